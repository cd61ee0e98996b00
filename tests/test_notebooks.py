"""Every notebook is a test: it runs from top to bottom, without the cells that are slow or need a GPU.

A few cells run on less here than on the page. SMALLER says what is less; what follows is checked as before.

Each runs in a process of its own, as `nbdev_test` would run it. All are forked from one that has imported torch and
transformers already: that takes longer than many a chapter."""
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))
WARM = ["nbdev.test", "matplotlib.pyplot", "scipy.stats", "qkrestore_nb.hypenet", "qkrestore_nb.cli"]
SMALLER = {  # notebook -> what a cell says, once -> what it says here
    "03_hybrid": {"units: int = 20, ": "units: int = 12, ", "[2, 8, 16])": "[2, 8, 10])",
                  "measure(model, pairs=16)": "measure(model, pairs=10)"},
    "04_recall": {'recall_test("S3", 12, T, seed=3)': 'recall_test("S3", 3, T, seed=3)'},
    "05_reasoning": {'recall_test("MF", 1, 448, 6, seed=6)': 'recall_test("MF", 1, 160, 6, seed=6)',
                     '(post, "MADH", (8,), "near", 1)': '(post, "MH", (4,), "near", 1)',
                     "test = reasoning_test(task, 8, 16, seed=2)": "test = reasoning_test(task, 8, 4, seed=2)",
                     "steps, chain, count=6, rules": "steps, chain, count=2, rules"},
    "07c_monitor": {'recall_test("MF", 2, 2048, 16)': 'recall_test("MF", 1, 512, 16)',
                    "rows=16)": "rows=2)", "        24,\n": "        12,\n"},
    "11e_repair": {"    for i in range(16):\n": "    for i in range(8):\n", "haystacks=4, room": "haystacks=2, room"},
    "13b_audit": {"(512, 2048), 8, folder": "(256,), 4, folder",
                  "    for i in range(32):\n": "    for i in range(8):\n"},
}


def smaller(sources: list[str], less: dict[str, str]) -> list[str]:
    "The cells of a notebook as they are run here."
    for said, here in less.items():
        assert sum(s.count(said) for s in sources) == 1, f"SMALLER expects {said!r} once"
        sources = [s.replace(said, here) for s in sources]
    return sources


def run(path: Path, log: Path) -> None:
    "In the process of a notebook: what it writes goes into the log, and a cell that fails makes the process fail."
    import nbdev.test
    from nbdev.config import get_config
    with open(log, "w") as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    os.chdir(ROOT / "nbs")
    read = nbdev.test.NBProcessor
    def shrunk(*args, **kw):
        book = read(*args, **kw)
        for cell, source in zip(book.nb.cells, smaller([c.source for c in book.nb.cells], SMALLER.get(path.stem, {}))):
            cell.set_source(source)
        return book
    nbdev.test.NBProcessor = shrunk
    passed, _ = nbdev.test.test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(0 if passed else 1)


@pytest.fixture(scope="module")
def warm():
    "Where processes come from."
    os.environ |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    forks = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    forks.set_forkserver_preload(WARM)
    return forks


def ends(warm, path: Path, log: Path) -> tuple[int, str]:
    process = warm.Process(target=run, args=(path, log))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def test_there_are_notebooks():
    assert "index.ipynb" in NOTEBOOKS and len(NOTEBOOKS) >= 12
    exported = {re.sub(r"^\d+\w?_", "", n) for n in NOTEBOOKS}
    assert len(exported) == len(NOTEBOOKS), "two notebooks of one name"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(warm, tmp_path, name):
    code, said = ends(warm, ROOT / "nbs" / name, tmp_path / "log")
    assert code == 0, said[-4000:]


def test_what_is_smaller_stands_in_its_notebook():
    with pytest.raises(AssertionError, match="expects 'a = 2' once"): smaller(["a = 1"], {"a = 2": "a = 3"})
    assert smaller(["a = 1", "b"], {"a = 1": "a = 3"}) == ["a = 3", "b"]
    assert {f"{name}.ipynb" for name in SMALLER} <= set(NOTEBOOKS)


def test_a_cell_that_fails(warm, tmp_path):
    "Cells run in their order, those that are slow or not to be run are left out, and a wrong one is told."
    left_out = ["#| slow\nx = 2", "#| gpu\nx = 3", "#| eval: false\nx = 4"]
    sources = ["x = 1", *left_out, "assert x == 1", "assert x == 5, 'no'"]
    fields = dict(cell_type="code", metadata={}, execution_count=None, outputs=[])
    cells = [dict(fields, id=f"cell{i}", source=source) for i, source in enumerate(sources)]
    for n, expected in ((5, 0), (6, 1)):
        book = dict(cells=cells[:n], metadata=dict(kernelspec=dict(language="python")), nbformat=4, nbformat_minor=5)
        (tmp_path / "book.ipynb").write_text(json.dumps(book))
        code, said = ends(warm, tmp_path / "book.ipynb", tmp_path / "log")
        assert code == expected and ("AssertionError: no" in re.sub(r"\x1b\[[\d;]*m", "", said)) == bool(expected), said

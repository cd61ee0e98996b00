"""Every notebook is a test: it runs from top to bottom, without the cells that are slow or need a GPU.

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


def run(path: Path, log: Path) -> None:
    "In the process of a notebook: what it writes goes into the log, and a cell that fails makes the process fail."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    with open(log, "w") as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    os.chdir(ROOT / "nbs")
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
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

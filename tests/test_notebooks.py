"Every notebook is a test: it runs from top to bottom, without the cells that are slow or need a GPU."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def run(path: Path):
    "nbdev_test on one notebook, over the library of this checkout."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    code = "import sys; from nbdev.test import nbdev_test; sys.argv[0] = 'nbdev_test'; nbdev_test()"
    return subprocess.run([sys.executable, "-c", code, "--path", str(path), "--n_workers", "0", "--do_print"], cwd=ROOT, env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_every_notebook_is_here():
    assert len(NOTEBOOKS) >= 13 and "index.ipynb" in NOTEBOOKS
    assert NOTEBOOKS == sorted(os.listdir(ROOT / "nbs"), key=str), "nbs/ holds notebooks and nothing else"
    hidden = [n for n in NOTEBOOKS if n[0] in "._"]
    assert not hidden, f"nbdev_test would leave out {hidden}: names start with a letter or a digit"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    done = run(ROOT / "nbs" / name)
    if done.returncode: pytest.fail((done.stdout + done.stderr)[-6000:], pytrace=False)
    assert f"Completed {ROOT / 'nbs' / name}" in done.stdout, "nbdev_test did not run it"  # a path that matches nothing would pass


def test_a_wrong_cell_fails_and_a_slow_one_is_left_out(tmp_path):
    cell = lambda source: dict(cell_type="code", id=f"c{len(source)}", metadata={}, source=source, outputs=[], execution_count=None)
    nb = dict(cells=[cell("#| slow\n1 / 0"), cell("import qkrestore_nb\nprint(qkrestore_nb.__file__)")], nbformat=4, nbformat_minor=5,
              metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))
    (tmp_path / "planted.ipynb").write_text(json.dumps(nb))
    assert run(tmp_path / "planted.ipynb").returncode == 0
    nb["cells"].append(cell("assert 1 + 1 == 3, 'a sentence'"))
    (tmp_path / "planted.ipynb").write_text(json.dumps(nb))
    done = run(tmp_path / "planted.ipynb")
    assert done.returncode == 1 and "AssertionError" in done.stderr and "a sentence" in done.stderr

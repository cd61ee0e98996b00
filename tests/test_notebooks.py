"Every notebook is a test: it runs from top to bottom, without the cells that are slow or need a GPU."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))


def test_there_are_notebooks():
    assert "index.ipynb" in NOTEBOOKS and len(NOTEBOOKS) >= 12
    exported = {re.sub(r"^\d+\w?_", "", n) for n in NOTEBOOKS}
    assert len(exported) == len(NOTEBOOKS), "two notebooks of one name"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    test = str(Path(sys.executable).parent / "nbdev_test")
    command = [test, "--path", f"nbs/{name}", "--n_workers", "0", "--do_print"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert name in done.stdout + done.stderr, "nbdev_test did not run it"  # a path that matches nothing would pass

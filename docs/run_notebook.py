"""Run notebooks, keep what readers should see, clean: `python docs/run_notebook.py nbs/04_recall.ipynb ...`.

Outputs are committed, so that the docs and the README show what was run. Progress bars and warnings (stderr) are
dropped, after they were printed here for whoever runs this."""
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean


def run(path: Path) -> None:
    nb = nbformat.read(path, 4)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # a figure that is drawn again has the same bytes
    where, figures = {"metadata": {"path": str(path.parent)}}, ["--InlineBackend.figure_formats={'svg'}"]
    NotebookClient(nb, timeout=600, resources=where, extra_arguments=figures).execute()
    for cell in nb.cells:
        for o in cell.get("outputs", []):
            if o.get("name") == "stderr": print(f"{path.name}: {o.text.strip()}", file=sys.stderr)
        if "outputs" in cell: cell.outputs = _joined([o for o in cell.outputs if o.get("name") != "stderr"])
    nbformat.write(nb, path)
    nbdev_clean(str(path))


def _joined(outputs: list) -> list:
    "Pieces of stdout that only stderr had kept apart, in one."
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == "stream": out[-1].text += o.text
        else: out.append(o)
    return out


for name in sys.argv[1:]: run(Path(name))

"""Train the shipped pair of checkpoints on one modern GPU: `python benchmarks/train_pair.py RUN OUT [SEED]`.

Runs `qkrestore experiment --profile gpu` in the folder RUN (which may hold an interrupted run, or one that has pre/ and
pretraining.json already) and collects in OUT what is worth keeping: two weight files and a tar of everything small.
`python benchmarks/install_pair.py OUT` puts them where the package and results/ want them."""
import shutil
import sys
import tarfile
from pathlib import Path

from qkrestore_nb.experiment import run

out, seed = Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
folder = run("gpu", sys.argv[1], seed)
for name in ("pre", "post"): shutil.copy(folder / name / "model.safetensors", out / f"{name}.safetensors")
with tarfile.open(out / "run.tar", "w") as tar:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".safetensors", ".pt"): tar.add(path, path.relative_to(folder))

"""Train the shipped pair of checkpoints on one modern GPU: `python benchmarks/train_pair.py OUT [SEED]`.

Runs `qkrestore experiment --profile gpu` and leaves in OUT what the package ships and what results/ keeps: the two weight
files and a tar of everything small. Install them with `python benchmarks/install_pair.py OUT`."""
import shutil
import sys
import tarfile
from pathlib import Path

from qkrestore_nb.experiment import run

out, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
folder = run("gpu", out / "run", seed)
for name in ("pre", "post"): shutil.copy(folder / name / "model.safetensors", out / f"{name}.safetensors")
with tarfile.open(out / "run.tar", "w") as tar:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".safetensors", ".pt"): tar.add(path, path.relative_to(folder))

"""Put what benchmarks/train_pair.py collected where it belongs: `python benchmarks/install_pair.py OUT`.

The checkpoints and their record go into the package (qkrestore_nb/pair), the record also into results/experiment."""
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT, out = Path(__file__).parent.parent, Path(sys.argv[1])
pair = ROOT / "qkrestore_nb" / "pair"
with tempfile.TemporaryDirectory() as folder:
    with tarfile.open(out / "run.tar") as tar: tar.extractall(folder, filter="data")
    shutil.rmtree(pair, ignore_errors=True)
    for name in ("pre", "post"):
        shutil.copytree(Path(folder) / name, pair / name)
        shutil.copyfile(out / f"{name}.safetensors", pair / name / "model.safetensors")
    record = (Path(folder) / "results.json").read_text()
(pair / "provenance.json").write_text(record)
made = json.loads(record)
target = ROOT / "results" / "experiment" / f"shipped-hypenet7m-seed{made['seed']}.json"
target.parent.mkdir(exist_ok=True)
target.write_text(record)
print(f"installed the pair of seed {made['seed']}, {made['date']}, {made['device']}")

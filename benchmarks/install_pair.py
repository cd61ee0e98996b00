"""Make seed 0 of benchmarks/seeds.py the shipped pair: `python benchmarks/install_pair.py OUT`.

OUT holds pre.safetensors and post.safetensors as that script leaves them; the record is the one that benchmarks/collect_runs.py wrote.
Config and tokenizer are the same for every model of the recipe and stay as they are."""
import shutil
import sys
from pathlib import Path

ROOT, out = Path(__file__).parent.parent, Path(sys.argv[1])
pair, record = ROOT / "qkrestore_nb" / "pair", ROOT / "results" / "experiment" / "gpu-hypenet7m-seed0.json"
for name in ("pre", "post"): shutil.copyfile(out / f"{name}.safetensors", pair / name / "model.safetensors")
shutil.copyfile(record, pair / "provenance.json")

"""Whole-process figures on this machine: `python benchmarks/speed/measure.py` writes results/demo.json and results/import.json.

The demo once, as a user runs it: wall time, peak memory and its scores. Importing qkrestore_nb.restore in a fresh
interpreter, eleven times, beside an empty interpreter and beside importing torch, in turn."""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qkrestore_nb.core import provenance

ROOT = Path(__file__).resolve().parents[2]


def seconds(code: str) -> float:
    then = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - then


def write(name: str, **result) -> None:
    (ROOT / "results" / name).write_text(json.dumps({**provenance(0, cores=os.cpu_count()), **result}, indent=1) + "\n")


with tempfile.TemporaryDirectory() as folder:
    then = time.perf_counter()
    subprocess.run([sys.executable, "-c", "from qkrestore_nb.cli import main; main()", "demo", "--out", f"{folder}/demo"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wall, peak = time.perf_counter() - then, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    made = json.loads((Path(folder) / "demo" / "demo.json").read_text())
write("demo.json", config=made["config"], wall_s=round(wall, 1), peak_rss_mib=round(peak), scores=made["scores"])

codes = dict(empty="pass", restore="import qkrestore_nb.restore", torch="import torch")
times = {name: [] for name in codes}
for _ in range(11):
    for name, code in codes.items(): times[name].append(seconds(code))
median = {name: round(statistics.median(t), 4) for name, t in times.items()}
write("import.json", median_s=median, restore_alone_s=round(median["restore"] - median["empty"], 4), all_s={n: [round(x, 4) for x in t] for n, t in times.items()})
print(f"demo {wall:.1f} s, {peak:.0f} MiB; import {median}")

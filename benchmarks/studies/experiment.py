"""Chapter 10's experiment over seeds, on every GPU: `python benchmarks/studies/experiment.py RUNS OUT --seeds 41-50`.

A seed is a process: pre-training, each kind of fine-tuning, every variant, what decides first. `--check` evaluates as the prototype
did, one question a haystack. With --minutes what still runs is stopped; the same command goes on from there. OUT gets
results.tar.gz (the json files and logs) and, with --ship, the checkpoints of the median run and its name."""
import argparse
import json
import shutil
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobs import run_jobs

from qkrestore_nb.experiment import alternatives, decisive, seed_numbers
from qkrestore_nb.study import accuracy, needles

CHECK = """
from qkrestore_nb import experiment as e
sizes = {1024: 96, 4096: 96, 16384: 72, 32768: 48}
e.recipes["gpu"]["long"] = dict(recall={k: [(T, n, 1) for T, n in sizes.items()] for k in ("S1", "S2", "S3", "MK", "MF")}, steps=(8,), problems=128)
e.recipes["gpu"]["short"] = {**e.recipes["gpu"]["long"], "recall": {k: v[:3] for k, v in e.recipes["gpu"]["long"]["recall"].items()}}
"""


def median_run(runs: Path, model: str) -> Path:
    """The run that is shipped: of those whose pre has at least 95% exact answers at the primary endpoint, the one whose damage there (look-up,
    pre minus post) is the median, of an even number the lower one of the middle."""
    damage = {}
    for path in runs.glob(f"*/{model}-near-seed*.json"):
        record = json.loads(path.read_text())
        length = 16384 if "16384" in record["scores"]["pre"]["S3"] else 256  # smoke has one length
        share = lambda variant, count: float(accuracy([record], variant, needles(length), count)[0])
        if not record["sft_seed"] and (path.parent / "packed").is_dir() and share("pre", "exact") >= 95:
            damage[path.parent] = share("pre", "lookup") - share("post", "lookup")
    print({run.name: round(x, 1) for run, x in damage.items()}, flush=True)
    return sorted(damage, key=damage.get)[(len(damage) - 1) // 2]


ask = argparse.ArgumentParser()
ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path)
ask.add_argument("--seeds", default="41-50")
ask.add_argument("--model", default="hypenet7m")
ask.add_argument("--kinds", nargs="+", default=["packed", "borders"], help="beside near")
ask.add_argument("--all", action="store_true", help="every alternative repair, not only the decisive ones")
ask.add_argument("--again", type=int, default=0, help="so many of the seeds are fine-tuned (near) a second time, with other data")
ask.add_argument("--profile", default="gpu")
ask.add_argument("--per-gpu", type=int, default=4)
ask.add_argument("--minutes", type=float, default=600.)
ask.add_argument("--check", action="store_true")
ask.add_argument("--ship", action="store_true")
args = ask.parse_args()

seeds = seed_numbers(args.seeds)
args.runs.mkdir(exist_ok=True), args.out.mkdir(exist_ok=True)
jobs = {}
for i, seed in enumerate(seeds):
    folder, calls = str(args.runs / f"{args.model}-seed{seed}"), []
    plan = [(("near",), decisive, 0), ((args.kinds[:1]), decisive, 0)]
    plan += [(("near",), decisive, 1)] * (i < args.again)
    plan += [(("near",), decisive + alternatives[:8], 0)] * args.all + [(args.kinds[1:], decisive, 0)] + [(("near",), decisive + alternatives, 0)] * args.all
    for kinds, variants, sft_seed in plan: calls.append(f"run({args.profile!r}, {folder!r}, {seed}, {args.model!r}, {kinds!r}, {variants!r}, {sft_seed})\n")
    jobs[f"{args.model}-seed{seed}"] = [sys.executable, "-c", (CHECK if args.check else "") + "from qkrestore_nb.experiment import run\n" + "".join(calls)]
ended = run_jobs(jobs, args.runs / "logs", args.per_gpu, args.minutes)
print({name: status for name, status in ended.items()}, flush=True)
with tarfile.open(args.out / "results.tar.gz", "w:gz") as tar:
    for path in sorted([*args.runs.glob("*/*-seed*.json"), *args.runs.glob("logs/*.log")]): tar.add(path, path.name)
if args.ship:
    run = median_run(args.runs, args.model)
    (args.out / "shipped.txt").write_text(run.name + "\n")
    for name in ("pre", "near", "packed"): shutil.copy(run / name / "model.safetensors", args.out / f"{name}.safetensors")
    shutil.copy(run / "pre" / "config.json", args.out / "config.json")

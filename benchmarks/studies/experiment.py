"""Chapter 10's experiment over seeds, on every GPU: `python benchmarks/studies/experiment.py RUNS OUT --seeds 41-50`.

A seed is a process: pre-training, the recipe's own fine-tuning, its variants; then the other kinds are shared out, --chunks processes
a seed. Several models: `--models hypenet7m silu7m`; the first one's other kinds are made. With --ladder models are fine-tuned at the
lowest rate that solves their chains instead of the recipe's. `--check` evaluates as the prototype did, one question a haystack. With --minutes what still runs is stopped; the same command goes on from
there. --begin FOLDER takes models before fine-tuning that --bring and results.tar.gz gave (pre-seedN.safetensors beside MODEL-near-seedN.json)
instead of training them again. OUT gets results.tar.gz (the json files and logs), with --ship the checkpoints of the median run and its name, and with
--bring N the models before fine-tuning of the first N seeds."""
import argparse
import json
import shutil
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobs import run_jobs

from qkrestore_nb.experiment import alternatives, decisive, seed_numbers, sfts
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
ask.add_argument("--models", nargs="+", default=["hypenet7m"])
ask.add_argument("--kinds", nargs="*", default=["packed", "borders"], help="beside near; switches: all others")
ask.add_argument("--chunks", type=int, default=1, help="processes a seed in the second round")
ask.add_argument("--all", action="store_true", help="every alternative repair, not only the decisive ones")
ask.add_argument("--again", type=int, default=0, help="so many of the seeds are fine-tuned (near) a second time, with other data")
ask.add_argument("--profile", default="gpu")
ask.add_argument("--per-gpu", type=int, default=4)
ask.add_argument("--minutes", type=float, default=600.)
ask.add_argument("--ladder", action="store_true", help="instead of near: rising rates until 98%% of 8-step chains are solved, as `switches.lowest_rate` does")
ask.add_argument("--check", action="store_true")
ask.add_argument("--ship", action="store_true")
ask.add_argument("--bring", type=int, default=0)
ask.add_argument("--begin", type=Path)
args = ask.parse_args()

seeds, started = seed_numbers(args.seeds), time.monotonic()
kinds = [kind for kind in sfts if kind not in ("near", "packed", "borders")] if args.kinds == ["switches"] else [] if args.ladder else args.kinds
args.runs.mkdir(exist_ok=True), args.out.mkdir(exist_ok=True)


def folder(model: str, seed: int) -> Path: return args.runs / f"{model}-seed{seed}"


def begin(model: str, seed: int) -> None:
    "A run folder as it stood when `near` was done, without near's own weights: kinds go on from its model before fine-tuning."
    note, weights, run = args.begin / f"{model}-near-seed{seed}.json", args.begin / f"pre-seed{seed}.safetensors", folder(model, seed)
    if run.exists() or not (note.exists() and weights.exists()): return
    record = json.loads(note.read_text())
    config = {k: v for k, v in record["config"].items() if k != "kind"}
    made = HypeNetForCausalLM(HypeNetConfig(**config["fields"]))
    made.load_state_dict(load_file(weights), strict=False)  # a tied or derived buffer is in no file; `save` writes what was read
    run.mkdir()
    save(made, run / "pre")
    assert all(torch.equal(x, y) for x, y in zip(*(load_file(f).values() for f in (weights, run / "pre" / "model.safetensors")), strict=True))
    shutil.copy(note, run / note.name)
    (run / "recipe.json").write_text(json.dumps(dict(seed=seed, **config)))
    (run / "pretraining.json").write_text(json.dumps(record["pretraining"]))
    (run / "near.json").write_text(json.dumps(record["sft"]))


def job(model: str, seed: int, calls: list[tuple]) -> list[str]:
    "A process that makes calls of `run`: kinds, variants, seed of the fine-tuning."
    code = [f"run({args.profile!r}, {str(folder(model, seed))!r}, {seed}, {model!r}, {', '.join(map(repr, call))})\n" for call in calls]
    return [sys.executable, "-c", (CHECK if args.check else "") + "from qkrestore_nb.experiment import run\n" + "".join(code)]


jobs: dict[str, list[str]] = {}
after: dict[str, str] = {}
for model in args.models:
    for i, seed in enumerate(seeds):
        if args.ladder:
            call = f"lowest_rate({args.profile!r}, {str(folder(model, seed))!r}, {seed}, {model!r})\n"
            jobs[folder(model, seed).name] = [sys.executable, "-c", "from qkrestore_nb.switches import lowest_rate\n" + call]
            continue
        calls: list[tuple] = [(("near",), decisive, 0)]
        if i < args.again: calls.append((("near",), decisive, 1))
        if args.all: calls.append((("near",), decisive + alternatives, 0))
        jobs[folder(model, seed).name] = job(model, seed, calls)
for seed in seeds:
    for chunk in range(args.chunks):
        if not (some := tuple(kinds[chunk::args.chunks])): continue
        name = folder(args.models[0], seed).name
        jobs[f"{name}-{chunk}"], after[f"{name}-{chunk}"] = job(args.models[0], seed, [(some, decisive, 0)]), name
if args.begin:
    import torch
    from safetensors.torch import load_file

    from qkrestore_nb.experiment import save
    from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
    for seed in seeds: begin(args.models[0], seed)
print(run_jobs(jobs, args.runs / "logs", args.per_gpu, args.minutes - (time.monotonic() - started) / 60, after), flush=True)
with tarfile.open(args.out / "results.tar.gz", "w:gz") as tar:
    for path in sorted([*args.runs.glob("*/*-seed*.json"), *args.runs.glob("logs/*.log")]): tar.add(path, path.name)
if args.ship:
    run = median_run(args.runs, args.models[0])
    (args.out / "shipped.txt").write_text(run.name + "\n")
    for name in ("pre", "near", "packed"): shutil.copy(run / name / "model.safetensors", args.out / f"{name}.safetensors")
    shutil.copy(run / "pre" / "config.json", args.out / "config.json")
for seed in seeds[:args.bring]: shutil.copy(folder(args.models[0], seed) / "pre" / "model.safetensors", args.out / f"pre-seed{seed}.safetensors")

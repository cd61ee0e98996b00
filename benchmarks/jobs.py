"""The one job runner of this folder: commands side by side on every GPU, each slot taking the next one until time is up."""
import os
import subprocess
import time
from pathlib import Path


def cards() -> list[str]:
    "The GPUs that may be used, by number; one empty name where there is none."
    import torch
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def run_jobs(
    jobs: dict[str, list[str]],  # name -> command, in the order in which they are started
    logs: Path,                  # folder of a log for each
    per_gpu: int = 1,            # commands at once on a GPU: one small model does not fill it
    minutes: float = 600.,       # then what still runs is stopped; commands go on from where they were when they are run again
    after: dict[str, str] | None = None,  # name -> name of the job that must have ended well before it begins
) -> dict[str, int | None]:
    "Exit status by name; None for what was stopped or not begun."
    logs.mkdir(parents=True, exist_ok=True)
    deadline, waiting, ended = time.monotonic() + 60 * minutes, list(jobs), dict.fromkeys(jobs)
    slots = {(card, i): None for i in range(per_gpu) for card in cards()}
    ready = lambda name: not (after or {}).get(name) or ended[(after or {})[name]] == 0
    while (any(map(ready, waiting)) or any(slots.values())) and time.monotonic() < deadline:
        for slot, running in slots.items():
            if running and (status := running[1].poll()) is not None:
                ended[running[0]], slots[slot] = status, None
                print(f"{running[0]} ended with {status} after {time.monotonic() - running[2]:.0f} s", flush=True)
            if slots[slot] is None and (name := next(filter(ready, waiting), None)):
                waiting.remove(name)
                env = {**os.environ, "CUDA_VISIBLE_DEVICES": slot[0], "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "20", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
                with open(logs / f"{name}.log", "a") as log:
                    slots[slot] = name, subprocess.Popen(jobs[name], env=env, stdout=log, stderr=log), time.monotonic()
        time.sleep(.2)
    for running in filter(None, slots.values()):
        running[1].kill()
        print(f"{running[0]} stopped in time", flush=True)
    return ended

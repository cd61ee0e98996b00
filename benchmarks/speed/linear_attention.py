"""The chunked form in plain PyTorch beside the quadratic one on this machine's CPU: `python benchmarks/speed/linear_attention.py OUT`.

Forward and backward, interleaved, medians. The quadratic form stops where its T x T mask would not fit."""
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.linear_attention import decay_slopes, linear_attention_chunked, linear_attention_quadratic

H, D, repeats = 4, 64, 9


def seconds(form, T: int) -> float:
    x = [torch.randn(1, T, H, D).requires_grad_() for _ in range(3)]
    then = time.perf_counter()
    form(*x, -decay_slopes(H))[0].sum().backward()
    return time.perf_counter() - then


if __name__ == "__main__":
    torch.manual_seed(0)
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    jobs = [(form, T) for T in lengths for form in (linear_attention_chunked, linear_attention_quadratic) if form is linear_attention_chunked or T <= 4096]
    times = {f"{form.__name__} {T}": [] for form, T in jobs}
    for form, T in jobs: seconds(form, min(T, 4096))
    for _ in range(repeats):
        for form, T in random.sample(jobs, len(jobs)): times[f"{form.__name__} {T}"].append(seconds(form, T))
    medians = {name: statistics.median(t) for name, t in times.items()}
    chunked = {T: medians[f"linear_attention_chunked {T}"] for T in lengths}
    result = dict(H=H, D=D, seconds=times, median_s=medians, quadratic_over_chunked_at_4096=medians["linear_attention_quadratic 4096"] / chunked[4096],
                  microseconds_per_token={T: 1e6 * s / T for T, s in chunked.items()})
    Path(sys.argv[1]).write_text(json.dumps({**provenance(0), **result}, indent=1) + "\n")
    print(result["quadratic_over_chunked_at_4096"], result["microseconds_per_token"])

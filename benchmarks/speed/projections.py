"""Cost of the measurements of chapters 7 and 7a beside an ordinary backward: `python benchmarks/speed/projections.py
OUT.json --device cuda --dtype bfloat16`.

A hybrid of 8 layers, two of them softmax layers with 8 heads of 64, on one row of T = 32,768 tokens. Measured:
forward, forward and backward, gradient_range and projection_gradients of the softmax layers. Medians after one
warm-up; peak memory is above what was allocated before the call and is not measured on a CPU. Tiny: --tokens 512
--repeats 1 --width 64."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.diagnostics import gradient_range, rows_loss, rows_of
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.projections import projection_gradients
from qkrestore_nb.training import init_weights

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16, float16")
parser.add_argument("--tokens", type=int, nargs="+", default=[32768], help="lengths of the row, one after the other")
parser.add_argument("--width", type=int, default=512, help="of the model; heads have 64 dimensions")
parser.add_argument("--bins", type=int, default=12)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
cuda = args.device.startswith("cuda")


def measured(work) -> dict:
    "Median seconds and peak MiB beyond what was there, after one warm-up."
    work()
    seconds, peaks = [], []
    for _ in range(args.repeats):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, then = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - then)
        if cuda:
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return dict(median_s=statistics.median(seconds), all_s=seconds, peak_mib=max(peaks) if cuda else None)


began = time.perf_counter()
torch.manual_seed(args.seed)
mixers = ["lightning-attn", "attn", "attn"] + ["lightning-attn"] * 5
model = init_weights(
    HypeNetForCausalLM(
        HypeNetConfig(
            vocab_size=512,
            hidden_size=args.width,
            intermediate_size=11 * args.width // 4,
            num_hidden_layers=8,
            head_dim=64,
            num_attention_heads=max(1, args.width // 64),
            mixer_types=mixers,
            attn_use_rope=False,
            attn_use_output_gate=True,
            attn_logits_scaling="hype 500",
            lightning_use_qk_norm=True,
            lightning_use_output_norm=True,
            lightning_use_output_gate=True,
            lightning_use_short_conv=True,
        )
    )
).to(args.device, getattr(torch, args.dtype))


def at_length(T: int) -> dict:
    ids = torch.randint(512, (1, T))
    rows = rows_of(ids)

    def forward():
        with torch.no_grad():
            rows_loss(model, rows, T - 1)

    def backward():
        rows_loss(model, rows, T - 1).backward()
        model.zero_grad(set_to_none=True)

    works = dict(
        forward=forward,
        backward=backward,
        gradient_range=lambda: gradient_range(model, ids, bins=None),
        projection_gradients=lambda: projection_gradients(model, ids, bins=args.bins),
    )
    found = {name: measured(work) for name, work in works.items()}
    for name in ("gradient_range", "projection_gradients"):
        found[name]["times_backward"] = found[name]["median_s"] / found["backward"]["median_s"]
        if cuda:
            found[name]["times_backward_memory"] = found[name]["peak_mib"] / found["backward"]["peak_mib"]
        print(
            f"T = {T:,}: {name} {found[name]['times_backward']:.2f} times an ordinary forward and backward "
            f"({found['backward']['median_s']:.3f} s); "
            f"peak {found[name]['peak_mib']} against {found['backward']['peak_mib']} MiB",
            flush=True,
        )
    return found


results = {str(T): at_length(T) for T in args.tokens}
config = {k: v for k, v in vars(args).items() if k not in ("out", "seed")} | dict(
    heads=max(1, args.width // 64), head_dim=64, mixers=mixers
)
made = dict(**provenance(args.seed, **config), wall_s=round(time.perf_counter() - began, 1), results=results)
args.out.write_text(json.dumps(made, indent=1) + "\n")

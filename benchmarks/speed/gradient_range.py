"""Speed and memory of gradient_range: `python benchmarks/speed/gradient_range.py OUT.json --device cuda` (T = 32,768, 8 heads of 64).

Beside it an ordinary forward and backward of the same model on the same batch. Peak memory is above what is allocated before
the call; on a CPU it is not measured."""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.diagnostics import _loss, _rows, gradient_range
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.training import init_weights

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--tokens", type=int, default=32768)
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()
cuda = args.device.startswith("cuda")


def measured(work) -> dict:
    "Median seconds and peak MiB beyond what was there, after one warm-up."
    work()
    seconds, peaks = [], []
    for _ in range(args.repeats):
        if cuda: torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        before, then = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        work()
        if cuda: torch.cuda.synchronize()
        seconds.append(time.perf_counter() - then)
        if cuda: peaks.append((torch.cuda.max_memory_allocated() - before) / 2 ** 20)
    return dict(median_s=statistics.median(seconds), all_s=seconds, peak_mib=max(peaks) if cuda else None)


torch.manual_seed(0)
mixers = ["lightning-attn", "attn", "attn"] + ["lightning-attn"] * 5
model = init_weights(HypeNetForCausalLM(HypeNetConfig(
    vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, head_dim=64, num_attention_heads=8, mixer_types=mixers,
    attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 500", lightning_use_qk_norm=True, lightning_use_output_norm=True,
    lightning_use_output_gate=True, lightning_use_short_conv=True))).to(args.device, getattr(torch, args.dtype))
ids = torch.randint(512, (1, args.tokens))


def backward():
    _loss(model, _rows(ids), args.tokens - 1).backward()
    model.zero_grad(set_to_none=True)


def forward():
    with torch.no_grad(): _loss(model, _rows(ids), args.tokens - 1)


results = dict(forward=measured(forward), backward=measured(backward), gradient_range=measured(lambda: gradient_range(model, ids, bins=None)))
ratio = results["gradient_range"]["median_s"] / results["backward"]["median_s"]
made = dict(**provenance(0, device=args.device, dtype=args.dtype, tokens=args.tokens, heads=8, head_dim=64, mixers=mixers), **results, times_backward=ratio)
args.out.write_text(json.dumps(made, indent=1) + "\n")
print(f"gradient_range {ratio:.2f} times an ordinary forward and backward; peak {results['gradient_range']['peak_mib']} against {results['backward']['peak_mib']} MiB")

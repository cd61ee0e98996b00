"""What packed rows cost in the softmax layers: `python benchmarks/speed/packing.py OUT.json [--repeats 5]`.

A hybrid of SmolLM2's width, two softmax and two linear layers, forward and backward of one row full of documents of 100 to 350 tokens. Ours takes the
documents apart; its peer is the mask of T x T that transformers makes for packed rows, through the same fused attention. In turns, one warm-up each."""
import argparse
import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

from qkrestore_nb import hypenet
from qkrestore_nb.core import pick_profile, provenance

ask = argparse.ArgumentParser()
ask.add_argument("out", type=Path), ask.add_argument("--repeats", type=int, default=5), ask.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
args = ask.parse_args()
machine = pick_profile()
shape = dict(vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3, head_dim=64, lightning_nh=9, lightning_nkv=3, lightning_head_dim=64,
             mixer_types=["lightning-attn", "attn", "attn", "lightning-attn"])
torch.manual_seed(0)
model = hypenet.HypeNetForCausalLM(hypenet.HypeNetConfig(**shape)).to(machine.device)
draw, rows = torch.Generator().manual_seed(0), []


def sync():
    if machine.device == "cuda": torch.cuda.synchronize()


def step(ids, positions) -> float:
    sync()
    then = time.perf_counter()
    with torch.autocast(machine.device, getattr(torch, machine.dtype), enabled=machine.device == "cuda"): logits = model(ids, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    loss.backward()
    sync()
    took.append(time.perf_counter() - then)
    model.zero_grad()
    return loss.item()


for T in args.lengths:
    lengths = []
    while sum(lengths) < T: lengths.append(min(T - sum(lengths), int(torch.randint(100, 351, (), generator=draw))))
    ids = torch.randint(1, 4096, (1, T), generator=draw).to(machine.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(machine.device)
    seconds, losses = dict(documents=[], mask=[]), {}
    for i in range(args.repeats + 1):
        for way in seconds:
            took = []
            if way == "mask":
                with patch.multiple(hypenet, document_groups=lambda *a: None, has_flash=lambda *a: False): losses[way] = step(ids, positions)
            else: losses[way] = step(ids, positions)
            if i: seconds[way] += took
    median = {way: statistics.median(s) for way, s in seconds.items()}
    rows.append(dict(T=T, documents=len(lengths), pairs=sum(n * n for n in lengths), seconds=median, ratio=median["mask"] / median["documents"], all_s=seconds, difference_of_losses=abs(losses["documents"] - losses["mask"])))
    print(f"{T:>6} tokens, {len(lengths)} documents: {median['documents']:.3f} s, with a mask {median['mask']:.3f} s: {rows[-1]['ratio']:.2f} times; losses differ by {rows[-1]['difference_of_losses']:.1e}", flush=True)
args.out.write_text(json.dumps(dict(**provenance(0, **shape, repeats=args.repeats), rows=rows), indent=1) + "\n")

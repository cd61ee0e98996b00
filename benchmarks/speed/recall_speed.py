"""How fast recall is asked beside reading alone: `python benchmarks/speed/recall_speed.py OUT.json [--tokens 65536]`.

The shipped `pre`, MF in batches of two rows. Asking is `recall.score`, exact match and look-up, from ids on the CPU to bits on the CPU;
reading is the model's forward of the same rows with the logits of the last token. Both in turns, one warm-up each."""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from qkrestore_nb.core import pick_profile, provenance
from qkrestore_nb.experiment import pair
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.recall import recall_test, score

ask = argparse.ArgumentParser()
ask.add_argument("out", type=Path), ask.add_argument("--tokens", type=int, default=65536)
ask.add_argument("--rows", type=int, default=8), ask.add_argument("--questions", type=int, default=128), ask.add_argument("--repeats", type=int, default=7)
args = ask.parse_args()
machine = pick_profile()
model = HypeNetForCausalLM.from_pretrained(pair() / "pre", dtype=getattr(torch, machine.dtype)).to(machine.device).eval()
batch = recall_test("MF", args.rows, args.tokens, args.questions, 0)


def read():
    with torch.no_grad():
        for ids in torch.as_tensor(batch["ids"]).split(2): model(ids.to(machine.device), use_cache=False, logits_to_keep=1).logits.cpu()


def seconds(work) -> float:
    then = time.perf_counter()
    work()
    return time.perf_counter() - then


ways = dict(asking=lambda: score(model, batch, rows=2), reading=read)
for way in ways.values(): way()
rows = [{name: seconds(way) for name, way in ways.items()} for _ in range(args.repeats)]
median = {name: statistics.median(r[name] for r in rows) for name in ways}
tokens = args.rows * args.tokens
record = dict(**provenance(0, tokens=args.tokens, rows=args.rows, at_once=2, questions=args.questions), tokens_per_s={name: tokens / s for name, s in median.items()}, share=median["reading"] / median["asking"], all_s=rows)
args.out.write_text(json.dumps(record, indent=1) + "\n")
print(f"asking {tokens / median['asking']:,.0f} tokens/s, {100 * record['share']:.0f}% of reading alone")

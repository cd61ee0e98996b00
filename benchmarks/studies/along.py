"""What moves while a model is fine-tuned: `python benchmarks/studies/along.py OUT.json --pre 51=PRE --kinds near packed`.

For every model before SFT and every kind of data: the recipe's fine-tuning, and at some of its steps, on one batch of the kind's
data and on needles (full haystacks of 512 tokens), the share of the gradient of W_Q, W_K, W_V and W_O of the softmax layers that
comes from pairs more than 32 tokens apart; how far each group of weights has moved; S3 at 4K tokens and a full haystack at 1K.
OUT is written after every kind; what it holds is not measured again. --steps, --rows shorten it for a try."""
import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from forecast import DEVICE, FAR, recalled, sample

from qkrestore_nb.core import pick_profile, provenance
from qkrestore_nb.diagnostics import recall_batch
from qkrestore_nb.drift import drift
from qkrestore_nb.experiment import recipes, sfts
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.projections import projection_gradients, roles
from qkrestore_nb.recall import recall_test
from qkrestore_nb.training import sft_batch, train, weighted_loss

ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ask.add_argument("out", type=Path)
ask.add_argument("--pre", nargs="+", required=True, help="SEED=FOLDER")
ask.add_argument("--kinds", nargs="+", default=["near", "packed", "far", "direct", "talk"])
ask.add_argument("--at", nargs="+", type=float, default=[.02, .1, .3, 1.], help="shares of the steps at which to look, beside the start")
ask.add_argument("--steps", type=int, help="of the recipe; None: its own")
ask.add_argument("--rows", type=int, help="of a step; None: the kind's own")


def look(model, first, batches: dict[str, dict], seed: int) -> dict:
    "The measurements at one step."
    model = model.eval()
    out: dict = dict(gradients={}, recall=recalled(model, seed), drift={} if model is first else drift(first, model).groups())
    for name, batch in batches.items():
        parts = projection_gradients(model, batch)
        out["gradients"][name] = dict(loss=parts.loss, layers=parts.layers, roles=roles, far=parts.share(FAR).tolist(), whole=parts.whole.tolist())
    return out


def main():
    args = ask.parse_args()
    made = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    began, recipe = time.perf_counter(), recipes["gpu"]["sft"] | (dict(steps=args.steps) if args.steps else {})
    how = dict(dtype=pick_profile("gpu").dtype) if DEVICE == "cuda" else {}
    for seed, folder in ((int(s), Path(f)) for s, _, f in (x.partition("=") for x in args.pre)):
        found = made.setdefault(str(seed), {})
        test = recall_batch(recall_test("MF", 16, 512, 8, seed))
        needles = dict(input_ids=test[0].to(DEVICE), weights=test[1].float().to(DEVICE))
        first = HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
        for kind in args.kinds:
            if kind in found: continue
            sft, model = sfts[kind], HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
            batches = dict(own=sample(kind, seed, step=10**6), needles=needles)
            steps = round(sft.steps * recipe["steps"])
            every, rows = max(1, round(min(args.at) * steps)), dict(rows=args.rows) if args.rows else {}
            wanted = {steps, *(every * round(x / min(args.at)) for x in args.at if x < 1)}
            seen = {"0": look(first, first, batches, seed)}
            train(model, partial(sft_batch, seed=seed, **sft.data | rows), **recipe | dict(steps=steps, lr=sft.lr * recipe["lr"]),
                  loss=partial(weighted_loss, borders=sft.borders), every=every, label=kind, **how,
                  look=lambda step, model: seen.update({str(step): look(model, first, batches, seed)}) if step in wanted else None)
            found[kind] = seen
            print(seed, kind, {step: round(x["recall"]["S3"]["4096"]["exact"] / x["recall"]["S3"]["4096"]["n"], 2) for step, x in seen.items()},
                  f"{time.perf_counter() - began:.0f} s", flush=True)
            note = provenance(0, far=FAR, **{k: v for k, v in vars(args).items() if k not in ("out", "pre")})
            args.out.write_text(json.dumps(dict(**note, wall_s=round(time.perf_counter() - began, 1), models=made)) + "\n")


if __name__ == "__main__": main()

"""What can be said of a data set before training on it: `python benchmarks/studies/forecast.py OUT.json --pre 51=PRE ... --trials 51`.

For every kind of fine-tuning data and every model before SFT the candidates of chapter 7d, from one batch of the data. For the models named in --trials
also a trial: 30 steps at the recipe's rate, and the recall lost by them. OUT is written after every kind; what it holds is not
measured again."""
import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.diagnostics import recall_batch
from qkrestore_nb.experiment import cell, model_fields, recipes, sfts
from qkrestore_nb.forecast import features, gradients
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.recall import recall_test, score
from qkrestore_nb.training import document_positions, sft_batch, train, weighted_loss

FAR, DEVICE = 32, "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["near", "far", "packed", "packed_long", "borders", "wide", "narrow", "direct", "talk", "MA", "DH", "recall1", "recall3", "recall10",
         "random512", "end512", "random2048", "end2048"]


def sample(kind: str, seed: int, step: int = 0, tokens: int = 16384) -> dict:
    "A batch of a kind, of about so many tokens whatever the recipe's rows."
    data = sfts[kind].data
    ids, weights = sft_batch(step, seed, **data | dict(rows=tokens // data.get("T", 128)))
    more = dict(position_ids=document_positions(ids)) if sfts[kind].borders else {}
    return {k: x.to(DEVICE) for k, x in dict(input_ids=ids, weights=weights, **more).items()}


def trial(pre: Path, kind: str, seed: int, steps: int) -> dict:
    "A short fine-tuning, and what recall is left: as `evaluate` keeps it, S3 at 4K tokens and a full haystack at 1K."
    model, sft = HypeNetForCausalLM.from_pretrained(pre, dtype=torch.float32).to(DEVICE), sfts[kind]
    how = recipes["gpu"]["sft"] | dict(steps=steps, warmup=5)
    train(model, partial(sft_batch, seed=seed, **sft.data | ({} if DEVICE == "cuda" else dict(rows=max(1, 4096 // sft.data.get("T", 128))))), **how, loss=partial(weighted_loss, borders=sft.borders), every=steps, label=kind)
    return recalled(model.eval(), seed)


def recalled(model, seed: int) -> dict:
    out = {}
    for test, T, haystacks, questions in (("S3", 4096, 16, 1), ("MF", 1024, 4, 32)):
        got = score(model, recall_test(test, haystacks, T, questions, seed), max(1, 8192 // T))
        out[test] = {str(T): cell(got.tokens, got.lookup)}
    return out


ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ask.add_argument("out", type=Path)
ask.add_argument("--pre", nargs="+", required=True, help="SEED=FOLDER")
ask.add_argument("--trials", nargs="*", type=int, default=[], help="seeds whose model is also fine-tuned for --trial-steps steps")
ask.add_argument("--trial-steps", type=int, default=30)
ask.add_argument("--kinds", nargs="+", default=KINDS)


def main():
    args = ask.parse_args()
    made = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    began = time.perf_counter()

    def keep():
        note = provenance(0, far=FAR, kinds=args.kinds, trial_steps=args.trial_steps)
        args.out.write_text(json.dumps(dict(**note, wall_s=round(time.perf_counter() - began, 1), models=made)) + "\n")

    for seed, folder in ((int(s), Path(f)) for s, _, f in (x.partition("=") for x in args.pre)):
        found = made.setdefault(str(seed), dict(features={}, trials={}))
        if all(k in found["features"] for k in args.kinds) and (seed not in args.trials or all(k in found["trials"] for k in args.kinds)): continue
        model = HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        assert model.config.mixer_types == HypeNetConfig(**model_fields).mixer_types
        model = model.eval()
        tests = [recall_batch(recall_test(*how, seed)) for how in (("S3", 8, 1024, 1), ("MF", 8, 1024, 16))]
        needles = dict(input_ids=torch.cat([ids for ids, _ in tests]), weights=torch.cat([w for _, w in tests]).float())
        needles = {k: x.to(DEVICE) for k, x in needles.items()}
        recall_gradient = gradients(model, needles)
        for kind in args.kinds:
            if kind in found["features"]: continue
            found["features"][kind] = features(model, sample(kind, seed), recall_gradient, FAR)
            print(seed, kind, {k: f"{v:.4g}" for k, v in found["features"][kind].items()}, f"{time.perf_counter() - began:.0f} s", flush=True)
            keep()
        if seed not in args.trials: continue
        found["trials"].setdefault("pre", recalled(model, seed))
        for kind in args.kinds:
            if kind in found["trials"]: continue
            found["trials"][kind] = trial(folder, kind, seed, args.trial_steps)
            print(seed, kind, {t: next(iter(c.values()))["exact"] for t, c in found["trials"][kind].items()}, f"{time.perf_counter() - began:.0f} s", flush=True)
            keep()


if __name__ == "__main__": main()

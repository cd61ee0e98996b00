"""How far the data of a fine-tuning reach, and what they damage: `python benchmarks/orders.py RUNS OUT [--seeds 0 1 2] [--jobs 6] [--minutes M]`.

The shipped `pre` is fine-tuned on chains of M of order 1 to 8, on long answers of order 1 to 16, on all chains, on all but those of A, and on all
chains with an adapter at three rates; every one of these is asked as it is, with Q and K of pre, and with V and O. Beside them how far the gradients of each kind of data
reach in `pre` (W_grad), and what the generator says (its Markov order, and for words the second eigenvalue of the chain). A (seed, kind) is a job in a
process of its own; what is done is passed over, so the same command goes on. OUT gets orders-seedN.json for each seed with all that is finished."""
import argparse
import json
import os
from pathlib import Path

from queued import leave, work

KINDS = ("cot", "order1", "order2", "order4", "order8", "long", "long4", "long16", "held", "lora", "lora3", "lora1")
VARIANTS = ("post", "restored", "vo")
SIZES = dict(recall=dict(S3=[(4096, 32, 1), (16384, 32, 1)], MK=[(4096, 16, 8), (16384, 8, 8)], MF=[(1024, 8, 32), (4096, 4, 128), (16384, 2, 128)]), steps=(1, 8), problems=128)
ROWS = 64  # whose gradients are looked at


def recipe(profile: str) -> dict:
    "The shipped pre, half of the chapter's steps of fine-tuning, a row for each chain, and fewer questions."
    from qkrestore_nb.experiment import recipes
    r = recipes[profile]
    if profile != "gpu": return {**r, "pretraining": None}
    return {**r, **SIZES, "pretraining": None, "sft": {**r["sft"], "steps": 400}, "sft_data": dict(rows=128, T=112)}


def reach(kind: str, seed: int) -> dict:
    "W_grad of a kind of data in pre, and what its generator says."
    import numpy as np
    import torch
    from qkrestore_nb.diagnostics import gradient_range
    from qkrestore_nb.experiment import pair, sft_data
    from qkrestore_nb.hypenet import HypeNetForCausalLM
    from qkrestore_nb.training import _phrases, sft_batch
    data = sft_data(kind)
    ids, weights = sft_batch(0, 1000 + seed, ROWS, **data)
    batch = dict(input_ids=ids, labels=ids.masked_fill(weights == 0, -100), attention_mask=(ids > 0).long())
    found = gradient_range(HypeNetForCausalLM.from_pretrained(pair() / "pre", dtype=torch.float32).eval(), batch)
    said = dict(order=data.get("order", 1), answer=data.get("answer", "cot"), summary=found.summary(), layers={i: found.summary(i) for i in found.layers})
    if said["answer"] == "long":
        chain = np.zeros((len(_phrases), len(_phrases)))
        np.add.at(chain, (np.arange(len(_phrases))[:, None], _phrases), 1 / _phrases.shape[1])
        said["rho"] = float(np.sort(abs(np.linalg.eigvals(chain)))[-2] ** (1 / said["order"]))  # what is left of a word's influence, for each token of distance
    return said


def job(runs: Path, kind: str, seed: int, profile: str):
    from qkrestore_nb import experiment
    from qkrestore_nb.core import pick_profile
    out, machine, how = runs / f"{kind}-seed{seed}", pick_profile(profile), recipe(profile)
    out.mkdir(exist_ok=True)
    if (out / "done.json").exists(): return
    fields = {**experiment.model_fields, **experiment.models["hypenet7m"]}
    experiment.pretrain(how, out, seed, machine, fields)
    made = experiment.finetune({**how, "probe": 10 ** 9}, out, kind, seed, machine)
    scores = experiment.measure(out, how, seed, machine, [("cot", "pre", "all")] * (kind == "cot") + [(kind, v, "all") for v in VARIANTS])
    experiment._write(out / "done.json", dict(scores=scores, sft=made, reach=reach(kind, seed)))


def collect(runs: Path, out: Path, seed: int, profile: str):
    from qkrestore_nb.core import provenance
    done = {kind: json.loads(p.read_text()) for kind in KINDS if (p := runs / f"{kind}-seed{seed}" / "done.json").exists()}
    if "cot" not in done: return
    scores = {name: s for d in done.values() for name, s in d["scores"].items()}
    note = dict(**provenance(seed, profile=profile, recipe=recipe(profile), gradient_rows=ROWS), wall_s=sum(d["sft"]["wall_s"] for d in done.values()), device_of_runs=done["cot"]["sft"]["device"], scores=scores,
                reach={kind: d["reach"] for kind, d in done.items()}, loss={kind: d["sft"]["log"][-1]["loss"] for kind, d in done.items()})
    (out / f"orders-seed{seed}.json").write_text(json.dumps(note, indent=1) + "\n")
    print(f"seed {seed}: {len(done)} of {len(KINDS)} kinds", {k: [f"{s[t]['4096']['correct']}/{s[t]['4096']['n']}" for t in ("MF", "S3") if "4096" in s[t]] for k, s in scores.items() if "vo" not in k}, flush=True)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path)
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2]), ask.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    ask.add_argument("--jobs", type=int, default=6), ask.add_argument("--minutes", type=float, default=600.), ask.add_argument("--profile", default="gpu")
    args = ask.parse_args()
    for folder in (args.runs, args.out): folder.mkdir(exist_ok=True, parents=True)
    os.environ |= dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // args.jobs)), TORCHINDUCTOR_COMPILE_THREADS="2")
    work(job, [(kind, seed) for seed in args.seeds for kind in args.kinds], args.runs, (args.profile,), args.jobs, args.minutes)
    for seed in args.seeds: collect(args.runs, args.out, seed, args.profile)
    leave(args.runs)

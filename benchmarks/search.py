"""A search for a recipe that reaches the targets: `python benchmarks/search.py RUNS OUT NAME:SEED[:MODEL] ... [--tunings T ...] [--full] [--jobs N] [--minutes M]`.

NAME is one of `searched`: what it changes of the gpu recipe of chapter 10. MODEL, one of `qkrestore_nb.experiment.models`, puts the softmax layers
elsewhere. A job pre-trains one model and fine-tunes it by each of the named `tunings`; with --full every rival of QK-Restore is asked besides, a little
less. Jobs run in N processes on the one GPU; what is done is passed over, what --minutes stops goes on with the same command. OUT gets one json for each
job and fine-tuning that is finished."""
import argparse
import json
import os
import shutil
from pathlib import Path

from queued import leave, work

narrow = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4)
wide = dict(hidden_size=384, intermediate_size=1024, num_attention_heads=6)
searched = dict(  # the model, and the kinds of rows that pre-training leaves out; shipped: no pre-training, the shipped pre
    shipped=(narrow, ()), gpu=(narrow, ()), plain=(narrow, ("values", "hops")), wide=(wide, ("values", "hops")))
tests_of = dict(values="MV", hops="HOP")  # what a model without these rows has not been taught
chapter = dict(steps=800, lr=2.5e-4, warmup=60)
alone, packed = dict(rows=128, T=112), dict(rows=8, T=2048, packed=True)
tunings = dict(  # chapter, longer, gentle, ramp: a row for each chain, as chapter 10 had it at first; ramp: the highest rate comes when half is over; packed: every chain but the first of a row has something behind it that it does not need; far: up to 8,192 tokens of it
    chapter=dict(sft=chapter, sft_data=alone), longer=dict(sft=dict(steps=1500, lr=3e-4, warmup=30), sft_data=alone),
    gentle=dict(sft=dict(steps=2400, lr=1e-4, warmup=60), sft_data=alone), ramp=dict(sft={**chapter, "warmup": 400}, sft_data=alone),
    packed=dict(sft=chapter, sft_data=packed), packedramp=dict(sft={**chapter, "warmup": 400}, sft_data=packed), far=dict(sft=chapter, sft_data={**packed, "rows": 2, "T": 8192}))
variants = ("pre", "post", "restored", "vo", "interpolated 0.9")


def job(runs: Path, name: str, seed: int, model: str, chosen: list, full: bool, profile: str):
    from qkrestore_nb import experiment, training
    from qkrestore_nb.core import pick_profile, provenance
    machine, recipe = pick_profile(profile), experiment.recipes[profile]
    size, without = searched[name]
    fields, untaught = {**experiment.model_fields, **experiment.models[model]}, [tests_of[k] for k in without]
    recipe = {**recipe, "model": size if profile == "gpu" else recipe["model"], "recall": {k: v for k, v in recipe["recall"].items() if k not in untaught}}
    if name == "shipped": recipe["pretraining"] = None
    start = runs / f"{name}-{model}-seed{seed}"
    start.mkdir(exist_ok=True)
    every = dict(training.kinds)
    for kind in without: training.kinds.pop(kind)
    pretraining = experiment.pretrain(recipe, start, seed, machine, fields)
    training.kinds.update(every)
    for tuning in chosen:
        out = runs / f"{start.name}-{tuning}"
        changed = {**recipe, **tunings[tuning]} if profile == "gpu" else recipe
        if not (out / "pre").exists():
            shutil.copytree(start / "pre", out / "pre.part", dirs_exist_ok=True)
            (out / "pre.part").rename(out / "pre")
        made = dict(pretraining=pretraining, sft=experiment.finetune({**changed, "probe": changed["sft"]["steps"] // 4}, out, "cot", seed, machine))
        rivals = [v for v in ("q", "k", *experiment.more_variants) if full and not v.startswith("head")]
        scores = experiment.measure(out, changed, seed, machine, [("cot", v, "all") for v in variants] + [("cot", v, "fewer") for v in rivals])
        config = dict(profile=profile, search=name, model=model, tuning=tuning, recipe=changed, fields=fields, without=without)
        experiment._write(out / "results.json", dict(**provenance(seed, **config), wall_s=round(sum(m["wall_s"] for m in made.values()), 1), scores=scores, **made))


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path), ask.add_argument("names", nargs="+")
    ask.add_argument("--tunings", nargs="*", choices=tunings, default=["chapter"], help="none: pre-training alone"), ask.add_argument("--full", action="store_true")
    ask.add_argument("--jobs", type=int, default=4), ask.add_argument("--minutes", type=float, default=600.), ask.add_argument("--profile", default="gpu")
    args = ask.parse_args()
    for folder in (args.runs, args.out): folder.mkdir(exist_ok=True, parents=True)
    os.environ |= dict(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="3")
    jobs = [(n.split(":") + ["hypenet7m"])[:3] for n in args.names]
    work(job, [(name, int(seed), model) for name, seed, model in jobs], args.runs, (args.tunings, args.full, args.profile), args.jobs, args.minutes)
    for file in args.runs.glob("*/results.json"): shutil.copy(file, args.out / f"search-{file.parent.name}.json")
    for file in sorted(args.out.glob("search-*.json")):
        scores = json.loads(file.read_text())["scores"]
        print(file.name, {t: " ".join(str(round(100 * scores[v][t][T]["correct"] / scores[v][t][T]["n"])) for v in variants[:4]) for t, T in (("S3", "32768"), ("MK", "32768"), ("MF", "16384"), ("cot-A", "8")) if T in scores["pre"].get(t, {})}, flush=True)
    leave(args.runs)

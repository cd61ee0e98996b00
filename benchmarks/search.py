"""A search for a recipe that reaches the targets: `python benchmarks/search.py RUNS OUT NAME:SEED ... [--minutes M]`.

NAME is one of `searched` (what it changes of the gpu recipe of chapter 10, and under which fine-tunings the same model is looked at), or
one of `qkrestore_nb.experiment.models` (other places of the softmax layers, the recipe unchanged). Every job runs in a process of its own on
the one GPU; what --minutes stops goes on with the same command. OUT gets one json for each job and fine-tuning that is finished."""
import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

narrow = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4)
wide = dict(hidden_size=384, intermediate_size=1024, num_attention_heads=6)
chapter = dict(steps=800, lr=2.5e-4, warmup=60)
longer = dict(steps=1500, lr=3e-4, warmup=30)
gentle = dict(steps=2400, lr=1e-4, warmup=60)
searched = dict(  # the model, kinds of rows left out of pre-training, and the fine-tunings
    wide=(wide, ("values", "hops"), dict(chapter=chapter, longer=longer)),
    plain=(narrow, ("values", "hops"), dict(chapter=chapter, longer=longer, gentle=gentle)))
variants = ("pre", "post", "restored", "vo", "interpolated 0.9", "q", "k")


def job(runs: Path, name: str, seed: int, profile: str):
    from qkrestore_nb import experiment, training
    from qkrestore_nb.core import pick_profile, provenance
    machine, recipe = pick_profile(profile), experiment.recipes[profile]
    fields, without, tunings = experiment.model_fields, (), dict(chapter=recipe["sft"])
    if name in searched: model, without, tunings = searched[name]
    else: model, fields = recipe["model"], {**fields, **experiment.models[name]}
    if profile == "smoke": model, tunings = recipe["model"], dict(chapter=recipe["sft"])
    for kind in without: training.kinds.pop(kind)
    base = None
    for tuning, sft in tunings.items():
        changed, out = {**recipe, "model": model, "sft": sft}, runs / f"{name}-seed{seed}-{tuning}"
        out.mkdir(exist_ok=True)
        if (out / "results.json").exists(): base = base or out; continue
        if base:
            shutil.copytree(base / "pre", out / "pre", dirs_exist_ok=True), shutil.copy(base / "pretraining.json", out)
        made = dict(pretraining=experiment.pretrain(changed, out, seed, machine, fields), sft=experiment.finetune(changed, out, "cot", seed, machine))
        scores = experiment.measure(out, changed, seed, machine, [("cot", v, "recall") for v in variants])
        config = dict(profile=profile, search=name, tuning=tuning, recipe=changed, fields=fields, without=without)
        experiment._write(out / "results.json", dict(**provenance(seed, **config), wall_s=sum(m["wall_s"] for m in made.values()), scores=scores, **made))
        base = base or out


def entry(runs, name, seed, profile):
    log = open(runs / f"{name}-seed{seed}.log", "a")
    for stream in (1, 2): os.dup2(log.fileno(), stream)
    job(runs, name, seed, profile)


if __name__ == "__main__":
    ask = argparse.ArgumentParser()
    ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path), ask.add_argument("jobs", nargs="+")
    ask.add_argument("--minutes", type=float, default=600.), ask.add_argument("--profile", default="gpu")
    args = ask.parse_args()
    args.runs.mkdir(exist_ok=True, parents=True)
    os.environ |= dict(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="3")
    deadline, context = time.monotonic() + 60 * args.minutes, multiprocessing.get_context("spawn")
    jobs = [(j, context.Process(target=entry, args=(args.runs, j.split(":")[0], int(j.split(":")[1]), args.profile))) for j in args.jobs]
    for _, p in jobs: p.start()
    for name, p in jobs:
        p.join(max(0, deadline - time.monotonic()))
        print(name, "ended with", p.exitcode, flush=True)
        if p.is_alive(): p.kill()
    for file in args.runs.glob("*/results.json"): shutil.copy(file, args.out / f"search-{file.parent.name}.json")
    for log in args.runs.glob("*.log"): print(log.name, log.read_text()[-300:].replace("\r", "\n").splitlines()[-1:], flush=True)
    sys.stdout.flush()

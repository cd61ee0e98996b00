"""Recall against reasoning over lam: `python benchmarks/studies/tradeoff.py` adds to results/tradeoff.json until every variant is there.

Variants of the shipped pair: QK-Pro in its three forms over lam, beside QK-Restore, Q only, K only, and interpolation towards pre
of Q and K alone and of all weights. Each is asked MF at 1K, 2K and 4K tokens and 8-step chains. Stops after --minutes and goes on
where it was when called again; a file made with other questions is refused, not mixed in."""
import argparse
import json
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.experiment import evaluate, pair
from qkrestore_nb.families import planned_tensors
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.procrustes import qk_pro
from qkrestore_nb.restore import qk_restore

OUT, SEED = Path(__file__).resolve().parents[2] / "results" / "tradeoff.json", 12
sizes = dict(recall=dict(MF=[(1024, 8, 32), (2048, 4, 64), (4096, 4, 128)]), steps=(8,), problems=64)
forms = {"input, matrix": dict(space="input"), "input, kv_head": dict(space="input", per="kv_head"), "head": dict(space="head")}
lams, shares_qk, shares_all = (1e-2, 3e-2, .1, .3, 1., 10.), (.25, .5, .75), (.05, .1, .2, .3)
variants = {"pre": None, "post": None, "QK-Restore": "qk", "Q only": "q", "K only": "k",
            **{f"{form}, lam {lam:g}": ("pro", form, lam) for form in forms for lam in ((0.,) if form == "input, kv_head" else ()) + lams},
            **{f"Q, K interpolated, {s:g} pre": ("qk mix", s) for s in shares_qk}, **{f"all interpolated, {s:g} pre": ("all mix", s) for s in shares_all}}

parser = argparse.ArgumentParser()
parser.add_argument("--minutes", type=float, default=2)
stop = time.perf_counter() + 60 * parser.parse_args().minutes
load = lambda name: HypeNetForCausalLM.from_pretrained(pair() / name, dtype=torch.float32).eval()
pre, post = load("pre"), load("post")
a, plan = pre.state_dict(), planned_tensors(post.config.to_dict())


def make(name: str):
    "One variant as a model."
    what = variants[name]
    if what is None: return pre if name == "pre" else post
    if isinstance(what, str): return qk_restore(pre, post, projections=what)
    if what[0] == "pro": return qk_pro(pre, post, lam=what[2], **forms[what[1]])
    model = load("post")
    moved = plan if what[0] == "qk mix" else list(a)
    model.load_state_dict({n: torch.lerp(w, a[n], what[1]) if n in moved else w for n, w in model.state_dict().items()})
    return model


config = json.loads(json.dumps(dict(pair=json.loads((pair() / "provenance.json").read_text())["date"], variants=variants, forms=forms, **sizes)))
made = json.loads(OUT.read_text()) if OUT.exists() else dict(**provenance(SEED, **config), wall_s=0., scores={})
if made["config"] != config or made["seed"] != SEED: raise SystemExit(f"{OUT} was made with other questions or variants: move it away first")
for name in variants:
    if name in made["scores"]: continue
    if time.perf_counter() > stop: break
    then = time.perf_counter()
    made["scores"][name] = evaluate(make(name), **sizes, seed=SEED)
    made["wall_s"] = round(made["wall_s"] + time.perf_counter() - then, 1)
    OUT.write_text(json.dumps(made, indent=1) + "\n")
    share = lambda *cells: f"{100 * sum(c['exact'] for c in cells) / sum(c['n'] for c in cells):5.1f}"
    chains = share(*(x["8"] for test, x in made["scores"][name].items() if test.startswith("cot")))
    print(f"{name:>30}  MF", *map(share, made["scores"][name]["MF"].values()), " chains", chains, f" {time.perf_counter() - then:5.1f} s", flush=True)
print(f"{len(made['scores'])} of {len(variants)} variants")

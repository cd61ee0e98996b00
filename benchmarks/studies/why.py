"""What the theory of chapters 7 to 7b says of a run: `python benchmarks/studies/why.py OUT.json --checkpoints pre=PRE
post=POST --batch near=sft_batch ...`.

For every checkpoint: the gradient range, the projections' gradients by distance, and the reach of attention, on
every batch; the retrieval scores of every head on needle tests. Between the first checkpoint and each later one:
the drift of every group of weights, with its share in the directions of far pairs. The first two checkpoints are
also restored (Q, K) unless --no-restored is given.

A batch is NAME=FUNCTION or NAME=FUNCTION:JSON. FUNCTION is a function of qkrestore_nb.training (or module.function,
as in recall.recall_test), called as FUNCTION(step, seed=..., **JSON) where it takes a step, which returns (ids,
weights); a test of recall (ids, ask) becomes a batch whose answers weigh 1; an entry of training.kinds, as in
kinds.dense:{"B": 16, "T": 512}, is called with its rows and length. "borders": true lets no document of a packed
row read another. Examples: near=sft_batch:{"rows":64} packed=sft_batch:{"rows":8,"T":2048,"packed":true}
direct=sft_batch:{"chain":"none","packed":true} dense=recall.recall_test:{"kind":"MF","B":16,"T":512,"questions":8}."""

import argparse
import importlib
import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.diagnostics import autocorrelation, fit_decay, gradient_range, recall_batch
from qkrestore_nb.drift import attention_reach, drift, far_directions, needle_places, retrieval_scores
from qkrestore_nb.projections import far_bound, projection_gradients, roles
from qkrestore_nb.recall import recall_test
from qkrestore_nb.training import document_positions


def named(text: str) -> tuple[str, str]:
    "NAME=VALUE."
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=VALUE")
    return name, value


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument(
    "--checkpoints", type=named, nargs="+", required=True, help="NAME=FOLDER, the one before fine-tuning first"
)
parser.add_argument(
    "--batch", type=named, nargs="+", default=[("near", "sft_batch")], help="NAME=FUNCTION or NAME=FUNCTION:JSON"
)
parser.add_argument(
    "--steps",
    type=int,
    default=1,
    help="batches of each kind, drawn with steps 0, 1, ... and measured one after the other",
)
parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens of the needle tests")
parser.add_argument("--haystacks", type=int, default=8)
parser.add_argument(
    "--beyond", type=int, nargs="+", default=[32, 64, 128], help="distances from which a pair counts as far"
)
parser.add_argument("--bins", type=int, default=12)
parser.add_argument("--no-restored", action="store_true")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--seed", type=int, default=0)


def function(name: str):
    "sft_batch, recall.recall_test, kinds.dense."
    first, _, rest = name.partition(".")
    try:
        return (
            getattr(importlib.import_module(f"qkrestore_nb.{first}"), rest)
            if rest
            else getattr(importlib.import_module("qkrestore_nb.training"), name)
        )
    except ModuleNotFoundError:
        return getattr(importlib.import_module("qkrestore_nb.training"), first)[rest]


def batch(said: str, step: int, seed: int) -> dict[str, torch.Tensor]:
    "input_ids, weights and, with borders, position_ids; all (B, T)."
    name, _, words = said.partition(":")
    make, fields = function(name), json.loads(words) if words else {}
    borders = fields.pop("borders", False)
    if isinstance(make, tuple):  # an entry of training.kinds: (share, maker)
        got = make[1](np.random.default_rng([seed, step]), fields.pop("B"), fields.pop("T"), **fields)
    elif "step" in inspect.signature(make).parameters:
        got = make(step, **{"seed": seed} | fields)
    else:
        got = make(**{"seed": seed + step} | fields)
    if isinstance(got, dict):
        got = recall_batch(got)
    ids, weights = (torch.as_tensor(np.ascontiguousarray(x)) for x in got)
    return dict(input_ids=ids, weights=weights) | (dict(position_ids=document_positions(ids)) if borders else {})


def load(folder: str, device: str, dtype: str):
    from transformers import AutoModelForCausalLM

    import qkrestore_nb.hypenet  # noqa: F401  registers the family

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)


def text_rho(ids: torch.Tensor) -> float | None:
    "exp(-1 / W_corr) of a batch; None where the text does not lose its memory exponentially."
    most = min(64, ids.shape[1] - 1)
    W = float(fit_decay(np.arange(1, most + 1), np.maximum(autocorrelation(ids.numpy(), most)[1:], 1e-9))["W"][0])
    return float(np.exp(-1 / W)) if np.isfinite(W) else None


def on_batch(model, batch, args) -> dict:
    "The three measurements on one batch."
    ids, weights = batch["input_ids"], batch["weights"]
    T = ids.shape[1]
    g, p = gradient_range(model, batch), projection_gradients(model, batch, bins=args.bins)
    rho, far = text_rho(ids), [b for b in args.beyond if b < p.edges[-1]]
    reach = attention_reach(model, batch, beyond=min(args.beyond))
    return dict(
        rows=len(ids),
        T=T,
        loss=p.loss,
        loss_tokens=float(weights.sum()),
        rho=rho,
        range=dict(
            all={k: v for k, v in g.summary(beyond=min(args.beyond)).items()},
            layers={str(i): g.summary([i], beyond=min(args.beyond)) for i in g.layers},
        ),
        projections=dict(
            layers=p.layers,
            roles=roles,
            edges=p.edges.tolist(),
            tau=p.tau.tolist(),
            norms=p.norms.tolist(),
            along=p.along.tolist(),
            whole=p.whole.tolist(),
            far={
                str(b): dict(
                    share=p.share(b).tolist(),
                    along=p.share(b, "along").tolist(),
                    own=[x.tolist() for x in p.interval(b)],
                )
                for b in far
            },
            bound=None
            if rho is None
            else [far_bound(p.edges, rho, p.density()[i, :2]).tolist() for i in range(len(p.layers))],
        ),
        reach=reach.table(),
    )


def needles(model, args) -> dict:
    "Retrieval scores (layers, heads) of every head by test and length."
    out = {}
    for kind, questions in (("S2", 1), ("S3", 1), ("MK", 4), ("MF", 8)):
        for T in args.lengths:
            test = recall_test(kind, args.haystacks, T, questions, args.seed)
            s = retrieval_scores(model, test["ids"], *needle_places(test))
            out.setdefault(kind, {})[str(T)] = dict(layers=s.layers, scores=s.mean().tolist(), best=s.best())
    return out


def main():
    args = parser.parse_args()
    began, models = time.perf_counter(), {}
    for name, folder in args.checkpoints:
        models[name] = load(folder, args.device, args.dtype)
    first, *later = models
    if later and not args.no_restored:
        from qkrestore_nb.restore import qk_restore

        models["restored"] = qk_restore(models[first], models[later[0]])
    found: dict = dict(batches={}, needles={}, drift={})
    for label, said in args.batch:
        for step in range(args.steps):
            drawn = batch(said, step, args.seed)
            for name, model in models.items():
                found["batches"].setdefault(label, {}).setdefault(name, []).append(on_batch(model, drawn, args))
            print(f"{label}, step {step}: {tuple(drawn['input_ids'].shape)}, {time.perf_counter() - began:.0f} s", flush=True)
    for name, model in models.items():
        found["needles"][name] = needles(model, args)
    test = recall_test("MF", args.haystacks, args.lengths[0], 8, args.seed)
    directions = far_directions(models[first], torch.as_tensor(test["ids"]), far=min(args.beyond))
    for name in later:
        moved = drift(models[first], models[name], directions)
        found["drift"][name] = dict(groups=moved.groups(), tensors=[vars(t) for t in moved.tensors])
    config = {k: v for k, v in vars(args).items() if k not in ("out", "seed")}
    made = dict(**provenance(args.seed, **config), wall_s=round(time.perf_counter() - began, 1), **found)
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{args.out}: {made['wall_s']} s")


if __name__ == "__main__":
    main()

"""Is it the weights, or the way of answering? `python benchmarks/asking.py` writes results/asking.json (minutes on two CPU cores).

The shipped pair is asked for the same needles in three ways: with the answer's prefix given (as every test of the package does, so
that no format has to be chosen), the same with nothing but digits to choose from, and inside a thinking span in the shape of the
fine-tuning's own steps. If only the format had changed, the second would find what the first does not.

`python benchmarks/asking.py PRE POST OUT` asks another pair the first two ways (S3 among letters), more kinds, longer, and of more variants; on a
GPU up to 32K tokens."""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.experiment import pair, recipes
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.recall import digits, letters, recall_test, right, token_id
from qkrestore_nb.variants import variant

ROOT, SEED, ASKED = Path(__file__).parent.parent, 13, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict = {kind: [(T, 32, ASKED) for T in (512, 1024)] for kind in ("MK", "MF")}  # tokens, haystacks, questions a haystack
FOLDERS, OUT, NAMES = [pair() / "pre", pair() / "post"], ROOT / "results" / "asking.json", ("pre", "post", "restored", "interpolated 0.9")
if other := sys.argv[1:]:
    *FOLDERS, OUT = map(Path, other)
    NAMES = ("pre", "post", "restored", "vo", "qkvo", "softmax mixers", "interpolated 0.9")
    SIZES = {k: v for k, v in recipes["gpu"]["other"]["recall"].items() if k != "HOP"} if DEVICE == "cuda" else {k: [(T, 16, n) for T in (1024, 4096)] for k, n in (("S2", 1), ("S3", 1), ("MK", 8), ("MF", 8))}


def ways(kind: str, T: int, rows: int, asked: int) -> dict:
    "The same haystacks and questions, asked in three ways: ids and ask."
    test = recall_test(kind, rows, T, asked, SEED)
    if other: return dict(prefix=test, digits=test)
    ids, body = test["ids"], test["ids"][:, :T - 10 * ASKED]
    question = ids[:, T - 10 * ASKED:].reshape(rows, ASKED, 10)  # QM k1 k2 IS v v v v v DOT
    word = lambda w: np.full((rows, ASKED, 1), token_id[w])
    thought = np.concatenate([word("THINK"), word("#0"), word("N"), question[..., 1:]], -1)
    place = lambda start, size, what: np.broadcast_to(start + size * np.arange(ASKED)[:, None] + np.array(what), (rows, ASKED, len(what)))
    return dict(prefix=dict(ids=ids, ask=test["ask"]), digits=dict(ids=ids, ask=test["ask"]),
                thinking=dict(ids=np.concatenate([body, thought.reshape(rows, -1)], 1), ask=place(T - 10 * ASKED, 12, range(6, 11))))


then = time.perf_counter()
load = lambda folder: HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
pre, model = (load(folder) for folder in FOLDERS)
a, b = ({n: w.clone() for n, w in m.state_dict().items()} for m in (pre, model))
if DEVICE == "cuda": model = model.to(torch.bfloat16)  # as in the experiment
only = {k: torch.full((model.config.vocab_size,), -torch.inf).index_fill(0, torch.as_tensor(letters if k == "S3" else digits), 0.).to(DEVICE) for k in SIZES}  # added to the logits: only what a value consists of is left
scores = {}
for name in NAMES:
    model.load_state_dict(variant(name, a, b, model.config))
    for kind, sizes in SIZES.items():
        for T, rows, asked in sizes:
            for way, batch in ways(kind, T, rows, asked).items():
                hook = model.lm_head.register_forward_hook(lambda head, inputs, logits: logits + only[kind] if way == "digits" else logits)
                ok = right(model, batch, rows=max(1, (131072 if DEVICE == "cuda" else 65536) // T))
                hook.remove()
                scores.setdefault(name, {}).setdefault(f"{kind} {way}", {})[str(T)] = dict(correct=int(ok.sum()), n=ok.size)
    print(name, {t: {x: f"{c['correct']}/{c['n']}" for x, c in v.items()} for t, v in scores[name].items()}, flush=True)
of = Path(FOLDERS[0]).resolve().parent.name if other else json.loads((pair() / "provenance.json").read_text())["date"]
result = dict(**provenance(SEED, pair=of, sizes=SIZES), wall_s=round(time.perf_counter() - then, 1), scores=scores)
OUT.write_text(json.dumps(result, indent=1) + "\n")

"""Is it the weights, or the way of answering? `python benchmarks/asking.py` writes results/asking.json (minutes on two CPU cores).

The shipped pair is asked for the same needles in three ways: with the answer's prefix given (as every test of the package does, so
that no format has to be chosen), the same with nothing but digits to choose from, and inside a thinking span in the shape of the
fine-tuning's own steps. If only the format had changed, the second would find what the first does not.

`python benchmarks/asking.py PRE POST OUT` asks another pair the first two ways, more kinds, longer, and of V and O as well."""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.experiment import pair
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.recall import digits, recall_test, right, token_id
from qkrestore_nb.variants import variant

ROOT, SEED, ROWS, ASKED, LENGTHS, KINDS = Path(__file__).parent.parent, 13, 32, 8, (512, 1024), ("MK", "MF")
FOLDERS, OUT, NAMES = [pair() / "pre", pair() / "post"], ROOT / "results" / "asking.json", ("pre", "post", "restored", "interpolated 0.9")
if other := sys.argv[1:]:
    *FOLDERS, OUT = map(Path, other)
    ROWS, LENGTHS, KINDS, NAMES = 16, (1024, 4096), ("S2", "MK", "MF"), ("pre", "post", "restored", "vo", "interpolated 0.9")


def ways(kind: str, T: int) -> dict:
    "The same haystacks and questions, asked in three ways: ids and ask."
    test = recall_test(kind, ROWS, T, 1 if kind == "S2" else ASKED, SEED)
    if other: return dict(prefix=test, digits=test)
    ids, body = test["ids"], test["ids"][:, :T - 10 * ASKED]
    question = ids[:, T - 10 * ASKED:].reshape(ROWS, ASKED, 10)  # QM k1 k2 IS v v v v v DOT
    word = lambda w: np.full((ROWS, ASKED, 1), token_id[w])
    thought = np.concatenate([word("THINK"), word("#0"), word("N"), question[..., 1:]], -1)
    place = lambda start, size, what: np.broadcast_to(start + size * np.arange(ASKED)[:, None] + np.array(what), (ROWS, ASKED, len(what)))
    return dict(prefix=dict(ids=ids, ask=test["ask"]), digits=dict(ids=ids, ask=test["ask"]),
                thinking=dict(ids=np.concatenate([body, thought.reshape(ROWS, -1)], 1), ask=place(T - 10 * ASKED, 12, range(6, 11))))


then = time.perf_counter()
pre, post = (HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in FOLDERS)
a, b = ({n: w.clone() for n, w in m.state_dict().items()} for m in (pre, post))
others = torch.full((post.config.vocab_size,), -torch.inf).index_fill(0, torch.as_tensor(digits), 0.)  # added to the logits: digits alone are left
scores = {}
for name in NAMES:
    post.load_state_dict(variant(name, a, b, post.config))
    for kind in KINDS:
        for T in LENGTHS:
            for way, batch in ways(kind, T).items():
                hook = post.lm_head.register_forward_hook(lambda head, inputs, logits: logits + others if way == "digits" else logits)
                ok = right(post, batch)
                hook.remove()
                scores.setdefault(name, {}).setdefault(f"{kind} {way}", {})[str(T)] = dict(correct=int(ok.sum()), n=ok.size)
    print(name, {t: {x: f"{c['correct']}/{c['n']}" for x, c in v.items()} for t, v in scores[name].items()}, flush=True)
of = [str(f) for f in FOLDERS] if other else json.loads((pair() / "provenance.json").read_text())["date"]
result = dict(**provenance(SEED, pair=of, rows=ROWS, asked=ASKED, lengths=LENGTHS), wall_s=round(time.perf_counter() - then, 1), scores=scores)
OUT.write_text(json.dumps(result, indent=1) + "\n")

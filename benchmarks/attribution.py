"""Where does the damage sit? `python benchmarks/attribution.py` writes results/attribution.json (two minutes on two CPU cores).

Puts one group of tensors of the shipped post back to pre, everything else stays post, and asks recall and reasoning again.
What a group regains is not what it alone is to blame for: groups interact, and the shares do not add up to one."""
import json
import re
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.experiment import evaluate, pair, pooled
from qkrestore_nb.hypenet import HypeNetForCausalLM

ROOT, SEED = Path(__file__).parent.parent, 11
groups = {  # name -> pattern of the tensors that go back; layers 1 and 2 are softmax
    "nothing": r"$^", "Q, K of softmax": r"layers\.[12]\.self_attn\.[qk]_proj", "Q of softmax": r"layers\.[12]\.self_attn\.q_proj",
    "K of softmax": r"layers\.[12]\.self_attn\.k_proj", "V, O of softmax": r"layers\.[12]\.self_attn\.[vo]_proj",
    "all of softmax": r"layers\.[12]\.self_attn\.", "Q, K of all layers": r"self_attn\.[qk]_proj",
    "linear layer 0": r"layers\.0\.self_attn\.", "linear layers 3-7": r"layers\.[3-7]\.self_attn\.", "MLPs": r"\.mlp\.",
    "norm gains": r"norm\.weight", "embedding": r"embed_tokens", "output head": r"lm_head"}

then = time.perf_counter()
pre, post = (HypeNetForCausalLM.from_pretrained(pair() / name, dtype=torch.float32).eval() for name in ("pre", "post"))
a, b = ({n: w.clone() for n, w in m.state_dict().items()} for m in (pre, post))
sizes = dict(recall=dict(MF=[(1024, 8, 32), (4096, 2, 128)], MK=[(1024, 16, 8)]), steps=(8,), problems=64)
scores = {"pre": evaluate(pre, **sizes, seed=SEED)}
for name, pattern in groups.items():
    back = [n for n in b if re.search(pattern, n)]
    post.load_state_dict({**b, **{n: a[n] for n in back}})
    scores[name] = evaluate(post, **sizes, seed=SEED)
    print(f"{name:>20} {len(back):3d} tensors", {t: {x: f"{c['correct']}/{c['n']}" for x, c in v.items()} for t, v in scores[name].items() if t[:3] != "cot"},
          pooled(scores[name], "8"), flush=True)
result = dict(**provenance(SEED, pair=json.loads((pair() / "provenance.json").read_text())["date"], groups=groups, **sizes),
              wall_s=round(time.perf_counter() - then, 1), scores=scores)
(ROOT / "results" / "attribution.json").write_text(json.dumps(result, indent=1) + "\n")

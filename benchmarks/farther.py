"""Recall beyond 32K tokens: `python benchmarks/farther.py RUNS OUT SEED [SEED ...]` (one modern GPU, about a minute and a half a seed).

RUNS holds run folders of `qkrestore experiment --profile gpu` (benchmarks/seeds.py makes them). Their checkpoints are asked single needles and eight
similar keys at 64K and 128K tokens, 32 and 64 times the longest row of pre-training: before, after chains end to end and after chains with a row
each, with Q and K put back, V and O, all four, and all weights mixed. OUT gets farther-hypenet7m-seedN.json."""
import json
import sys
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.experiment import evaluate
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.variants import variant

SIZES: dict = dict(recall={kind: [(T, n, asked) for T in (65536, 131072)] for kind, n, asked in (("S1", 16, 1), ("S2", 16, 1), ("S3", 32, 1), ("MK", 8, 8))}, steps=())
REPAIRS = ("post", "restored", "vo", "qkvo", "interpolated 0.9")
device = "cuda" if torch.cuda.is_available() else "cpu"

runs, out, *seeds = sys.argv[1:]
for seed in map(int, seeds):
    then, folder = time.perf_counter(), Path(runs) / f"gpu-hypenet7m-seed{seed}"
    pre, post, alone = (HypeNetForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(device) for name in ("pre", "post", "sft-alone"))
    model = HypeNetForCausalLM(pre.config).to(device, torch.bfloat16).eval()
    scores = {}
    for label, after, names in (("", post, ("pre", *REPAIRS)), ("alone: ", alone, REPAIRS)):
        for name in names:
            model.load_state_dict(variant(name, pre.state_dict(), after.state_dict(), pre.config, seed))
            scores[label + name] = evaluate(model, **SIZES, seed=seed, device=device)
            print(seed, label + name, {t: [c["correct"] for c in cells.values()] for t, cells in scores[label + name].items()}, flush=True)
    note = dict(**provenance(seed, run=json.loads((folder / "recipe.json").read_text()), **SIZES), wall_s=round(time.perf_counter() - then, 1), scores=scores)
    (Path(out) / f"farther-hypenet7m-seed{seed}.json").write_text(json.dumps(note, indent=1) + "\n")

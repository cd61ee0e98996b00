"""The hybrid of chapter 3, trained from several seeds: `python benchmarks/studies/hybrid.py results/hybrid.json`.

Each seed leaves what it got right along the way, whole and with its softmax layers off, what it gets right at the end
without its linear layers, and its seconds on one thread."""
import argparse
import json
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.hybrid import LinearAttention, measure, train_hybrid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in args.seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        model, history = train_hybrid(seed)
        seconds = dict(wall=round(time.perf_counter() - wall, 1), cpu=round(time.process_time() - cpu, 1))
        runs.append(dict(seed=seed, seconds=seconds, history=history, linear_off=measure(model, LinearAttention)))
        print(seed, history[-1], seconds, flush=True)
    args.out.write_text(json.dumps({**provenance(args.seeds[0], seeds=args.seeds), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__": main()

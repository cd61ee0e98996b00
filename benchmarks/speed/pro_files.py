"""QK-Pro on files of a 9B's shape beside the restore and beside the solves alone, in one interleaved run.

    python benchmarks/speed/pro_files.py results/pro_files-9b.json --in-place

36 layers, 9 of them softmax, of the real shapes (d_model 4096, 32 and 8 heads of 128), the rest filled up to 17.7 GB in
8 shards. With `--in-place` only Q and K are on the disk, and the other tensors, which nobody reads then, are holes.
Restore and QK-Pro are processes of their own. The solves are `solve_queries` on the same numbers in float32, in one
that has torch already; how long torch takes to import is measured apart."""
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from restore_files import CLI, interleaved, run, write_pair

D_MODEL, H, N_KV, D, LAYERS = 4096, 32, 8, 128, 36
SOLVES = """
import sys, time
import numpy as np, torch
from qkrestore_nb.procrustes import solve_queries
from qkrestore_nb.moves import open_both, plan_sides
from qkrestore_nb.restore import file_reader
pre, post = open_both(sys.argv[1], sys.argv[2])
moves, read = plan_sides(pre, post), file_reader(pre, post)
number = lambda which, m: torch.from_numpy(np.array(read(which, m))).view(m.shape)
layers = [[m for m in moves if m.layer == i] for i in sorted({m.layer for m in moves})]
took = 0
for q, k in (sorted(x, key=lambda m: m.role != 'q') for x in layers):
    a, b, c = number('pre', q), number('post', q), number('pre', k)
    then = time.perf_counter()
    solve_queries(a, b, c, int(sys.argv[3]), 0.01, space=sys.argv[4])
    took += time.perf_counter() - then
open(sys.argv[5], 'w').write(str(took))
"""


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--runs", type=int, default=9)
    ask.add_argument("--gb", type=float, default=17.7)
    ask.add_argument("--dir", type=Path, default=Path("."))
    ask.add_argument("--in-place", action="store_true", help="and taken back; no third copy is needed")
    args = ask.parse_args()
    root, py = Path(tempfile.mkdtemp(prefix="pro-files-", dir=args.dir)).absolute(), sys.executable
    pre, post, out = root / "pre", root / "post", root / "out"

    def repaired(*words):
        took = run(root, py, "-c", CLI, *words[:1], pre, post, *words[1:], "--in-place" if args.in_place else out)
        if args.in_place: run(root, py, "-c", CLI, "undo", post)
        return took

    def solves(space):
        _, mb = run(root, py, "-c", SOLVES, pre, post, N_KV, space, root / "took")
        return float((root / "took").read_text()), mb
    ways = {"qkrestore restore": lambda: repaired("restore")}
    ways["import torch"] = lambda: run(root, py, "-c", "import torch")
    for space in ("head", "input"):
        ways[f"qkrestore pro, {space}"] = lambda space=space: repaired("pro", "--space", space)
        ways[f"solves, {space}"] = lambda space=space: solves(space)
    try:
        shape = dict(hidden=D_MODEL, layers=LAYERS, softmax=range(3, LAYERS, 4), shards=8, q=H * D, k=N_KV * D)
        heads = dict(num_attention_heads=H, num_key_value_heads=N_KV, head_dim=D)
        write_pair(root, args.gb, ("pre", "post") if args.in_place else (), **shape, **heads)
        load = [os.getloadavg()[0]]
        took = interleaved(ways, args.runs, out)
        load.append(os.getloadavg()[0])
    finally: shutil.rmtree(root, ignore_errors=True)
    from qkrestore_nb.core import provenance
    median = {n: statistics.median(s for s, _ in t) for n, t in took.items()}
    one, over = median["qkrestore restore"], {}
    for s in ("head", "input"):
        over[s] = median[f"qkrestore pro, {s}"] / (one + median[f"solves, {s}"])
    shape = dict(d_model=D_MODEL, H=H, n_kv=N_KV, D=D, layers=LAYERS, softmax=9)
    result = provenance(0, gb=args.gb, runs=args.runs, in_place=args.in_place, **shape)
    result |= dict(load_before_and_after=load, over_restore_and_solves=over, median_s=median)
    result["seconds"] = {n: [round(s, 4) for s, _ in t] for n, t in took.items()}
    result["rss_mb"] = {n: max(mb for _, mb in t) for n, t in took.items()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(dict(median_s=median, over_restore_and_solves=over), indent=1))


if __name__ == "__main__": main()

"""How long a restore of checkpoint folders takes, beside cp and beside loading and saving, in one interleaved run.

    python benchmarks/speed/restore_files.py --gb 1 --runs 9 --out results/restore_files-1gb.json

Random bf16 shards, a pair of them; 6 of 24 layers are softmax. Each way is run in turn, --runs times, as a process of its own; medians are
reported, with the peak memory of the process. The output of every way is removed outside the clock, and the disk is synced before each start."""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT_OF_PEAKS = tempfile.gettempdir()
LAYERS, SOFTMAX, SHARDS = 24, (3, 7, 11, 15, 19, 23), 4


def write_pair(root: Path, gb: float) -> None:
    "Two checkpoints of `gb` GB. Q and K are as large a part as in a small hybrid; the rest is MLP."
    import numpy as np
    hidden = 1024
    per_layer = int(gb * 1e9 / LAYERS / 2 / hidden)                       # rows of width `hidden` in a layer
    q, k = int(per_layer * .08), int(per_layer * .04)
    config = dict(model_type="hypenet", architectures=["HypeNetForCausalLM"], vocab_size=16, hidden_size=hidden, num_hidden_layers=LAYERS, num_attention_heads=1,
                  num_key_value_heads=1, head_dim=128, mixer_types=["attn" if i in SOFTMAX else "lightning-attn" for i in range(LAYERS)])
    for seed, name in enumerate(("pre", "post")):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
        rng, where = np.random.default_rng(seed), {}
        for s in range(SHARDS):
            file, header, at = f"model-{s + 1:05d}-of-{SHARDS:05d}.safetensors", {}, 0
            tensors = [(f"model.layers.{i}.{part}.weight", rows) for i in range(s * LAYERS // SHARDS, (s + 1) * LAYERS // SHARDS)
                       for part, rows in (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("mlp.up_proj", per_layer - q - k))]
            for tensor, rows in tensors:
                header[tensor] = dict(dtype="BF16", shape=[rows, hidden], data_offsets=[at, at + 2 * rows * hidden])
                at += 2 * rows * hidden
                where[tensor] = file
            text = json.dumps(header).encode()
            with open(root / name / file, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                block = (rng.standard_normal(1 << 22).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()  # real bf16 numbers, repeated
                while at:
                    f.write(block[:at])
                    at -= min(at, len(block))
        (root / name / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


SYNC = "import os, sys\nfor d, _, fs in os.walk(sys.argv[1]):\n  for f in fs:\n    fd = os.open(os.path.join(d, f), os.O_RDONLY); os.fsync(fd)\n"
LOAD_SAVE = """
import json, shutil, sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from qkrestore_nb.families import planned_tensors
pre, post, out = map(Path, sys.argv[1:])
out.mkdir()
plan, where = set(planned_tensors(json.loads((post / 'config.json').read_text()))), json.loads((pre / 'model.safetensors.index.json').read_text())['weight_map']
for file in sorted(post.glob('*.safetensors')):
    tensors = load_file(file)
    for n in plan & tensors.keys():
        with safe_open(pre / where[n], 'pt') as f: tensors[n] = f.get_tensor(n)
    save_file(tensors, out / file.name, metadata={'format': 'pt'})
for file in post.glob('*.json'): shutil.copy(file, out)
"""
NO_SYNC = "import os, sys\nos.fsync = lambda fd: None\nfrom qkrestore_nb.cli import main\nmain(sys.argv[1:])"  # to compare with cp, which does not either
CLI = "import sys\nfrom qkrestore_nb.cli import main\nmain(sys.argv[1:])"


PEAK = ("import atexit, os\n"  # of the process alone: what the kernel tells the parent includes the parent's own memory before the exec
        "atexit.register(lambda: open(os.environ['PEAK'], 'w').write(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))))\n")


def run(*command) -> tuple[float, float]:
    "Seconds of one process, and its peak MB where it is one of Python's."
    command, peak = [PEAK + c if c in (CLI, NO_SYNC, LOAD_SAVE) else str(c) for c in command], Path(f"{ROOT_OF_PEAKS}/peak-{os.getpid()}")
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env={**os.environ, "PEAK": str(peak)})
    took, mb = time.perf_counter() - start, int(peak.read_text()) / 1024 if peak.exists() else 0.
    peak.unlink(missing_ok=True)
    return took, mb


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gb", type=float, default=1.), p.add_argument("--runs", type=int, default=9), p.add_argument("--out", type=Path, required=True)
    p.add_argument("--dir", type=Path, default=Path("."), help="where to put the files: the disk that is measured"), p.add_argument("--without-loading", action="store_true")
    args = p.parse_args()
    root = args.dir / f"restore-files-{os.getpid()}"
    pre, post, out, py = root / "pre", root / "post", root / "out", sys.executable

    def cp():
        return run("cp", "-r", post, out)
    def cp_fsync():
        seconds, mb = cp()
        return seconds + run(py, "-S", "-c", SYNC, out)[0], mb
    def in_place():
        took = run(py, "-c", CLI, "restore", pre, post, "--in-place")
        run(py, "-c", CLI, "undo", post)
        return took
    ways = {"cp -r": cp, "cp -r, fsync": cp_fsync, "qkrestore restore (copy, patch, fsync, rename)": lambda: run(py, "-c", CLI, "restore", pre, post, out),
            "the same without fsync": lambda: run(py, "-c", NO_SYNC, "restore", pre, post, out),
            "qkrestore restore --in-place (journal, fsync)": in_place, "qkrestore inspect": lambda: run(py, "-c", CLI, "inspect", post)}
    if not args.without_loading: ways["safetensors load, replace, save, by shard"] = lambda: run(py, "-c", LOAD_SAVE, pre, post, out)
    try:
        write_pair(root, args.gb)
        from qkrestore_nb.inspection import inspect_checkpoint
        seen = inspect_checkpoint(post)
        took = {name: [] for name in ways}
        for i in range(args.runs + 1):                                    # the first round warms the page cache and does not count
            for name in random.Random(i).sample(list(ways), len(ways)):    # so that no way always follows the same other
                os.sync()
                took[name].append(ways[name]())
                shutil.rmtree(out, ignore_errors=True)
    finally: shutil.rmtree(root, ignore_errors=True)
    median = {n: statistics.median(s for s, _ in t[1:]) for n, t in took.items()}
    from qkrestore_nb.core import provenance
    result = provenance(0, gb=args.gb, shards=SHARDS, runs=args.runs, share=seen["moved_bytes"] / seen["bytes"], bytes=seen["bytes"], moved_bytes=seen["moved_bytes"],
                        file_system=subprocess.run(["stat", "-f", "-c", "%T", str(args.dir)], capture_output=True, text=True).stdout.strip())
    result["ways"] = {n: dict(median_s=m, seconds=[round(s, 4) for s, _ in took[n][1:]], x_cp=m / median["cp -r"], x_cp_fsync=m / median["cp -r, fsync"],
                              rss_mb=None if n.startswith("cp") else max(mb for _, mb in took[n])) for n, m in median.items()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for n, r in result["ways"].items(): print(f"{n:50} {r['median_s']:8.3f} s  {r['x_cp']:6.2f} x cp  {r['x_cp_fsync']:6.2f} x cp+fsync  {r['rss_mb'] or 0:6.0f} MB")


if __name__ == "__main__": main()

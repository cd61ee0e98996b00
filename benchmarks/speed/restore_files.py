"""How long a restore of checkpoint folders takes, beside cp, beside loading and saving, and beside mergekit, in one interleaved run.

    python benchmarks/speed/restore_files.py --gb 1 --runs 9 --out results/restore_files-1gb.json --mergekit mk/bin/mergekit-yaml

Random bf16 shards, a pair of them; 6 of 24 layers are softmax. Each way is run in turn, --runs times, as a process of its own; medians are
reported, with the peak memory of the process. The output of every way is removed outside the clock, and the disk is synced before each start.
Python's bytecode is there, as pip leaves it. `--in-place` is for sizes that the disk has no room for: only what a restore in place reads and writes
is on it, the other tensors are holes, and nothing is copied. `--dir` may lie on a file system that shares blocks (btrfs, XFS)."""
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

LAYERS, SOFTMAX, SHARDS = 24, (3, 7, 11, 15, 19, 23), 4


def write_pair(root: Path, gb: float, holes: tuple = (), hidden=1024, layers=LAYERS, softmax=SOFTMAX, shards=SHARDS, q=0, k=0, **more) -> None:
    """Two checkpoints of `gb` GB: Q and K of q and k rows (default: as large a part as in a small hybrid), and MLP. They carry HypeNet's code,
    which mergekit wants to see. Of those named in `holes` only Q and K are on the disk: nobody reads the rest."""
    import numpy as np

    from qkrestore_nb.hypenet import HypeNetConfig
    per_layer = int(gb * 1e9 / layers / 2 / hidden)                       # rows of width `hidden` in a layer
    q, k = q or int(per_layer * .08), k or int(per_layer * .04)
    kinds = ["attn" if i in softmax else "lightning-attn" for i in range(layers)]
    heads = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=128) | more
    config = HypeNetConfig(vocab_size=16, hidden_size=hidden, num_hidden_layers=layers, mixer_types=kinds, **heads)
    config.architectures = ["HypeNetForCausalLM"]
    for seed, name in enumerate(("pre", "post")):
        config.save_pretrained(root / name)
        rng, where = np.random.default_rng(seed), {}
        block = (rng.standard_normal(1 << 22).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()  # real bf16 numbers, repeated
        for s in range(shards):
            file, header, at, parts = f"model-{s + 1:05d}-of-{shards:05d}.safetensors", {}, 0, []
            for i in range(s * layers // shards, (s + 1) * layers // shards):
                for part, rows in (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("mlp.up_proj", per_layer - q - k)):
                    size, tensor = 2 * rows * hidden, f"model.layers.{i}.{part}.weight"
                    header[tensor] = dict(dtype="BF16", shape=[rows, hidden], data_offsets=[at, at + size])
                    parts.append((at, size, name in holes and not (i in softmax and "attn" in part)))
                    at, where[tensor] = at + size, file
            text = json.dumps(header).encode()
            with open(root / name / file, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                for begin, size, hole in parts:
                    f.seek(8 + len(text) + begin)
                    while size and not hole: size -= f.write(block[:size])
                f.truncate(8 + len(text) + at)
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
CLI = "import sys\nfrom qkrestore_nb.cli import main\nmain(sys.argv[1:])"
PEAK = ("import atexit, os\n"  # of the process alone: what the kernel tells the parent includes the parent's own memory before the exec
        "atexit.register(lambda: open(os.environ['PEAK'], 'w').write(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))))\n")


def environment(folder: Path) -> dict:
    "Of the processes that are measured: with bytecode, as an installed package has it, and without the network."
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | dict(PYTHONPYCACHEPREFIX=str(folder / "bytecode"), PEAK=str(folder / "peak"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")


def run(folder: Path, *command, own_path: bool = True) -> tuple[float, float]:
    "Seconds of one process, and its peak MB where it is one of Python's."
    command, peak, env = [PEAK + c if c in (CLI, LOAD_SAVE) else str(c) for c in command], folder / "peak", environment(folder)
    if not own_path: env.pop("PYTHONPATH", None)
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=env)
    took, mb = time.perf_counter() - start, int(peak.read_text()) / 1024 if peak.exists() else 0.
    peak.unlink(missing_ok=True)
    return took, mb


def interleaved(ways: dict, runs: int, out: Path) -> dict[str, list[tuple[float, float]]]:
    "All ways in turn, the output removed and the disk synced before each; the first round warms the page cache and does not count."
    took: dict[str, list] = {name: [] for name in ways}
    for i in range(runs + 1):
        for name in random.Random(i).sample(list(ways), len(ways)):        # so that no way always follows the same other
            os.sync()
            took[name].append(ways[name]())
            shutil.rmtree(out, ignore_errors=True)
    return {name: t[1:] for name, t in took.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gb", type=float, default=1.), p.add_argument("--runs", type=int, default=9), p.add_argument("--out", type=Path, required=True)
    p.add_argument("--dir", type=Path, default=Path("."), help="where to put the files: the disk that is measured")
    p.add_argument("--mergekit", help="a mergekit-yaml of another environment; without it that way is left out")
    p.add_argument("--without-loading", action="store_true"), p.add_argument("--in-place", action="store_true")
    p.add_argument("--thin-pre", action="store_true", help="of pre only Q and K are on the disk, for checkpoints of which three would not fit")
    args = p.parse_args()
    root, py = Path(tempfile.mkdtemp(prefix="restore-files-", dir=args.dir)).absolute(), sys.executable
    pre, post, out = root / "pre", root / "post", root / "out"
    restore = lambda *words: run(root, py, "-c", CLI, "restore", pre, post, *words)

    def cp_fsync():
        seconds, mb = run(root, "cp", "-r", post, out)
        return seconds + run(root, py, "-S", "-c", SYNC, out)[0], mb
    def in_place():
        took = restore("--in-place")
        run(root, py, "-c", CLI, "undo", post)
        return took
    ways = {"cp -r": lambda: run(root, "cp", "-r", post, out), "cp -r, fsync": cp_fsync,
            "qkrestore restore (copy, patch, fsync, rename)": lambda: restore(out),
            "qkrestore restore --no-sync": lambda: restore(out, "--no-sync"),
            "qkrestore restore --in-place (journal, fsync)": in_place, "qkrestore inspect": lambda: run(root, py, "-c", CLI, "inspect", post),
            "qkrestore --version (start-up)": lambda: run(root, py, "-c", CLI, "--version")}
    if not args.without_loading: ways["safetensors load, replace, save, by shard"] = lambda: run(root, py, "-c", LOAD_SAVE, pre, post, out)
    if args.mergekit:
        more = ("--trust-remote-code", "--no-write-model-card", "--quiet")
        ways["mergekit-yaml"] = lambda: run(root, args.mergekit, root / "recipe.yaml", out, *more, own_path=False)
    if args.in_place: ways = {n: way for n, way in ways.items() if "in-place" in n or "inspect" in n or "version" in n}
    try:
        holes = ("pre", "post") if args.in_place else ("pre",) if args.thin_pre else ()
        write_pair(root, args.gb, holes)
        from qkrestore_nb.hub import mergekit_yaml
        from qkrestore_nb.inspection import inspect_checkpoint
        seen = inspect_checkpoint(post)
        (root / "recipe.yaml").write_text(mergekit_yaml(pre, post))
        load = [os.getloadavg()[0]]
        took = interleaved(ways, args.runs, out)
        load.append(os.getloadavg()[0])
    finally: shutil.rmtree(root, ignore_errors=True)
    median = {n: statistics.median(s for s, _ in t) for n, t in took.items()}
    from qkrestore_nb.core import provenance
    result = provenance(0, gb=args.gb, shards=SHARDS, runs=args.runs, holes=holes, share=seen["moved_bytes"] / seen["bytes"], bytes=seen["bytes"], moved_bytes=seen["moved_bytes"],
                        file_system=subprocess.run(["stat", "-f", "-c", "%T", str(args.dir)], capture_output=True, text=True).stdout.strip())
    result["load_before_and_after"] = load
    beside = {key: median[cp] for key, cp in (("x_cp", "cp -r"), ("x_cp_fsync", "cp -r, fsync")) if cp in median}
    result["ways"] = {n: dict(median_s=m, seconds=[round(s, 4) for s, _ in took[n]], **{key: m / s for key, s in beside.items()},
                              rss_mb=max(mb for _, mb in took[n]) or None) for n, m in median.items()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for n, r in result["ways"].items(): print(f"{n:50} {r['median_s']:8.3f} s ", *(f"{r[key]:6.2f} {key}" for key in beside), f" {r['rss_mb'] or 0:6.0f} MB")


if __name__ == "__main__": main()

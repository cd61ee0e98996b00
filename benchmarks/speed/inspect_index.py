"""`qkrestore inspect` of a checkpoint of a trillion parameters in 2,000 shards:
`python benchmarks/speed/inspect_index.py results/inspect-index.json`.

The shards are sparse files: headers, and holes where the numbers would be. Nine runs, each a process of its own, after
one that warms the page cache; wall and CPU seconds, peak memory, and the load of the machine before."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qkrestore_nb.core import provenance

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, D, FFN, SHARDS = 61, 384, 7168, 2048, 2000
HEADS = dict(num_attention_heads=64, num_key_value_heads=8, head_dim=128)
SIZES = dict(vocab_size=160000, hidden_size=D, num_hidden_layers=LAYERS, full_attention_interval=4)
CONFIG = dict(model_type="qwen3_next", **SIZES, **HEADS)


def shapes() -> dict[str, list[int]]:
    "Name -> shape of every tensor."
    found = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        attention = dict(q=[2 * 8192, D], k=[1024, D], v=[1024, D], o=[D, 8192])
        linear = {"in_proj_qkvz": [12288, D], "out_proj": [D, 4096]}
        for name, shape in (attention if i % 4 == 3 else linear).items():
            found[layer + (f"self_attn.{name}_proj.weight" if i % 4 == 3 else f"linear_attn.{name}.weight")] = shape
        for e in range(EXPERTS):
            for name, shape in dict(gate=[FFN, D], up=[FFN, D], down=[D, FFN]).items():
                found[layer + f"mlp.experts.{e}.{name}_proj.weight"] = shape
    return found


def write(folder: Path) -> tuple[int, int]:
    "The checkpoint; how many tensors and bytes it has."
    items, where, total = list(shapes().items()), {}, 0
    share = -(-len(items) // SHARDS)
    for s in range(SHARDS):
        file, header, at = f"model-{s + 1:05d}-of-{SHARDS:05d}.safetensors", {}, 0
        for name, (rows, columns) in items[s * share:(s + 1) * share]:
            header[name] = dict(dtype="BF16", shape=[rows, columns], data_offsets=[at, at + 2 * rows * columns])
            at, where[name] = at + 2 * rows * columns, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
        total += at
    index = dict(metadata=dict(total_size=total), weight_map=where)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return len(items), total


def run(folder: Path) -> dict:
    "One inspection."
    then = time.perf_counter()
    code = "from qkrestore_nb.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and "A restore moves 30 tensors" in said, said
    wall, cpu = time.perf_counter() - then, usage.ru_utime + usage.ru_stime
    return dict(wall_s=round(wall, 3), cpu_s=round(cpu, 3), peak_mib=round(usage.ru_maxrss / 1024))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tensors, size = write(Path(folder))
        run(Path(folder))
        load, runs = os.getloadavg()[0], [run(Path(folder)) for _ in range(9)]
    medians = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
    config = dict(shards=SHARDS, tensors=tensors, parameters=size // 2, cores=os.cpu_count())
    found = dict(median=medians, load_before=round(load, 2), runs=runs)
    Path(sys.argv[1]).write_text(json.dumps(provenance(0, **config) | found, indent=1) + "\n")
    print(json.dumps(medians))

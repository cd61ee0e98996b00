"""HypeNet's published shapes at full size with random weights, on a GPU machine: `python benchmarks/speed/scale.py OUT [section ...]`.

Sections: 2b 5b 9b (prefill and answers at 128K and 256K), restore_9b (a pair of
17.7 GB checkpoints on this machine's disk), pro_9b (QK-Pro of all softmax layers on the GPU). One json each in OUT; what is finished is
written at once. LENGTHS, BIG (a folder for the large files) and TINY (a dry run anywhere) are environment variables."""
import gc
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

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.families import planned_tensors
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.procrustes import qk_pro
from qkrestore_nb.prose import prose_test, small_tokenizer
from qkrestore_nb.scale import ask, compiled_step, needs

PEAK = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s by the vendor's data sheets
TINY = bool(os.environ.get("TINY"))      # a dry run of this script on any machine
LENGTHS = (2048, 4096) if TINY else tuple(map(int, os.environ.get("LENGTHS", "131072 262144").split()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sync():
    if DEVICE == "cuda": torch.cuda.synchronize()


def clock(f) -> float:
    sync()
    then = time.perf_counter()
    f()
    sync()
    return time.perf_counter() - then


def peak_gb(reset: bool = False) -> float:
    if DEVICE == "cpu": return 0.
    if reset: torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


def shape(size: str) -> HypeNetConfig:
    tiny = dict(hidden_size=128, intermediate_size=256, head_dim=32, lightning_head_dim=32, vocab_size=4096) if TINY else {}
    return HypeNetConfig.preset(size, max_position_embeddings=262144, **tiny)


def make(size: str, seed: int = 0) -> HypeNetForCausalLM:
    "Random weights in bfloat16, made where they are needed."
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE): return HypeNetForCausalLM(shape(size)).eval()
    finally: torch.set_default_dtype(torch.float32)


def record(out: Path, name: str, config: dict, **result):
    from importlib.metadata import PackageNotFoundError, version
    try: config["flash-linear-attention"] = version("fla-core")
    except PackageNotFoundError: pass
    (out / f"{name}.json").write_text(json.dumps({**provenance(0, **config), **result}, indent=1) + "\n")
    print(name, json.dumps({k: v for k, v in result.items() if k != "rows"})[:1000], flush=True)


def reading(out: Path, size: str):
    "Seconds for one needle (reading and answering), and for each further question on the same haystack."
    from transformers import StaticCache
    words, model = small_tokenizer(), make(size)
    first_s = clock(lambda: ask(model, words, prose_test("multikey_1", words, 20000 if not TINY else 1024, 1)[0], room=4))  # kernels are chosen and compiled once
    for T in LENGTHS:
        torch._dynamo.reset()  # a program for this length's cache, not one for any
        cache, step = StaticCache(config=model.config, max_cache_len=T + 8), compiled_step(model) if DEVICE == "cuda" else None
        hay = prose_test("multikey_1", words, T, 1, questions=4)[0]
        one = hay | dict(questions=hay["questions"][:1])
        compile_s = clock(lambda: ask(model, words, prose_test("multikey_1", words, 20000 if not TINY else 1024, 1)[0], 8, cache=cache, step=step))
        peak_gb(reset=True)
        read = [clock(lambda: ask(model, words, one, room=1, cache=cache)) for _ in range(2)]
        answered = clock(lambda: ask(model, words, one, cache=cache, step=step))
        four = clock(lambda: ask(model, words, hay, cache=cache, step=step))
        n = needs(model.config, hay["tokens"])
        mfu = next((n["flops"] / min(read) / p for g, p in PEAK.items() if DEVICE == "cuda" and g in torch.cuda.get_device_name()), None)
        record(out, f"prefill_{size.lower()}_{T // 1024}k", dict(size=size, T=T, chunk=16384, room=128, weights="random"), seconds=answered, tokens=hay["tokens"], read_s=read, answered_s=answered,
               four_questions_s=four, further_question_s=(four - answered) / 3, first_s=first_s, compile_s=compile_s, peak_gpu_gb=peak_gb(), tokens_per_s=hay["tokens"] / min(read), mfu=mfu, needs=n)
        del cache, step
    del model


def watched(command: list[str]) -> tuple[float, float]:
    "Seconds and peak resident MiB of a process of its own."
    then = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "import sys; from qkrestore_nb.cli import main\ntry: main()\nfinally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)",
                           *command], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stdout + done.stderr)
    return time.perf_counter() - then, int(done.stderr.split()[-1]) / 1024


def restoring(out: Path):
    "Restore a full-size pair on disk: time, memory, ratio to cp, and to cp with its bytes on the disk too."
    config = shape("9B")
    with tempfile.TemporaryDirectory(dir=os.environ.get("BIG", None)) as folder:
        folder, written = Path(folder), []
        for seed, name in enumerate(("pre", "post")):
            model = make("9B", seed)
            written.append(clock(lambda: model.save_pretrained(folder / name, max_shard_size="5GB")))
            del model
            gc.collect()
            if DEVICE == "cuda": torch.cuda.empty_cache()
        size = sum(p.stat().st_size for p in (folder / "post").glob("*.safetensors"))
        print("written", size, written, flush=True)
        rows = []
        def cp(then: str = "true"): return lambda: (clock(lambda: subprocess.run(f"cp -r '{folder}/post' '{folder}/out' && {then}", shell=True, check=True)), None)
        ways = {"restore": lambda: watched(["restore", str(folder / "pre"), str(folder / "post"), str(folder / "out"), "--json"]), "cp": cp(), "cp, fsync": cp(f"sync '{folder}'/out/*")}
        for i in range(int(os.environ.get("ROUNDS", 3))):
            for way in random.Random(i).sample(list(ways), 3):
                s, rss = ways[way]()
                rows.append(dict(way=way, seconds=s, peak_rss_mib=rss))
                print(rows[-1], flush=True)
                shutil.rmtree(folder / "out")
            median = {w: statistics.median(r["seconds"] for r in rows if r["way"] == w) for w in ways}
            record(out, "restore_9b", dict(size="9B", bytes=size, tensors=len(planned_tensors(config.to_dict())), fsync=True, weights="random"), seconds=median["restore"], cp_s=median["cp"], cp_fsync_s=median["cp, fsync"],
                   ratio=median["restore"] / median["cp"], ratio_fsync=median["restore"] / median["cp, fsync"], peak_rss_mib=max(r["peak_rss_mib"] or 0 for r in rows), write_s=written, rows=rows)


def pro(out: Path):
    "QK-Pro of all softmax layers of the 9B on the GPU, tensors in bfloat16, both readings."
    config = shape("9B")
    names = planned_tensors(config.to_dict())
    g = torch.Generator(DEVICE).manual_seed(0)
    H, n_kv, D, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    rand = lambda n: torch.randn((H if "q_proj" in n else n_kv) * D, d, generator=g, device=DEVICE)
    pre = {n: (.02 * rand(n)).bfloat16() for n in names}
    post = {n: (pre[n].float() + .002 * rand(n)).bfloat16() for n in names}
    rows = []
    for space in ("input", "head"):
        qk_pro(pre, post, lam=1e-2, space=space, config=config)
        for _ in range(5): rows.append(dict(space=space, seconds=clock(lambda: qk_pro(pre, post, lam=1e-2, space=space, config=config))))
    plain = [clock(lambda: {n: pre[n].clone() for n in names}) for _ in range(5)]
    record(out, "pro_9b", dict(size="9B", tensors=len(names), lam=1e-2, weights="random"), seconds={s: statistics.median(r["seconds"] for r in rows if r["space"] == s) for s in ("input", "head")},
           copying_s=statistics.median(plain), peak_gpu_gb=peak_gb(), rows=rows)


SECTIONS = {"2b": lambda o: reading(o, "2B"), "5b": lambda o: reading(o, "5B"), "9b": lambda o: reading(o, "9B"), "restore_9b": restoring, "pro_9b": pro}

if __name__ == "__main__":
    out, chosen = Path(sys.argv[1]), [a for a in sys.argv[2:] if a in SECTIONS] or list(SECTIONS)
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        then = time.perf_counter()
        try: SECTIONS[name](out)
        except Exception:
            import traceback
            traceback.print_exc()
        gc.collect()
        if DEVICE == "cuda": torch.cuda.empty_cache()
        print(f"== {name}: {time.perf_counter() - then:.0f} s", flush=True)

"""Speed and memory of the linear layers and of HypeNet's 2B shape (random weights) on a GPU, beside flash-linear-attention's own.

    python benchmarks/speed/hypenet_gpu.py OUT [section ...]      sections: forms layer cold cold_model train prefill decode decode_attention

One json a section in OUT. Peers run in the same process, interleaved, medians. Where flash-attn is missing, fla's model class gets PyTorch's
flash attention under flash-attn's name (said in the json): both sides then use the same attention kernel.
"""
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from qkrestore_nb.core import provenance
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM, compile_layers, prefill
from qkrestore_nb.linear_attention import (
    FORMS,
    compare_forms,
    decay_slopes,
    delta_rule_recurrent,
    delta_rule_triton,
    fla_kernels,
    linear_attention,
)

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by the vendor's data sheets


def peak_flops() -> float | None:
    "Of this GPU; None where it is not in the table."
    return next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)


def kv_bytes(config, T: int) -> int:
    "Keys and values of T tokens in bf16."
    return 2 * 2 * config.layer_types.count("full_attention") * config.num_key_value_heads * config.head_dim * T


def timed(f, reps: int = 5, warm: int = 2) -> list[float]:
    "Seconds of each repeat, between device synchronizations."
    out = []
    for i in range(warm + reps):
        torch.cuda.synchronize()
        then = time.perf_counter()
        f()
        torch.cuda.synchronize()
        if i >= warm: out.append(time.perf_counter() - then)
    return out


def flops_per_token(config, T: int, head: bool = True) -> float:
    "Multiply-adds times two of one forward pass, causal attention counted once: a token of a sequence of T."
    d, f = config.hidden_size, config.intermediate_size
    total = 2 * d * config.vocab_size * head
    for kind in config.layer_types:
        total += 2 * 3 * d * f
        if kind == "full_attention":
            qo, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            total += 2 * d * (3 * qo + 2 * kv) + 2 * T * qo            # projections and gate; logits and values, half of T^2 each
        else:
            w = config.lightning_nh * config.lightning_head_dim
            total += 2 * d * 5 * w + 2 * 2 * w * (64 / 2 + config.lightning_head_dim)  # chunks of 64, states
    return total


def forms() -> dict:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for D in (64,): rows += [r | {"dtype": str(dtype)[6:], "D": D} for r in compare_forms(list(FORMS), "cuda", dtype, D=D, lengths=(1, 63, 64, 65, 200, 1000))]
    delta = []
    for T in (64, 200, 1000):
        g = torch.Generator().manual_seed(T)
        q, k, v = (torch.randn(2, T, 3, 64, generator=g).double() for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        a, b = -torch.rand(2, T, 3, generator=g).double(), torch.rand(2, T, 3, generator=g).double()
        q, k, v = (x.bfloat16().double() for x in (q, k, v))
        want, S = delta_rule_recurrent(q, k, v, a, b)
        o, S_ = delta_rule_triton(*(x.cuda().bfloat16() for x in (q, k, v)), a.cuda().float(), b.cuda().bfloat16())
        delta.append({"T": T, "o": ((o.cpu().double() - want).norm() / want.norm()).item(), "state": ((S_.cpu().double() - S).norm() / S.norm()).item()})
    return {"rows": rows, "gated delta rule": delta}


def layer() -> dict:
    chunk = fla_kernels().chunk_simple_gla
    rows = []
    for B, T, H, D in ((16, 2048, 4, 64), (1, 4096, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128)):
        q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        q = (q.detach() * D ** -.5).requires_grad_()
        decay, w = -decay_slopes(H, "cuda"), torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)
        both = {"ours": lambda: linear_attention(q, k, v, decay)[0], "fla": lambda: chunk(q, k, v, g_gamma=decay, scale=1.0, output_final_state=True)[0]}
        if T <= 4096: both["chunked PyTorch"] = lambda: FORMS["chunked"](q.float(), k.float(), v.float(), decay)[0]
        seconds = {name: [] for name in both}
        calls = 50 if T <= 4096 else 5  # a sample is many calls: one of a millisecond is at the mercy of Python
        def many(f):
            for _ in range(calls): f().backward(w)
        for f in both.values(): timed(lambda: f().backward(w), 1, 2)
        for i in range(9):
            for name in random.Random(i).sample(list(both), len(both)):
                seconds[name] += [s / calls for s in timed(lambda: many(both[name]), 1, 1)]
        rows.append({"B": B, "T": T, "H": H, "D": D, "seconds": seconds,
                     "ratio to fla": {n: statistics.median(s) / statistics.median(seconds["fla"]) for n, s in seconds.items()}})
    return {"rows": rows}


COLD = """
import time
import torch, json, sys
from qkrestore_nb.linear_attention import linear_attention, decay_slopes
B, T, H, D = map(int, sys.argv[1:])
q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
torch.cuda.synchronize(); start = time.perf_counter()
decay = -decay_slopes(H, "cuda")
linear_attention(q, k, v, decay)[0].sum().backward()
torch.cuda.synchronize(); first = time.perf_counter() - start
runs = []
for _ in range(20):
    torch.cuda.synchronize(); start = time.perf_counter()
    linear_attention(q, k, v, decay)[0].sum().backward()
    torch.cuda.synchronize(); runs.append(time.perf_counter() - start)
import fla.ops.common.chunk_h as h, fla.ops.common.chunk_o as o
best = {}
for m in (h, o):
    for name in dir(m):
        kernel = getattr(m, name)
        while hasattr(kernel, "fn") and not hasattr(kernel, "configs"): kernel = kernel.fn
        if getattr(kernel, "best_config", None) is not None: best[name] = str(kernel.best_config)
print(json.dumps({"first_s": first, "warm_s": sorted(runs)[10], "best": best}))
"""


def cold() -> dict:
    rows = []
    for shape, modes in (("16 2048 4 64", ("narrow", "full")), ("1 32768 16 128", ("narrow",))):
        for mode in modes:
            with tempfile.TemporaryDirectory() as cache:
                env = {**os.environ, "TRITON_CACHE_DIR": cache, "QKRESTORE_AUTOTUNE": mode}
                out = subprocess.run([sys.executable, "-c", COLD, *shape.split()], env=env, capture_output=True, text=True)
                if out.returncode: raise RuntimeError(out.stderr[-2000:])
                rows.append({"shape B T H D": shape, "tiles": mode, **json.loads(out.stdout.splitlines()[-1])})
                if mode == "narrow":  # a second process with the compiled kernels on disk
                    again = subprocess.run([sys.executable, "-c", COLD, *shape.split()], env=env, capture_output=True, text=True)
                    rows[-1]["second_process_first_s"] = json.loads(again.stdout.splitlines()[-1])["first_s"]
    return {"rows": rows}


COLD_MODEL = """
import json, sys, time
begun = time.perf_counter()
import torch
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM, prefill
imported = time.perf_counter() - begun
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    if sys.argv[1] == "course":
        from qkrestore_nb.experiment import pair
        model = HypeNetForCausalLM(HypeNetConfig.from_pretrained(pair() / "pre"))
    else: model = HypeNetForCausalLM(HypeNetConfig.preset("2B"))
torch.set_default_dtype(torch.float32)
ids = torch.randint(0, model.config.vocab_size, (1, int(sys.argv[2])), device="cuda")
made = time.perf_counter() - begun
prefill(model.eval(), ids, 16384)
torch.cuda.synchronize(); read = time.perf_counter() - begun
model.train()(ids[:, :4096], labels=ids[:, :4096], use_cache=False).loss.backward()
torch.cuda.synchronize(); print(json.dumps(dict(imported_s=imported, made_s=made, read_s=read, trained_s=time.perf_counter() - begun)))
"""


def cold_model() -> dict:
    "From an empty cache of kernels: seconds until a process has read its first text, and has its first gradient."
    rows = []
    for name, T in (("course", 32768), ("2B", 32768)):
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, "TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache + "/inductor"}
            for again in (False, True):
                out = subprocess.run([sys.executable, "-c", COLD_MODEL, name, str(T)], env=env, capture_output=True, text=True)
                if out.returncode: raise RuntimeError(out.stderr[-2000:])
                rows.append(dict(model=name, T=T, kernels_on_disk=again) | json.loads(out.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    return {"rows": rows}


def flash_attn_from_torch():
    "PyTorch's flash attention under flash-attn's name."
    try:
        import flash_attn
        return getattr(flash_attn, "instead", "flash-attn")
    except ImportError: pass
    def flash_attn_func(q, k, v, causal=True, window_size=(-1, -1), **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True).transpose(1, 2)
    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, None
    module.__spec__ = types.SimpleNamespace(name="flash_attn", loader=None, origin=None, submodule_search_locations=None)
    sys.modules["flash_attn"], module.instead = module, "PyTorch's attention under flash-attn's name"
    return module.instead


def make(which: str):
    "The 2B shape, random weights, bf16, on the GPU."
    torch.manual_seed(0)
    config = HypeNetConfig.preset("2B")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            if which == "ours": model = HypeNetForCausalLM(config)
            else:
                from fla.models import RetNetConfig, RetNetForCausalLM
                model = RetNetForCausalLM(RetNetConfig(
                    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_heads=16, expand_k=1.0, expand_v=1.0, vocab_size=config.vocab_size,
                    tie_word_embeddings=True, max_position_embeddings=262144,
                    attn={"layers": [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"], "num_heads": 16, "num_kv_heads": 8,
                          "qkv_bias": False, "qk_norm": True, "window_size": None, "rope_theta": 1e6}))
    finally: torch.set_default_dtype(torch.float32)
    return model, config


def free(*_):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def attention_backends():
    "cuDNN's attention first (faster on Hopper), PyTorch's flash attention else: for both sides."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def profile(step) -> None:
    "Where one step's time goes, printed."
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record
    with record(activities=[ProfilerActivity.CUDA]) as p: step()
    rows = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)[:16]
    for e in rows: print(f"{e.self_device_time_total / 1e3:9.1f} ms {e.count:5d}x {e.key[:90]}")


def train() -> dict:
    "Forward and backward, loss included, no optimizer; the same fused loss for both."
    from fla.modules import FusedLinearCrossEntropyLoss
    loss_of, rows, flash = FusedLinearCrossEntropyLoss(), [], flash_attn_from_torch()
    torch.set_float32_matmul_precision("high")  # fla's fused loss sums the head's gradient in float32: not on the slow units
    plan = [(8, 4096, 0), (1, 32768, 0), (1, 131072, 28), (1, 262144, 28)]
    if torch.cuda.get_device_properties(0).total_memory < 100e9: plan[:2] = [(4, 4096, 0), (1, 32768, 8)]
    for which in ("ours", "fla", "ours, whole layers"):
        free()
        model, config = make("fla" if which == "fla" else "ours")
        model.train()
        if which == "ours": compile_layers(model)
        if which == "ours, whole layers":
            for block in model.model.layers: block.compile(fullgraph=True)
        for B, T, checkpointed in plan:
            if which == "ours, whole layers" and T != 32768: continue
            ids = torch.randint(0, config.vocab_size, (B, T), device="cuda")
            model.gradient_checkpointing_disable()
            if checkpointed: model.gradient_checkpointing_enable()
            if 0 < checkpointed < 28:
                for i, block in enumerate(model.model.layers): block.gradient_checkpointing = i < checkpointed
            def step():
                x = model.model(ids, use_cache=False).last_hidden_state
                loss_of(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), model.lm_head.weight).backward()
                model.zero_grad(set_to_none=False)
            free()
            row = {"model": which, "B": B, "T": T, "layers checkpointed": checkpointed}
            try:
                with attention_backends():
                    then = time.perf_counter()
                    step()
                    torch.cuda.synchronize()
                    row["first_s"] = time.perf_counter() - then
                    row["seconds"] = timed(step, 1, 0) if T > 100000 else timed(step, 5, 1)
                    if which == "ours" and T == 32768: profile(step)
            except Exception as e: row["error"] = f"{type(e).__name__}: {e}"[:300]  # one variant's failure must not cost the others
            else:
                s = statistics.median(row["seconds"])
                row |= {"tokens_per_s": B * T / s, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
                if which != "fla" and (peak := peak_flops()): row["mfu"] = 3 * flops_per_token(config, T) * B * T / s / peak
            print(row, flush=True)
            rows.append(row)
        del model, step
    return {"attention of fla's class": flash, "rows": rows}


def prefilling() -> dict:
    rows, flash = [], flash_attn_from_torch()
    for which, chunk in (("ours", 16384), ("ours", 32768), ("fla", None)):
        free()
        model, config = make(which)
        model.eval()
        weights = torch.cuda.memory_allocated()
        if which == "ours": compile_layers(model)
        for T in (4096, 32768, 131072, 262144):
            ids = torch.randint(0, config.vocab_size, (1, T), device="cuda")
            def read():
                if which == "ours":
                    from transformers import StaticCache
                    return prefill(model, ids, chunk, StaticCache(config=config, max_cache_len=T))[0]
                with torch.no_grad(): return model(ids, use_cache=True, logits_to_keep=1).logits
            free()
            with attention_backends():
                seconds = timed(read, 2 if T > 100000 else 5, 1)
                if T == 32768: profile(read)
            s = statistics.median(seconds)
            kv = kv_bytes(config, T)
            row = {"model": which, "chunk": chunk, "T": T, "seconds": seconds, "tokens_per_s": T / s, "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                   "weights_gb": weights / 1e9, "kv_gb": kv / 1e9, "beyond weights and kv, gb": (torch.cuda.max_memory_allocated() - weights - kv) / 1e9}
            if which == "ours" and (peak := peak_flops()): row["mfu"] = flops_per_token(config, T, head=False) * T / s / peak
            print(row, flush=True)
            rows.append(row)
        del model, read
    return {"attention of fla's class": flash, "rows": rows}


def decoding(T: int = 32768, n: int = 64) -> dict:
    "Time per token after T tokens, beside the time to read weights, cache and states once at the bandwidth of a large copy."
    from transformers import StaticCache
    a = torch.empty(2 ** 31, dtype=torch.uint8, device="cuda")
    copy = statistics.median(timed(lambda: a.clone(), 9))
    bandwidth = 2 * a.numel() / copy
    del a
    free()
    model, config = make("ours")
    model.eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(0, config.vocab_size, (1, T), device="cuda")
    cache = StaticCache(config=config, max_cache_len=T + 3 * n + 16)
    logits, _ = prefill(model, ids, 16384, cache)
    states = sum(layer.recurrent_states[0].numel() * 4 for layer in cache.layers if hasattr(layer, "recurrent_states"))
    floor = (weights + kv_bytes(config, T) + 2 * states) / bandwidth
    token = logits.argmax(-1)
    rows = {}
    def run(step, steps):
        nonlocal token
        out = []
        for _ in range(steps):
            torch.cuda.synchronize()
            then = time.perf_counter()
            token = step(input_ids=token, past_key_values=cache).logits.argmax(-1).clone()
            torch.cuda.synchronize()
            out.append(time.perf_counter() - then)
        return out
    with torch.no_grad():
        rows["eager"] = run(model.forward, 12)[2:]
        ways = {"compiled, CUDA graph": dict(mode="reduce-overhead"),  # a product with one row is a sum over columns: no tiles, all of the bandwidth
                "products as sums": dict(options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})}
        compile_s = {}
        for name, how in ways.items():
            torch._dynamo.reset()
            then = time.perf_counter()
            compiled = torch.compile(model.forward, fullgraph=True, **how)
            run(compiled, 3)
            compile_s[name] = time.perf_counter() - then
            rows[name] = run(compiled, n)
            print(name, compile_s[name], statistics.median(rows[name]), flush=True)
            profile(lambda: run(compiled, 1))
    medians = {name: statistics.median(s) for name, s in rows.items()}
    return {"T": T, "bandwidth_gb_s": bandwidth / 1e9, "floor_s": floor, "seconds": rows, "median_s": medians, "compile_s": compile_s,
            "times the floor": {name: s / floor for name, s in medians.items()}}


def decode_attention() -> dict:
    "One query against a long cache: seconds and GB/s, for lengths of whole pieces of 512 and not. By hand: two products, the values in pieces of 512, which are added afterwards."
    from qkrestore_nb.softmax_attention import fused_attention
    rows = []
    for H, S in ((16, 131072), (16, 131072 + 8), (32, 262144), (32, 262144 + 8)):
        q = torch.randn(1, 1, H, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, 8, S, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        mask = (torch.arange(S, device="cuda") < S - 64)[None, None, None]
        for x in (k, v, mask): torch._dynamo.mark_static_address(x)  # as transformers marks a static cache; what may move is copied before each replay
        def by_hand(q):
            n, e = S // 512, (q.view(1, 8, H // 8, 128) @ k.mT).float() * 128 ** -.5
            weights = e.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
            o = weights[..., 512 * n:] @ v[:, :, 512 * n:]
            pieces = weights[..., :512 * n].unflatten(-1, (n, 512)).transpose(2, 3) @ v[:, :, :512 * n].unflatten(2, (n, 512))
            return (o + pieces.float().sum(2).to(o.dtype)).view(1, 1, H, 128)
        def fused(q): return fused_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        torch.testing.assert_close(by_hand(q), fused(q), rtol=.05, atol=1e-3)
        torch._dynamo.reset()
        captured = {f"{name}, captured": torch.compile(f, mode="reduce-overhead", fullgraph=True) for name, f in (("by hand", by_hand), ("fused_attention", fused))}
        for name, run in ({"by hand": by_hand, "fused_attention": fused, "by hand, logits alone": lambda q: q.view(1, 8, H // 8, 128) @ k.mT} | captured).items():
            s = statistics.median(timed(lambda: run(q), 20, 4))
            rows.append(dict(H=H, S=S, way=name, seconds=s, gb_s=(1 if "logits" in name else 2) * k.numel() * 2 / s / 1e9))
            print(rows[-1], flush=True)
        profile(lambda: fused(q))
    return {"rows": rows}


SECTIONS = {"forms": forms, "layer": layer, "cold": cold, "cold_model": cold_model, "train": train, "prefill": prefilling, "decode": decoding, "decode_attention": decode_attention}

if __name__ == "__main__":
    flash_attn_from_torch()  # before anything imports fla
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(SECTIONS)
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        then = time.perf_counter()
        try: result = SECTIONS[name]()
        except Exception as e:
            import traceback
            traceback.print_exc()
            result = {"error": f"{type(e).__name__}: {e}"[:2000]}
        wall = time.perf_counter() - then
        from importlib.metadata import version
        record = {**result, **provenance(0, section=name, **{"flash-linear-attention": version("fla-core")}), "wall_s": wall}
        (out / f"hypenet-gpu-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"== {name}: {wall:.0f} s", json.dumps({k: v for k, v in result.items() if k not in ("rows", "seconds")})[:600], flush=True)
        if name in ("layer", "cold"): print(json.dumps([{k: v for k, v in r.items() if k != "seconds"} for r in result.get("rows", [])], indent=0)[:3500])
        if name == "forms" and "rows" in result:
            for dtype in ("float32", "bfloat16"):
                for form in FORMS:
                    r = [x for x in result["rows"] if x["form"] == form and x["dtype"] == dtype]
                    print(dtype, form, {p: f"{max(x[p] for x in r):.1e}" for p in ("o", "state", "grad")})

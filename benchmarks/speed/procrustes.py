"""QK-Pro at the shapes of the 9B's softmax layers beside the literal formulas: `python benchmarks/speed/procrustes.py OUT [--device cuda] [--repeats 3]`.

One layer of each is timed, interleaved, with random bf16 weights; all nine layers once with ours. Literal, head space: W transposed,
the inverse of a d_model x d_model matrix for each key head. Literal, input space: the d_model x d_model projector. Left to right, input space:
the same formula multiplied from the left, which never makes the projector."""
import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.procrustes import solve_queries

LAYERS, H, N_KV, D, D_MODEL, LAM = 9, 32, 8, 128, 4096, .1


def head_literal(pre, post, k):
    "One key head after another, d_model x d_model each time."
    out = []
    for p, q, K in zip(*(w.float().unflatten(0, (N_KV, -1)) for w in (pre, post, k))):
        K = K.T                                              # (d_model, D)
        G = K @ K.T                                          # (d_model, d_model)
        ridge = LAM * (K.T @ K).diagonal().mean()            # the mean eigenvalue of the part that is not zero
        inverse = torch.linalg.inv(G + ridge * torch.eye(D_MODEL, device=k.device))
        for a, b in zip(p.unflatten(0, (-1, D)), q.unflatten(0, (-1, D))):
            R = (a.T @ K.T) - b.T @ K.T                      # R_pre - W_Q K^T, (d_model, d_model)
            out.append((b.T + R @ (inverse @ K)).T)      # from the right, which is kinder to it
    return torch.cat(out)


def input_literal(pre, post, k):
    pre, post, K = pre.float(), post.float(), k.float()
    G = K @ K.T
    P = K.T @ torch.linalg.inv(G + LAM * G.diagonal().mean() * torch.eye(len(G), device=k.device)) @ K
    return post + (pre - post) @ P


def input_left_to_right(pre, post, k):
    pre, post, K = pre.float(), post.float(), k.float()
    G = K @ K.T
    return post + (pre @ K.T - post @ K.T) @ torch.linalg.inv(G + LAM * G.diagonal().mean() * torch.eye(len(G), device=k.device)) @ K


WAYS = {"head, ours": lambda *w: solve_queries(*w, N_KV, LAM, space="head"), "head, literal": head_literal,
        "input, ours": lambda *w: solve_queries(*w, N_KV, LAM), "input, literal": input_literal, "input, left to right": input_left_to_right}


def seconds(f, device) -> float:
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    sync()
    then = time.perf_counter()
    f()
    sync()
    return time.perf_counter() - then


def extra_bytes(f, device) -> int:
    "Peak memory while f runs beyond what was there before: of the GPU, or the process's resident memory, looked at every 2 ms."
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    before, peak, done = now(), [0], threading.Event()
    def look():
        while not done.wait(.002): peak[0] = max(peak[0], now())
    watcher = threading.Thread(target=look)
    watcher.start()
    f()
    done.set()
    watcher.join()
    return peak[0] - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    draw = lambda rows: (torch.randn(rows, D_MODEL, device=args.device) * D_MODEL ** -.5).bfloat16()
    layers = [(draw(H * D), draw(H * D), draw(N_KV * D)) for _ in range(LAYERS)]
    error = {}
    for space in ("head", "input"):
        a, b = WAYS[f"{space}, ours"](*layers[0]), WAYS[f"{space}, literal"](*layers[0])
        error[space] = ((a - b).norm() / b.norm()).item()
        assert error[space] < 1e-3, (space, error[space])
    times = {name: [] for name in WAYS}
    for _ in range(args.repeats):
        for name, f in WAYS.items(): times[name].append(seconds(lambda: f(*layers[0]), args.device))
    median = {name: statistics.median(t) for name, t in times.items()}
    nine, extra = {}, {}
    for space in ("head", "input"):
        run = lambda: [WAYS[f"{space}, ours"](*layer).bfloat16() for layer in layers] and None
        nine[space] = statistics.median(seconds(run, args.device) for _ in range(3))
        extra[space] = extra_bytes(lambda: WAYS[f"{space}, ours"](*layers[0]).bfloat16(), args.device)
    result = dict(seconds_one_layer=times, median_s=median, relative_difference=error, nine_layers_s=nine, extra_bytes=extra,
                  literal_over_ours={space: median[f"{space}, literal"] / median[f"{space}, ours"] for space in ("head", "input")},
                  left_to_right_over_ours=median["input, left to right"] / median["input, ours"])
    shape = dict(layers=LAYERS, H=H, n_kv=N_KV, D=D, d_model=D_MODEL, lam=LAM)
    args.out.write_text(json.dumps({**provenance(0, **shape), **result}, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "seconds_one_layer"}, indent=1))

"""What RecallMonitor costs: `python benchmarks/speed/monitor.py OUT.json --device cuda` trains a small hybrid with it and
measures both.

A step is forward and backward of --rows rows of --row-tokens tokens with AdamW; a look is --haystacks haystacks of
--length tokens, with the drift of W_Q and W_K. The overhead at N steps between looks is (median look) / (N * median
step). The looks of the run are real: the share that the monitor itself reports of the whole run stands beside it.
Tiny: --layers 2 --width 64 --rows 2 --row-tokens 128 --length 512 --haystacks 2 --steps 12."""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

from qkrestore_nb.core import provenance
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.monitor import RecallMonitor
from qkrestore_nb.recall import recall_test
from qkrestore_nb.training import init_weights

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--device", default="cpu")
parser.add_argument("--bf16", action="store_true", help="autocast the steps to bfloat16")
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--width", type=int, default=256)
parser.add_argument(
    "--rows", type=int, default=128, help="of a step; 128 rows of 128 tokens is the recipe of the course"
)
parser.add_argument("--row-tokens", type=int, default=128)
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--haystacks", type=int, default=16)
parser.add_argument("--every", type=int, default=50)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
cuda = args.device.startswith("cuda")

torch.manual_seed(args.seed)
mixers = ["lightning-attn", "attn", "attn"] + ["lightning-attn"] * 5
model = init_weights(
    HypeNetForCausalLM(
        HypeNetConfig(
            vocab_size=512,
            hidden_size=args.width,
            intermediate_size=11 * args.width // 4,
            num_hidden_layers=args.layers,
            head_dim=64,
            num_attention_heads=max(1, args.width // 64),
            mixer_types=mixers[: args.layers],
            attn_use_rope=False,
            attn_use_output_gate=True,
            attn_logits_scaling="hype 500",
            lightning_use_qk_norm=True,
            lightning_use_output_norm=True,
            lightning_use_output_gate=True,
            lightning_use_short_conv=True,
        )
    )
).to(args.device)
opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
rows = torch.randint(512, (args.rows, args.row_tokens), device=args.device)
monitor = RecallMonitor(every=args.every, probe=recall_test("MK", args.haystacks, args.length, 1, args.seed))


def step():
    with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
        loss = model(rows, labels=rows, use_cache=False).loss
    loss.backward()
    opt.step()
    opt.zero_grad(set_to_none=True)


began = time.perf_counter()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # a model that was never trained finds nothing
    monitor.start(model)
    for _ in range(2):
        step()  # warm-up
    seconds = []
    for i in range(1, args.steps + 1):
        then = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - then)
        monitor.look(model, i)
looks = [r.seconds for r in monitor.readings[1:]]
if not looks:
    parser.error(f"--steps {args.steps} with --every {args.every}: no look fell due")
each, look = statistics.median(seconds), statistics.median(looks)
made = dict(
    **provenance(
        args.seed, **{k: v for k, v in vars(args).items() if k not in ("out", "seed")}, mixers=mixers[: args.layers]
    ),
    wall_s=round(time.perf_counter() - began, 1),
    parameters=sum(p.numel() for p in model.parameters()),
    step_s=each,
    look_s=look,
    looks=looks,
    overhead={str(n): look / (n * each) for n in (10, 50, 100)},
    overhead_of_the_run=monitor.overhead(),
)
args.out.write_text(json.dumps(made, indent=1) + "\n")
print(
    f"a look {look:.2f} s, a step {each:.2f} s: {100 * made['overhead']['50']:.1f}% at 50 steps between looks; "
    f"the run's own share {100 * monitor.overhead():.1f}%"
)

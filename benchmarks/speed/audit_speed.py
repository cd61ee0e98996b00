"""How fast an audit asks beside the model's own prefill.

    python benchmarks/speed/audit_speed.py results/audit-speed-cpu.json

Asking is `scale.right_in_prose`, which audit and repair use: a haystack is read once, and each of its questions goes on
from there with a generated answer. Prefill is the model's forward of the same tokens in the same pieces: haystack and
questions once. A model with random weights, whose answers never end by themselves, so the tokens of an answer are set:
`--room 9` is RULER's seven digits and an end, 128 what an audit allows at most. In turns, one warm-up each."""

import argparse
import json
import statistics
import time
from os.path import commonprefix
from pathlib import Path

import torch
from transformers import set_seed

from qkrestore_nb.core import provenance
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM, prefill
from qkrestore_nb.prose import prompt, prose_test, small_tokenizer
from qkrestore_nb.scale import right_in_prose

CHUNK = 16384


def hybrid(hidden: int, layers: int) -> HypeNetForCausalLM:
    set_seed(0)
    kinds = ["attn" if i % 4 == 1 else "lightning-attn" for i in range(layers)]
    config = HypeNetConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, mixer_types=kinds,
    )
    return HypeNetForCausalLM(config).eval()


def seconds(work) -> float:
    then = time.perf_counter()
    work()
    return time.perf_counter() - then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--room", type=int, nargs="+", default=[9, 128])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer, model = small_tokenizer(1000, 20000), hybrid(args.hidden, args.layers)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None  # so that no answer ends early
    rows = []
    for T in args.tokens:
        for kind, questions in (("single_2", 1), ("multikey_2", 8)):
            hays = prose_test(kind, tokenizer, T, 1, questions, 0, 128)
            prompts = [tokenizer(prompt(hays[0], q))["input_ids"] for q in hays[0]["questions"]]
            shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
            parts = [prompts[0][:shared], *(ids[shared:] for ids in prompts)]

            @torch.no_grad()
            def read(parts=parts):
                cache = None
                for ids in parts:
                    _, cache = prefill(model, torch.tensor([ids]), CHUNK, cache)

            ways = {f"asking, {n} tokens": lambda n=n: right_in_prose(model, tokenizer, hays, n, CHUNK)
                    for n in args.room} | dict(prefill=read)  # fmt: skip
            for way in ways.values():
                way()
            took = [{name: seconds(way) for name, way in ways.items()} for _ in range(args.repeats)]
            median = {name: statistics.median(t[name] for t in took) for name in ways}
            share = {name: median["prefill"] / s for name, s in median.items() if name != "prefill"}
            row = dict(kind=kind, tokens=T, questions=questions, read=sum(map(len, parts)), median_s=median)
            rows.append(row | dict(share_of_prefill=share, all_s=took))
            print(kind, T, {name: f"{x:.0%}" for name, x in share.items()}, flush=True)
    record = provenance(0, hidden=args.hidden, layers=args.layers, repeats=args.repeats)
    args.out.write_text(json.dumps(record | dict(parameters=model.num_parameters(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()

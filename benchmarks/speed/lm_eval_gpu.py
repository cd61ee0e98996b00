"""RULER's needles by lm-eval and by `ask`, on the same prompts: answers, scores, seconds. The 2B shape, random weights.

    python benchmarks/speed/lm_eval_gpu.py OUT [--lengths 32768 131072] [--limit 2] [--tiny]

The vocabulary is the tokenizer's: every answer is text. Random weights score nothing, so answers are compared, too."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from many_gpus import SMOKE
from transformers import StaticCache

from qkrestore_nb.core import provenance
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.prose import local_text, prose_test, score, small_tokenizer
from qkrestore_nb.scale import ask, compiled_step, continued, lm_eval_scores

TASKS = ["niah_single_1", "niah_single_2", "niah_multikey_1"]
GPU = torch.cuda.is_available()


def clock(f):
    if GPU:
        torch.cuda.synchronize()
    then = time.perf_counter()
    got = f()
    if GPU:
        torch.cuda.synchronize()
    return got, time.perf_counter() - then


def make(tokenizer, tiny: bool) -> HypeNetForCausalLM:
    config = HypeNetConfig.preset(
        "2B", **(SMOKE if tiny else {}) | dict(vocab_size=len(tokenizer), max_position_embeddings=262144)
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    try:
        with torch.device("cuda" if GPU else "cpu"):
            return HypeNetForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def by_lm_eval(model, tokenizer, T: int, limit: int, words) -> tuple[dict, list[dict], float]:
    "lm-eval's scores, its samples, its seconds."
    import lm_eval

    kept, whole = {}, lm_eval.simple_evaluate

    def keeping(*given, **how):
        got = whole(*given, log_samples=True, **how)
        kept.update(got["samples"])
        return got

    lm_eval.simple_evaluate = keeping
    try:
        scores, seconds = clock(lambda: lm_eval_scores(model, tokenizer, TASKS, (T,), limit=limit, essay=words))
    finally:
        lm_eval.simple_evaluate = whole
    return scores, [s | dict(task=task) for task, samples in kept.items() for s in samples], seconds


def by_us(model, tokenizer, prompts: list[str], room: int) -> tuple[list[str], float]:
    "The same prompts, each read alone, into one static cache."
    ids = [torch.tensor([tokenizer(p)["input_ids"]], device=model.device) for p in prompts]
    cache = StaticCache(config=model.config, max_cache_len=max(x.shape[1] for x in ids) + room + 8)
    step = compiled_step(model) if GPU else None

    def said(x):
        cache.reset()
        return tokenizer.decode(continued(model, x, cache, room, {tokenizer.eos_token_id}, step))

    with torch.no_grad():
        said(ids[0])  # the program is compiled once
        return clock(lambda: [said(x) for x in ids])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--lengths", type=int, nargs="*", default=[32768, 131072])
    p.add_argument("--limit", type=int, default=2)
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args()
    tokenizer = small_tokenizer()
    model, words, rows = make(tokenizer, a.tiny), local_text(), []
    for T in a.lengths:
        scores, samples, seconds = by_lm_eval(model, tokenizer, T, a.limit, words[:3000] if a.tiny else words)
        prompts, theirs = (
            [
                s["arguments"]["gen_args_0"]["arg_0"] if isinstance(s["arguments"], dict) else s["arguments"][0][0]
                for s in samples
            ],
            [s["resps"][0][0] for s in samples],
        )
        ours, own_s = by_us(model, tokenizer, prompts, 128)
        values = [s["doc"]["outputs"] for s in samples]
        hay = prose_test("multikey_1", tokenizer, T, 1, questions=4)[0]
        cache = StaticCache(config=model.config, max_cache_len=T + 8)
        _, four_s = clock(lambda: ask(model, tokenizer, hay, cache=cache, step=compiled_step(model) if GPU else None))
        begins = [
            min(len(x), len(y)) and next((i for i, (c, d) in enumerate(zip(x, y)) if c != d), min(len(x), len(y)))
            for x, y in zip(ours, theirs)
        ]
        row = dict(
            T=T,
            samples=len(samples),
            lm_eval_s=seconds,
            ours_s=own_s,
            four_questions_of_one_haystack_s=four_s,
            per_sample_s=dict(lm_eval=seconds / len(samples), ours=own_s / len(samples), ours_sharing=four_s / 4),
            same_answers=sum(x.strip() == y.strip() for x, y in zip(ours, theirs)),
            same_characters=statistics.mean(begins),
            same_scores=sum(score(x, v) == score(y, v) for x, y, v in zip(ours, theirs, values)),
            scores=scores,
        )
        rows.append(row)
        print({k: v for k, v in row.items() if k != "scores"}, flush=True)
        a.out.mkdir(parents=True, exist_ok=True)
        record = dict(**provenance(0, size="2B", tasks=TASKS, limit=a.limit, vocabulary=len(tokenizer)), rows=rows)
        (a.out / "lm_eval_2b.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

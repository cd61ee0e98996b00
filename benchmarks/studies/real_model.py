"""A real language model made a hybrid, fine-tuned, and repaired, stage by stage: `python benchmarks/studies/real_model.py RUNS OUT [--minutes M] [--profile P] [--hybrid FOLDER] [--at-once N] [stage ...]`.

Stages, in order: texts-N (drawn from the teacher), questions (what every model is asked), layers (which softmax layers stay), teacher (its recall
and word problems), align, distil, long (distilling on longer texts), hybrid (its recall), data (how often each fine-tuning reads what it is given),
range (how far gradients of chains and of chat reach), soft (the unconverted model in our classes), nope, nope-long, nope-hybrid (distil to hybrid
again without RoPE in the softmax layers, as HypeNet has it); then for each seed sft-N, strong-N (word problems at five times the rate, which damages;
every variant for the first seed), lora-N (word problems with an adapter), softstrong-N (word problems at five times the rate, for the unconverted model),
chat-N (conversations without chains, so few that they are read six times), repair-N (word problems), middle-N (at two and a half times the rate); and once
wherestrong-0 and where-0 (what strong and chat damage, layer by layer), nopestrong-0 and nope-0 (word problems at either rate), soft-0, softchat-0, fresh-0 and
softfresh-0 (more conversations, read one and a half times), repeated-0 (fewer word problems, read seven times).

A stage that is done is passed over; one that is interrupted goes on where its last save was. With --at-once 4 up to four stages a GPU that do not wait
for each other run side by side, in processes of their own, on every GPU that is visible; those that make the hybrid have the first one to themselves.
Start NVIDIA's MPS before (nvidia-cuda-mps-control -d): without it processes use a GPU by turns.
RUNS holds weights and texts, OUT gets one json a stage (that of an unfinished stage says so), and timeline.json, which says when each ran and where.

Profiles: gpu (28 minutes of two H100 with --at-once 4; less than an hour of one, by that), colab (a T4: fine-tunes and repairs a hybrid that
--hybrid names, once), small (two cores, an hour and a half: the stages questions and strong-seed0, from a hybrid, with 200,000 tokens), cpu (up to align in
half an hour on two cores), tiny (random weights, to see that the path works)."""
import argparse
import fcntl
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkrestore_nb import distill
from qkrestore_nb.audit import solve
from qkrestore_nb.core import pick_profile, provenance
from qkrestore_nb.diagnostics import autocorrelation, fit_decay, gradient_range
from qkrestore_nb.finetune import encode_chat, finetune
from qkrestore_nb.hypenet import compile_layers
from qkrestore_nb.prose import local_text
from qkrestore_nb.variants import variant

GPU = dict(keep=8, layers=dict(T=512, window=64, texts=16, answers=128), texts=dict(files=2, n=8192, T=512, rows=4096), needles={512: 200, 1024: 200, 2048: 200, 4096: 100, 8192: 100},
           tokens=32768, align=dict(T=512, steps=250, lr=1e-3, warmup=20), distil=dict(T=2048, steps=1200, lr=5e-4, warmup=50), long=dict(T=8192, steps=150, lr=1e-4, warmup=10),
           recall={512: 64, 1024: 64, 2048: 64, 4096: 32, 8192: 32}, problems=20000, tasks=128, room=272, sft=dict(steps=300, T=8192, rows=2, lr=3e-4), seeds=3,
           variants=["post", "restored", "pre", "vo", "first linear mixer", "all mixers", "qk of linear layers", "vo of linear layers", "interpolated 0.9", "qk of all layers", "MLPs", "LiNeS 0.8", "interpolated 0.75", "drift alone",
                     "embedding and head", "q", "k", "v", "o", "noise", "pro head 1", "pro input 1", "pro head 0.1", "pro input 0.1"], where=dict(chat=dict(single_3=2048), strong=dict(multikey_1=512, single_2=4096)))
GPU |= dict(some=GPU["variants"][:10], few=["post", "restored", "pre", "vo", "interpolated 0.9", "all mixers"])
RECIPES = dict(gpu=GPU, colab=GPU | dict(recall={512: 32, 2048: 32}, tasks=64, sft=dict(steps=150, T=2048, rows=8, lr=3e-4), seeds=1, variants=GPU["few"]),
               small=GPU | dict(recall={512: 24}, tasks=2, problems=4000, seeds=1, sft=dict(steps=100, T=2048, rows=1, lr=3e-4),
                                variants=["post", "pre", "restored", "vo", "all mixers", "qk of linear layers", "vo of linear layers", "MLPs", "interpolated 0.9", "first linear mixer", "embedding and head"]),
               cpu=GPU | dict(asked="bfloat16", recall={512: 64, 1024: 64, 2048: 64}, tasks=8, problems=64, seeds=1, texts=dict(files=1, n=64, T=256, rows=64), tokens=2048, align=GPU["align"] | dict(steps=80, warmup=8)),
               tiny=GPU | dict(keep=1, layers=dict(T=600, window=8, texts=2, answers=2), texts=dict(files=2, n=32, T=64, rows=32), needles={600: 2, 800: 2}, tokens=1800, align=dict(T=600, steps=3, lr=1e-3, warmup=1),
                               distil=dict(T=700, steps=3, lr=4e-4, warmup=1), long=dict(T=900, steps=2, lr=1e-4, warmup=1), recall={600: 1}, problems=40, tasks=4, room=16,
                               sft=dict(steps=2, T=256, rows=2, lr=2e-4), seeds=1, variants=["pre", "post", "restored"], where=dict(chat=dict(single_3=600), strong=dict(multikey_1=600, single_2=600)), some=["pre", "post"], few=["pre", "post"]))
FASTER = dict(lora=5, strong=5, middle=2.5)  # word problems at a multiple of the rate
LIGHT = ("questions", "layers", "data")  # stages that do next to nothing on the GPU
KINDS = ("single_1", "single_2", "single_3", "multikey_1")


class TimeIsUp(Exception): "What is done is kept, and the stage goes on another time."


def is_hybrid(config) -> bool: return "linear_attention" in (getattr(config, "layer_types", None) or [])


class Run:
    "Where things lie, the recipe, and the machine."
    def __init__(self, runs: Path, out: Path, profile: str, hybrid: Path | None):
        self.runs, self.out, self.pre, self.recipe, self.until = runs, out, runs / "teacher", RECIPES[profile], float("inf")
        self.so_far = lambda **result: None  # called with what a long stage has by now
        machine = pick_profile()
        self.machine, self.device, self.dtype = machine.name, machine.device, machine.dtype
        if profile == "tiny" and not self.pre.exists(): _tiny(self.pre)
        if hybrid: self.pre = hybrid
        elif not self.pre.exists(): shutil.copytree(distill.smollm2(), self.pre)
        self.tokenizer = AutoTokenizer.from_pretrained(self.pre)

    def teacher(self): return AutoModelForCausalLM.from_pretrained(self.pre, dtype=torch.float32).to(self.device).eval().requires_grad_(False)
    def load(self, name, **config): return AutoModelForCausalLM.from_pretrained(self.runs / name, dtype=torch.float32, **config).to(self.device)
    def to_ask(self, name):
        "A model that will be asked a lot: on a large GPU compiled, since reading is mostly passes over memory there."
        return compile_layers(self.load(name)) if self.machine == "gpu" else self.load(name)
    def half(self, model): return model.to(getattr(torch, self.recipe.get("asked", self.dtype))).eval()  # as on a GPU, where answers are meant to be compared
    def json(self, name): return json.loads((self.out / f"{name}.json").read_text())
    def at_once(self, model):
        "Tokens that are read at once; a hybrid keeps little of them."
        return dict(gpu=524288 if is_hybrid(model.config) else 262144, colab=16384).get(self.machine, 4096)

    def keep(self, what, file: str):
        part = self.runs / f"{file}.{os.getpid()}.part"
        torch.save(what, part)
        part.rename(self.runs / file)

    def save(self, model, name: str):
        model.save_pretrained(self.runs / f"{name}.part"), self.tokenizer.save_pretrained(self.runs / f"{name}.part")
        (self.runs / f"{name}.part").rename(self.runs / name)


def _tiny(folder: Path):
    "A teacher of random weights with a tokenizer of its own."
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(local_text())], vocab_size=1000, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def questions(run):
    "What every model is asked, and what the fine-tunings are taught, made once."
    r = run.recipe
    asked = {kind: {T: distill.answer_rows(run.tokenizer, kind, T, n) for T, n in r["recall"].items()} for kind in KINDS}
    needles = {T: [x for kind in KINDS for x in distill.answer_rows(run.tokenizer, kind, T, n, seed=100)] for T, n in r["needles"].items()}
    tasks = {name: distill.word_problems(r["tasks"], seed=1, held_out=held) for name, held in (("seen kinds", False), ("held-out kinds", True))}
    for seed in range(r["seeds"]):
        rows = distill.word_problems(r["problems"], seed=10 + seed)
        _lines(run.runs / f"problems-{seed}.jsonl", [dict(prompt=x["prompt"], completion=x["completion"]) for x in rows])
    small = lambda rows: [(torch.tensor(x, dtype=torch.int32), n) for x, n in rows]
    run.keep(dict(recall={k: {T: small(rows) for T, rows in x.items()} for k, x in asked.items()}, needles={T: small(rows) for T, rows in needles.items()}, tasks=tasks), "questions.pt")
    return dict(rows={kind: {T: len(rows) for T, rows in x.items()} for kind, x in asked.items()}, problems=r["problems"])


@cache
def _asked(run): return torch.load(run.runs / "questions.pt", weights_only=True)


def _lines(file: Path, rows: list):
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps(r) + "\n" for r in rows))
    part.rename(file)


def layers(run):
    "Which softmax layers look far."
    r, ids = run.recipe["layers"], run.tokenizer(" ".join(local_text()))["input_ids"]
    step = len(ids) // (r["texts"] + 1)
    answers = [x for kind in ("single_2", "multikey_1") for x in distill.answer_rows(run.tokenizer, kind, r["T"], r["answers"] // 2, seed=200)]
    teacher = run.teacher()
    if run.device == "cuda": teacher = run.half(teacher)
    return dict(rows=distill.layer_values(teacher, [ids[i * step:i * step + r["T"]] for i in range(r["texts"])], answers, r["window"], run.at_once(teacher), lambda text: print(text, flush=True)))


def asked(run, model) -> tuple[dict, dict]:
    "What a model scores, and its words: test -> length or kind -> {correct, n}: needles by whether the answer comes at once (correct) or at all (said), word problems by what is said last, and how much of the shortest texts' uuids is copied from its beginning (copied); kind -> words said to two questions."
    model, q = run.half(model), _asked(run)
    scores = {kind: {} for kind in q["recall"]}
    for T in run.recipe["recall"]:  # all kinds together: decoding many takes as long as decoding few
        kinds, rows = zip(*((kind, (x.tolist(), n)) for kind in scores for x, n in q["recall"][kind][T]))
        said = distill.replies(model, run.tokenizer, rows, tokens=run.at_once(model))
        seen = list(zip(kinds, distill.judged(run.tokenizer, rows, said)))
        for kind in scores: scores[kind][str(T)] = counted([x for k, x in seen if k == kind])
        if T == min(run.recipe["recall"]): words = {kind: told(run, [(row, s) for k, row, s in zip(kinds, rows, said) if k == kind]) for kind in scores}
    tasks = [t for group in q["tasks"].values() for t in group]
    right = iter(solve(model, run.tokenizer, tasks, run.recipe["room"], 256))
    scores["problems"] = {name: dict(correct=sum(next(right)[0] for _ in group), n=len(group)) for name, group in q["tasks"].items()}
    scores["single_3"][str(min(run.recipe["recall"]))]["copied"] = sum(map(copied, words["single_3"]))
    return scores, {kind: pairs[:2] for kind, pairs in words.items()}


def counted(seen) -> dict:
    "How many of the `judged` come at once (correct) and at all (said)."
    return dict(correct=sum(ok for ok, _ in seen), n=len(seen), said=sum(said for _, said in seen))


def told(run, said) -> list[dict]:
    "The answers that were asked for, and the words that came."
    return [dict(answer=run.tokenizer.decode(x[-n:]).strip(), said=run.tokenizer.decode(words)) for (x, n), words in said]


def copied(words: dict) -> float:
    "The share of an answer that is said, from its beginning on: a uuid that is found but not copied to its end."
    return next(n for n in range(len(words["answer"]), -1, -1) if words["answer"][:n] in words["said"]) / len(words["answer"])


def scored(**variants) -> dict:
    "What `asked` found of each variant, as records keep it."
    return dict(scores={name: scores for name, (scores, _) in variants.items()}, words={name: words for name, (_, words) in variants.items()})


def texts(run, number):
    r = run.recipe["texts"]
    document = "<|endoftext|>" if number % 2 and "<|endoftext|>" in run.tokenizer.get_vocab() else None  # what documents begin with in SmolLM2's pre-training; else conversations
    drawn = distill.samples(run.half(run.teacher()), run.tokenizer, r["n"], r["T"], seed=number, rows=r["rows"], opening=document)
    run.keep(torch.tensor(drawn, dtype=torch.int32), f"texts-{number}.pt")
    return dict(tokens=sum(map(len, drawn)))


def _stream(run):
    "All that is there to read: what was drawn, and prose; the last twentieth of the texts is for looking."
    drawn = torch.cat([torch.load(p, weights_only=True).flatten() for p in sorted(run.runs.glob("texts-?.pt"))]).long()
    cut = len(drawn) - max(len(drawn) // 20, 2 * run.recipe["long"]["T"])
    return torch.cat([torch.tensor(run.tokenizer(" ".join(local_text()))["input_ids"]), drawn[:cut]]), drawn[cut:]


def trained(run, stage, source, teach, T, calibrated=False, **settings):
    "One stage of training: the student of the stage before, the texts, a resumable loop, the student kept; how far from the teacher it is on text that it does not train on."
    teacher, (stream, held) = run.teacher(), _stream(run)
    rows = max(1, run.recipe["tokens"] // T)
    needles = [(x.tolist(), n) for length, found in _asked(run)["needles"].items() if length <= T for x, n in found]
    batch = partial(distill.text_batch, stream=stream, T=T, rows=rows, needles=needles)
    held = distill.text_batch(0, held, T, min(rows, 8))[0].to(run.device)
    def look(student):
        with torch.no_grad(): return dict(nats=distill.distance(student, held, torch.ones(held.shape, device=held.device), teacher).item(), errors={i: e.item() for i, e in distill.layer_errors(student, teacher, held).items()})
    student = source(teacher)
    seen = dict(at_first=look(student))
    if calibrated:
        distill.calibrate(student, teacher, batch(10 ** 6)[0].to(run.device))
        seen["calibrated"] = look(student)
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.set_float32_matmul_precision("high")
    log = teach(student, teacher, batch, dtype=run.dtype, file=run.runs / f"{stage}.pt", workers=4 if run.device == "cuda" else 0, **settings)
    peak = torch.cuda.max_memory_allocated() / 1e9 if run.device == "cuda" else None
    seen["at_last"] = look(student.eval())
    run.save(student, stage)
    (run.runs / f"{stage}.pt").unlink()
    return dict(away=seen, log=log, peak_gpu_gb=peak, texts_tokens=len(stream))


def chats(run, kind, seed) -> Path:
    """The data of a fine-tuning: word problems with their steps (repeated: so few that they are read several times); or conversations drawn from the teacher that came
    to an end (few, so they are read several times, too; fresh: those that the end of a text cut off as well, which is several times as much)."""
    file = run.runs / f"{kind}-{seed}.jsonl"
    if kind in FASTER: return chats(run, "problems", seed)
    if kind == "problems" or file.exists(): return file
    if kind == "repeated":
        rows = run.runs.joinpath(f"problems-{seed}.jsonl").read_text().splitlines()
        _lines(file, [json.loads(x) for x in rows[:len(rows) // 6]])
        return file
    render = lambda *said: run.tokenizer.apply_chat_template([dict(role=role, content=c) for role, c in zip(("user", "assistant", "user"), said)], tokenize=False)
    _, turn, between, _ = re.split("[\0\1\2]", render("\0", "\1", "\2"))
    end = render("\0", "\1").split("\1")[1].strip()
    user = between.strip().removeprefix(end).strip()
    said = re.compile(f"{re.escape(user)}\\s*(\\S.+?){re.escape(turn)}(.+?)(?:{re.escape(end)}{'|$' * (kind == 'fresh')})", re.S)
    drawn = torch.load(run.runs / "texts-0.pt", weights_only=True).tolist()
    rows = [dict(prompt=p, completion=a) for text in run.tokenizer.batch_decode(drawn) for p, a in said.findall(text) if end not in p]
    if not rows and run.tokenizer.vocab_size < 2000: rows = [dict(prompt="a", completion="b c d")]  # random weights end no conversation
    if not rows: raise SystemExit("the teacher began no conversation that it also ended: draw more or longer texts")
    random.Random(seed).shuffle(rows)
    _lines(file, rows)
    return file


def data(run) -> dict:
    "How much there is to read for each kind of fine-tuning, and how often its steps go through it."
    out, sft = {}, run.recipe["sft"]
    for kind in ("problems", "repeated", "chat", "fresh"):
        rows = [json.loads(x) for x in chats(run, kind, 0).read_text().splitlines()]
        tokens = sum(len(encode_chat(run.tokenizer, [dict(role="user", content=x["prompt"]), dict(role="assistant", content=x["completion"])])[0]) for x in rows)
        out[kind] = dict(rows=len(rows), tokens=tokens, times_read=round(sft["steps"] * sft["T"] * sft["rows"] / tokens, 2))
    return dict(data=out)


def remembered(rows: list[list[int]]) -> dict:
    "How far texts of one length remember themselves."
    c = autocorrelation(np.array(rows), 128)
    return dict(texts=len(rows), c=c.tolist(), fit={k: float(v[0]) for k, v in fit_decay(np.arange(1, 129), c[1:]).items()})


def reach(run):
    "How far the gradients of chains and of chat reach in the hybrid, before any fine-tuning, and how far the texts remember themselves."
    out, model = {}, run.load("long").eval()
    for kind in ("problems", "chat"):
        lines = [json.loads(x) for x in chats(run, kind, 0).read_text().splitlines()[:4096]]
        encoded = [encode_chat(run.tokenizer, [dict(role="user", content=x["prompt"]), dict(role="assistant", content=x["completion"])]) for x in lines]
        rows, long = encoded[:64], [ids[:256] for ids, _ in encoded if len(ids) >= 256]
        T = max(len(ids) for ids, _ in rows)
        batch = dict(input_ids=[x + [0] * (T - len(x)) for x, _ in rows], labels=[y + [-100] * (T - len(y)) for _, y in rows], attention_mask=[[1] * len(x) + [0] * (T - len(x)) for x, _ in rows])
        found = gradient_range(model, batch)
        g, low, high = found.curve()
        layers = {i: found.summary(i) for i in found.layers}
        out[kind] = dict(corr=remembered(long) if long else None, tau=found.tau.tolist(), g=g.tolist(), low=low.tolist(), high=high.tolist(), summary=found.summary(), layers=layers, loss=found.loss, longest=T)
    return out


def tuned(run, base, kind, seed) -> Path:
    "The folder after fine-tuning on word problems (all weights, or an adapter that is merged afterwards) or on the teacher's own conversations."
    post, settings = run.runs / f"{base}-{kind}-{seed}", dict(seed=seed, every=100, **run.recipe["sft"])
    settings["lr"] *= FASTER.get(kind, 1)
    with _alone(post): return post if post.exists() else _tuned(run, base, kind, seed, post, settings)


@contextmanager
def _alone(file: Path):
    "Others who need the same file wait until it is there."
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tuned(run, base, kind, seed, post, settings) -> Path:
    data = chats(run, kind, seed)
    if kind != "lora":
        finetune(run.runs / base, data, post, **settings)
        gc.collect(), torch.cuda.empty_cache()  # others may be on this GPU
        return post
    from peft import PeftModel
    adapter = post.with_name(post.name + ".adapter")
    if not adapter.exists(): finetune(run.runs / base, data, adapter, rank=16, **settings)
    run.save(PeftModel.from_pretrained(run.load(base), adapter).merge_and_unload(), post.name)
    shutil.copy(adapter / "finetune.json", post)
    return post


def before(run, base) -> list:
    "What a model says before any fine-tuning: asked once for all pairs."
    kept = run.runs / f"{base}.scores.json"
    with _alone(kept):
        if not kept.exists():
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(asked(run, run.to_ask(base))))
            part.rename(kept)
    return json.loads(kept.read_text())


def repair(run, base, kind, seed, names):
    "Every variant of a pair, asked; a variant that is done is passed over."
    pre, post, model = run.load(base), run.load(tuned(run, base, kind, seed).name), run.to_ask(base)
    if not is_hybrid(pre.config): names = [n for n in names if "linear" not in n]
    a, b, kept = pre.state_dict(), post.state_dict(), run.runs / f"{base}-{kind}-{seed}.scores.json"
    seen = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        if name in seen: continue
        if time.monotonic() > run.until: raise TimeIsUp(name)
        if name == "pre": seen[name] = before(run, base)
        else:
            known = name.replace("restored", "qk").replace("interpolated", "average")  # records and chapters 12 keep their first names
            model.float().load_state_dict(variant(known, a, b, pre.config, seed))
            seen[name] = asked(run, model)
        kept.write_text(json.dumps(seen))
        run.so_far(unfinished=f"{len(seen)} of {len(names)} variants", **scored(**seen))
        print(f"{base}-{kind}-{seed}", name, {k: " ".join(f"{c.get('said', c['correct'])}/{c['n']}" for c in s.values()) for k, s in seen[name][0].items()}, flush=True)
    tuned_as = json.loads((run.runs / f"{base}-{kind}-{seed}" / "finetune.json").read_text())
    return dict(**scored(**seen), peak_gpu_gb=tuned_as["peak_gpu_gb"], log=tuned_as["log"][::10] + tuned_as["log"][-1:])


def where(run, base, kind, seed):
    "What this fine-tuning took (uuids; or keys and far numbers), said by the fine-tuned model with parts of it from before, and by the model before with parts of the fine-tuned one: layer by layer."
    pre, post, model = run.load(base), run.load(tuned(run, base, kind, seed).name), run.to_ask(base)
    a, b, kept = pre.state_dict(), post.state_dict(), run.runs / f"{base}-{kind}-{seed}.where.json"
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    rows = {(test, T): [(x.tolist(), n) for x, n in _asked(run)["recall"][test][T]] for test, T in run.recipe["where"][kind].items()}
    def names(i, *parts): return [n for n in a if f".layers.{i}." in n and ("MLP" if "mlp" in n or "post_attention" in n else "mixer") in parts]
    layers = range(pre.config.num_hidden_layers)
    plan = {f"back: layers to {i}": sum((names(j, "mixer", "MLP") for j in range(i + 1)), []) for i in layers if i < 4 or i % 4 == 3 or i == layers[-1]}
    plan |= {f"{way}: embedding and head": [n for n in a if ".layers." not in n] for way in ("back", "alone")}
    plan |= {f"{way}: {part} {i}": names(i, part) for way in ("back", "alone") for part in ("mixer", "MLP") for i in layers}
    for name, these in {"alone: none": [], "back: none": [], **plan}.items():
        if name in scores: continue
        if time.monotonic() > run.until: raise TimeIsUp(name)
        to, source = (b, a) if name.startswith("back") else (a, b)
        model.float().load_state_dict({**to, **{n: source[n] for n in these}})
        run.half(model)
        scores[name] = {test: {str(T): counted(distill.spoken(model, run.tokenizer, asks, tokens=run.at_once(model)))} for (test, T), asks in rows.items()}
        kept.write_text(json.dumps(scores))
        run.so_far(unfinished=f"{len(scores)} of {len(plan) + 2}", scores=scores)
    return dict(scores=scores)


def softened(run):
    teacher = run.teacher()
    run.save(distill.convert(teacher, range(teacher.config.num_hidden_layers)), "soft")
    return {}


def stages(run) -> dict:
    r = run.recipe
    made = dict(**{f"texts-{i}": partial(texts, number=i) for i in range(r["texts"]["files"])}, questions=questions, layers=layers, teacher=lambda run: scored(pre=asked(run, run.teacher())),
                align=lambda run: trained(run, "align", lambda t: distill.convert(t, distill.choose_layers(run.json("layers")["rows"], r["keep"])), distill.align, calibrated=True, **r["align"]),
                distil=lambda run: trained(run, "distil", lambda t: run.load("align"), distill.distil, **r["distil"]),
                long=lambda run: trained(run, "long", lambda t: run.load("distil"), distill.distil, **r["long"]),
                hybrid=lambda run: scored(pre=before(run, "long")), data=data, range=reach, soft=softened,
                nope=lambda run: trained(run, "nope", lambda t: run.load("align", attn_use_rope=False, attn_logits_scaling="hype 500"), distill.distil, **r["distil"]),
                **{"nope-long": lambda run: trained(run, "nope-long", lambda t: run.load("nope"), distill.distil, **r["long"]), "nope-hybrid": lambda run: scored(pre=before(run, "nope-long"))})
    seeds = dict(sft="long problems", strong="long strong", lora="long lora", softstrong="soft strong", chat="long chat", repair="long problems", middle="long middle")
    once = dict(wherestrong="long strong", nopestrong="nope-long strong", nope="nope-long problems", soft="soft problems", where="long chat", fresh="long fresh", softchat="soft chat", softfresh="soft fresh", repeated="long repeated")
    def names(kind, n): return r["some" if n else "variants"] if kind == "strong" else r["few"]
    for name, n in [(name, n) for name in seeds for n in range(r["seeds"])] + [(name, 0) for name in once]:
        base, kind = (seeds | once)[name].split()
        if name == "sft": made[f"sft-seed{n}"] = lambda run, n=n: dict(post=tuned(run, "long", "problems", n).name)
        elif name.startswith("where"): made[f"{name}-seed{n}"] = partial(where, base=base, kind=kind, seed=n)
        else: made[f"{name}-seed{n}"] = partial(repair, base=base, kind=kind, seed=n, names=names(name, n))
    return made


def waits_for(name: str, files: int) -> set[str]:
    "The stages whose results a stage reads."
    kind, _, seed = name.partition("-seed")
    if seed: return dict(sft={"long", "questions"}, repair={f"sft-seed{seed}", "hybrid"}, nope={"nope-hybrid"}, nopestrong={"nope-hybrid"}, **{f"soft{x}": {"soft", "questions", "texts-0"} for x in ("", "strong", "chat", "fresh")}).get(kind, {"hybrid", "texts-0"})
    earlier = {"teacher": {"questions"}, "align": {"layers", "questions"} | {f"texts-{i}" for i in range(files)}, "distil": {"align"}, "long": {"distil"}, "hybrid": {"long", "questions"}, "range": {"long", "texts-0"}, "data": {"questions", "texts-0"},
               "nope": {"align"}, "nope-long": {"nope"}, "nope-hybrid": {"nope-long"}}
    return earlier.get(name, set())


def fits(name: str, gpu: int, beside: list[str], path: set[str], at_once: int) -> bool:
    "Whether a stage may start on a GPU beside those that run there: the path to the hybrid, of which `path` is still to come, has the first GPU to itself, and so have texts that are drawn theirs."
    big = lambda n: n.startswith("texts") or n in ("align", "distil", "long")
    if name in LIGHT: return True
    if big(name): return not beside and (gpu == 0 or name.startswith("texts"))
    return len(beside) < at_once and not any(map(big, beside)) and not (gpu == 0 and any(map(big, path)))


def side_by_side(start, names: list[str], done, files: int, at_once: int, until: float, gpus: int = 1, look=lambda ran: None) -> tuple[list[dict], list[str]]:
    "Start each stage, in this order, once what it waits for is done, on the emptiest GPU where it fits. Returns what ran when (in seconds) and where, which look is told each time that a stage ends, and what failed; after that nothing new starts, and what runs is waited for."
    waiting, running, failed, ran, begun = [n for n in names if not done(n)], {}, [], [], time.monotonic()
    def beside(gpu): return [n for n, (_, row) in running.items() if row["gpu"] == gpu and n not in LIGHT]
    while running or waiting and not failed and time.monotonic() < until:
        for name in [n for n, (p, _) in running.items() if p.poll() is not None]:
            process, row = running.pop(name)
            ran.append(row | dict(end=round(time.monotonic() - begun, 1)))
            if process.returncode: failed.append(name)
            look(ran)
        for name in [n for n in waiting if all(map(done, waits_for(n, files) & set(names)))]:
            free = [g for g in sorted(range(gpus), key=lambda g: len(beside(g))) if fits(name, g, beside(g), {*waiting, *running}, at_once)]
            if failed or time.monotonic() > until or not free: continue
            waiting.remove(name)
            running[name] = start(name, free[0]), dict(stage=name, gpu=free[0], begin=round(time.monotonic() - begun, 1))
        if not running: break  # what is left waits for something whose time was up
        time.sleep(.1)
    if waiting and not failed: print("time is up; the same command goes on with", waiting[0])
    return ran, failed


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path), ask.add_argument("stages", nargs="*"), ask.add_argument("--minutes", type=float, default=1e9)
    ask.add_argument("--profile", choices=RECIPES, default="gpu"), ask.add_argument("--hybrid", type=Path, help="a converted checkpoint, from an earlier run's RUNS/long")
    ask.add_argument("--at-once", type=int, default=1, help="stages that run side by side")
    args = ask.parse_intermixed_args()
    for folder in (args.runs, args.out): folder.mkdir(exist_ok=True, parents=True)
    run, begun = Run(args.runs, args.out, args.profile, args.hybrid), time.monotonic()
    known, run.until = stages(run), begun + 60 * args.minutes
    if unknown := [s for s in args.stages if s not in known]: ask.error(f"no stage is called {unknown[0]}: choose from {', '.join(known)}")
    names = args.stages or list(known)
    if args.hybrid:
        if not (args.runs / "long").exists(): shutil.copytree(args.hybrid, args.runs / "long")
        names = args.stages or ["questions", "hybrid", "sft-seed0", "repair-seed0"]

    def record(name, then, **result):
        part = args.out / f"{name}.part"
        part.write_text(json.dumps(dict(**provenance(int(name[-1]) if "seed" in name else 0, profile=args.profile, teacher="tiny" if args.profile == "tiny" else "SmolLM2-135M-Instruct", **run.recipe),
                                        wall_s=round(time.perf_counter() - then, 1), **result), indent=1) + "\n")
        part.rename(args.out / f"{name}.json")

    def done(name): return (args.out / f"{name}.json").exists() and "unfinished" not in run.json(name)

    if args.at_once > 1:
        visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",") if x] or [""]
        def start(name, gpu): return subprocess.Popen([sys.executable, __file__, str(args.runs), str(args.out), name, "--profile", args.profile, "--minutes", str((run.until - time.monotonic()) / 60)] + ["--hybrid", str(args.hybrid)] * bool(args.hybrid),
                                                      env=os.environ | dict(CUDA_VISIBLE_DEVICES=visible[gpu]))
        then = time.perf_counter()
        goes = run.json("timeline")["goes"] if (args.out / "timeline.json").exists() else []
        def look(ran): record("timeline", then, goes=[*goes, dict(at_once=args.at_once, gpus=len(visible), ran=ran)])
        _, failed = side_by_side(start, names, done, run.recipe["texts"]["files"], args.at_once, run.until, len(visible), look)
        if failed: raise SystemExit(f"failed: {', '.join(failed)}; what is done is kept, the same command goes on")
        return
    for name in names:
        if done(name): continue
        if time.monotonic() > run.until: print("time is up; the same command goes on with", name); break
        then = time.perf_counter()
        run.so_far = partial(record, name, then)
        try: result = known[name](run)
        except TimeIsUp as e: print(f"time is up; the same command goes on with {name}: {e}"); break
        except torch.OutOfMemoryError: raise SystemExit(f"memory ran out in stage {name}: halve tokens (a step), texts' rows or sft's T in RECIPES; what is done is kept, the same command goes on")
        record(name, then, **result)
        print(f"== {name}: {time.perf_counter() - then:.0f} s", flush=True)


if __name__ == "__main__": main()

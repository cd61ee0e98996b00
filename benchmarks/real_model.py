"""A real language model made a hybrid, fine-tuned, and repaired, stage by stage: `python benchmarks/real_model.py RUNS OUT [--minutes M] [stage ...]`.

Stages, in order: layers (which softmax layers stay), teacher (its recall), texts (drawn from it), align, distil, long (distilling on longer
texts), hybrid (its recall), then for each seed sft-N, repair-N (every variant), chat-N (the control without chains), lora-N (with an
adapter) and soft-N (the unconverted model). A stage that is done is passed over; one that is interrupted goes on where its last save was. RUNS holds weights
and texts, OUT gets one json a stage. TINY=1 in the environment runs everything with a model of random weights, to see that the path works; CPU=1
shortens the stages up to align to what two cores do in half an hour."""
import argparse
import json
import os
import re
import shutil
import time
from functools import cache, partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkrestore_nb import distill
from qkrestore_nb.audit import solve
from qkrestore_nb.core import pick_profile, provenance
from qkrestore_nb.finetune import finetune
from qkrestore_nb.prose import local_text
from qkrestore_nb.scale import recall
from qkrestore_nb.variants import variant

TINY, CPU = bool(os.environ.get("TINY")), bool(os.environ.get("CPU"))
MACHINE = pick_profile()
RECIPE = dict(keep=8, window=64, texts=4, answers=16, T=512, sampled=20000, sample_T=512, align=dict(steps=1500, lr=1e-3), distil=dict(steps=6000, lr=4e-4), long=dict(steps=800, lr=1e-4, T=4096), tokens=32768,
              recall={kind: [(T, n, q) for T, n in ((512, 64), (1024, 64), (2048, 64), (4096, 32), (8192, 16))] for kind, q in (("single_1", 1), ("single_2", 1), ("single_3", 1), ("multikey_1", 4))},
              problems=16000, tasks=256, sft=dict(steps=400, T=2048, rows=16, lr=2e-4), seeds=3,
              variants=["pre", "post", "restored", "q", "k", "v", "o", "vo", "qk of linear layers", "qk of all layers", "first linear mixer", "all mixers", "MLPs", "interpolated 0.9", "interpolated 0.75", "LiNeS 0.8",
                        "pro input 0.1", "pro input 1", "pro head 0.1", "pro head 1", "drift alone", "noise"])
if TINY: RECIPE |= dict(keep=1, window=8, texts=2, answers=2, T=800, sampled=8, sample_T=64, align=dict(steps=3, lr=1e-3), distil=dict(steps=3, lr=4e-4), long=dict(steps=2, lr=1e-4, T=900), tokens=1800, recall=dict(single_2=[(600, 1, 1)]),
                        problems=40, tasks=4, sft=dict(steps=2, T=256, rows=2, lr=2e-4), seeds=1, variants=["pre", "post", "restored"])

if CPU: RECIPE |= dict(sampled=64, sample_T=256, align=dict(steps=80, lr=1e-3, warmup=8), tokens=2048, long=RECIPE["long"] | dict(T=1024), recall=dict(single_2=[(512, 16, 1)]))


class Run:
    "Where things lie, and what is loaded once."
    def __init__(self, runs: Path, out: Path):
        self.runs, self.out, self.pre = runs, out, runs / "teacher"
        if TINY and not self.pre.exists(): _tiny(self.pre)
        elif not self.pre.exists(): shutil.copytree(distill.smollm2(), self.pre)
        self.tokenizer = AutoTokenizer.from_pretrained(self.pre)

    def teacher(self): return AutoModelForCausalLM.from_pretrained(self.pre, dtype=torch.float32).to(MACHINE.device).eval().requires_grad_(False)
    def load(self, name): return AutoModelForCausalLM.from_pretrained(self.runs / name, dtype=torch.float32).to(MACHINE.device)
    def json(self, name): return json.loads((self.out / f"{name}.json").read_text())

    def save(self, model, name):
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


def layers(run):
    "Which softmax layers look far."
    r, ids = RECIPE, run.tokenizer(" ".join(local_text()))["input_ids"]
    step = len(ids) // (r["texts"] + 1)
    answers = [x for kind in ("single_2", "multikey_1") for x in distill.answer_rows(run.tokenizer, kind, r["T"], r["answers"] // 2)]
    rows = distill.layer_values(run.teacher(), [ids[i * step:i * step + r["T"]] for i in range(r["texts"])], answers, r["window"], lambda text: print(text, flush=True))
    return dict(rows=rows)


@cache
def tasks() -> list[dict]: return distill.word_problems(RECIPE["tasks"], seed=1, held_out=True)


def asked(run, model):
    "Recall and word problems of held-out kinds, in bfloat16 where there is a GPU that has it."
    model = model.to(getattr(torch, MACHINE.dtype)).eval()
    ok = sum(c for c, _ in solve(model, run.tokenizer, tasks(), 16 if TINY else 320, 64))
    return recall(model, run.tokenizer, RECIPE["recall"]) | dict(problems={"held out": dict(correct=ok, n=len(tasks()))})


def texts(run):
    teacher, r = run.teacher().to(getattr(torch, MACHINE.dtype)), RECIPE
    drawn = [t for x in distill.samples(teacher, run.tokenizer, r["sampled"], r["sample_T"], rows=256) for t in x]
    prose = run.tokenizer(" ".join(local_text()))["input_ids"]
    needles = {T: [x for kind in ("single_1", "single_2", "single_3", "multikey_1") for x in distill.answer_rows(run.tokenizer, kind, T, 4 if TINY else 200, seed=100)] for T in (r["T"], r["long"]["T"])}
    part = run.runs / "texts.part"
    torch.save(dict(stream=torch.tensor(drawn + prose), needles=needles), part)
    part.rename(run.runs / "texts.pt")
    return dict(tokens=len(drawn), prose_tokens=len(prose))


def trained(run, stage, source, teach, T, calibrated=False, **settings):
    "One stage of training: the student of the stage before, the texts, a resumable loop, the student kept; how far from the teacher it is on text that it does not train on."
    teacher, data = run.teacher(), torch.load(run.runs / "texts.pt", weights_only=True)
    stream, rows = data["stream"], max(1, RECIPE["tokens"] // T)
    cut = len(stream) - max(2 * T, len(stream) // 20)  # the last twentieth is for looking
    batch = partial(distill.text_batch, stream=stream[:cut], T=T, rows=rows, needles=data["needles"][RECIPE["long"]["T"] if T > RECIPE["T"] else RECIPE["T"]])
    held = distill.text_batch(0, stream[cut:], T, min(rows, 8))[0].to(MACHINE.device)
    def look(student):
        with torch.no_grad(): return dict(nats=distill.distance(student, held, torch.ones(held.shape, device=held.device), teacher).item(), errors={i: e.item() for i, e in distill.layer_errors(student, teacher, held).items()})
    student = source(teacher)
    seen = dict(at_first=look(student))
    if calibrated:
        distill.calibrate(student, teacher, batch(10 ** 6)[0].to(MACHINE.device))
        seen["calibrated"] = look(student)
    if MACHINE.device == "cuda": torch.cuda.reset_peak_memory_stats()
    log = teach(student, teacher, batch, dtype=MACHINE.dtype, file=run.runs / f"{stage}.pt", workers=0 if TINY or MACHINE.device == "cpu" else 4, **settings)
    peak = torch.cuda.max_memory_allocated() / 1e9 if MACHINE.device == "cuda" else None
    seen["at_last"] = look(student.eval())
    run.save(student, stage)
    (run.runs / f"{stage}.pt").unlink()
    return dict(away=seen, log=log, peak_gpu_gb=peak)


def chats(run, kind, seed):
    "The data of a fine-tuning: word problems with their steps, or conversations drawn from the teacher."
    file, n = run.runs / f"{kind}-{seed}.jsonl", RECIPE["problems"]
    if file.exists(): return file
    if kind == "problems": rows = [dict(prompt=x["prompt"], completion=x["completion"]) for x in distill.word_problems(n, seed=10 + seed)]
    else:
        said = distill.samples(run.teacher().to(getattr(torch, MACHINE.dtype)), run.tokenizer, n // 4, RECIPE["sample_T"], seed=50 + seed, rows=256)
        rows = [dict(prompt=p, completion=a) for x in said for p, a in re.findall(r"<\|im_start\|>user\n(.+?)<\|im_end\|>\s*<\|im_start\|>assistant\n(.+?)<\|im_end\|>", run.tokenizer.decode(x), re.S)]
        if TINY: rows = [dict(prompt="a", completion="b c d")]
        if not rows: raise SystemExit("the teacher began no conversation that it also ended: draw more or longer texts")
    file.with_suffix(".part").write_text("".join(json.dumps(r) + "\n" for r in rows))
    file.with_suffix(".part").rename(file)
    return file


def tuned(run, base, kind, seed):
    "The folder after fine-tuning on word problems (all weights, or an adapter that is merged afterwards) or on the teacher's own conversations."
    post, settings = run.runs / f"{base}-{kind}-{seed}", dict(seed=seed, every=50, **RECIPE["sft"])
    if post.exists(): return post
    data = chats(run, "chat" if kind == "chat" else "problems", seed)
    if kind != "lora": return finetune(run.runs / base, data, post, **settings)
    from peft import PeftModel
    adapter = post.with_name(post.name + ".adapter")
    if not adapter.exists(): finetune(run.runs / base, data, adapter, rank=16, **settings | dict(lr=5 * settings["lr"]))
    run.save(PeftModel.from_pretrained(run.load(base), adapter).merge_and_unload(), post.name)
    shutil.copy(adapter / "finetune.json", post)
    return post


def repair(run, base, kind, seed, names):
    "Every variant of a pair, asked; a variant that is done is passed over."
    pre, post, model = run.load(base), run.load(tuned(run, base, kind, seed).name), run.load(base)
    a, b, kept = pre.state_dict(), post.state_dict(), run.runs / f"{base}-{kind}-{seed}.scores.json"
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        if name in scores: continue
        model.float().load_state_dict(variant(name, a, b, pre.config, seed))
        scores[name] = asked(run, model)
        kept.write_text(json.dumps(scores))
        print(name, {k: {T: round(c["correct"] / c["n"], 2) for T, c in s.items()} for k, s in scores[name].items()}, flush=True)
    return dict(scores=scores, log=json.loads((run.runs / f"{base}-{kind}-{seed}" / "finetune.json").read_text())["log"][-1])


def softened(run):
    "The unconverted model in our classes, so that the same functions work on it."
    if (run.runs / "soft").exists(): return
    teacher = run.teacher()
    run.save(distill.convert(teacher, range(teacher.config.num_hidden_layers)), "soft")


def stages() -> dict:
    r = RECIPE
    made = dict(layers=layers, teacher=lambda run: dict(scores=dict(pre=asked(run, run.teacher()))), texts=texts,
                align=lambda run: trained(run, "align", lambda t: distill.convert(t, distill.choose_layers(run.json("layers")["rows"], r["keep"])), distill.align, r["T"], True, **r["align"]),
                distil=lambda run: trained(run, "distil", lambda t: run.load("align"), distill.distil, r["T"], **r["distil"]),
                long=lambda run: trained(run, "long", lambda t: run.load("distil"), distill.distil, r["long"]["T"], **{k: v for k, v in r["long"].items() if k != "T"}),
                hybrid=lambda run: dict(scores=dict(pre=asked(run, run.load("long")))))
    for n in range(r["seeds"]):
        made[f"sft-seed{n}"] = lambda run, n=n: dict(post=tuned(run, "long", "problems", n).name)
        made[f"repair-seed{n}"] = lambda run, n=n: repair(run, "long", "problems", n, r["variants"])
        made[f"chat-seed{n}"] = lambda run, n=n: repair(run, "long", "chat", n, ["pre", "post", "restored"])
        made[f"lora-seed{n}"] = lambda run, n=n: repair(run, "long", "lora", n, ["pre", "post", "restored", "vo", "interpolated 0.9"])
        made[f"soft-seed{n}"] = lambda run, n=n: (softened(run), repair(run, "soft", "problems", n, ["pre", "post", "restored", "vo", "interpolated 0.9"]))[1]
    return made


if __name__ == "__main__":
    ask = argparse.ArgumentParser()
    ask.add_argument("runs", type=Path), ask.add_argument("out", type=Path), ask.add_argument("stages", nargs="*"), ask.add_argument("--minutes", type=float, default=1e9)
    args = ask.parse_args()
    for folder in (args.runs, args.out): folder.mkdir(exist_ok=True, parents=True)
    run, begun, all_stages = Run(args.runs, args.out), time.monotonic(), stages()
    for name in args.stages or all_stages:
        if (args.out / f"{name}.json").exists(): continue
        if time.monotonic() - begun > 60 * args.minutes: print("time is up; the same command goes on with", name); break
        then = time.perf_counter()
        result = all_stages[name](run)
        seed = int(name[-1]) if "seed" in name else 0
        record = dict(**provenance(seed, teacher="tiny" if TINY else "SmolLM2-135M-Instruct", **RECIPE), wall_s=round(time.perf_counter() - then, 1), **result)
        part = args.out / f"{name}.part"
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.rename(args.out / f"{name}.json")
        print(f"== {name}: {record['wall_s']:.0f} s", flush=True)

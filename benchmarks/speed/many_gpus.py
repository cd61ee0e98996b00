"""Several GPUs of one machine, random weights of the published shapes: fine-tuning, TRL's beside it, a text on all.

    python benchmarks/speed/many_gpus.py OUT [--profile smoke] [--minutes 9] [--only NAME ...] [--have FILE]
    python benchmarks/speed/many_gpus.py OUT --split results/scale      # one file a question, as the chapters read them

Jobs stand in waves; those of a wave run at the same time on cards of their own. Each leaves its record in
OUT/many_gpus.json at once, and is not run again; --have names such a file of an earlier call. No wave begins after
--minutes. BIG is a folder for checkpoints (/dev/shm, say)."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CARDS = (0, 1, 2, 3)


def job(name: str, kind: str, cards=CARDS, size="2B", **more) -> dict:
    return dict(name=name, kind=kind, cards=list(cards), size=size, **more)


def tune(name: str, cards=CARDS, size="2B", T=8192, rows=8, steps=8, **more) -> dict:
    return job(name, "finetune", cards, size, T=T, rows=rows, steps=steps, **more)


WAVES = [  # the most valuable first
    [tune("2b_8k_4", restore=True)],
    [tune("2b_8k_2", (0, 1)), tune("2b_8k_1", (2,)), job("read_2b_256k_1", "read", (3,), T=262144)],
    [job("read_2b_256k_4", "read", T=262144)],
    [tune("9b_8k_4", size="9B", steps=5, finish=False)],
    [job("trl_2b_8k_4", "trl", T=8192, rows=8, steps=8, at_once=1)],  # its logits of 16,384 tokens would take 35 GB
    [job("read_2b_1m_1", "read", (0,), T=1048576, repeats=1), tune("2b_8k_dies", (1, 2), every=3, dies=9)],
    [job("read_2b_1m_4", "read", T=1048576, repeats=2)],
    [tune("2b_32k_4", T=32768, steps=5, finish=False)],
    [tune("9b_32k_lora_4", size="9B", T=32768, rows=4, steps=5, rank=16, finish=False)],
    [tune("5b_8k_4", size="5B", steps=5, finish=False)],
    [tune("9b_32k_4", size="9B", T=32768, rows=4, steps=4, finish=False)],
]
SMOKE = dict(
    hidden_size=64,
    intermediate_size=128,
    head_dim=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    lightning_nh=2,
    lightning_nkv=2,
    lightning_head_dim=32,
    num_hidden_layers=4,
    mixer_types=["lightning-attn", "attn"] * 2,
    vocab_size=4096,
)


def smoke(waves: list) -> list:
    "The same jobs on one or two processes of a CPU, tiny."
    small = dict(T=lambda T: min(512, T // 32), rows=lambda n: 4, steps=lambda n: 6)

    def less(j):
        return j | {k: f(j[k]) for k, f in small.items() if k in j} | dict(cards=j["cards"][:2], every=3)

    return [[less(j) for j in wave] for wave in waves]


# ---- what runs in each process


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shape(j: dict):
    from qkrestore_nb.hypenet import HypeNetConfig

    return HypeNetConfig.preset(j["size"], max_position_embeddings=1048576, **(SMOKE if j["smoke"] else {}))


def make(j: dict):
    "Random weights in bfloat16, the same on every card, made where they are needed."
    import torch

    from qkrestore_nb.hypenet import HypeNetForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if on_gpu() else "cpu"):
            return HypeNetForCausalLM(shape(j)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def peak_gb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else 0.0


def told(j: dict, what: str, **values):
    with open(Path(j["folder"]) / f"{j['name']}.{what}.jsonl", "a") as f:
        f.write(json.dumps(values) + "\n")


def read_told(j: dict, what: str) -> list[dict]:
    file = Path(j["folder"]) / f"{j['name']}.{what}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finetuning(j: dict):
    from qkrestore_nb import finetune as ft

    rank, world = rank_and_world()
    last = [time.perf_counter()]

    def look(step, loss):
        now = time.perf_counter()
        told(j, "step", step=step, loss=loss, seconds=now - last[0], peak=peak_gb())
        last[0] = now
        if step == j["steps"] and not j.get("finish", True):
            time.sleep(2), os._exit(7)  # a large model need not be written

    if j.get("dies") and rank == world - 1:
        ask, calls = ft.summed_loss, []

        def counted(*given):
            calls.append(1)
            if len(calls) >= j["dies"]:
                os._exit(9)
            return ask(*given)

        ft.summed_loss = counted
    out = Path(j["folder"]) / f"{j['name']}.post"
    try:
        more = dict(rank=j.get("rank", 0), every=j.get("every", 100), look=look)
        ft.finetune(j["pre"], j["data"], out, steps=j["steps"], T=j["T"], rows=j["rows"], **more)
    finally:
        told(j, f"peak{rank}", peak=peak_gb())


def trl(j: dict):
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import qkrestore_nb.hypenet  # noqa: F401  makes the family known

    rank, world = rank_and_world()

    class Clock(TrainerCallback):
        last = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if on_gpu():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if rank == 0:
                told(j, "step", step=state.global_step, seconds=now - self.last, peak=peak_gb())
            self.last = now

        def on_log(self, args, state, control, logs=None, **_):
            if rank == 0 and "loss" in (logs or {}):
                told(j, "loss", step=state.global_step, loss=logs["loss"])

    share, gpu = j["rows"] // world, on_gpu()
    args = SFTConfig(
        str(Path(j["folder"]) / "trl"),
        max_steps=j["steps"],
        max_length=j["T"],
        packing=True,
        bf16=gpu,
        use_cpu=not gpu,
        per_device_train_batch_size=j.get("at_once", 1),
        gradient_accumulation_steps=share // j.get("at_once", 1),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=dict(use_reentrant=False),
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
    )

    def text(row):
        return dict(
            prompt=[dict(role="user", content=row["prompt"])],
            completion=[dict(role="assistant", content=row["completion"])],
        )

    data = load_dataset("json", data_files=j["data"], split="train").map(text)
    tokenizer = AutoTokenizer.from_pretrained(j["pre"])
    if not tokenizer.chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{{ '\n' if m.role == 'user' else eos_token }}{% endfor %}"
        )
    model = AutoModelForCausalLM.from_pretrained(j["pre"], dtype=torch.float32)
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=args, callbacks=[Clock()]).train()
    told(j, f"peak{rank}", peak=peak_gb())


def reading(j: dict):
    import torch
    import torch.distributed as dist
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import StaticCache

    from qkrestore_nb.hypenet import compile_layers, prefill
    from qkrestore_nb.long_reading import read_long

    rank, world = rank_and_world()
    if on_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if on_gpu() else "gloo")
    model, T = make(j), j["T"]
    if on_gpu():
        compile_layers(model)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))

    def read(ids):
        if world > 1:
            return read_long(model, ids)
        return prefill(
            model, ids.to(model.device), 16384, StaticCache(config=model.config, max_cache_len=ids.shape[1])
        )[0]

    def wait():
        if on_gpu():
            torch.cuda.synchronize()
        if world > 1:
            dist.barrier()

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        for n in sorted({min(T, 262144), T} if world > 1 else {min(T, 262144)}):  # kernels are chosen and compiled once
            read(ids[:, :n]), wait()
        for _ in range(j.get("repeats", 3)):
            wait()
            then = time.perf_counter()
            logits = read(ids)
            wait()
            if rank == 0:
                told(j, "step", seconds=time.perf_counter() - then)
    told(j, f"peak{rank}", peak=peak_gb())
    if rank == 0:
        torch.save(logits.float().cpu(), Path(j["folder"]) / f"{j['name']}.logits.pt")
    if world > 1:
        dist.destroy_process_group()


KINDS = dict(finetune=finetuning, trl=trl, read=reading)


# ---- the one that starts them


def chains(file: Path, n: int = 2000, seed: int = 0):
    "Conversations of 100 to 700 tokens in random words: what is said has no bearing on the time it takes."
    import random

    from qkrestore_nb.prose import local_text

    rng, words = random.Random(seed), local_text()
    with open(file, "w") as f:
        for _ in range(n):
            said = lambda k: " ".join(rng.choices(words, k=k))
            f.write(json.dumps(dict(prompt=said(20), completion=said(rng.randint(40, 320)))) + "\n")


def prepare(j: dict, folder: Path):
    "The checkpoint and the data that a job begins with, once."
    pre, data = folder / f"pre_{j['size']}", folder / "chains.jsonl"
    if not data.exists():
        chains(data, 200 if j["smoke"] else 2000)
    if not pre.exists() and j["kind"] != "read":
        here = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import many_gpus as m; m.write_pre({j!r}, {str(pre)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)  # a process of its own gives the card's memory back
    return dict(pre=str(pre), data=str(data))


def write_pre(j: dict, pre: str):
    from qkrestore_nb.prose import small_tokenizer

    small_tokenizer().save_pretrained(pre)
    make(j).save_pretrained(pre)


def start(j: dict) -> subprocess.Popen:
    env = dict(
        os.environ, JOB=json.dumps(j), OMP_NUM_THREADS="1" if j["smoke"] else "8", TOKENIZERS_PARALLELISM="false"
    )
    if on_gpu():
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, j["cards"]))
    if (
        j["kind"] == "trl" and on_gpu()
    ):  # what `accelerate launch --use_fsdp --fsdp_version 2 --mixed_precision bf16` sets
        env |= dict(
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_RESHARD_AFTER_FORWARD="true",
            FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
            ACCELERATE_MIXED_PRECISION="bf16",
            FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        )
    port = str(29500 + 10 * j["cards"][0] + (j.get("again", 0)))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(len(j["cards"])), "--master_port", port]
    command = [sys.executable, *(torchrun if len(j["cards"]) > 1 else []), __file__, "--worker"]
    log = open(Path(j["folder"]) / f"{j['name']}.log", "a")
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def ended(j: dict, process: subprocess.Popen, seconds: float) -> str:
    "How a job ended, after at most so many seconds: '' as it should."
    import signal

    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends what it has started
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        code = "out of time"
    steps = read_told(j, "step")
    enough = len(steps) >= j.get("steps", 1) and not j.get("finish", True)
    if code == 0 or enough:
        return ""
    return f"{code}: " + " | ".join((Path(j["folder"]) / f"{j['name']}.log").read_text().splitlines()[-30:])[-3000:]


def needed(j: dict, record: dict) -> float | None:
    "GB that the table computes."
    from qkrestore_nb.finetune import training_needs
    from qkrestore_nb.long_reading import reading_needs

    if j["kind"] == "finetune":
        share = j["rows"] // len(j["cards"])
        fit = [n for n in range(1, share + 1) if share % n == 0 and n * j["T"] <= 16384]
        at_once = record.get("rows_at_once") or max(fit, default=1)
        return training_needs(shape(j), j["T"] * at_once, len(j["cards"]), bool(j.get("rank")))["total_gb"]
    return (
        reading_needs(shape(j), j["T"], len(j["cards"]))["total_gb"]
        if j["kind"] == "read" and len(j["cards"]) > 1
        else None
    )


def gathered(j: dict, wall: float, error: str) -> dict:
    steps, folder = read_told(j, "step"), Path(j["folder"])

    def peak(r):
        return [p["peak"] for p in read_told(j, f"peak{r}")] + [s.get("peak", 0) for s in steps if r == 0]

    record = dict(
        job={k: v for k, v in j.items() if k not in ("pre", "data", "folder")},
        wall_s=wall,
        seconds=[s["seconds"] for s in steps],
        losses=[s["loss"] for s in steps if "loss" in s] or [s["loss"] for s in read_told(j, "loss")],
        peak_gpu_gb=[max(peak(r), default=None) for r in range(len(j["cards"]))],
    )
    note = folder / f"{j['name']}.post" / "finetune.json"
    if note.exists():
        done = json.loads(note.read_text())
        record["rows_at_once"] = done["config"]["rows_at_once"]
        record |= dict(seconds=[r["seconds"] for r in done["log"]], losses=[r["loss"] for r in done["log"]])
    record["needs_gb"] = needed(j, record)
    if error:
        record["error"] = error
    return record


def run(j: dict, limit: float) -> dict:
    "One job from its start to its record."
    then = time.perf_counter()
    if j.get("dies"):
        first = ended(j, start(j), limit)  # one process ends itself; the states stay
        saved = sorted(p.name for p in (Path(j["folder"]) / f"{j['name']}.post.run").glob("state-*"))
        j = {k: v for k, v in j.items() if k != "dies"} | dict(again=1)
    error = ended(j, start(j), limit - (time.perf_counter() - then))
    record = gathered(j, time.perf_counter() - then, error)
    if j.get("again"):
        record |= dict(first_end=first[:200], states_after_death=saved)
    if j.get("restore") and not error:
        from qkrestore_nb.restore import qk_restore

        post, began = Path(j["folder"]) / f"{j['name']}.post", time.perf_counter()
        record["restored"] = sorted(
            p.name for p in qk_restore(j["pre"], post, out=post.with_suffix(".restored")).iterdir()
        )
        record["restore_s"] = time.perf_counter() - began
        shutil.rmtree(post.with_suffix(".restored"))
    shutil.rmtree(Path(j["folder"]) / f"{j['name']}.post", ignore_errors=True)
    shutil.rmtree(Path(j["folder"]) / f"{j['name']}.post.run", ignore_errors=True)
    return record


def compared(folder: Path, found: dict):
    "How far the logits of one card and of several lie apart, in units of their spread."
    import torch

    for name in [n for n in found if n.startswith("read_") and n.endswith("_4")]:
        files = [folder / f"{n}.logits.pt" for n in (name, name[:-1] + "1")]
        if all(f.exists() for f in files):
            a, b = (torch.load(f, weights_only=True).flatten() for f in files)
            found[name] |= dict(
                difference=float((a - b).std() / b.std()),
                same_best=bool(a.argmax() == b.argmax()),
                best_10_shared=len(set(a.topk(10).indices.tolist()) & set(b.topk(10).indices.tolist())),
            )


def split(found: dict, out: Path):
    "One file a question: the runs on 1, 2, 4 cards beside each other."
    done = {k: v for k, v in found.items() if isinstance(v, dict) and "job" in v and not v.get("error")}

    def write(name, main, **more):
        peak = max(filter(None, main["peak_gpu_gb"]), default=0.0)
        record = dict(
            config=main["job"],
            versions=found["versions"],
            device=found["device"],
            cards=len(main["job"]["cards"]),
            seconds=main["seconds"],
            peak_gpu_gb=peak,
            needs_gb=main["needs_gb"],
            **more,
        )
        (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, {k: v for k, v in record.items() if k not in ("rows", "beside", "versions", "seconds", "config")})

    for r in done.values():
        late = r["seconds"][len(r["seconds"]) // 2 :]
        rows = r["job"].get("rows", 1)
        r["tokens_per_s"] = (
            rows * r["job"]["T"] / (min(late) if r["job"]["kind"] == "read" else statistics.median(late))
        )
    for stem in sorted({k.rsplit("_", 1)[0] for k, v in done.items() if v["job"]["kind"] == "finetune"}):
        rows = [done[f"{stem}_{n}"] for n in (1, 2, 4) if f"{stem}_{n}" in done]
        if not rows:
            continue
        one, many = rows[0], [r for r in rows if len(r["job"]["cards"]) > 1]
        number = lambda r: str(len(r["job"]["cards"]))
        if len(one["job"]["cards"]) > 1:
            many = []
        apart = {number(r): max(abs(a - b) for a, b in zip(r["losses"], one["losses"])) for r in many}
        ratio = {number(r): r["tokens_per_s"] / one["tokens_per_s"] for r in many}
        beside = {k: found[k] for k in (f"{stem}_dies", f"trl_{stem}_4") if k in found}
        write(
            f"fsdp_{stem}",
            rows[-1],
            tokens_per_s=rows[-1]["tokens_per_s"],
            ratio=ratio,
            largest_difference_of_losses=apart,
            rows=rows,
            beside=beside,
        )
    for name, main in done.items():
        one = done.get(name[:-1] + "1")
        if main["job"]["kind"] != "read" or len(main["job"]["cards"]) == 1 or not one:
            continue
        same = {k: main.get(k) for k in ("difference", "same_best", "best_10_shared")}
        write(
            name.replace("read_", "long_").rsplit("_", 1)[0],
            main,
            tokens_per_s=main["tokens_per_s"],
            one_card=dict(seconds=one["seconds"], peak_gpu_gb=one["peak_gpu_gb"][0]),
            ratio=min(one["seconds"]) / min(main["seconds"]),
            **same,
        )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--profile", choices=("full", "smoke"), default="full")
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--limit", type=float, default=200.0, help="seconds that a wave may take")
    p.add_argument("--only", nargs="*")
    p.add_argument("--have", type=Path)
    p.add_argument("--split", type=Path)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "many_gpus.json"
    found = {}
    for f in filter(None, (a.have, file)):
        if f.exists():
            found |= json.loads(f.read_text())
    if a.split:
        return split(found, a.split)
    from qkrestore_nb.core import provenance

    began, found = (
        time.perf_counter(),
        found | {k: v for k, v in provenance(0).items() if k in ("versions", "device", "date")},
    )
    waves = smoke(WAVES) if a.profile == "smoke" else WAVES
    with tempfile.TemporaryDirectory(dir=os.environ.get("BIG")) as folder:
        for wave in waves:
            missing = [j for j in wave if found.get(j["name"], dict(error="not run")).get("error")]
            wave = [
                j | dict(folder=folder, smoke=a.profile == "smoke")
                for j in missing
                if not a.only or j["name"] in a.only
            ]
            if not wave:
                continue
            if (left := 60 * a.minutes - (time.perf_counter() - began)) < 30:
                break
            ready = [j | prepare(j, Path(folder)) for j in wave]
            with ThreadPoolExecutor(len(wave)) as pool:
                records = list(pool.map(lambda j: run(j, min(a.limit, left)), ready))
            for j, r in zip(ready, records):
                found[j["name"]] = r
            compared(Path(folder), found)
            file.write_text(json.dumps(found, indent=1) + "\n")
            for j, r in zip(ready, records):
                short = json.dumps({k: v for k, v in r.items() if k != "job"})[:1500]
                print(f"== {j['name']} {r['wall_s']:.0f} s (at {time.perf_counter() - began:.0f}): {short}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        (lambda j: KINDS[j["kind"]](j))(json.loads(os.environ["JOB"]))
    else:
        main()

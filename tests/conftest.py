"Tiny checkpoints, written by hand as safetensors files: small enough to read, real enough to restore."
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CONFIG = dict(model_type="hypenet", architectures=["HypeNetForCausalLM"], vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=4,
              num_attention_heads=2, num_key_value_heads=1, head_dim=4, mixer_types=["lightning-attn", "attn", "attn", "lightning-attn"],
              attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 50", lightning_use_qk_norm=True,
              lightning_use_output_norm=True, lightning_use_output_gate=True, torch_dtype="bfloat16")


def write_checkpoint(folder: Path, seed: int, shards: int = 1, config: dict | None = None, dtype=torch.bfloat16) -> Path:
    "A HypeNet of four layers with random weights, in so many shards, with a tokenizer file and a generation config beside it."
    from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
    config = {**CONFIG, **(config or {})}
    torch.manual_seed(seed)
    model = HypeNetForCausalLM(HypeNetConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    tensors = {n: torch.randn_like(p).to(dtype).contiguous() for n, p in model.named_parameters()}
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts): save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {n: f for f, part in zip(files, parts) for n in part}}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def snapshot(folder: Path) -> dict:
    "Path below the folder -> hash of the file, or None for a folder: everything that could have been touched."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def pair(tmp_path):
    "pre and post of one model, beside each other, and nothing else in the folder."
    return write_checkpoint(tmp_path / "pre", 1), write_checkpoint(tmp_path / "post", 2)

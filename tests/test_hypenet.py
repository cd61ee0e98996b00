"Parity with the public reference implementation, on tiny checkpoints with its inputs and outputs; padding; transformers' ways."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(params=["tiny-a", "tiny-c"])
def golden(request):
    folder = GOLDENS / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_hidden_states(golden, attention):
    model, g, _ = golden
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out = model(g["input_ids"], output_hidden_states=True)
        long = model(g["long.input_ids"]).logits
    assert_close(out.logits, g["logits"], atol=5e-5, rtol=0)
    assert_close(long, g["long.logits"], atol=5e-5, rtol=0)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for i, h in enumerate(out.hidden_states): assert_close(h, g[f"hidden.{i}"], atol=5e-5, rtol=0)


def test_loss_and_gradients(golden):
    model, g, meta = golden
    loss = model(g["input_ids"], labels=g["labels"], use_cache=False).loss
    assert_close(loss, g["loss"], atol=5e-5, rtol=0)
    loss.backward()
    ours = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    assert ours.keys() == meta["grad_norms"].keys()
    for name, norm in meta["grad_norms"].items(): assert ours[name] == pytest.approx(norm, rel=1e-5), name


def test_prefill_and_decode(golden):
    model, g, _ = golden
    with torch.no_grad():
        out = model(g["input_ids"][:, :24], use_cache=True)
        assert_close(out.logits, g["prefill.logits"], atol=5e-5, rtol=0)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1)
        for i, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention":
                assert_close(cache.layers[i].recurrent_states[0], g[f"prefill.cache.{i}.state"], atol=2e-4, rtol=0)
            else:
                assert_close(cache.layers[i].keys, g[f"prefill.cache.{i}.key"], atol=5e-5, rtol=0)
                assert_close(cache.layers[i].values, g[f"prefill.cache.{i}.value"], atol=5e-5, rtol=0)
        for i in range(8):
            assert token.tolist() == g["decode.ids"][:, i].tolist()
            out = model(token[:, None], past_key_values=cache, use_cache=True)
            assert_close(out.logits[:, -1], g["decode.logits"][:, i], atol=5e-5, rtol=0)
            token = out.logits[:, -1].argmax(-1)
        for i, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention":
                assert_close(cache.layers[i].recurrent_states[0], g[f"decode.cache.{i}.state"], atol=2e-4, rtol=0)


def test_generate_is_greedy_decoding(golden):
    model, g, _ = golden
    out = model.generate(g["input_ids"][:, :24], attention_mask=torch.ones(2, 24, dtype=torch.long), max_new_tokens=8,
                         do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[:, 24:].tolist() == g["decode.ids"].tolist()


def _tiny(**fields):
    torch.manual_seed(0)
    config = HypeNetConfig(**{**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=8, mixer_types=["lightning-attn", "attn", "attn", "lightning-attn"],
                                     attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 50",
                                     lightning_use_qk_norm=True, lightning_use_output_norm=True, lightning_use_output_gate=True), **fields})
    model = HypeNetForCausalLM(config).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)  # default weights are too small to show a mistake
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, conv, attention):
    model = _tiny(lightning_use_short_conv=conv)  # no pad_token_id: the pad row of the embedding is not zero
    model.set_attn_implementation(attention)
    ids, pad = torch.randint(1, 64, (1, 90)), 13
    padded, mask = torch.zeros(2, 90 + pad, dtype=torch.long), torch.zeros(2, 90 + pad, dtype=torch.long)
    where = slice(pad, None) if side == "left" else slice(0, 90)
    padded[0, where], mask[0, where], padded[1], mask[1] = ids[0], 1, torch.randint(1, 64, (90 + pad,)), 1
    with torch.no_grad():
        alone, batch = model(ids).logits, model(padded, attention_mask=mask).logits
    assert_close(batch[0, where], alone[0], atol=1e-5, rtol=0)


def test_left_padded_generation():
    model = _tiny(lightning_use_short_conv=True)
    ids = torch.randint(1, 64, (1, 40))
    padded, mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1), torch.tensor([[0] * 9 + [1] * 40])
    keep = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **keep)[:, 40:]
    assert model.generate(padded, attention_mask=mask, **keep)[:, 49:].tolist() == alone.tolist()


@pytest.mark.parametrize("fields", [{}, dict(lightning_use_short_conv=True), dict(attn_use_rope=True, attn_logits_scaling=2),
                                    dict(lightning_head_dim=16, lightning_nh=3, lightning_nkv=1), dict(tie_word_embeddings=True, attention_bias=True)])
def test_saved_loads_and_decodes_the_same(tmp_path, fields):
    model, ids = _tiny(**fields), torch.randint(1, 64, (2, 100))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert json.loads((tmp_path / "config.json").read_text())["mixer_types"] == model.config.mixer_types
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(again(ids).logits, whole, atol=0, rtol=0)
        head = again(ids[:, :70], use_cache=True)
        parts = [head.logits]
        for a, b in ((70, 97), (97, 98), (98, 100)):
            parts.append(again(ids[:, a:b], past_key_values=head.past_key_values, use_cache=True).logits)
    assert_close(torch.cat(parts, 1), whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize("fields, word", [(dict(mixer_types=["attn", "mamba", "attn", "attn"]), "mamba"), (dict(mixer_types=["attn"]), "num_hidden_layers"),
                                          (dict(num_key_value_heads=3), "3 key heads"), (dict(attn_logits_scaling="yarn 4"), "yarn"),
                                          (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn")])
def test_a_config_that_cannot_be(fields, word):
    with pytest.raises(ValueError, match=word): _tiny(**fields)

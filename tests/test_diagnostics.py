"Gradient ranges against autograd on explicit logits, on HypeNet and on models of transformers; everything one can get wrong."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Gemma2Config, AutoModelForCausalLM

from qkrestore_nb import hypenet
from qkrestore_nb.diagnostics import finite_gradient, fit_decay, gradient_range
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.training import init_weights

MIXERS = ["lightning-attn", "attn", "attn", "lightning-attn"]


def hybrid(mixers=MIXERS, **fields):
    torch.manual_seed(0)
    return init_weights(HypeNetForCausalLM(HypeNetConfig(**dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=len(mixers), head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        lightning_nkv=2, mixer_types=mixers, attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 50",
        lightning_use_qk_norm=True, lightning_use_output_norm=True, lightning_use_short_conv=True) | fields)))


def llama(kind=LlamaConfig, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                 num_key_value_heads=2, head_dim=8, initializer_range=.3, **fields))


def text(B=2, T=256, seed=1): return torch.randint(1, 64, (B, T), generator=torch.Generator().manual_seed(seed))


def explicit(model, ids, weights=None, kind="softmax"):
    "dL/de by autograd: layer -> (B, H, T, T), with the logits themselves as leaves that zero is added to."
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    leaves, before, old = {}, hypenet.linear_attention, model.config._attn_implementation
    def attend(module, q, k, v, mask, scaling=None, **kw):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        e = q @ k.transpose(2, 3) * (q.shape[-1] ** -.5 if scaling is None else scaling)
        leaves[module.layer_idx] = zero = torch.zeros_like(e, requires_grad=True)
        allowed = torch.ones(e.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
        return ((e + zero).masked_fill(~allowed, -math.inf).softmax(-1) @ v).transpose(1, 2), None
    def linear(q, k, v, decay, *rest, **kw):
        T = q.shape[1]
        age = torch.arange(T)[:, None] - torch.arange(T)
        a = torch.einsum("bthd,bshd->bhts", q, k) * (decay[:, None, None] * age.clamp(min=0)).exp()
        leaves[("linear", len(leaves))] = zero = torch.zeros_like(a, requires_grad=True)
        return torch.einsum("bhts,bshd->bthd", (a + zero).tril(), v), None
    ALL_ATTENTION_FUNCTIONS.register("explicit", attend), ALL_MASK_ATTENTION_FUNCTIONS.register("explicit", sdpa_mask)
    try:
        model.config._attn_implementation = "explicit"
        if kind == "linear": hypenet.linear_attention = linear
        logits = model(ids, use_cache=False).logits
    finally: model.config._attn_implementation, hypenet.linear_attention = old, before
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = torch.ones(ids.shape)[:, 1:].flatten() if weights is None else weights[:, 1:].flatten()
    grads = torch.autograd.grad((loss * w).sum() / w.sum(), list(leaves.values()))
    return {k: g for k, g in zip(leaves, grads) if (k[0] == "linear" if isinstance(k, tuple) else kind == "softmax")}


def diagonals(de, pairs=True, signed=False):
    "The mean over each diagonal, the slow way: (H, T)."
    de, T = (de if signed else de.abs()), de.shape[-1]
    x = torch.stack([de.diagonal(-tau, 2, 3).sum((0, 2)) / (de.shape[0] * (T - tau) if pairs else 1) for tau in range(T)], -1)
    return x.abs()


MODELS = dict(hypenet=hybrid, llama=llama, sliding=lambda: llama(MistralConfig, sliding_window=50), gemma=lambda: llama(GemmaConfig))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True])
def test_agrees_with_autograd_on_explicit_logits(name, signed):
    model, ids = MODELS[name](), text()
    r, truth = gradient_range(model, ids, bins=None, signed=signed), explicit(model, ids)
    assert r.layers == sorted(truth) and r.g.shape == (len(truth), 4, 256) and r.tau.tolist() == list(range(256))
    for i, layer in enumerate(r.layers):
        want = diagonals(truth[layer], signed=signed)
        assert_close(torch.tensor(r.g[i]).float(), want, rtol=1e-5 if not signed else 1e-3, atol=1e-5 * want.max().item())


def test_linear_layers_agree_with_autograd():
    model, ids = hybrid(), text()
    r, truth = gradient_range(model, ids, "linear", bins=None), explicit(model, ids, kind="linear")
    assert r.layers == [0, 3] and r.kinds == ["linear"] * 2
    for g, de in zip(r.g, truth.values()): assert_close(torch.tensor(g).float(), diagonals(de), rtol=1e-4, atol=1e-5 * diagonals(de).max().item())
    raw = gradient_range(model, ids, "linear", bins=None, raw=True)
    decay = torch.exp(-hypenet.decay_slopes(4)[:, None] * torch.arange(256)).numpy()
    np.testing.assert_allclose(raw.g[0], r.g[0] * decay, rtol=1e-5)
    both = gradient_range(model, ids, "all", bins=None)
    assert both.layers == [0, 1, 2, 3] and both.kinds == ["linear", "softmax", "softmax", "linear"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masked_labels_and_uneven_rows(side):
    model, ids = hybrid(), text(2, 40)
    labels = ids.clone()
    labels[:, :9] = -100
    pad = lambda x, value: torch.cat([torch.full((2, 7), value), x][::1 if side == "left" else -1], 1)
    r = gradient_range(model, dict(input_ids=pad(ids, 0), labels=pad(labels, -100), attention_mask=pad(torch.ones_like(ids), 0)), bins=None)
    plain = explicit(model, ids, (labels != -100).float())
    for i, layer in enumerate(r.layers): assert_close(torch.tensor(r.g[i]).float(), diagonals(plain[layer]), rtol=1e-4, atol=1e-9)
    short, long = text(1, 20, 3), text(1, 40, 4)
    both = torch.cat([F.pad(short, (0, 20)), long])
    weights = torch.ones(2, 40)
    weights[0, 20:] = 0
    together = gradient_range(model, (both, weights), bins=None)
    alone = [gradient_range(model, x, bins=None) for x in (short, long)]
    for i, n in enumerate((19, 39)):
        T = alone[i].sums.shape[-1]
        np.testing.assert_allclose(together.sums[i][..., :T], alone[i].sums[0] * n / 58, rtol=2e-4, atol=1e-8)


def test_normalised_and_binned():
    model, ids = hybrid(), text(3, 64)
    exact = {n: gradient_range(model, ids, bins=None, normalise=n).g for n in ("pair", "token", "share")}
    np.testing.assert_allclose(exact["share"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(exact["pair"] * 3 * np.arange(64, 0, -1), exact["token"], rtol=1e-5)
    r = gradient_range(model, ids, bins=[0, 1, 4, 64])
    np.testing.assert_allclose(r.g[..., 1], exact["token"][..., 1:4].sum(-1) / (3 * (63 + 62 + 61)), rtol=1e-5)
    few = gradient_range(model, ids, bins=None, tokens=64)
    np.testing.assert_allclose(few.g, exact["pair"], rtol=1e-3, atol=1e-9)
    rows, s = r.table(), r.summary()
    assert len(rows) == 8 and {"layer", "head", "W", "W_low", "W_high", "median", "beyond", "r2"} <= rows[0].keys()
    for name in ("W", "mean", "median", "beyond"): assert s[name][1] <= s[name][0] * 1.5 and s[name][1] <= s[name][2]
    import matplotlib.pyplot as plt
    assert len(r.plot(plt.figure().gca()).lines) == 2


def test_model_is_left_as_it_was():
    model = hybrid().train()
    model.lm_head.weight.requires_grad_(False)
    attention, linear = model.config._attn_implementation, hypenet.linear_attention
    with torch.no_grad(): gradient_range(model, text(1, 32), bins=None)
    with pytest.raises(ValueError): gradient_range(model, text(1, 32), layers=[9])
    assert model.training and all(m.training for m in model.modules()) and model.config._attn_implementation == attention
    assert hypenet.linear_attention is linear
    assert not model.lm_head.weight.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())


def test_fit_finds_a_known_length_and_says_when_it_is_not_exponential():
    tau = np.arange(1, 400)
    f = fit_decay(tau, 3 * np.exp(-tau / 115))
    assert f["W"][0] == pytest.approx(115) and f["r2"][0] == pytest.approx(1) and f["r2_power"][0] < .9
    f = fit_decay(tau, tau ** -.7)
    assert f["r2"][0] < .9 and f["r2_power"][0] == pytest.approx(1)
    assert fit_decay(tau, np.exp(tau / 50))["W"][0] == math.inf


def _half(scale):
    model = llama().half()
    with torch.no_grad(): model.lm_head.weight.mul_(scale)
    return model


WRONG = dict(
    no_softmax=(lambda: gradient_range(hybrid(["lightning-attn"] * 2), text(1, 16)), "no softmax layer"),
    no_linear=(lambda: gradient_range(llama(), text(1, 16), "linear"), "no linear layer"),
    labels_masked=(lambda: gradient_range(hybrid(), dict(input_ids=text(1, 16), labels=torch.full((1, 16), -100))), "every label is masked"),
    only_first_label=(lambda: gradient_range(hybrid(), (text(1, 16), torch.eye(16)[:1])), "every label is masked"),
    short=(lambda: gradient_range(hybrid(), text(1, 16), bins=[0, 8, 32]), "ends at 32 and the longest row has 16"),
    bins=(lambda: gradient_range(hybrid(), text(1, 16), bins=[4, 2]), "edges"),
    normalise=(lambda: gradient_range(hybrid(), text(1, 16), normalise="mean"), "choose pair, token or share"),
    layer=(lambda: gradient_range(hybrid(), text(1, 16), layers=[1, 7]), "layer 7"),
    word=(lambda: gradient_range(hybrid(), text(1, 16), layers="attn"), "choose softmax, linear, all"),
    capped=(lambda: gradient_range(llama(Gemma2Config, attn_logit_softcapping=50.), text(1, 16)), "softcap"),
    holes=(lambda: gradient_range(hybrid(), dict(input_ids=text(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))), "holes"),
    one_row=(lambda: gradient_range(hybrid(), text(1, 16)[0]), r"\(B, T\)"),
    not_hooked=(lambda: gradient_range(Unhookable(), text(1, 16)), "so that nothing can be recorded"),
    not_a_model=(lambda: gradient_range(torch.nn.Linear(2, 2), text(1, 16)), "causal language model"),
    overflow=(lambda: gradient_range(_half(3e4), text(1, 16)), "overflow|not finite"),
    underflow=(lambda: finite_gradient((torch.randn(1, 9, 2, 8) * 5e-8).half(), 1), "too small for float16"),
)


class Unhookable(torch.nn.Module):
    "A model that does its attention by itself."
    def __init__(self):
        super().__init__()
        self.config = GPT2Config(n_layer=1)
        self.embed = torch.nn.Embedding(64, 64)

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        return type("Out", (), dict(logits=F.scaled_dot_product_attention(x, x, x, is_causal=True)))


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_is_wrong(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words): call()

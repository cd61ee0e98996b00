"""Gradients of the four projections by distance: parts that sum to autograd's gradient, and the parts themselves on
explicit logits."""

import math

import numpy as np
import pytest
import torch
from test_diagnostics import Unhookable, _half, hybrid, llama, text
from transformers import GPT2Config, MistralConfig, Qwen2Config

from qkrestore_nb import hypenet
from qkrestore_nb.diagnostics import rows_loss, rows_of
from qkrestore_nb.projections import far_bound, projection_gradients

NAMES = dict(Q="q_proj", K="k_proj", V="v_proj", O="o_proj")


def weights_of(model, layer):
    return {r: getattr(model.get_submodule(f"model.layers.{layer}.self_attn"), n).weight for r, n in NAMES.items()}


def autograd(model, batch, layer):
    "The whole gradients of the four weights, in the model's own dtype."
    rows = rows_of(batch)
    total = {r: torch.zeros_like(w) for r, w in weights_of(model, layer).items()}
    for row in rows:
        grads = torch.autograd.grad(
            rows_loss(model, [row], sum(float(r[2].sum()) for r in rows)), list(weights_of(model, layer).values())
        )
        for r, g in zip(total, grads):
            total[r] += g
    return total


MODELS = dict(
    hypenet=(hybrid, 1e-6),
    biases=(lambda: hybrid(attention_bias=True), 1e-6),
    no_log_scale=(lambda: hybrid(attn_logits_scaling=None), 1e-7),
    no_gate=(lambda: hybrid(attn_use_output_gate=False, attn_logits_scaling=None, attn_use_rope=True), 1e-6),
    llama=(llama, 1e-10),
    qwen2_biases=(lambda: llama(Qwen2Config), 1e-6),
    sliding=(lambda: llama(MistralConfig, sliding_window=50), 1e-6),
)


@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_to_autograd_in_float64(name):
    make, close = MODELS[name]
    model, ids = make().double().eval(), text(2, 150)
    r = projection_gradients(model, ids, keep=True)
    assert r.edges[0] == 0 and r.edges[-1] == 150 and r.kinds == ["softmax"] * len(r.layers) and len(r.layers) == 2
    for i, layer in enumerate(r.layers):
        for j, (role, truth) in enumerate(autograd(model, ids, layer).items()):
            parts = r.parts[layer, role]
            assert parts.dtype == torch.float64 and (parts.sum(0) - truth).norm() < close * truth.norm(), role
            assert r.whole[i, j] == pytest.approx(truth.norm().item(), rel=close) and r.along[
                i, j
            ].sum() == pytest.approx(r.whole[i, j])
            np.testing.assert_allclose(r.norms[i, j], parts.flatten(1).norm(dim=1).numpy())


@pytest.mark.parametrize(
    "fields",
    [{}, dict(lightning_use_short_conv=False), dict(lightning_use_output_norm=False, lightning_use_output_gate=True)],
)
def test_parts_of_linear_layers_sum_to_autograd(fields):
    model, ids = hybrid(**fields).double().eval(), text(2, 150)
    r = projection_gradients(model, ids, "all", keep=True)
    assert r.layers == [0, 1, 2, 3] and r.kinds == ["linear", "softmax", "softmax", "linear"]
    for layer in r.layers:
        for role, truth in autograd(model, ids, layer).items():
            assert (r.parts[layer, role].sum(0) - truth).norm() < 1e-6 * truth.norm(), (layer, role)


def _explicit_part(model, ids, near, far, layer):
    """The same part by autograd: the pairs of the bin are let through, the gradient of all others is stopped where e
    and P are made."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kept = {}

    def attend(module, q, k, v, mask, scaling=None, **kw):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        t = torch.arange(q.shape[2])
        tau = t[:, None] - t
        inside = (tau >= near) & (tau < far) & (tau >= 0)

        def only(x, wanted):
            return torch.where(wanted, x, x.detach())

        e = (q @ k.mT) * scaling
        if module.layer_idx == layer:
            e = only(e, inside)
        p = e.masked_fill(tau < 0, -math.inf).softmax(-1)
        if module.layer_idx != layer:
            return (p @ v).transpose(1, 2), None
        stopped = p.detach() * inside
        o = p @ v.detach() + stopped @ v - (stopped @ v).detach()  # v hears the pairs of the bin alone, e all of v
        kept["part"] = (stopped @ v).detach().transpose(1, 2)
        return o.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("explicit", attend), ALL_MASK_ATTENTION_FUNCTIONS.register("explicit", sdpa_mask)
    old, model.config._attn_implementation = model.config._attn_implementation, "explicit"
    try:
        grads = autograd(model, ids, layer)
    finally:
        model.config._attn_implementation = old
    return grads, kept["part"]


@pytest.mark.parametrize("make", [lambda: hybrid(attn_logits_scaling=None, attention_bias=True), llama])
def test_each_part_is_that_of_its_pairs(make):
    "Not only the sum: with the other pairs cut out of the graph, autograd gives the same part of Q, K and V."
    model, ids = make().double().eval(), text(1, 60)
    r = projection_gradients(model, ids, bins=[0, 1, 5, 20, 60], keep=True)
    layer = r.layers[-1]
    for i, (near, far) in enumerate(zip(r.edges[:-1], r.edges[1:])):
        truth, _ = _explicit_part(model, ids, near, far, layer)
        for role in "QKV":
            assert (r.parts[layer, role][i] - truth[role]).norm() < 1e-6 * truth[role].norm(), (near, role)


def test_the_output_s_part():
    "Half of the keys: what W_O hears of a bin is dz times the part of its input."
    model, ids = llama().double().eval(), text(1, 40)
    r = projection_gradients(model, ids, bins=[0, 5, 40], keep=True)
    seen = {}
    attention = model.model.layers[1].self_attn
    hook = attention.o_proj.register_forward_hook(
        lambda m, args, z: z.register_hook(lambda g: seen.__setitem__("dz", g)) and None
    )
    _, part = _explicit_part(model, ids, 0, 5, 1)
    hook.remove()
    truth = seen["dz"].flatten(0, 1).T @ part.flatten(2).flatten(0, 1)
    torch.testing.assert_close(r.parts[1, "O"][0], truth, rtol=1e-6, atol=1e-12)


def test_rows_of_different_lengths_weights_and_few_tokens():
    model = hybrid().double().eval()
    ids, weights = text(3, 80), torch.ones(3, 80)
    weights[0, 30:] = 0
    weights[1, :50] = 0
    r = projection_gradients(model, (ids, weights), keep=True)
    few = projection_gradients(model, (ids, weights), tokens=80, keep=True)
    for layer in r.layers:
        for role, truth in autograd(model, (ids, weights), layer).items():
            assert (r.parts[layer, role].sum(0) - truth).norm() < 1e-6 * truth.norm()
            torch.testing.assert_close(few.parts[layer, role], r.parts[layer, role], rtol=1e-6, atol=1e-9)
    assert (
        r.sequences.shape == (3, 2, 4, len(r.tau))
        and not r.sequences[0][..., r.edges[:-1] >= 30].any()
        and r.sequences[1][..., -1].any()
    )


def test_packed_documents():
    "Two documents in a row with positions that begin anew give what they give in rows of their own; no pair crosses the border."
    model = hybrid().double().eval()
    a, b = text(1, 30, 3), text(1, 50, 4)
    positions = torch.cat([torch.arange(30), torch.arange(50)])[None]
    labels = torch.cat([a, b], 1)
    labels[:, 30] = -100
    packed = dict(input_ids=torch.cat([a, b], 1), labels=labels, position_ids=positions)
    r = projection_gradients(model, packed, bins=[0, 5, 80], keep=True)
    alone = [projection_gradients(model, x, bins=[0, 5, x.shape[1]], keep=True) for x in (a, b)]
    for at, parts in r.parts.items():
        want = (29 * alone[0].parts[at] + 49 * alone[1].parts[at]) / 78
        assert (parts - want).norm() < 1e-5 * want.norm(), at
    crossed = projection_gradients(model, packed | dict(position_ids=None), bins=[0, 5, 80], keep=True)
    assert (crossed.parts[1, "Q"] - r.parts[1, "Q"]).norm() > 1e-2 * r.parts[1, "Q"].norm()
    with pytest.raises(ValueError, match="rows of one document"):
        projection_gradients(model, packed, "all")


def test_model_is_left_as_it_was():
    model = hybrid().train()
    before, linear = model.config._attn_implementation, hypenet.linear_attention
    projection_gradients(model, text(1, 32), "all", bins=4)
    assert model.training and model.config._attn_implementation == before and hypenet.linear_attention is linear
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not any(
        m._forward_hooks for m in model.modules()
    )


def test_half_precision_is_near():
    model, ids = llama(), text(2, 64)
    exact = projection_gradients(model, ids, bins=[0, 4, 16, 64])
    for dtype in (torch.bfloat16, torch.float16):
        r = projection_gradients(llama().to(dtype), ids, bins=[0, 4, 16, 64])
        np.testing.assert_allclose(r.norms, exact.norms, rtol=0.1)


def test_adapters():
    "With LoRA the parts are those of the effective weight."
    from peft import LoraConfig, get_peft_model

    ids = text(2, 40)
    plain = projection_gradients(llama(), ids, bins=4)
    r = projection_gradients(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"])), ids, bins=4)
    np.testing.assert_allclose(r.norms, plain.norms, rtol=1e-4)


def test_summaries():
    r = projection_gradients(hybrid(), text(3, 64), bins=[0, 1, 8, 64])
    share = r.share(8)
    np.testing.assert_allclose(share, r.norms[..., 2] / r.norms.sum(-1))
    value, low, high = r.interval(8)
    assert ((low <= value) & (value <= high)).all() and (low < high).all()
    d, low, high = r.contrast(8)
    assert low < d < high and d == pytest.approx(value[:, 2:].mean() - value[:, :2].mean())
    np.testing.assert_allclose((r.density() * np.diff(r.edges)).sum(-1), 1)
    assert len(r.table(8)) == 8 and r.table(8)[1]["share"] == pytest.approx(share[0, 1])
    import matplotlib.pyplot as plt

    assert len(r.plot(ax=plt.figure().gca()).lines) == 4 and len(r.plot(2, plt.figure().gca(), rho=0.9).lines) == 5
    b = far_bound(r.edges, 0.9, r.density()[0, :2])
    assert b[1] == pytest.approx(r.density()[0, :2, 1].max()) and (np.diff(b) < 0).all()


def _mixing():
    "Something between attention and W_O that is no gate: the channels are rolled."
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0].roll(1, -1),))
    return model


WRONG = dict(
    no_softmax=(lambda: projection_gradients(hybrid(["lightning-attn"] * 2), text(1, 16)), "no softmax layer"),
    no_linear=(lambda: projection_gradients(llama(), text(1, 16), "linear"), "no linear layer"),
    labels_masked=(
        lambda: projection_gradients(hybrid(), dict(input_ids=text(1, 16), labels=torch.full((1, 16), -100))),
        "every label is masked",
    ),
    short=(
        lambda: projection_gradients(hybrid(), text(1, 16), bins=[0, 8, 32]),
        "ends at 32 and the longest row has 16",
    ),
    every=(lambda: projection_gradients(hybrid(), text(1, 16), bins=None), "a matrix for each"),
    word=(lambda: projection_gradients(hybrid(), text(1, 16), layers="attn"), "choose softmax, linear, all"),
    layer=(lambda: projection_gradients(hybrid(), text(1, 16), layers=[1, 7]), "layer 7"),
    not_hooked=(lambda: projection_gradients(Unhookable(), text(1, 16)), "nothing can be recorded"),
    overflow=(lambda: projection_gradients(_half(3e4), text(1, 16)), "overflow|not finite"),
    mixing=(lambda: projection_gradients(_mixing(), text(1, 16)), "more than a gate"),
    rho=(lambda: far_bound([0, 1, 2], 1.0), "between 0 and 1"),
)


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_is_wrong(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert len(str(e.value)) <= 160


def test_names_of_projections_that_are_not_known():
    "GPT-2 has one matrix for Q, K and V."
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=64, n_positions=64))
    with pytest.raises(ValueError, match="cannot be told apart"):
        projection_gradients(model, text(1, 16))


def _script(name):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / "studies" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "said, shape",
    [
        ('sft_batch:{"rows":4}', (4, 128)),
        ('sft_batch:{"rows":2,"T":256,"packed":true,"borders":true}', (2, 256)),
        ('recall.recall_test:{"kind":"MF","B":2,"T":256,"questions":4}', (2, 256)),
        ('kinds.copy:{"B":3,"T":96}', (3, 96)),
        ('pretraining_batch:{"tokens":512}', (2, 256)),
    ],
)
def test_batches_of_the_script(said, shape):
    "benchmarks/studies/why.py takes functions by name, with their own parameters."
    why = _script("why")
    b, again, other = (why.batch(said, step, 0) for step in (0, 0, 1))
    assert b["input_ids"].shape == b["weights"].shape == shape and b["weights"].any()
    assert torch.equal(b["input_ids"], again["input_ids"]) and not torch.equal(b["input_ids"], other["input_ids"])
    assert ("position_ids" in b) == ("borders" in said)

"Drift of weights, reach of attention, attention on the needle: against the slow way on explicit weights."

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from test_diagnostics import Unhookable, hybrid, llama, text
from transformers import MistralConfig

from qkrestore_nb.drift import (
    attention_reach,
    drift,
    effective_rank,
    far_directions,
    group_of,
    needle_places,
    retrieval_scores,
    softmax_layers,
)
from qkrestore_nb.recall import recall_test


def explicit(model, ids):
    "layer -> attention weights (B, H, T, T) and the inputs of q_proj (B, T, d)."
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    weights, inputs, hooks = {}, {}, []

    def attend(module, q, k, v, mask, scaling=None, **kw):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() if mask is None else mask
        p = (q @ k.mT * scaling).masked_fill(~allowed, -math.inf).softmax(-1)
        weights[module.layer_idx] = p.detach()
        return (p @ v).transpose(1, 2), None

    for m in model.modules():
        if hasattr(m, "q_proj"):
            hooks.append(
                m.q_proj.register_forward_pre_hook(lambda q, a, i=m.layer_idx: inputs.__setitem__(i, a[0].detach()))
            )
    ALL_ATTENTION_FUNCTIONS.register("explicit", attend), ALL_MASK_ATTENTION_FUNCTIONS.register("explicit", sdpa_mask)
    old, model.config._attn_implementation = model.config._attn_implementation, "explicit"
    with torch.no_grad():
        model(ids, use_cache=False)
    model.config._attn_implementation = old
    for h in hooks:
        h.remove()
    return weights, inputs


MODELS = dict(hypenet=hybrid, llama=llama, sliding=lambda: llama(MistralConfig, sliding_window=50))


@pytest.mark.parametrize("name", MODELS)
def test_reach_against_explicit_weights(name):
    model, ids = MODELS[name]().eval(), text(3, 300)
    r, (weights, _) = attention_reach(model, ids, beyond=20), explicit(model, ids)
    tau = (torch.arange(300)[:, None] - torch.arange(300)).clamp(min=0)
    assert r.layers == sorted(weights) and r.distance.shape == (3, 2, 4)
    for i, layer in enumerate(r.layers):
        p = weights[layer].double()
        np.testing.assert_allclose(r.distance[:, i], (p * tau).sum(-1).mean(-1), rtol=1e-4)
        np.testing.assert_allclose(
            r.entropy[:, i], -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(r.far[:, i], (p * (tau >= 20)).sum(-1).mean(-1), rtol=1e-4)
    assert len(r.table()) == 8


@pytest.mark.parametrize("name", MODELS)
def test_far_directions_against_explicit_weights(name):
    model, ids = MODELS[name]().eval(), text(2, 200)
    found, (weights, inputs) = far_directions(model, ids, far=30, rank=3), explicit(model, ids)
    far = (torch.arange(200)[:, None] - torch.arange(200)) >= 30
    for layer, p in weights.items():
        p, x = p.double(), inputs[layer].double()
        assert found[layer, "Q"].mass == pytest.approx(float((p * far).sum() / p.sum()), rel=1e-4)
        for role, axis in (("Q", -1), ("K", -2)):
            for which, part in (("far", p * far), ("near", p * ~far)):
                w = part.sum(axis).sum(1)
                M = torch.einsum("bt,bti,btj->ij", w, x, x)
                U = getattr(found[layer, role], which).double()
                best = torch.linalg.eigvalsh(M)[-3:].sum()
                assert float((U.T @ M @ U).trace()) == pytest.approx(float(best), rel=1e-4), (layer, role, which)
    d = torch.randn(8, 32)
    U = found[layer, "Q"].far
    assert (
        found[layer, "Q"].shares(d @ U @ U.T)[0] == pytest.approx(1, rel=1e-4)
        and found[layer, "Q"].shares(d)[2] == 3 / 32
    )
    assert found[layer, "Q"].shares(d - d @ U @ U.T)[0] < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_retrieval_against_explicit_weights(name):
    model = MODELS[name]().eval()
    ids = text(3, 120).numpy()
    rng = np.random.default_rng(0)
    asking, value = (
        rng.integers(60, 119, (3, 2, 5)),
        np.sort(rng.permuted(np.tile(np.arange(60), (6, 1)), axis=1)[:, :5].reshape(3, 2, 5)),
    )
    r, (weights, _) = retrieval_scores(model, ids, asking, value), explicit(model, torch.as_tensor(ids))
    for i, layer in enumerate(r.layers):
        for b in range(3):
            want = sum(weights[layer][b][:, asking[b, q]][..., value[b, q]].sum(-1).mean(-1) for q in range(2)) / 2
            np.testing.assert_allclose(r.scores[b, i], want, rtol=1e-4, atol=1e-6)
    layer, head, score = r.best()
    assert score == r.mean().max() == r.mean()[r.layers.index(layer), head]


def test_places_of_a_recall_test():
    test = recall_test("MK", 3, 400, 4)
    asking, value = needle_places(test)
    row = np.arange(3)[:, None, None]
    assert (test["ids"][row, value] == test["ids"][row, asking + 1]).all() and (value < asking).all()
    with pytest.raises(ValueError, match="where its needles are"):
        needle_places(dict(ids=test["ids"], ask=test["ask"]))


def test_drift_says_what_was_moved():
    pre = hybrid()
    post = deepcopy(pre)
    attention, D = post.model.layers[1].self_attn, 8
    with torch.no_grad():
        attention.q_proj.weight[:D] *= 1.5
        attention.k_proj.weight[:D] = torch.randn(D, 32)
        post.model.layers[0].self_attn.v_proj.weight += torch.outer(torch.randn(16), torch.randn(32))
    moved = {t.name: t for t in drift(pre, post).tensors}
    q, k, v = (moved[f"model.layers.{i}.self_attn.{n}_proj.weight"] for i, n in ((1, "q"), (1, "k"), (0, "v")))
    assert (q.group, k.group, v.group) == ("softmax Q", "softmax K", "linear V") and v.rank == pytest.approx(
        1, rel=1e-3
    )
    size = pre.model.layers[1].self_attn.q_proj.weight
    assert q.relative == pytest.approx(0.5 * float((size[:D].norm() / size.norm()).detach()), rel=1e-5)
    assert len(q.angles) == 4 and max(q.angles) < 1e-3 and k.angles[0] > 5 and max(k.angles[1:]) < 1e-3
    assert sum(t.norm > 0 for t in moved.values()) == 3
    groups = drift(pre, post).groups()
    assert groups["mlp"]["relative"] == 0 and groups["softmax V"]["relative"] == 0 and groups["softmax K"]["angle"] > 1
    assert {t.name: t.norm for t in drift(pre.state_dict(), post.state_dict()).tensors if t.name in moved} == {
        n: t.norm for n, t in moved.items()
    }
    import matplotlib.pyplot as plt

    assert len(drift(pre, post).plot(plt.figure().gca()).patches) == len(groups)
    assert len(attention_reach(pre, text(2, 32)).plot(plt.figure().gca()).collections) == 2
    assert (
        len(
            retrieval_scores(pre, text(1, 32), np.full((1, 1, 1), 20), np.full((1, 1, 1), 3))
            .plot(plt.figure().gca())
            .lines[0]
            .get_xdata()
        )
        == 8
    )


def test_layers_of_any_model():
    assert softmax_layers(hybrid()) == {1, 2} and softmax_layers(torch.nn.Linear(2, 2)) is None
    assert softmax_layers(hybrid(["lightning-attn"] * 2)) == set() and softmax_layers(llama()) in (None, {0, 1})
    assert (
        group_of("backbone.layers.3.mixer.k_proj.bias", {3}) == "softmax K"
        and group_of("model.layers.0.self_attn.q_norm.weight") == "norm"
    )
    assert group_of("model.layers.0.self_attn.q_conv1d.weight") == "other"
    assert effective_rank(1e-20 * torch.eye(4)) == pytest.approx(4)


def _renamed():
    return {n.replace("layers.1", "layers.9"): x for n, x in hybrid().state_dict().items()}


WRONG = dict(
    other_names=(lambda: drift(hybrid().state_dict(), _renamed()), "in one of pre and post only"),
    other_shapes=(lambda: drift(hybrid(), hybrid(intermediate_size=64)), "compare checkpoints of one model"),
    no_softmax=(lambda: attention_reach(hybrid(["lightning-attn"] * 2), text(1, 16)), "no softmax layer"),
    not_hooked=(lambda: attention_reach(Unhookable(), text(1, 16)), "nothing can be recorded"),
    labels_masked=(
        lambda: attention_reach(hybrid(), dict(input_ids=text(1, 16), labels=torch.full((1, 16), -100))),
        "every label is masked",
    ),
    not_far=(lambda: far_directions(hybrid(), text(1, 16), far=64), "goes 64 tokens back"),
    places=(
        lambda: retrieval_scores(hybrid(), text(1, 16), np.zeros((1, 2)), np.zeros((1, 2))),
        r"must be \(B, Q, L\)",
    ),
    outside=(
        lambda: retrieval_scores(hybrid(), text(1, 16), np.full((1, 1, 1), 16), np.zeros((1, 1, 1), int)),
        "outside the rows",
    ),
)


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_is_wrong(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert len(str(e.value)) <= 160

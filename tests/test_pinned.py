"Values that nothing else holds in place: intervals against published implementations, borders, and the fields that make Q and K foreign."
import numpy as np
import pytest
from conftest import hypenet_config, small_tokenizer

from qkrestore_nb.core import wilson
from qkrestore_nb.families import disagreement


@pytest.mark.parametrize("k, n, low, high", [(18, 20, .698966, .972134), (0, 200, 0, .018845), (20, 20, .838875, 1), (1, 3, .061492, .79234), (50, 100, .403832, .596168)])
def test_wilson_is_scipys(k, n, low, high):
    "scipy.stats.binomtest(k, n).proportion_ci(.95, 'wilson'), to what 1.96 differs from its 1.959964."
    assert wilson(k, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_reaches_where_the_test_stops_rejecting():
    "Its ends p solve (k/n - p)^2 = z^2 p (1 - p) / n: that is its definition."
    for k, n in ((3, 7), (18, 20), (199, 200)):
        for p in wilson(k, n): assert (k / n - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n)
    for k, n in ((1, 0), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="not a proportion"): wilson(k, n)


@pytest.mark.parametrize("n", [1, 4, 16, 100])
def test_paired_is_never_sure_of_nothing(n):
    "Equal answers throughout: the two haystacks that Bonett and Price add leave 1.96 sqrt(2 / ((n + 1) (n + 2)))."
    from qkrestore_nb.audit import paired
    d, low, high = paired([(1, 2)] * n, [(1, 2)] * n)
    half = 196 * np.sqrt(2 / ((n + 1) * (n + 2)))
    assert (d, low, high) == pytest.approx((0, max(-100, -half), min(100, half)))


def test_paired_by_hand():
    "Differences .5, 0, 1 and the added 1, -1: mean .3, standard deviation sqrt(2.8 / 4)."
    from qkrestore_nb.audit import paired
    d, low, high = paired([(1, 4), (2, 4), (0, 4)], [(3, 4), (2, 4), (4, 4)], z=1.)
    spread = 100 * np.sqrt(sum((x - .3) ** 2 for x in (.5, 0, 1, 1, -1)) / 4 / 5)
    assert (d, low, high) == pytest.approx((50, 30 - spread, 30 + spread))


def test_the_bootstrap_draws_sequences():
    "The spread of its sums is what drawing n of n sequences with replacement has: n times the variance of one."
    from qkrestore_nb.diagnostics import _resampled
    x, pairs = np.random.default_rng(0).normal(size=(6, 5)), np.ones((6, 5))
    (total, _), (drawn, counts) = _resampled(x, pairs, None, 20_000, 0)
    assert total[0] == pytest.approx(x.sum(0)) and (counts == 6).all()
    assert drawn.mean(0) == pytest.approx(x.sum(0), abs=.1) and drawn.var(0) == pytest.approx(6 * x.var(0), rel=.05)


def test_intervals_of_a_gradient_range_have_a_width():
    from test_diagnostics import hybrid, text

    from qkrestore_nb.diagnostics import gradient_range
    r = gradient_range(hybrid(), text(4, 64), bins=[0, 1, 4, 64])
    s = r.summary()
    for name in ("mean", "W"): assert s[name][1] < s[name][0] < s[name][2]
    g, low, high = r.curve()
    assert ((low < high) | (g == 0)).all()


@pytest.mark.parametrize("template", [True, False])
def test_a_conversation_that_begins_with_the_assistant(template):
    "Its first token is the next token of nobody, wherever in a row it stands."
    from qkrestore_nb.finetune import encode_chat, packed_rows
    tokenizer = small_tokenizer()
    if not template: tokenizer.chat_template = None
    chat = [dict(role="assistant", content="four words are here")]
    ids, labels = encode_chat(tokenizer, chat)
    assert tokenizer.decode([y for y in labels if y >= 0]) == "four words are here<|end|>" and (template or labels[0] == ids[0])  # alone it would count
    row = next(packed_rows([chat] * 3, tokenizer, 64))
    starts = [i for i, p in enumerate(row["position_ids"]) if p == 0][:3]
    assert starts == [0, len(ids), 2 * len(ids)] and [row["labels"][i] for i in starts] == [-100] * 3
    assert row["labels"][1:len(ids)] == labels[1:]


HYPENET = dict(hidden_size=16, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, attention_bias=True, rope_theta=5e5,
               rope_scaling=dict(rope_type="yarn", factor=2.), attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 500", lightning_nh=4, lightning_nkv=4, lightning_head_dim=2,
               lightning_scale="1/d", lightning_use_rope=False, lightning_use_qk_norm=True, lightning_use_short_conv=True)
QWEN = dict(model_type="qwen3_next", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"])
QWEN_OTHER = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8, attention_bias=True, rope_theta=5e5, rms_norm_eps=1e-5, sliding_window=64, partial_rotary_factor=.5,
                  query_pre_attn_scalar=8, attention_multiplier=.5, attn_logit_softcapping=50., logits_soft_cap=30.)


@pytest.mark.parametrize("field", HYPENET)
def test_fields_of_hypenet_that_make_q_and_k_foreign(field):
    said = disagreement(hypenet_config(), hypenet_config(**{field: HYPENET[field]} | (dict(mixer_types=["attn"] * 8) if field == "num_hidden_layers" else {})))
    assert said and said.startswith(f"{field} differs")


@pytest.mark.parametrize("field", QWEN_OTHER)
def test_fields_of_others_that_make_q_and_k_foreign(field):
    "Written in both configs: what one of them leaves out may be a default that is not known here."
    first = dict(rms_norm_eps=1e-6, rope_theta=1e4, attention_bias=False, sliding_window=32, partial_rotary_factor=.25, query_pre_attn_scalar=4, attention_multiplier=1., attn_logit_softcapping=20., logits_soft_cap=10.)
    said = disagreement(QWEN | first, QWEN | first | {field: QWEN_OTHER[field]})
    assert said and said.startswith(f"{field} differs") and disagreement(QWEN | first, QWEN | first) is None


@pytest.mark.parametrize("space, per", [("input", "matrix"), ("input", "kv_head"), ("head", "kv_head")])
@pytest.mark.parametrize("lam", [1e-6, .03, 2.])
def test_the_ridge_is_in_mean_eigenvalues(space, per, lam):
    "The formula letter by letter, with lam times the mean eigenvalue of the matrix that it is added to; both ways to solve it."
    import torch

    from qkrestore_nb.procrustes import solve_queries
    g = torch.Generator().manual_seed(0)
    H, n, D, d = 4, 2, 3, 16
    pre, post, k = torch.randn(H * D, d, generator=g).double(), torch.randn(H * D, d, generator=g).double(), torch.randn(n * D, d, generator=g).double()
    blocks = 1 if per == "matrix" else n
    want = []
    for a, b, K in zip(pre.chunk(blocks), post.chunk(blocks), k.chunk(blocks), strict=True):
        G = K @ K.T
        ridge = lam * torch.linalg.eigvalsh(G).mean() * torch.eye(len(G)).double()
        if space == "input": want.append(b + (a - b) @ K.T @ torch.linalg.inv(G + ridge) @ K)
        else: want += [y + G @ torch.linalg.inv(G + ridge) @ (x - y) for x, y in zip(a.split(D), b.split(D), strict=True)]
    got = solve_queries(pre, post, k, n, lam, space, per, dtype=torch.float64)
    assert torch.allclose(got, torch.cat(want), rtol=1e-8, atol=1e-8)

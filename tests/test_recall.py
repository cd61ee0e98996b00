"Haystacks read again from their text; look-up against a decoder that walks a tree of candidates; exact match against generate."
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qkrestore_nb import recall
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.recall import (
    answer_logits,
    decode,
    digits,
    draw_keys,
    encode,
    essay,
    letters,
    looked_up,
    needle_rows,
    noise,
    recall_test,
    score,
    token_id,
    tokenizer,
)

LENGTH = dict(digits=5, letters=16)
ITEM = re.compile(r"(N|QM) (k\d+ k\d+) IS ((?:\S+ )+?)DOT")


@pytest.fixture(scope="module")
def tiny():
    "Three layers over the whole vocabulary, weights large enough that every context gets another answer."
    torch.manual_seed(0)
    model = HypeNetForCausalLM(HypeNetConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, head_dim=16,
        mixer_types=["lightning-attn", "attn", "lightning-attn"], lightning_use_short_conv=True, lightning_conv_activation=None))
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)
    return model.eval()


def found(row) -> list[tuple]:
    "Needles and questions of a row as they stand in its text: place of the first word, opener, key, value."
    text = decode(row) + " "
    return [(text[:m.start()].count(" "), m[1], m[2], m[3].strip()) for m in ITEM.finditer(text)]


shapes = st.integers(1, 12).flatmap(lambda needles: st.tuples(st.just(needles), st.integers(0, needles)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(["digits", "letters"]), st.booleans(), st.integers(0, 60), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_geometry(shape, value, grid, spare, candidates, seed):
    "BOS, needles that are not cut, questions at the very end, each about another needle of its row, and nothing else touched."
    (needles, questions), rng, L = shape, np.random.default_rng(seed), LENGTH[value] + 5
    T = 1 + (needles + questions) * L + spare
    haystack = essay(rng, 3, T)
    before = haystack.copy()
    batch = needle_rows(rng, haystack, needles, questions, value, grid, candidates)
    ids, ask = batch["ids"], batch["ask"]
    assert (haystack == before).all() and ids.shape == (3, T) and ask.shape == (3, questions, LENGTH[value])
    assert batch["candidates"].shape == (3, max(needles, candidates), LENGTH[value])
    assert (ids[:, 0] == token_id["BOS"]).all() and (ids == token_id["BOS"]).sum() == 3
    untouched = ~batch["body"]
    untouched[:, 0] = False
    assert (ids[untouched] == before[untouched]).all() and (batch["body"].sum(1) == (needles + questions) * L).all()
    for b, row in enumerate(ids):
        items = found(row)
        hidden, asked = ([i for i in items if i[1] == opener] for opener in ("N", "QM"))
        assert len(hidden) == needles == len({key for _, _, key, _ in hidden}) and len({key for _, _, key, _ in asked}) == questions
        assert [at for at, *_ in asked] == [T - L * q for q in range(questions, 0, -1)]
        for q, (at, _, key, answer) in enumerate(asked):
            (where, said), = [(at, value) for at, _, k, value in hidden if k == key]
            assert said == answer == decode(row[ask[b, q]]) and ask[b, q, 0] == at + 4
            assert batch["distance"][b, q] == at - where > 0
            assert answer in [decode(c) for c in batch["candidates"][b]]
        assert {v for _, _, _, v in hidden} == {decode(c) for c in batch["candidates"][b, :needles]}


def test_needles_stand_everywhere():
    "With room for one needle at 31 places, 400 haystacks use all of them about equally often."
    rng = np.random.default_rng(0)
    batch = needle_rows(rng, noise(rng, 400, 51), 1, 1)
    count = np.bincount(batch["distance"][:, 0], minlength=41)[10:41]
    assert count.min() > 0 and count.max() < 40 and batch["distance"].min() == 10 and batch["distance"].max() == 40


def test_keys_of_a_grid_need_both_tokens():
    rng = np.random.default_rng(0)
    for grid, most in ((True, 4), (False, 128)):
        keys = draw_keys(rng, 50, 16, grid)
        assert all(len({tuple(k) for k in row}) == 16 for row in keys)
        sides = [len(set(row[:, i])) for row in keys for i in (0, 1)]
        assert max(sides) == 4 if grid else min(sides) > 8
        assert max(sides) <= most


def test_haystacks():
    rng = np.random.default_rng(0)
    loop, start = decode(recall._noise).split(), decode(noise(rng, 20, 50)[7]).split()
    assert any((loop * 4)[i:i + 50] == start for i in range(24)) and len({tuple(r) for r in noise(rng, 50, 24)}) > 10
    text = essay(rng, 4, 2000) - token_id["baba"]
    follow = {(a, b) for row in text for a, b in zip(row, row[1:])}
    assert all(b in recall._successors[a] for a, b in follow) and len(follow) > 1500  # of at most 2,048 pairs


@pytest.mark.parametrize("kind, T, questions, needles, value, filler", [
    ("S1", 256, 1, 1, "digits", "noise"), ("S2", 256, 1, 1, "digits", "essay"), ("S3", 256, 1, 1, "letters", "essay"),
    ("MK", 512, 8, 8, "digits", "essay"), ("MF", 512, 4, 21, "digits", "essay")])
def test_the_five_tests(kind, T, questions, needles, value, filler):
    batch = recall_test(kind, 4, T, questions, seed=3)
    again, others = recall_test(kind, 4, T, questions, 3), [recall_test(kind, 4, t, questions, s) for t, s in ((T, 4), (T + 24, 3))]
    assert all((batch[x] == again[x]).all() for x in batch) and not any((batch["ids"] == o["ids"][:, :T]).all() for o in others)
    for row, ask in zip(batch["ids"], batch["ask"]):
        opened = [i[1] for i in found(row)]
        assert opened.count("N") == needles and opened.count("QM") == questions == len(ask)
        assert np.isin(row[ask], dict(digits=digits, letters=letters)[value]).all()
    rest = set(batch["ids"][:, 1:][~batch["body"][:, 1:]])
    assert rest <= (set(recall._noise) if filler == "noise" else set(range(token_id["baba"], token_id["baba"] + 256)))


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    assert needle_rows(rng, noise(rng, 1, 61), 4, 2)["ids"].shape == (1, 61)
    with pytest.raises(ValueError, match="4 needles and 2 questions of 10 tokens do not fit into 60"): needle_rows(rng, noise(rng, 1, 60), 4, 2)
    with pytest.raises(ValueError, match="2 questions about 1 needles: ask each needle once"): needle_rows(rng, noise(rng, 1, 99), 1, 2)
    with pytest.raises(ValueError, match="4 x 4 grid has 16 keys: 17"): needle_rows(rng, noise(rng, 1, 999), 17, 1)
    with pytest.raises(ValueError, match="no recall test is called 'MV': choose from S1, S2, S3, MK, MF"): recall_test("MV", 1, 256)
    with pytest.raises(ValueError, match="not in the vocabulary: qwerty zz"): encode("The zz grass qwerty")


def test_the_tokenizer_says_what_decode_says():
    row = recall_test("MK", 1, 256, 8)["ids"][0]
    t = tokenizer()
    assert t.decode(row) == decode(row) and t(decode(row))["input_ids"] == row.tolist() == encode(decode(row))
    assert t.bos_token_id == token_id["BOS"] and t.pad_token_id == token_id["PAD"]


def spelled(logits, candidates) -> list[int]:
    "Greedy decoding down a tree of candidates: at each token the likeliest of those that continue what was said."
    said = []
    for step in logits:
        allowed = sorted({c[len(said)] for c in candidates if c[:len(said)] == said})
        said.append(max(allowed, key=lambda token: step[token]))
    return said


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_look_up_walks_a_tree_of_candidates(L, C, vocabulary, seed):
    "Few tokens, so that candidates share beginnings; the same candidate may stand there twice."
    rng, B, Q = np.random.default_rng(seed), 3, 4
    candidates = rng.integers(0, vocabulary, (B, C, L))
    truth = np.stack([c[rng.integers(0, C, Q)] for c in candidates])
    logits = rng.normal(size=(B, Q, L, vocabulary))
    got = looked_up(*map(torch.from_numpy, (logits, truth, candidates)))
    wanted = [[spelled(logits[b, q], candidates[b].tolist()) == truth[b, q].tolist() for q in range(Q)] for b in range(B)]
    assert got.tolist() == wanted


def test_look_up_and_exact_match_are_not_the_same():
    "A word that is no candidate is likeliest: not exact, but looked up; another candidate is likelier: neither."
    truth, candidates = torch.tensor([[[1, 2]]]), torch.tensor([[[1, 2], [1, 3], [4, 4]]])
    logits = torch.zeros(1, 1, 2, 9)
    logits[..., 8], logits[0, 0, 0, 1], logits[0, 0, 1, 2] = 5., 1., 1.
    assert looked_up(logits, truth, candidates).all() and not (logits.argmax(-1) == truth).any()
    logits[0, 0, 1, 3] = 2.
    assert not looked_up(logits, truth, candidates).any()


def test_answer_logits_are_those_before_the_asked_tokens(tiny):
    batch = recall_test("MK", 3, 256, 5)
    with torch.no_grad(): whole = tiny(torch.as_tensor(batch["ids"])).logits
    row = torch.arange(3)[:, None, None]
    assert_close(answer_logits(tiny, batch["ids"], batch["ask"]), whole[row, torch.as_tensor(batch["ask"]) - 1], atol=1e-5, rtol=1e-5)


def test_exact_match_is_what_greedy_decoding_says(tiny):
    "The truth of every question becomes what the model generates there; then one token of some is another."
    batch = recall_test("MK", 5, 160, 3, seed=1)
    ids, ask = batch["ids"].copy(), batch["ask"]
    for q in range(3):
        for b in range(5):
            at = ask[b, q]
            prompt = torch.as_tensor(ids[b:b + 1, :at[0]])
            ids[b, at] = tiny.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, at[0]:]
    said = ids[np.arange(5)[:, None, None], ask]
    batch = dict(batch, ids=ids, candidates=np.concatenate([batch["candidates"], said], 1))
    got = score(tiny, batch)
    assert got.tokens.shape == (5, 3, 5) and got.tokens.all() and got.exact.all() and got.lookup.all()

    wrong = ids.copy()
    wrong[1, ask[1, 2, 3]] = wrong[4, ask[4, 2, 0]] = token_id["yellow"]
    truth = wrong[np.arange(5)[:, None, None], ask]
    got = score(tiny, dict(batch, ids=wrong, candidates=np.concatenate([batch["candidates"], truth], 1)), rows=2)
    assert got.exact.tolist() == [[True, True, b not in (1, 4)] for b in range(5)]
    assert got.tokens[1, 2, :4].tolist() == [True, True, True, False] and not got.tokens[4, 2, 0]
    assert not got.lookup[1, 2] and not got.lookup[4, 2] and got.lookup[[0, 2, 3]].all()  # what the model says is a candidate too


def test_haystacks_at_once_change_nothing(tiny):
    batch = recall_test("MF", 5, 256, 4)
    one, all_ = score(tiny, batch, rows=1), score(tiny, batch, rows=8)
    assert (one.tokens == all_.tokens).all() and (one.lookup == all_.lookup).all() and 0 < one.lookup.mean() < 1

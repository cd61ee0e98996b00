"What batches hold, read again from their text; documents in packed rows; and a training loop that resumes, slows and freezes."
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer

from qkrestore_nb import training
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.recall import decode, digits, essay, keys, letters, noise, token_id, words
from qkrestore_nb.training import (asked_rows, compiled, copy_rows, document_positions, init_weights, pretraining_batch, sft_batch,
                                   small_talk, train, weighted_loss)
from test_reasoning import follow, parts


def same(a, b) -> bool: return all(torch.equal(x, y) for x, y in zip(a, b))


def count(ids, word): return int((ids == token_id[word]).sum())


def tiny(**fields):
    "Two layers over the whole vocabulary."
    torch.manual_seed(0)
    return init_weights(HypeNetForCausalLM(HypeNetConfig(**{**dict(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        mixer_types=["lightning-attn", "attn"], attn_use_rope=False, lightning_use_qk_norm=True, attn_logits_scaling="hype 50",
        lightning_use_short_conv=True, lightning_conv_activation=None), **fields})))


# ---- documents

def test_positions_begin_anew_at_every_document():
    B = token_id["BOS"]
    ids = torch.tensor([[B, 5, 6, B, B, 7, 0, 0], [5, 6, B, 7, 8, 9, 9, B]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_with_borders_the_loss_is_that_of_the_documents_read_alone(activation):
    model = tiny(lightning_conv_activation=activation)
    ids, weights = sft_batch(0, rows=2, T=300, packed=True)
    weights = weights * torch.rand(weights.shape, generator=torch.Generator().manual_seed(0))
    total, mass, documents = 0., 0., 0
    for row, w in zip(ids, weights):
        starts = [*(row == token_id["BOS"]).nonzero()[:, 0].tolist(), 300]
        for a, b in itertools.pairwise(starts):
            part, documents = w[None, a:b], documents + 1
            total, mass = total + weighted_loss(model, row[None, a:b], part) * part[:, 1:].sum(), mass + part[:, 1:].sum()
    assert documents > 6
    assert_close(weighted_loss(model, ids, weights, borders=True), total / mass, atol=1e-5, rtol=1e-5)
    assert abs(weighted_loss(model, ids, weights) - total / mass) > .01  # without borders it is another loss


# ---- rows of pre-training

@pytest.mark.parametrize("filler, value, room", [(essay, "digits", 24), (noise, "digits", 24), (essay, "letters", 50)])
def test_rows_with_questions(filler, value, room):
    "Answers and the DOT behind them weigh 1, filler 0.02, needles and questions nothing."
    ids, weights = asked_rows(np.random.default_rng(0), 5, 256, filler, 4, room, value=value)
    for row, w in zip(ids, weights):
        text, heavy = decode(row).split(), w == 1
        answers = [i for i, word in enumerate(text) if word == "QM"]
        assert len(answers) == text.count("N") == 4
        places = [i + j for i in answers for j in range(4, 4 + dict(digits=6, letters=17)[value])]
        assert np.flatnonzero(heavy).tolist() == places and all(text[i - 1] == "IS" for i in places[::len(places) // 4])
        assert {*np.unique(w)} == {0., .02, 1.} and np.isin(row[1:][w[1:] == .02], filler(np.random.default_rng(0), 9, 999)).all()
        assert (w == 0).sum() == 4 * dict(digits=10, letters=21)[value] + 4 * 4
    full, _ = asked_rows(np.random.default_rng(0), 5, 256, filler, 2, room, full=True, value=value)
    assert count(full, "N") == 5 * (256 // room) and count(full, "QM") == 5 * 2


def test_rows_that_repeat_a_phrase():
    "A token has weight once it can be copied from one phrase before."
    ids, weights = copy_rows(np.random.default_rng(0), 20, 256)
    lengths = [int(np.argmax(w)) - 2 for w in weights]
    assert min(lengths) >= 12 and max(lengths) <= 96 and len(set(lengths)) > 10
    for row, w, n in zip(ids, weights, lengths):
        assert (row[n:] == row[:-n]).all() and (w[n + 2:] == 1).all() and (w[:n + 2] == 0).all()
        assert any(np.isin(row, pool).all() for pool in (digits, letters, keys, words))


def test_every_kind_gets_its_share(monkeypatch):
    "Of a batch the share give or take one row, over many batches the share."
    rows: dict[str, list] = {name: [] for name in training.kinds}
    def maker(name):
        def make(rng, n, T):
            rows[name].append(n)
            return np.zeros((n, T), int), np.zeros((n, T))
        return make
    share = {name: w for name, (w, _) in training.kinds.items()}
    for name, w in share.items(): monkeypatch.setitem(training.kinds, name, (w, maker(name)))
    for step in range(300):
        for made in rows.values(): made.append(0)
        ids, weights = pretraining_batch(step, tokens=8192)
        assert ids.shape == weights.shape == (32, 256)
        for name, made in rows.items():
            n = made.pop() + (made.pop() if len(made) > step else 0)
            made.append(n)
            assert abs(n - 32 * share[name] / sum(share.values())) < 1 + 1e-9
        assert sum(made[-1] for made in rows.values()) == 32
    for name, made in rows.items(): assert abs(np.mean(made) - 32 * share[name] / sum(share.values())) < .1


def test_batches_of_pretraining():
    first, later = pretraining_batch(0, tokens=4096), [pretraining_batch(800 + i, tokens=4096) for i in range(12)]
    assert first[0].shape == (16, 256) and {b[0].shape for b in later} == {(8, 512), (4, 1024), (2, 2048)}
    assert same(first, pretraining_batch(0, tokens=4096)) and not same(first, pretraining_batch(0, 1, tokens=4096))
    assert not same(first, pretraining_batch(1, tokens=4096)) and first[0].dtype == torch.long and first[1].dtype == torch.float32
    assert pretraining_batch(5, tokens=1024, short=128, first=6)[0].shape == (8, 128)
    ids, weights = pretraining_batch(0)
    assert ids.max() < 512 and (weights.sum(1) > 0).all() and not (weights[ids == token_id["PAD"]] > 0).any()


@pytest.mark.parametrize("kind, wanted, absent", [
    ("direct", "CALC", "STEP THINK"), ("M", "THINK STEP", "CALC N r3 r4"), ("A", "THINK + -", "* N"), ("D", "THINK N", "STEP CALC r3"),
    ("wordy_M", "THINK STEP", "CALC N"), ("wordy_D", "THINK N", "CALC STEP"), ("single", "N QM", "THINK"), ("full", "N QM", "THINK")])
def test_kinds_of_pretraining(kind, wanted, absent):
    ids, _ = training.kinds[kind][1](np.random.default_rng(0), 8, 256)
    assert all(count(ids, w) for w in wanted.split()) and not any(count(ids, w) for w in absent.split())
    assert np.isin(words, ids).any() == (kind in ("wordy_M", "wordy_D", "single", "full"))


# ---- rows of fine-tuning

def read(row) -> tuple[str, tuple]:
    "The task of a problem with its chain, and its parts."
    text = parts(row)
    task = ("H" if text[0][8] in "a b c d e f g h i j k l m n o p q r s t u v w x y z ae oe ue sh ch th".split() else "D") if "N" in text[0] else \
        "M" if text[0][0].startswith("r") else "A"
    return task, text


@pytest.mark.parametrize("chain", ["near", "far"])
def test_one_problem_a_row(chain):
    "All four tasks, every step right; the question weighs nothing, the response 1 but for the keys of its facts."
    ids, weights = sft_batch(3, chain=chain)
    assert ids.shape == weights.shape == (128, 128) and same((ids, weights), sft_batch(3, chain=chain))
    assert not same((ids, weights), sft_batch(4, chain=chain)) and not same((ids, weights), sft_batch(3, 1, chain=chain))
    tasks = []
    for row, w in zip(ids.numpy(), weights.numpy()):
        n = int((row != token_id["PAD"]).sum())
        assert not w[n:].any() and (row[:n] != token_id["PAD"]).all()
        task, text = read(row[:n])
        follow[task](*text, chain == "near")
        at = 2 + len(text[0])
        assert not w[:at].any() and (w[at:n] == ~np.isin(row[at:n], keys)).all()
        tasks.append(task)
    assert all(18 < tasks.count(t) < 48 for t in "MADH")
    assert same((ids, weights), sft_batch(3)) == (chain == "near")  # near is the default


def test_tasks_and_lengths_that_were_asked_for():
    assert {read(row[row != 0])[0] for row in sft_batch(0, tasks="MA")[0].numpy()} == {"M", "A"}
    assert {read(row[row != 0])[0] for row in sft_batch(0, tasks="H")[0].numpy()} == {"H"}
    direct, weights = sft_batch(0, chain="none", most=1, tasks="MD")
    assert count(direct, "CALC") == 128 and not count(direct, "STEP") and not count(direct, "THINK")
    assert all(decode(row[w > 0]).split()[0] == "ANS" for row, w in zip(direct, weights))


def test_problems_end_to_end():
    "Packed rows hold whole problems with hardly any room between them."
    ids, weights = sft_batch(0, rows=4, T=1024, packed=True)
    for row, w in zip(ids.numpy(), weights.numpy()):
        starts = [*np.flatnonzero(row == token_id["BOS"]), 1024 - int((row == 0).sum())]
        assert starts[0] == 0 and len(starts) > 10 and (row == 0).sum() < 126 and not w[row == 0].any()
        for a, b in itertools.pairwise(starts):
            task, text = read(row[a:b])
            follow[task](*text, True)
            assert not w[a:a + 2 + len(text[0])].any() and w[b - 2:b].all()


@pytest.mark.parametrize("window", ["random", "end"])
def test_a_problem_in_an_essay(window):
    ids, weights = sft_batch(1, rows=24, T=512, window=window)
    places = []
    for row, w in zip(ids.numpy(), weights.numpy()):
        at = int((row == token_id["THINK"]).argmax())
        end = int((row == token_id["ANS"]).argmax())
        end += int((row[end:] == token_id["DOT"]).argmax()) + 1
        task, text = read(np.concatenate([[token_id["BOS"]], row[at:end]]))
        follow[task](*text, True)
        assert row[0] == token_id["BOS"] and np.isin(row[1:at], words).all() and np.isin(row[end:], words).all()
        assert not w[:at + 1 + len(text[0])].any() and w[end - 2:end].all() and not w[end:].any()
        places.append(at), (window == "random" or places.append(end))
    assert set(places[1::2]) == {512} if window == "end" else min(places) < 100 and max(places) > 300
    with pytest.raises(ValueError, match="no window is called 'middle': choose random or end"): sft_batch(0, window="middle")


def test_recall_among_the_problems():
    "The share of rows that are a short haystack, over many batches; the others stay what they were."
    plain, mixed = sft_batch(7), sft_batch(7, recall=.1)
    rows = (mixed[0] == token_id["QM"]).any(1)
    assert rows.sum() in (12, 13) and torch.equal(mixed[0][~rows], plain[0][~rows]) and torch.equal(mixed[1][~rows], plain[1][~rows])
    assert all(set(w.unique().tolist()) == {0., torch.tensor(.02).item(), 1.} for w in mixed[1][rows])
    assert (mixed[0][rows] == token_id["N"]).sum(1).unique().tolist() == [4] and not (plain[0] == token_id["QM"]).any()
    seen = [int((sft_batch(s, rows=8, recall=.05)[0] == token_id["QM"]).any(1).sum()) for s in range(300)]
    assert set(seen) == {0, 1} and .28 < np.mean(seen) < .52


def test_small_talk():
    "A question, then 8 to 90 words; each but the first follows from the one before, and has weight."
    place = {int(t): i for i, t in enumerate(np.concatenate([digits, letters, keys]))}
    lengths = []
    for seed in range(60):
        ids, known = small_talk(np.random.default_rng(seed))
        at = int(known.argmax()) - 1  # of the first word: nobody can know it
        assert ids[0] == token_id["BOS"] and ids[1] == token_id["CALC"] and not known[:at + 1].any() and known[at + 1:].all()
        said = [place[int(i)] for i in ids[at:]]
        assert all(b in training._phrases[a] for a, b in itertools.pairwise(said))
        lengths.append(len(said))
    assert min(lengths) >= 9 and max(lengths) <= 91 and len(set(lengths)) > 25
    ids, weights = sft_batch(0, talk=True)
    assert ids.shape == (128, 128) and not count(ids, "ANS") and count(ids, "BOS") == 128 and (weights.sum(1) >= 8).all()


# ---- the loop

BATCH = dict(rows=4, tasks="A", most=2)


def fit(model, steps=6, **how): return train(model, lambda step: sft_batch(step, **BATCH), steps, 1e-2, warmup=1, **how)


def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path):
    straight = tiny()
    whole = fit(straight)

    def cut(step, model):
        if step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(tiny(), file=tmp_path / "run.pt", every=2, look=cut)
    looked, again = [], tiny()
    log = fit(again, file=tmp_path / "run.pt", every=2, look=lambda step, model: looked.append((step, model.training)))
    assert looked == [(4, False), (6, False)] and again.training and [r["step"] for r in log] == [6] == [r["step"] for r in whole]
    assert log[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-5)
    for a, b in zip(again.parameters(), straight.parameters()): assert_close(a, b)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(again.parameters(), tiny().parameters()))


def test_parameters_that_are_slow_or_stand_still():
    rates = {"q_proj": 0., "k_proj": .01}
    before, model = tiny(), tiny()
    fit(model, rate=lambda name: rates.get(name.split(".")[-2], 1.))
    moved = {name: float((a - b).detach().abs().max()) for (name, a), b in zip(model.named_parameters(), before.parameters())}
    for name, x in moved.items():
        part = name.split(".")[-2]
        if part == "q_proj": assert x == 0
        elif part == "k_proj": assert 0 < x < 1e-3
        elif part in ("v_proj", "o_proj", "gate_proj"): assert x > 5e-3


def test_the_loss_that_is_asked_for_is_the_one_made_small():
    seen = []
    def loss(model, ids, weights):
        seen.append(ids.shape)
        return weighted_loss(model, ids, weights)
    fit(tiny(), steps=2, loss=loss)
    assert seen == [(4, 128)] * 2


def test_layers_are_compiled_inside_the_block_and_only_there():
    layer, other = GradientCheckpointingLayer(), torch.nn.Linear(1, 1)
    for device, wanted in (("cuda", True), ("cpu", False)):
        model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]), modules=lambda: iter([layer, other]))
        with pytest.raises(KeyboardInterrupt), compiled(model):
            assert (layer._compiled_call_impl is not None) == wanted and other._compiled_call_impl is None
            raise KeyboardInterrupt
        assert layer._compiled_call_impl is None

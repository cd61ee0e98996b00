"Batches for fine-tuning: the tasks and the order that were asked for, words of a long answer; and layers that are compiled for a while."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qkrestore_nb import training
from qkrestore_nb.recall import digits, ids_of, keys, letters, token_id
from qkrestore_nb.training import compiled, sft_batch
from test_reasoning import follows, states


def same(a, b) -> bool: return all(torch.equal(x, y) for x, y in zip(a, b))


def count(ids, word): return int((ids == token_id[word]).sum())


@pytest.mark.parametrize("answer", ["cot", "direct", "long"])
def test_batches_by_default(answer):
    "All four tasks, order 1."
    assert same(sft_batch(3, 1, answer=answer), sft_batch(3, 1, answer=answer, names="MADH", order=1))
    assert not same(sft_batch(3, 1, answer=answer), sft_batch(4, 1, answer=answer))


@pytest.mark.parametrize("answer", ["cot", "direct"])
def test_a_kind_held_out(answer):
    "A token of a task's name is nothing else, so counting it counts its problems."
    for step in range(5):
        ids, weights = sft_batch(step, answer=answer, names="MDH")
        assert ids.shape == weights.shape == (128, 112)
        assert count(ids, "A") == 0 and all(count(ids, t) > 20 for t in "MDH")
        assert count(sft_batch(step, answer=answer)[0], "A") > 20
        assert not (weights[ids == token_id["PAD"]] > 0).any()


def test_chains_end_to_end():
    "Packed rows hold whole problems with hardly any room between them; questions weigh nothing, answers one."
    ids, weights = sft_batch(0, rows=4, T=512, packed=True)
    for row, w in zip(ids.tolist(), weights.tolist()):
        starts, thinks, answers = ([i for i, t in enumerate(row) if t in those] for those in ({token_id[t] for t in "MADH"}, {token_id["THINK"]}, {token_id["ANS"]}))
        assert len(starts) == len(thinks) == len(answers) > 4 and row.count(token_id["PAD"]) < 112
        for start, think, answer in zip(starts, thinks, answers):
            assert start < think < answer and not any(w[start:think + 1]) and all(w[answer:row.index(token_id["DOT"], answer) + 1])
    assert (ids > 0).float().mean() > 1.5 * (sft_batch(0)[0] > 0).float().mean()


@pytest.mark.parametrize("order", [1, 3])
def test_rows_of_one_order(order):
    "Every row of a batch of M's chains follows its rule at that order; with other tasks an order above 1 is refused."
    ids, weights = sft_batch(0, rows=32, names="M", order=order)
    for row, w in zip(ids.tolist(), weights):
        row = [i for i in row if i != token_id["PAD"]]
        rule, chain, said = states(row)
        assert follows(rule, chain, order) and said == [*map(str, chain[-1]), "DOT"]
        at = row.index(token_id["THINK"]) + 1
        assert w[:at].sum() == 0 and (w[at:len(row)] > 0).all()
    if order > 1:
        with pytest.raises(ValueError, match="no order 3"): sft_batch(0, rows=32, order=3)


def explained(order: int, back: int) -> float:
    "Of the words with weight in long answers of an order: the share that may follow the word `back` places before."
    place = {int(t): i for i, t in enumerate(np.concatenate([digits, letters, keys, ids_of("#0", 8)]))}
    ids, weights = sft_batch(0, answer="long", order=order)
    found = []
    for row, w in zip(ids.tolist(), weights):
        at = [i for i in range(len(row)) if w[i] > 0]
        assert at == list(range(at[0], at[-1] + 1)) and set(row[at[-1] + 1:]) <= {token_id["PAD"]} and 8 <= len(at) <= 60
        found += [place[row[i]] in training._phrases[place[row[i - back]]] for i in at[back:]]
    return float(np.mean(found))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_a_word_of_a_long_answer_follows_the_one_order_words_before(order):
    assert explained(order, order) == 1
    for other in {1, 2, 5} - {order}: assert explained(order, other) < .1  # 4 of 178 words by chance


def test_layers_are_compiled_inside_the_block_and_only_there():
    layer, other = GradientCheckpointingLayer(), torch.nn.Linear(1, 1)
    for device, wanted in (("cuda", True), ("cpu", False)):
        model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]), modules=lambda: iter([layer, other]))
        with pytest.raises(KeyboardInterrupt), compiled(model):
            assert (layer._compiled_call_impl is not None) == wanted and other._compiled_call_impl is None
            raise KeyboardInterrupt
        assert layer._compiled_call_impl is None

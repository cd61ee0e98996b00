"Problems read again from their text: every step follows the rule, and what near, far, wordy and direct answers say and leave out."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qkrestore_nb.reasoning import pack, problem, reasoning_test, solved, tables, tasks
from qkrestore_nb.recall import decode, keys, token_id, vocabulary, words

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "ae", "oe", "ue", "sh", "ch", "th"]


def draw(task: str, n: int, chain: str = "near", seed: int = 0, **how):
    return problem(np.random.default_rng([seed, n]), task, n, chain, **how)


def parts(ids) -> tuple[list[str], list[str], list[str]]:
    "The words of question, steps and answer."
    text = decode(ids).split()
    assert text[0] == "BOS" and text[1] in ("THINK", "CALC") and text[-1] == "DOT" and text.count("ANS") == 1
    end = text.index("ANS")
    start = text.index("DOT" if "N" in text[:6] else "=") + 1
    return text[2:start], text[start:end], text[end + 1:-1]


def rule_of(word: str) -> np.ndarray: return tables[int(word[1]) - 1]


def follow_M(question, steps, answer, near):
    rule, state = rule_of(question[0]), [int(w) for w in question[2:5]]
    width = 7 if near else 6
    assert len(steps) == width * int(question[1]) and question[5:] == ["="]
    for left, i in zip(reversed(range(int(question[1]))), range(0, len(steps), width)):
        state = [rule[a, b] for a, b in zip(state, state[1:] + state[:1])]
        assert steps[i:i + width] == ["STEP", *([question[0]] if near else []), str(left), *map(str, state), ";"]
    assert answer == [*map(str, state)]


def follow_A(question, steps, answer, near):
    x, ops = int(question[0]), list(zip(question[1:-1:2], question[2:-1:2]))
    said = []
    for op, y in ops:
        y, before = int(y), x
        x = tables[2][x, y] if op == "*" else (x + y if op == "+" else x - y) % 10
        said += ["STEP", str(before), op, str(y), "=", str(x), ";"]
    assert steps == said and answer == [str(x)]


def follow_fact(question, steps, answer, near, letters=False):
    (rule, n, clue, *fact), width = question, 13 if near else 11
    value, move = fact[4:9], (lambda w: LETTERS[(LETTERS.index(w) + int(clue)) % 32]) if letters else lambda w: str(rule_of(rule)[int(w), int(clue)])
    assert fact[0] == "N" and fact[3] == "IS" and fact[9] == "DOT" and len(steps) == width * int(n)
    for left, i in zip(reversed(range(int(n))), range(0, len(steps), width)):
        value, step = [move(w) for w in value], steps[i:i + width]
        assert step[:-10] == ([rule, str(left), clue] if near else [str(left)])
        assert step[-10] == "N" and step[-7] == "IS" and step[-6:] == [*value, "DOT"]
    new = [tuple(steps[i - 9:i - 7]) for i in range(width, len(steps) + 1, width)]
    assert len({*new, tuple(fact[1:3])}) > len(new) // 2  # a new key each time
    assert answer == value


follow = dict(M=follow_M, A=follow_A, D=follow_fact, H=lambda *args: follow_fact(*args, letters=True))


def test_the_first_two_rules_are_plus_and_minus():
    for a in range(10):
        for b in range(10): assert (tables[0][a, b], tables[1][a, b]) == ((a + b) % 10, (a - b) % 10)
    assert tables.shape == (4, 10, 10) and len({t.tobytes() for t in tables}) == 4


@pytest.mark.parametrize("chain", ["near", "far"])
@pytest.mark.parametrize("task", tasks)
def test_every_step_follows_the_rule(task, chain):
    for n in range(1, 9):
        for seed in range(8):
            ids, _ = draw(task, n, chain, seed)
            follow[task](*parts(ids), chain == "near")


def test_this_check_can_fail():
    question, steps, answer = parts(draw("M", 4)[0])
    steps[-2] = str((int(steps[-2]) + 1) % 10)
    with pytest.raises(AssertionError): follow_M(question, steps, answer, True)


@pytest.mark.parametrize("task", tasks)
def test_the_three_chains_ask_and_answer_the_same(task):
    "Near restates rule and clue, far is the shorter for it (A has nothing to restate), none has no step at all."
    for n in (1, 5, 8):
        near, far, none = (parts(draw(task, n, chain)[0]) for chain in ("near", "far", "none"))
        assert near[0] == far[0] == none[0] and near[2] == far[2] == none[2] and none[1] == []
        assert len(near[1]) - len(far[1]) == n * dict(M=1, A=0, D=2, H=2)[task]
        assert [draw(task, n, c)[0][1] for c in ("near", "none")] == [token_id["THINK"], token_id["CALC"]]


@pytest.mark.parametrize("task", tasks)
@pytest.mark.parametrize("chain", ["near", "far", "none"])
def test_what_can_be_known(task, chain):
    "The response but for the keys of its facts."
    ids, known = draw(task, 6, chain)
    question, steps, answer = parts(ids)
    at = 2 + len(question)
    assert len(known) == len(ids) == at + len(steps) + len(answer) + 2 and not known[:at].any()
    assert (known[at:] == ~np.isin(ids[at:], keys)).all() and known[at:].sum() >= len(answer) + 2


@pytest.mark.parametrize("task", tasks)
def test_wordy_chains_are_the_same_chains_with_words_between(task):
    ids, known = draw(task, 5, wordy=True)
    plain, essay = draw(task, 5)[0], np.isin(ids, words)
    assert (ids[~essay] == plain).all() and known[essay].all()
    runs = "".join("w" if e else " " for e in essay).split()
    assert len(runs) == 5 and all(4 <= len(run) <= 12 for run in runs)


def test_rules_may_be_fewer():
    for task in "MD":
        for rules in (1, 2, 4): assert {draw(task, 1, seed=s, rules=rules)[0][2] for s in range(60)} == {token_id[f"r{i + 1}"] for i in range(rules)}
    ops = {token_id[o]: o for o in "+-*"}
    for rules, wanted in ((2, "+-"), (4, "+-*")):
        assert {ops[i] for s in range(20) for i in draw("A", 4, seed=s, rules=rules)[0] if i in ops} == set(wanted)


@pytest.mark.parametrize("wrong, why", [(dict(task="X"), "choose from M, A, D, H"), (dict(n=0), "1 to 8 steps, not 0"), (dict(n=9), "1 to 8 steps, not 9"),
                                        (dict(chain="long"), "no chain is called 'long': choose near, far or none")])
def test_problems_that_there_are_not(wrong, why):
    with pytest.raises(ValueError, match=why): problem(np.random.default_rng(0), **{**dict(task="M", n=3), **wrong})


def test_rows_of_problems():
    "One a row, or as many as fit; none is lost, none is cut, behind them is PAD that nobody can know."
    made = [draw("MADH"[s % 4], 1 + s % 8, seed=s) for s in range(30)]
    for packed in (False, True):
        ids, known = pack(iter(made), 6, 256, packed)
        text, at = [i for row in ids for i in row if i != token_id["PAD"]], 0
        assert not known[ids == token_id["PAD"]].any()
        count = (ids == token_id["BOS"]).sum(1)
        assert (count == 1).all() if not packed else count.min() > 1
        for row_ids, row_known in made[:count.sum()]:
            assert text[at:at + len(row_ids)] == row_ids.tolist()
            at += len(row_ids)
        assert at == len(text)
        assert known[ids != token_id["PAD"]].tolist() == np.concatenate([k for _, k in made[:count.sum()]]).tolist()
        if packed: assert all(256 - (row != 0).sum() < 126 for row in ids)  # the next one did not fit
    n = len(draw("D", 8)[0])
    assert pack([draw("D", 8)] * 2, 1, n)[0].shape == (1, n)
    with pytest.raises(ValueError, match=f"a problem of {n} tokens does not fit into a row of {n - 1}"): pack([draw("D", 8)] * 2, 1, n - 1)


def test_the_longest_problem_fits_into_a_row_of_fine_tuning():
    assert max(len(draw(task, 8)[0]) for task in tasks) == 126


@pytest.mark.parametrize("chain", ["near", "far"])
def test_a_test_of_chains(chain):
    ids, known = reasoning_test("D", 4, 6, seed=2, chain=chain)
    assert all((a == b).all() for a, b in zip((ids, known), reasoning_test("D", 4, 6, 2, chain)))
    assert ids.shape == known.shape and (ids != reasoning_test("D", 4, 6, 3, chain)[0]).any() and (ids[:, -1] != 0).any()
    for row in ids: follow["D"](*parts(row[row != token_id["PAD"]]), chain == "near")
    assert len({row.tobytes() for row in ids}) == 6


def test_a_chain_is_solved_if_every_known_token_is():
    "A model that knows the rows but for one token of two of them; what cannot be known may be wrong."
    ids, known = reasoning_test("H", 3, 7)
    believed = ids.copy()
    believed[~known] = token_id["PAD"]
    believed[2, np.flatnonzero(known[2])[-1]] = believed[5, np.flatnonzero(known[5])[0]] = token_id["yellow"]
    class Parrot(torch.nn.Linear):
        def forward(self, x, use_cache):
            row = [int((ids == line.numpy()).all(1).argmax()) for line in x]
            ahead = np.roll(believed[row], -1, 1)
            return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.as_tensor(ahead), len(vocabulary)).float())
    for rows in (64, 3): assert solved(Parrot(1, 1), ids, known, rows).tolist() == [i not in (2, 5) for i in range(7)]

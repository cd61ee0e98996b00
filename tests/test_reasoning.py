"Problems: the rule that their steps follow, at every order, and what is refused."
import numpy as np
import pytest

from qkrestore_nb import reasoning
from qkrestore_nb.reasoning import pack, problem, tasks
from qkrestore_nb.recall import decode, token_id


def states(ids: list[int]) -> tuple[int, list[list[int]], list[str]]:
    "Of a problem of M with its chain: the rule, the states of question and steps, the words of the answer."
    words = decode(ids).split()
    think, end = words.index("THINK"), words.index("ANS")
    digits = [int(w) for w in words[3:think]] + [int(w) for i, w in enumerate(words[think + 1:end]) if i % 4]
    assert words[0] == "M" and words[think + 1:end:4] == [f"#{i}" for i in reversed(range(int(words[1][1:])))]
    return int(words[2][1:]) - 1, [digits[i:i + 3] for i in range(0, len(digits), 3)], words[end + 1:]


def follows(rule: int, chain: list[list[int]], order: int) -> bool:
    "Whether every state after the first `order` is what the table makes of the one `order` places before: each digit with its right neighbour, the last one with the first."
    table = reasoning._machine[rule]
    return all(new == [table[old[i], old[(i + 1) % 3]] for i in range(3)] for old, new in zip(chain, chain[order:]))


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_a_step_of_M_reads_the_state_order_steps_back(order):
    rng = np.random.default_rng(order)
    made = [(n, problem(rng, "M", n, order=order)[0]) for n in range(1, 9) for _ in range(20)]
    for n, ids in made:
        rule, chain, said = states(ids)
        assert len(chain) == order + n and follows(rule, chain, order)
        assert said == [*map(str, chain[-1]), "DOT"]
    longest = [states(ids) for n, ids in made if n == 8]
    for other in {1, 2, 3, 8} - {order}: assert sum(follows(rule, chain, other) for rule, chain, _ in longest) < 10  # of 20: a chain that runs in a circle may follow several


@pytest.mark.parametrize("order", [1, 3])
def test_an_answer_at_once_is_that_of_the_chain(order):
    for seed in range(20):
        ids, known = problem(np.random.default_rng(seed), "M", 5, order=order)
        short, k = problem(np.random.default_rng(seed), "M", 5, cot=False, order=order)
        at = ids.index(token_id["THINK"])
        assert short == ids[:at] + ids[-5:] and sum(k) == 4 and not any(k[:at + 1])
        assert known == [False] * (at + 1) + [True] * (len(ids) - at - 1)


@pytest.mark.parametrize("task", tasks)
def test_order_one_is_the_default(task):
    for cot in (True, False):
        a, b = (problem(np.random.default_rng(7), task, 6, cot, **kw) for kw in ({}, dict(order=1)))
        assert a == b


@pytest.mark.parametrize("wrong, why", [(dict(task="X"), "choose from M, A, D, H"), (dict(n=0), "1 to 8 steps, not 0"), (dict(n=9), "1 to 8 steps, not 9"),
                                        (dict(order=0), "no order 0"), (dict(order=-1), "no order -1")] + [(dict(task=t, order=2), f"chains of {t} have no order 2") for t in "ADH"])
def test_problems_that_there_are_not(wrong, why):
    with pytest.raises(ValueError, match=why): problem(np.random.default_rng(0), **{**dict(task="M", n=3), **wrong})


def test_rows_and_the_longest_chain_of_an_order():
    "A problem of order k is 3 (k - 1) tokens longer: its question names more states."
    length = lambda n, order: len(problem(np.random.default_rng(0), "M", n, order=order)[0])
    assert [length(8, k) - length(8, 1) for k in (1, 2, 4)] == [0, 3, 9]
    problems = iter([problem(np.random.default_rng(0), "M", 8, order=4)] * 2)
    with pytest.raises(ValueError, match=f"{length(8, 4)} tokens does not fit"): pack(problems, 1, length(8, 4) - 1)

"The hybrid in a hundred lines: its size, its data, its layers; and that chapter 3's runs say what the chapter says."
import ast
import json
import re
from pathlib import Path

import pytest
import torch

from qkrestore_nb import hybrid
from qkrestore_nb.hybrid import (
    DIGITS,
    KEYS,
    LOOK_UP,
    SUM,
    VALUES,
    Hybrid,
    LinearAttention,
    SoftmaxAttention,
    measure,
    mqar_batch,
    switch,
    train_hybrid,
)

ROOT = Path(__file__).parent.parent


def code_lines(source: str) -> int:
    "Lines that hold code: no comments, no docstrings, nothing empty."
    tree = ast.parse(source)
    said = [n.body[0] for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(n)]
    dropped = {i for n in said for i in range(n.lineno, n.end_lineno + 1)}
    lines = enumerate(source.split("\n"), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in dropped for i, line in lines)


def test_a_hundred_lines():
    made = (ROOT / "qkrestore_nb" / "hybrid.py").read_text()
    written = re.sub(r"^__all__ = \[[^\]]*\]", "", made, flags=re.M)
    assert 60 < code_lines(written) <= 100 and max(map(len, written.split("\n"))) <= 100
    assert code_lines('"Doc."\n\n# a\ndef f(  # one\n    x,\n):\n    "Doc."\n    return x\n') == 5
    assert {n.split(".")[0] for n in imports(made)} <= {"torch", "einops"}, "a file that can be copied anywhere"


def imports(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | \
        {n.module for n in nodes if isinstance(n, ast.ImportFrom)}


def test_rows():
    "Keys keep their value, a value is graded where its key stood before, and digits follow the rule."
    ids, graded = mqar_batch(16, pairs=5, units=12, generator=torch.Generator().manual_seed(3))
    assert ids.shape == graded.shape == (16, 72)
    for row, marks in zip(ids.view(16, 12, 6).tolist(), graded.view(16, 12, 6).tolist()):
        seen: dict = {}
        for (key, value, *digits), mark in zip(row, marks):
            assert key in KEYS and value in VALUES and seen.get(key, value) == value
            assert mark == [0, LOOK_UP * (key in seen), 0, 0, SUM, SUM]
            seen[key] = value
            a, b, c, d = (x - DIGITS[0] for x in digits)
            assert (c, d) == ((a + b) % 10, (b + c) % 10)
        assert len(seen) == 5


@pytest.mark.parametrize("kinds", ["LSLS", "SSL"])
def test_no_token_sees_the_future(kinds):
    torch.manual_seed(0)
    model = Hybrid(kinds)
    ids = mqar_batch(2)[0]
    later = ids.clone()
    later[:, 60:] = ids[:, 60:].flip(1)
    with torch.no_grad(): torch.testing.assert_close(model(later)[:, :60], model(ids)[:, :60])


def test_switch():
    "What is off adds nothing, the others stay, and a measurement leaves all on."
    torch.manual_seed(0)
    model, ids = Hybrid("LS"), mqar_batch(1)[0]
    with torch.no_grad():
        whole = model(ids)
        switch(model, SoftmaxAttention)
        off = model(ids)
        model.layers[1].mixer.out.weight.zero_()
        switch(model)
        torch.testing.assert_close(model(ids), off)
    assert not torch.allclose(whole, off)
    measure(model, LinearAttention)
    assert all(layer.mixer.on for layer in model.layers)


def test_a_step_of_training_is_the_same_again():
    (one, history), (two, _) = (train_hybrid(seed=3, steps=2) for _ in range(2))
    assert [h["step"] for h in history] == [0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_what_five_seeds_say():
    "All learn both, within the two minutes; without softmax layers they look nothing up and add as before."
    runs = json.loads((ROOT / "results" / "hybrid.json").read_text())["runs"]
    assert [r["seed"] for r in runs] == [0, 1, 2, 3, 4] and hybrid.DIGITS[-1] + 1 == hybrid.TOKENS
    for run in runs:
        whole, off = run["history"][-1]["whole"], run["history"][-1]["softmax off"]
        assert min(whole) > 95 and off[0] < 20 and off[1] > 95 and run["linear_off"][0] < 40, run
        assert run["seconds"]["cpu"] < 120

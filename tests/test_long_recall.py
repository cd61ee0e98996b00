"Chapter 12b's plan: rows, layouts, look-up, stages that are passed over, gradients of two processes, and the script end to end."
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_tokenizer

from qkrestore_nb import long_recall as lr
from qkrestore_nb import traces
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.prose import local_text, sentence

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "studies" / "real_model.py")]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def tokenizer(): return small_tokenizer()


@pytest.fixture(scope="module")
def prose(tokenizer): return lr.tokenized(tokenizer, [" ".join(local_text()[:8000])])


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("kind", traces.kinds)
def test_a_told_solution_is_right_and_a_changed_one_is_not(kind, near):
    source = traces.problems(1, near, among=(kind,))
    for _ in range(8):
        p = next(source)
        wrong = p.completion.rsplit(" ", 1)[0] + " seventy"
        assert traces.right(p, p.completion) and not traces.right(p, wrong) and not traces.right(p, "")
        assert p.kind == kind and p.completion.endswith(f"Answer: {p.answer}")


def test_near_steps_restate_and_far_steps_do_not():
    for kind in ("countdown", "sudoku", "sums"):
        near, far = (next(traces.problems(3, x, among=(kind,))) for x in (True, False))
        begin = dict(countdown="I have ", sudoku="Now row one is ", sums="I have ")[kind]
        assert near.completion.startswith(begin) and not far.completion.startswith(begin)


@pytest.mark.parametrize("T", [256, 600, 3000])
def test_rows_ask_at_the_end_for_what_they_hold(T, tokenizer, prose):
    asked = 0
    for i in range(20):
        ids, weights = lr.distance_row(random.Random(i), tokenizer, prose, T)
        assert ids.shape == weights.shape == (T,)
        if not (weights == lr.answer_weight).any(): continue
        asked += 1
        first = int(np.argmax(weights == lr.answer_weight))
        value = tokenizer.decode(ids[first:first + int(np.argmin(weights[first:] == lr.answer_weight)) or None])
        assert value.strip().rstrip(".").split("\n")[0] in tokenizer.decode(ids[:first])
    assert asked > 8


def test_formats_are_not_the_tests():
    ours = sentence("numbers", "KEY", "VALUE")
    made = {lr._format(random.Random(i)) for i in range(3000)}
    assert len(made) > 2900 and "special magic" in ours
    assert all("magic" not in a + b and "One of" not in a and "mentioned" not in b for a, b in made)
    filled = [(a.format(k="KEY", v="VALUE"), b.format(k="KEY")) for a, b in made]
    assert all("KEY" in a and "VALUE" in a and "KEY" in b for a, b in filled)


def test_lookup_says_what_greedy_decoding_among_the_choices_says():
    choices = np.array([[1, 1, 2], [3, 4, 3], [-1, 5, 6]])  # (L, C): the right one ends first
    assert lr.looked_up(np.array([[2., 2., 1.], [2., 1., 9.], [0., 0., 0.]]), choices)      # the third was left at its first token
    assert not lr.looked_up(np.array([[2., 2., 3.], [2., 1., 0.], [0., 0., 0.]]), choices)  # the third is said
    assert not lr.looked_up(np.array([[2., 2., 1.], [1., 2., 0.], [0., 0., 0.]]), choices)  # the second is said


def test_layouts_hold_each_problem_once_and_as_many_tokens():
    rng = np.random.default_rng(0)
    pool = [(np.full(n, i, np.int32), np.arange(n) > 20) for i, n in enumerate(rng.integers(100, 1000, 200))]
    plan = replace(lr.plans["smoke"], weighted=30000)
    for layout in ("single", "packed"):
        batches = lr.filled(pool, layout, plan, 0)
        held = [i for _, rows in batches for row in rows for i in row]
        assert len(held) == len(set(held)) and all(len(row) == 1 for _, rows in batches for row in rows) == (layout == "single")
        assert all(sum(len(pool[i][0]) for i in row) <= T for T, rows in batches for row in rows)
        weight = sum(int(pool[i][1].sum()) for i in held)
        assert 30000 <= weight < 32500 and batches != lr.filled(pool, layout, plan, 0, seed=1) and batches == lr.filled(pool, layout, plan, 0)


def test_missing_books_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no.xz is missing: make it with `python benchmarks/studies/books.py`"): lr.books(tmp_path / "no.xz")
    with pytest.raises(CheckpointError, match="is not there: run the stage data"): lr.load_prose(tmp_path, wait=.1)


def test_every_fine_tuning_of_the_plan_has_a_file_of_its_own():
    for plan in lr.plans.values():
        assert len({t.file for t in plan.tunes}) == len(plan.tunes) and {c.T for c in plan.cells if c.primary} <= {16384, 700}
    names = [name for name, _ in lr.predicted(lr.plans["gpu"])]
    plan = lr.plans["gpu"]
    assert names[0] == "start, teacher, data" and names[1:1 + len(plan.base)] == [s.name for s in plan.base]
    assert len(names) == 1 + len(plan.base) + len(plan.tunes)


@pytest.mark.slow
def test_the_whole_path(tmp_path):
    "The script on a tiny teacher: two processes make the base alike, everything is evaluated, and a second call has nothing to do."
    command = [*SCRIPT, str(tmp_path / "runs"), str(tmp_path / "out"), "--plan", "smoke", "--per-gpu", "2"]
    late = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, env=ENV)
    assert late.returncode and "time is up" in late.stderr
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:] + "".join(p.read_text()[-1000:] for p in (tmp_path / "out").rglob("*.log"))
    records = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*-seed*.json")}
    assert {f"{t.name}-seed{t.seed}" for t in lr.plans["smoke"].tunes} == records.keys()
    for r in records.values():
        assert {"seed", "config", "versions", "device", "wall_s", "scores"} <= r.keys() and "unfinished" not in r
        for scores in r["scores"].values(): assert {"exact", "lookup", "n", "generated"} <= scores["single_2"]["700"].keys()
    assert set(records["near-1e-3-seed0"]["scores"]) == {*lr.decisive, *lr.further} and records["pre-seed0"]["scores"]["pre"]["multikey_1"]["700"]["n"] == 8
    again = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=100)
    assert again.returncode == 0 and "ended with" not in again.stdout
    # the same base by two processes that share each step: as many rows a step, so other weights, alike in both
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for part in ("teacher", "prose.npz"): os.symlink(tmp_path / "runs" / part, tmp_path / name / part)
    port = str(29500 + os.getpid() % 1000)
    two = [subprocess.Popen([*SCRIPT, str(tmp_path / "two"), str(tmp_path / "out2"), "--plan", "smoke", "--stage", "hybrid"], stderr=subprocess.PIPE,
                            env=ENV | dict(RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for i in range(2)]
    assert [p.wait(timeout=200) for p in two] == [0, 0]
    assert json.loads((tmp_path / "two" / "hybrid.json").read_text())["config"]["world"] == 2


def _worker(rank: int, port: int, out: str):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(_small(lambda step: (torch.tensor([[1, 2, 3, rank]]), torch.ones(1, 4))), f"{out}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _small(batch):
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from qkrestore_nb.training import train
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    train(model, batch, 3, 1e-2, warmup=1)
    return model.state_dict()


def test_two_processes_train_as_one_with_the_rows_of_both(tmp_path):
    torch.multiprocessing.spawn(_worker, (29400 + os.getpid() % 100, str(tmp_path / "w")), 2)
    one = _small(lambda step: (torch.tensor([[1, 2, 3, 0], [1, 2, 3, 1]]), torch.ones(2, 4)))
    for rank in (0, 1):
        for k, v in torch.load(tmp_path / f"w-{rank}.pt", weights_only=True).items(): torch.testing.assert_close(v, one[k], rtol=1e-4, atol=1e-5)

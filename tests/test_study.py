"Statistics over seeds: intervals that hold what they promise, files that belong together, and pairs that are paired."
import json

import numpy as np
import pytest
from scipy import stats

from qkrestore_nb.experiment import cell
from qkrestore_nb.study import accuracy, difference, load, needles, t_interval, within


def test_the_interval_is_students():
    x = np.array([24., 31., 16., 33., 25.])
    got, wanted = t_interval(x), stats.ttest_1samp(x, 0).confidence_interval(.95)
    assert (got.low, got.high) == pytest.approx(tuple(wanted)) and got.mean == pytest.approx(x.mean())
    assert t_interval(x, .8).low > got.low and str(got) == f"{got.mean:+.1f} ({got.low:+.1f} to {got.high:+.1f})"
    for few in ([], [1.]):
        with pytest.raises(ValueError, match="at least two units: give more seeds or more haystacks"): t_interval(few)


@pytest.mark.parametrize("n, draw", [(5, lambda g, n: g.normal(3, 2, n)), (10, lambda g, n: g.normal(0, 9, n)), (10, lambda g, n: g.uniform(-1, 1, n)),
                                     (10, lambda g, n: g.binomial(64, .7, n) / 64 - .7)])
def test_ninety_five_of_a_hundred_intervals_hold_the_truth(n, draw):
    truth, g = 3. if n == 5 else 0., np.random.default_rng(n)
    made = [t_interval(draw(g, n)) for _ in range(1500)]
    assert .93 < np.mean([e.low <= truth <= e.high for e in made]) < .97
    assert np.mean([e.low <= truth + 2 * e.units.std() <= e.high for e in made]) < .9  # elsewhere they do not


def made_up(seed: int, **shift: float) -> dict:
    "A result file: variants answer the same questions, hard ones and easy ones, one a little better than the other."
    rng = np.random.default_rng(seed)
    hard = dict(S1=rng.random((6, 1, 5)), MK=rng.random((3, 8, 5)))
    scores = {}
    for v, s in shift.items():
        scores[v] = {t: {"1024": cell(x < s, x[..., :2].max(-1) < s)} for t, x in hard.items()}
        scores[v] |= {f"cot-{t}": {"8": cell(rng.random((4, 1)) < .5)} for t in "MADH"}
    return dict(seed=seed, sft_seed=0, config=dict(kind="near"), scores=scores)


@pytest.fixture
def runs(): return [made_up(seed, post=.6 + .05 * seed, qk=.8 + .05 * seed) for seed in range(3)]


def test_accuracy_is_what_the_cells_say(runs):
    cells = [("S1", 1024), ("MK", 1024)]
    for count in ("lookup", "exact"):
        wanted = [50 * sum(r["scores"]["qk"][t]["1024"][count] / r["scores"]["qk"][t]["1024"]["n"] for t in ("S1", "MK")) for r in runs]
        assert accuracy(runs, "qk", cells, count) == pytest.approx(wanted) and len(set(wanted)) > 1
    chains = [25 * sum(r["scores"]["qk"][f"cot-{t}"]["8"]["exact"] / 4 for t in "MADH") for r in runs]
    assert accuracy(runs, "qk", [("chains", 8)]) == pytest.approx(chains)
    first = [100 * (np.random.default_rng(s).random((6, 1, 5))[..., 0] < .8 + .05 * s).mean() for s in range(3)]
    assert accuracy(runs, "qk", [("S1", 1024)], "first") == pytest.approx(first)
    assert needles(16384) == [("S1", 16384), ("S2", 16384), ("S3", 16384), ("MK", 16384)]


def test_differences_are_paired(runs):
    "Seeds differ much more than variants do within a seed: paired, the interval is the narrower one."
    for run, base in zip(runs, (.2, .5, .8)): run["scores"] = made_up(run["seed"], post=base, qk=base + .1)["scores"]
    cells = [("MK", 1024)]
    qk, post = (accuracy(runs, v, cells, "first") for v in ("qk", "post"))
    got, alone, back = difference(runs, "qk", "post", cells, "first"), t_interval(qk), difference(runs, "post", "qk", cells, "first")
    assert got.units == pytest.approx(qk - post) and 0 < got.mean and got.high - got.low < .5 * (alone.high - alone.low)
    assert (back.mean, back.low, back.high) == pytest.approx((-got.mean, -got.high, -got.low))


def test_within_one_model_haystacks_are_the_units(runs):
    x = np.random.default_rng(2)
    x.random((6, 1, 5))
    hard = x.random((3, 8, 5))[..., :2].max(-1)
    got = within(runs[2]["scores"], "qk", "post", "MK", 1024)
    assert got.units == pytest.approx(100 * ((hard < .9).mean(1) - (hard < .7).mean(1))) and len(got.units) == 3
    assert within(runs[2]["scores"], "qk", "qk", "MK", 1024).units.tolist() == [0, 0, 0]


def test_files_that_belong_together(runs, tmp_path):
    for run in runs[::-1]: (tmp_path / f"hypenet7m-near-seed{run['seed']}.json").write_text(json.dumps(run))
    (tmp_path / "hypenet7m-near-seed0-sft1.json").write_text(json.dumps(dict(runs[0], sft_seed=1)))
    (tmp_path / "silu7m-near-seed0.json").write_text("[]")
    assert [(r["seed"], r["sft_seed"]) for r in load(tmp_path)] == [(0, 0), (1, 0), (2, 0)]
    assert [(r["seed"], r["sft_seed"]) for r in load(tmp_path, sft_seed=1)] == [(0, 1)]
    with pytest.raises(ValueError, match="no hypenet7m-far-seed.*run `qkrestore experiment` first"): load(tmp_path, "far")
    (tmp_path / "hypenet7m-near-seed9.json").write_text(json.dumps(dict(runs[0], seed=9, config=dict(kind="near", steps=2))))
    with pytest.raises(ValueError, match="come from different recipes: name those of one"): load(tmp_path)

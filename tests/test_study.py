"Statistics over seeds: t intervals against scipy's own, paired differences, what is counted, and what is refused."
import json

import numpy as np
import pytest
from scipy import stats

from qkrestore_nb.experiment import cell
from qkrestore_nb.study import Estimate, accuracy, by_length, difference, load, needles, t_interval, within

TESTS = ("S1", "S2", "S3", "MK")


def scores(rng, easy: float) -> dict:
    "Random answers of two tokens: 6 haystacks of 4 questions."
    def one(): return cell(rng.random((6, 4, 2)) < easy, rng.random((6, 4)) < easy)
    return {t: {"1024": one(), "16384": one()} for t in TESTS} | {f"cot-{t}": {"8": cell(rng.random((10, 1)) < easy)} for t in "MADH"}


@pytest.fixture
def folder(tmp_path):
    "Three seeds of near, one of them fine-tuned twice, and one of packed."
    for seed, sft_seed, kind in ((3, 0, "near"), (1, 0, "near"), (2, 0, "near"), (2, 1, "near"), (1, 0, "packed")):
        rng = np.random.default_rng([seed, sft_seed])
        run = dict(seed=seed, sft_seed=sft_seed, config=dict(kind=kind), scores={v: scores(rng, p) for v, p in (("pre", .98), ("post", .6), ("qk", .8), ("vo", .6), ("average 0.9", .7))})
        (tmp_path / f"m-{kind}-seed{seed}{'-sft1' * sft_seed}.json").write_text(json.dumps(run))
    return tmp_path


@pytest.mark.parametrize("level", [.9, .95])
def test_the_interval_is_students(level):
    x = np.random.default_rng(0).normal(3, 2, 10)
    low, high = stats.t.interval(level, 9, x.mean(), stats.sem(x))
    got = t_interval(x, level)
    assert (got.low, got.high) == pytest.approx((low, high)) and got.mean == pytest.approx(x.mean())
    assert str(Estimate(np.array([1., 2.]), -.04, 3.06)) == "+1.5 (-0.0 to +3.1)"
    for few in ([], [1.]):
        with pytest.raises(ValueError, match="at least two units"): t_interval(few)


def test_runs_by_seed_and_those_that_do_not_belong_together(folder):
    assert [r["seed"] for r in load(folder, "near", "m")] == [1, 2, 3] and [r["seed"] for r in load(folder, "near", "m", 1)] == [2]
    with pytest.raises(ValueError, match="no m-far-seed"): load(folder, "far", "m")
    other = json.loads((folder / "m-near-seed3.json").read_text())
    (folder / "m-near-seed3.json").write_text(json.dumps(other | dict(config=dict(kind="near", lr=1))))
    with pytest.raises(ValueError, match="different recipes"): load(folder, "near", "m")


def test_what_is_counted(folder):
    "Against the bits, by hand."
    runs = load(folder, "near", "m")
    for count in ("lookup", "exact", "first"):
        by_hand = []
        for run in runs:
            rng, share = np.random.default_rng([run["seed"], 0]), {}
            for variant, easy in (("pre", .98), ("post", .6)):
                for t in TESTS:
                    for x in ("1024", "16384"):
                        tokens, lookup = rng.random((6, 4, 2)) < easy, rng.random((6, 4)) < easy
                        share[variant, t, x] = 100 * dict(lookup=lookup, exact=tokens.all(-1), first=tokens[..., 0])[count].mean()
                for _ in "MADH": rng.random((10, 1))
            by_hand.append(np.mean([share["post", t, "16384"] for t in TESTS]))
        assert accuracy(runs, "post", needles(16384), count) == pytest.approx(by_hand)
    chains = [np.mean([r["scores"]["qk"][f"cot-{t}"]["8"]["exact"] / 10 for t in "MADH"]) * 100 for r in runs]
    assert accuracy(runs, "qk", [("chains", 8)], "exact") == pytest.approx(chains) == accuracy(runs, "qk", [("chains", 8)])
    with pytest.raises(KeyError): accuracy(runs, "nothing", needles(16384))


def test_differences_are_paired(folder):
    "Within a seed first: what seeds have in common does not widen the interval."
    runs = load(folder, "near", "m")
    d = difference(runs, "qk", "post", needles(1024))
    assert d.units == pytest.approx(accuracy(runs, "qk", needles(1024)) - accuracy(runs, "post", needles(1024))) and d.low < d.mean < d.high
    assert difference(runs, "qk", "qk", needles(1024)).high == 0
    one = within(runs[0]["scores"], "qk", "post", "S3", 1024, "exact")
    assert len(one.units) == 6  # haystacks, and not questions
    s = runs[0]["scores"]
    assert one.mean == pytest.approx(100 * (s["qk"]["S3"]["1024"]["exact"] - s["post"]["S3"]["1024"]["exact"]) / 24)


def test_lines_by_length(folder):
    import matplotlib.pyplot as plt
    runs = load(folder, "near", "m")
    ax = plt.figure().subplots()
    by_length(ax, runs, (1024, 16384), "exact")
    thick = {line.get_label(): line.get_ydata() for line in ax.lines if line.get_lw() > 2}
    assert list(thick) == ["before SFT", "Q,K restored", "all weights at 0.9", "V,O restored", "after SFT"] and len(ax.lines) == 5 + 2 * 3
    assert thick["after SFT"][1] == pytest.approx(accuracy(runs, "post", needles(16384), "exact").mean())
    plt.close("all")

"The experiment's path on a CPU, its resuming, and the demo: what they write and what they refuse."
import json

import pytest
import torch

from qkrestore_nb import experiment
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.experiment import demo, pair, run, table
from qkrestore_nb.hypenet import HypeNetForCausalLM

few = dict(recall=dict(MF=[(256, 2, 4)]), steps=(1, 2), problems=4)


@pytest.fixture
def quick(monkeypatch):
    "The smoke recipe, but shorter still."
    recipe = {**experiment.recipes["smoke"], **few, "recall": dict(MF=[(512, 1, 4)])}
    recipe = {**recipe, "pretraining": {**recipe["pretraining"], "steps": 4}, "sft": {**recipe["sft"], "steps": 4}, "probe": 2, "steps": (1, 8)}
    monkeypatch.setitem(experiment.recipes, "smoke", recipe)


def test_run_resumes_and_belongs_to_one_seed(quick, tmp_path, monkeypatch):
    straight = run("smoke", tmp_path / "straight", seed=3)
    result = json.loads((straight / "results.json").read_text())
    assert {"seed", "config", "versions", "device", "wall_s", "scores", "pretraining", "sft", "probes"} <= result.keys()
    assert result["scores"].keys() == experiment.variants.keys() and [p["step"] for p in result["probes"]] == [0, 2, 4]
    assert (straight / "results.png").stat().st_size > 5000 and (straight / "restored" / "qk_restore.json").exists()

    real, calls = experiment.save, []
    def save(model, folder):
        calls.append(folder.name)
        if folder.name == "post" and calls.count("post") == 1: raise KeyboardInterrupt
        real(model, folder)
    monkeypatch.setattr(experiment, "save", save)
    with pytest.raises(KeyboardInterrupt): run("smoke", tmp_path / "cut", seed=3)
    assert not (tmp_path / "cut" / "post").exists() and not (tmp_path / "cut" / "sft.json").exists()
    run("smoke", tmp_path / "cut", seed=3)
    assert calls == ["pre", "post", "post"]  # pre-training was not run again
    for name in ("pre", "post", "restored"):
        assert (tmp_path / "cut" / name / "model.safetensors").read_bytes() == (straight / name / "model.safetensors").read_bytes()

    assert run("smoke", straight, seed=3) == straight  # a finished run is left as it is
    assert json.loads((straight / "results.json").read_text()) == result
    with pytest.raises(CheckpointError, match="another seed"): run("smoke", straight, seed=4)
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="not a run"): run("smoke", tmp_path / "mine")


@pytest.mark.parametrize("profile, words", [("laptop", "choose smoke"), ("colab", "profile")])
def test_profiles_that_cannot_run(profile, words, tmp_path):
    with pytest.raises(CheckpointError, match=words): run(profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "demo_sizes", dict(few, recall=dict(MF=[(256, 2, 4), (512, 2, 4)])))
    a, b = demo(tmp_path / "a"), demo(tmp_path / "b")
    first, second = (json.loads((f / "demo.json").read_text()) for f in (a, b))
    assert first["scores"] == second["scores"] and first["scores"].keys() == {"pre", "post", "restored"}
    assert "MF" in table(first["scores"]) and (a / "demo.png").stat().st_size > 5000
    for name in ("pre", "post", "restored"): HypeNetForCausalLM.from_pretrained(a / name)
    assert (a / "pre" / "model.safetensors").read_bytes() == (pair() / "pre" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists"): demo(a)
    monkeypatch.chdir(tmp_path)
    assert [demo().name, demo().name] == ["qkrestore-demo", "qkrestore-demo-2"]


def test_the_shipped_numbers_are_the_shipped_checkpoints():
    "The record's MF score at 1K, asked again here: the same questions, another machine and float32 instead of TF32."
    record = json.loads((pair() / "provenance.json").read_text())
    sizes = record["config"]["recipe"]["recall"]["MF"][0]
    model = HypeNetForCausalLM.from_pretrained(pair() / "post", dtype=torch.float32)
    here = experiment.evaluate(model, dict(MF=[sizes]), steps=(), seed=record["seed"])["MF"]["1024"]
    then = record["scores"]["post"]["MF"]["1024"]
    assert here["n"] == then["n"] and abs(here["correct"] - then["correct"]) <= .03 * then["n"]

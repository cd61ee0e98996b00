"The experiment's path on a CPU, its resuming, and the demo: what they write and what they refuse."
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from qkrestore_nb import experiment
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.cli import main
from qkrestore_nb.experiment import demo, pair, run, table
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.recall import decode, recall_test

few = dict(recall=dict(MF=[(256, 2, 4)]), steps=(1, 2), problems=4)


@pytest.fixture
def quick(monkeypatch):
    "The smoke recipe, but shorter still."
    recipe = {**experiment.recipes["smoke"], **few, "recall": dict(MF=[(512, 1, 4)]), "fewer": dict(few, steps=(1,))}
    recipe = {**recipe, "pretraining": {**recipe["pretraining"], "steps": 4}, "sft": {**recipe["sft"], "steps": 4}, "probe": 2, "steps": (1, 8)}
    monkeypatch.setitem(experiment.recipes, "smoke", recipe)


def test_run_resumes_and_belongs_to_one_seed(quick, tmp_path, monkeypatch):
    straight = run("smoke", tmp_path / "straight", seed=3)
    result = json.loads((straight / "results.json").read_text())
    assert {"seed", "config", "versions", "device", "wall_s", "scores", "pretraining", "sft", "probes"} <= result.keys()
    assert list(result["scores"]) == list(experiment.main_variants) and [p["step"] for p in result["probes"]] == [0, 2, 4]
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
    with pytest.raises(CheckpointError, match="choose from cot"): run("smoke", tmp_path / "new", kinds=("slow", "quick"))
    with pytest.raises(CheckpointError, match="choose from hypenet7m"): run("smoke", tmp_path / "new", model="gpt")

    more = run("smoke", straight, seed=3, kinds=("frozen", "slow", "long", "lora"), full=True)  # more questions to the same checkpoints
    added = json.loads((more / "results.json").read_text())
    assert added["config"]["kinds"] == ["cot", "frozen", "long", "slow", "lora"]
    assert {v: added["scores"][v] for v in result["scores"]} == result["scores"] and {"LiNeS 0.8", "head 1.0", "lora: restored"} <= added["scores"].keys()
    assert "head 1.1" not in added["scores"]  # the smoke model has one head
    pre, frozen, slow, full = (load_file(straight / name / "model.safetensors") for name in ("pre", "sft-frozen", "sft-slow", "post"))
    for name in pre:
        moved = lambda x: (x[name].float() - pre[name].float()).norm()
        if re.search(r"layers\.[12]\.self_attn\.[qk]_proj", name): assert moved(frozen) == 0 < moved(slow) < moved(full)
    assert any((frozen[n] != pre[n]).any() for n in pre)


def test_memory_that_runs_out_names_the_setting(quick, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(experiment, "finetune", full)
    with pytest.raises(CheckpointError, match="halve tokens"): run("smoke", tmp_path / "run")
    assert (tmp_path / "run" / "pre" / "model.safetensors").exists()


def test_the_longer_questions():
    "Several values a key, and two hops: what is asked for stands in the haystack, in order, and the key leads to it."
    for kind, spec in (("MV", dict(values=3)), ("HOP", dict(hops=2))):
        batch = recall_test(kind, 3, 512, seed=4)
        for row, ask in zip(batch["ids"], batch["ask"]):
            text = decode(row)
            for where in ask:
                key, *link = re.search(r"QM (k\d+ k\d+) IS", decode(row[where[0] - 4:where[0]]))[1], *decode(row[where]).split()
                found = re.findall(rf"N {key} IS ((?:\S+ )+?)DOT", text)
                if kind == "HOP":
                    assert [f.split() for f in found] == [link[:2]]
                    key, link = " ".join(link[:2]), link[2:]
                    found = re.findall(rf"N {key} IS ((?:\S+ )+?)DOT", text)
                assert " ".join(found).split() == link and len(found) == spec.get("values", 1)
    with pytest.raises(ValueError, match="do not fit"): recall_test("MV", 1, 150)


def test_several_seeds_in_one_command(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run", lambda profile, out, seed, *rest: run("smoke", out, seed))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as e: main(["experiment", "--profile", "smoke", "--out", str(tmp_path / "two"), "--seed", "1,3-3"])
    assert not e.value.code and sorted(p.name for p in (tmp_path / "two").iterdir()) == ["seed1", "seed3"]
    with pytest.raises(SystemExit) as e: main(["experiment", "--seed", "one"])
    assert e.value.code == 2 and "give a number" in capsys.readouterr().err


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
    "The record's MF score at 1K, asked again here: the same questions, another machine and float32 instead of bfloat16."
    record = json.loads((pair() / "provenance.json").read_text())
    sizes = next(s for s in record["config"]["recipe"]["recall"]["MF"] if s[0] == 1024)
    model = HypeNetForCausalLM.from_pretrained(pair() / "post", dtype=torch.float32)
    here = experiment.evaluate(model, dict(MF=[sizes]), steps=(), seed=record["seed"])["MF"]["1024"]
    then = record["scores"]["post"]["MF"]["1024"]
    assert here["n"] == then["n"] and abs(here["correct"] - then["correct"]) <= .03 * then["n"]

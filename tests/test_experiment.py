"The experiment's path on a CPU: what it writes, how it goes on, what it evaluates, and what it refuses."
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkrestore_nb import experiment, training
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.cli import main
from qkrestore_nb.experiment import (
    SFT,
    alternatives,
    bits,
    cell,
    decisive,
    demo,
    evaluate,
    figure,
    model_fields,
    models,
    names,
    pair,
    recipes,
    run,
    sfts,
    share,
    table,
    verdict,
)
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
from qkrestore_nb.reasoning import reasoning_test, solved
from qkrestore_nb.recall import recall_test, score, token_id
from qkrestore_nb.training import sft_batch

QK, VO = (rf"layers\.[12]\.self_attn\.[{x}]_proj" for x in ("qk", "vo"))  # of the softmax layers


@pytest.fixture
def quick(monkeypatch):
    "The smoke recipe, but shorter still."
    sizes = dict(recall=dict(S3=[(128, 2, 1)], MF=[(256, 1, 4)]), steps=(8,), problems=2)
    recipe = dict(recipes["smoke"], pretraining=dict(steps=3, lr=2e-3, warmup=1), pretraining_data=dict(tokens=1024, first=9), probe=2,
                  sft=dict(steps=4, lr=1e-2, warmup=1), probed=sizes, long=dict(sizes, steps=(1, 8)), short=sizes, few=dict(sizes, problems=1))
    monkeypatch.setitem(recipes, "smoke", recipe)
    return recipe


@pytest.fixture
def asked(monkeypatch):
    "Every evaluation is noted instead of made: questions, chain, and a copy of the weights."
    calls = []
    def note(model, recall, steps, problems, seed, chain):
        calls.append(dict(recall=recall, steps=steps, problems=problems, seed=seed, chain=chain,
                          weights={n: p.detach().clone() for n, p in model.state_dict().items()}))
        return {t: {str(c[0]): dict(exact=0, n=1) for c in cells} for t, cells in recall.items()} | \
            {f"cot-{t}": {str(n): dict(exact=0, n=1) for n in steps} for t in "MADH"}
    monkeypatch.setattr(experiment, "evaluate", note)
    return calls


def weights(folder) -> dict: return {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}


# ---- counts and bits

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 17)), st.integers(0, 2**32 - 1), st.booleans())
def test_bits_and_counts_agree(shape, seed, with_lookup):
    rng = np.random.default_rng(seed)
    tokens, lookup = rng.random(shape) < .8, rng.random(shape[:-1]) < .5 if with_lookup else None
    made = json.loads(json.dumps(cell(tokens, lookup)))  # as it comes back from a file
    assert (bits(made, "tokens") == tokens).all() and bits(made, "tokens").shape == shape
    assert (bits(made, "exact") == tokens.all(-1)).all() and made["exact"] == tokens.all(-1).sum() and made["n"] == tokens.all(-1).size
    assert ("lookup" in made) == ("lookup_bits" in made) == with_lookup
    if with_lookup: assert (bits(made) == lookup).all() and made["lookup"] == lookup.sum()


def test_evaluate_asks_what_recall_and_reasoning_ask():
    "The same questions, one by one; the sizes of a batch change nothing; what comes next is told before."
    torch.manual_seed(0)
    model = HypeNetForCausalLM(HypeNetConfig(**{**model_fields, **recipes["smoke"]["model"]}))
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)
    told, sizes = [], dict(S2=[(128, 3, 1)], MF=[(256, 2, 5)])
    got = evaluate(model.eval(), sizes, steps=(2,), problems=3, seed=4, chain="far", max_batch_tokens=256, on_progress=told.append)
    assert told == ["S2 at 128 tokens", "MF at 256 tokens", *(f"2-step chains of {t}" for t in "MADH")]
    assert list(got) == ["S2", "MF", "cot-M", "cot-A", "cot-D", "cot-H"] and [list(x) for x in got.values()] == [["128"], ["256"]] + [["2"]] * 4
    right = score(model, recall_test("MF", 2, 256, 5, seed=4))
    assert (bits(got["MF"]["256"]) == right.lookup).all() and (bits(got["MF"]["256"], "tokens") == right.tokens).all()
    assert got["MF"]["256"]["n"] == 10 and 0 < got["MF"]["256"]["lookup"] < 10
    chains = solved(model, *reasoning_test("D", 2, 3, 4, "far"))
    assert bits(got["cot-D"]["2"], "exact").tolist() == chains.tolist() and "lookup" not in got["cot-D"]["2"]


# ---- a run

def test_a_run_and_the_same_run_cut_and_resumed(quick, tmp_path, monkeypatch):
    straight = run("smoke", tmp_path / "straight", seed=3)
    path = straight / "hypenet7m-near-seed3.json"
    result = json.loads(path.read_text())
    assert {"seed", "sft_seed", "config", "versions", "device", "date", "wall_s", "scores", "probes", "pretraining", "sft"} == result.keys()
    assert (result["seed"], result["sft_seed"], result["config"]["kind"], result["config"]["model"]) == (3, 0, "near", "hypenet7m")
    assert result["config"]["fields"]["hidden_size"] == 64 and result["config"]["profile"] == "smoke" and result["wall_s"] > 0
    assert list(result["scores"]) == list(decisive) and [p["step"] for p in result["probes"]] == [2, 4]
    for scores in result["scores"].values():
        assert {t: list(x) for t, x in scores.items()} == dict(S3=["128"], MF=["256"]) | {f"cot-{t}": ["1", "8"] for t in "MADH"}
        for test, x in scores.items():
            for c in x.values():
                assert 0 <= c["exact"] <= c["n"] and bits(c, "exact").sum() == c["exact"] and np.prod(c["shape"][:-1]) == c["n"]
                if "cot" not in test: assert bits(c).sum() == c["lookup"] <= c["n"]
    assert result["probes"][0]["scores"].keys() == {"S3", "MF", "cot-M", "cot-A", "cot-D", "cot-H"}
    assert sorted(p.name for p in straight.iterdir()) == [path.name, "near", "near.json", "pre", "pretraining.json", "recipe.json"]

    real, calls = experiment.save, []
    def save(model, folder):
        calls.append(folder.name)
        if calls == ["pre", "near"]: raise KeyboardInterrupt
        real(model, folder)
    monkeypatch.setattr(experiment, "save", save)
    with pytest.raises(KeyboardInterrupt): run("smoke", tmp_path / "cut", seed=3)
    assert not (tmp_path / "cut" / "near").exists() and not (tmp_path / "cut" / "near.json").exists()
    run("smoke", tmp_path / "cut", seed=3)
    assert calls == ["pre", "near", "near"]  # pre-training was not run again
    for name in ("pre", "near"):
        assert (tmp_path / "cut" / name / "model.safetensors").read_bytes() == (straight / name / "model.safetensors").read_bytes()
    again = json.loads((tmp_path / "cut" / path.name).read_text())
    assert again["scores"] == result["scores"] and again["probes"] == result["probes"]  # no step was probed twice

    before = path.read_bytes()
    assert run("smoke", straight, seed=3) == straight and json.loads(path.read_text()) == result  # a finished run is left as it is
    with pytest.raises(CheckpointError, match="another seed or recipe"): run("smoke", straight, seed=4)
    with pytest.raises(CheckpointError, match="another seed or recipe"): run("smoke", straight, seed=3, model="silu7m")
    monkeypatch.setitem(recipes, "smoke", dict(quick, probe=1))
    with pytest.raises(CheckpointError, match="another seed or recipe"): run("smoke", straight, seed=3)
    assert path.read_bytes() == before


def test_an_interrupted_evaluation_goes_on_with_the_next_variant(quick, asked, tmp_path, monkeypatch):
    note, stop = experiment.evaluate, []
    def evaluate(*args, **how):
        if len(stop) == 4: raise KeyboardInterrupt  # two probes, pre, post
        stop.append(1)
        return note(*args, **how)
    monkeypatch.setattr(experiment, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt): run("smoke", tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "hypenet7m-near-seed0.json").read_text())
    assert list(kept["scores"]) == ["pre", "post"] and len(asked) == 4
    monkeypatch.setattr(experiment, "evaluate", note)
    run("smoke", tmp_path / "run")
    done = json.loads((tmp_path / "run" / "hypenet7m-near-seed0.json").read_text())
    assert list(done["scores"]) == list(decisive) and len(asked) == 7 and done["wall_s"] >= kept["wall_s"]


def test_a_probe_that_was_cut_is_made_when_the_run_goes_on(quick, asked, tmp_path, monkeypatch):
    note = experiment.evaluate
    def evaluate(*args, **how): raise KeyboardInterrupt
    monkeypatch.setattr(experiment, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt): run("smoke", tmp_path / "run", variants=())
    monkeypatch.setattr(experiment, "evaluate", note)
    run("smoke", tmp_path / "run", variants=())
    assert [p["step"] for p in json.loads((tmp_path / "run" / "hypenet7m-near-seed0.json").read_text())["probes"]] == [2, 4]


def test_a_probe_is_made_once(quick, asked, tmp_path, monkeypatch):
    "Cut after the probe and before the run was saved: the step is walked again, and its probe is there already."
    real = training._save
    def save(path, **state):
        if path.name == "near.pt": raise KeyboardInterrupt
        real(path, **state)
    monkeypatch.setattr(training, "_save", save)
    with pytest.raises(KeyboardInterrupt): run("smoke", tmp_path / "run", variants=())
    monkeypatch.setattr(training, "_save", real)
    run("smoke", tmp_path / "run", variants=())
    assert [p["step"] for p in json.loads((tmp_path / "run" / "hypenet7m-near-seed0.json").read_text())["probes"]] == [2, 4]


def test_every_variant_is_the_model_that_its_name_says(quick, asked, tmp_path):
    wanted = ("qk", "vo", "average 0.9", "q", "noise", "drift alone", "qk on average 0.9")
    out = run("smoke", tmp_path / "run", seed=5, variants=wanted)
    pre, post = weights(out / "pre"), weights(out / "near")
    got = dict(zip(["pre", "post", *wanted], [c["weights"] for c in asked[2:]], strict=True))  # two probes come first
    assert [c["seed"] for c in asked] == [6, 6] + [5] * 9  # probes have questions of their own
    for name, w in got.items():
        for n, a in w.items():
            a, (x, y), qk = a.float(), (pre[n], post[n]), bool(re.search(QK, n))
            if name == "noise" and qk:
                assert (a - y).norm() > .5 * (y - x).norm() and float((a - x).norm()) == pytest.approx(float((y - x).norm()), rel=1e-3)
                continue
            mixed = .9 * y + .1 * x
            right = dict(pre=x, post=y, qk=x if qk else y, vo=x if re.search(VO, n) else y, q=x if qk and "q_proj" in n else y, noise=y)
            right |= {"average 0.9": mixed, "drift alone": y if qk else x, "qk on average 0.9": x if qk else mixed}
            torch.testing.assert_close(a, right[name], atol=1e-6, rtol=0)
    assert all(sum(not torch.equal(pre[n], post[n]) for n in pre if re.search(part, n)) == 4 for part in (QK, VO))


def test_what_is_evaluated_and_how_long(quick, asked, tmp_path):
    "Near and its decisive variants at every length, another kind at some, all others at few; pre is evaluated once."
    out = run("smoke", tmp_path / "run", kinds=("near", "direct"), variants=("qk", "noise"))
    read = lambda c: (c["steps"], c["problems"], c["chain"])
    long, short, few, probe = ((1, 8), 2, "near"), ((8,), 2, "near"), ((8,), 1, "near"), ((8,), 2, "near")
    assert [read(c) for c in asked] == [probe, probe, long, long, long, few] + [short, short, few]  # direct: post, qk, noise; no pre, no probe
    near, direct = (json.loads((out / f"hypenet7m-{k}-seed0.json").read_text()) for k in ("near", "direct"))
    assert list(near["scores"]) == list(direct["scores"]) == ["pre", "post", "qk", "noise"] and direct["probes"] == []
    assert direct["scores"]["pre"] == {t: {x: near["scores"]["pre"][t][x] for x in xs} for t, xs in direct["scores"]["post"].items()}
    assert near["pretraining"] == direct["pretraining"]

    del asked[:]
    run("smoke", out, kinds=("far",), variants=("qk",))  # its chains are another test: pre is evaluated on them
    assert [read(c) for c in asked] == [((8,), 2, "far")] * 3
    del asked[:]
    run("smoke", out, kinds=("near", "direct"), variants=("qk", "vo"))  # only what is new
    assert len(asked) == 2 and all("vo" in json.loads((out / f"hypenet7m-{k}-seed0.json").read_text())["scores"] for k in ("near", "direct"))


def test_a_second_seed_of_fine_tuning_stands_beside_the_first(quick, asked, tmp_path):
    out = run("smoke", tmp_path / "run", seed=2)
    first = (out / "hypenet7m-near-seed2.json").read_bytes()
    run("smoke", out, seed=2, sft_seed=1)
    again = json.loads((out / "hypenet7m-near-seed2-sft1.json").read_text())
    assert (again["seed"], again["sft_seed"]) == (2, 1) and (out / "hypenet7m-near-seed2.json").read_bytes() == first
    a, b = weights(out / "near"), weights(out / "near-sft1")
    assert any(not torch.equal(a[n], b[n]) for n in a) and again["sft"]["seed"] == 1002


def test_steps_and_rates_of_the_kinds(quick, asked, tmp_path, monkeypatch):
    "What the training loop is told, against the recipe's 4 steps at 1e-2."
    told = {}
    def note(model, batch, steps, lr, file, loss, **how):
        if file.stem != "pretraining": told[file.stem] = steps, lr, batch.keywords, loss.keywords
        file.touch()
        return []
    monkeypatch.setattr(training, "train", lambda *args, file, loss=None, **how: note(*args, file=file, loss=loss, **how))
    run("smoke", tmp_path / "run", seed=3, kinds=("near", "lr1e_4", "twice", "half", "lora3", "borders"), variants=())
    assert {k: (x[0], pytest.approx(x[1])) for k, x in told.items()} == dict(near=(4, 1e-2), lr1e_4=(4, 2e-3), twice=(8, 1e-2), half=(2, 1e-2), lora3=(4, 3e-2),
                                                                              borders=(2, 1e-2))
    assert told["near"][2:] == (dict(seed=3, rows=8), dict(borders=False)) and told["borders"][2:] == (dict(seed=3, rows=8, T=2048, packed=True), dict(borders=True))


def test_frozen_slow_and_lora(quick, asked, tmp_path):
    out = run("smoke", tmp_path / "run", kinds=("near", "frozen", "slow", "lora10"), variants=())
    pre, near, frozen, slow, lora = (weights(out / name) for name in ("pre", "near", "frozen", "slow", "lora10"))
    moved = lambda w, n: float((w[n] - pre[n]).norm())
    for n in pre:
        if re.search(QK, n): assert moved(frozen, n) == 0 < moved(slow, n) < .5 * moved(near, n)
        elif re.search(VO, n): assert min(moved(frozen, n), moved(slow, n)) > .5 * moved(near, n) > 0
        if n.endswith("_proj.weight"): assert 0 < moved(lora, n) and np.linalg.matrix_rank((lora[n] - pre[n]).numpy(), tol=.05 * moved(lora, n)) <= 16
        elif "norm" in n or "embed" in n: assert moved(lora, n) == 0
    HypeNetForCausalLM.from_pretrained(out / "lora10")


def test_a_checkpoint_is_complete_or_not_there(quick, asked, tmp_path, monkeypatch):
    out = run("smoke", tmp_path / "run", variants=())
    model = AutoModelForCausalLM.from_pretrained(out / "near", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.lightning_conv_activation is None and model.generation_config.max_new_tokens == 128
    assert AutoTokenizer.from_pretrained(out / "near")("BOS N k1")["input_ids"] == [token_id[w] for w in ("BOS", "N", "k1")]
    before = (out / "near" / "model.safetensors").read_bytes()
    experiment.save(model.float(), out / "near")  # saved again: the same
    assert (out / "near" / "model.safetensors").read_bytes() == before and not list(out.glob("*.part"))
    monkeypatch.setattr(HypeNetForCausalLM, "save_pretrained", lambda self, folder: folder.mkdir() or 1 / 0)
    with pytest.raises(ZeroDivisionError): experiment.save(model, out / "other")
    assert not (out / "other").exists()


def test_several_seeds_and_every_repair_in_one_command(quick, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["experiment", "--profile", "smoke", "--out", str(tmp_path / "two"), "--seed", "1,3-3", "--kinds", "direct", "--full"]
    with pytest.raises(SystemExit) as e: main(words)
    assert not e.value.code and sorted(p.name for p in (tmp_path / "two").iterdir()) == ["seed1", "seed3"]
    for n in (1, 3):
        scores = json.loads((tmp_path / "two" / f"seed{n}" / f"hypenet7m-direct-seed{n}.json").read_text())["scores"]
        assert list(scores) == [*decisive, *alternatives]
    said = capsys.readouterr().out
    assert "direct, seed 1\n" in said and "direct, seed 3\n" in said and "nothing to restore" in said and "Q,K restored" in said
    for seed, why in (("one", "give a number"), ("3-1", "names no seed")):
        with pytest.raises(SystemExit) as e: main(["experiment", "--seed", seed])
        assert e.value.code == 2 and why in capsys.readouterr().err


# ---- what is refused

@pytest.mark.parametrize("wrong, why", [
    (dict(model="gpt"), "no model is called 'gpt': choose from hypenet7m, silu7m"), (dict(kinds=("near", "quick")), "no kind of fine-tuning is called 'quick': choose from near, far"),
    (dict(variants=("qk", "restored")), "no variant is called 'restored': choose from pre, post, qk"), (dict(profile="laptop"), "choose smoke"),
    (dict(profile="colab"), "needs a CUDA GPU")])
def test_unknown_names(wrong, why, tmp_path):
    if torch.cuda.is_available() and wrong.get("profile") == "colab": pytest.skip("there is a GPU here")
    with pytest.raises(CheckpointError, match=why): run(**{**dict(profile="smoke", out=tmp_path / "out"), **wrong})
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_the_runs(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="is not a run of this experiment: choose another folder"): run("smoke", tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    with pytest.raises(CheckpointError, match="there is no folder .* to put run into: make it first"): run("smoke", tmp_path / "no" / "run")
    assert not (tmp_path / "no").exists()


def test_a_profile_that_starts_from_the_shipped_model_has_only_that(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes, "smoke", recipes["colab"])
    with pytest.raises(CheckpointError, match="starts from the shipped model, hypenet7m: use --profile gpu for late7m"):
        run("smoke", tmp_path / "out", model="late7m")


def test_memory_that_runs_out_names_the_setting(quick, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    def broken(*args): raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(experiment, "finetune", full)
    with pytest.raises(CheckpointError, match="memory ran out with 1,024 tokens a step.*halve tokens"): run("smoke", tmp_path / "run")
    assert (tmp_path / "run" / "pre" / "model.safetensors").exists()
    monkeypatch.setattr(experiment, "finetune", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"): run("smoke", tmp_path / "run")  # a mistake of ours stays one


# ---- the tables of kinds and models

@pytest.mark.parametrize("kind", sfts)
def test_every_kind_of_fine_tuning_makes_its_rows(kind):
    sft = sfts[kind]
    ids, w = sft_batch(0, **{**sft.data, "rows": 4})
    assert ids.shape == (4, sft.data.get("T", 128)) and (w.sum(1) > 0).all()
    assert min(sft.steps, sft.lr) > 0 and 0 <= sft.qk_lr <= 1 and (sft == SFT()) == (kind == "near")


def test_packed_rows_are_compared_at_equal_loss_tokens():
    loss = lambda kind: np.mean([float(sft_batch(s, **sfts[kind].data)[1].sum()) for s in range(4)])
    near = loss("near")
    for kind in ("packed", "borders"): assert loss(kind) * sfts[kind].steps == pytest.approx(near, rel=.03)
    assert loss("wide") == pytest.approx(loss("packed_long"), rel=.03) and sfts["wide"].steps == sfts["packed_long"].steps == 1
    assert sfts["borders"].borders and not sfts["packed"].borders and sfts["borders"].data == sfts["packed"].data


@pytest.mark.parametrize("name, millions", [("hypenet7m", 7), ("silu7m", 7), ("first7m", 7), ("spread7m", 7), ("late7m", 7), ("softmax7m", 7),
                                            ("hypenet16m", 16), ("hypenet42m", 42), ("hypenet100m", 100)])
def test_every_model_can_be_built(name, millions):
    with torch.device("meta"): model = HypeNetForCausalLM(HypeNetConfig(**{**model_fields, **models[name]}))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=.15)
    assert len(models) == 9 and ("linear_attention" in model.config.layer_types) == (name != "softmax7m")


def test_decisive_and_alternative_repairs_are_told_apart():
    assert len({*decisive, *alternatives}) == len(decisive) + len(alternatives)


# ---- the shipped pair and its demo

SIZES = dict(recall=dict(MF=[(256, 1, 8)]), steps=(1,), problems=2)


def test_demo(tmp_path, monkeypatch):
    "Five models, the same questions each time; the folders are the shipped checkpoints and the restored one; --packed takes the sibling."
    monkeypatch.setattr(experiment, "demo_sizes", SIZES)
    one, packed = demo(tmp_path / "a"), demo(tmp_path / "c", packed=True)
    first, third = (json.loads((f / "demo.json").read_text()) for f in (one, packed))
    assert {"seed", "config", "versions", "device", "wall_s", "scores"} <= first.keys() and list(first["scores"]) == list(names)
    assert first["scores"]["pre"] == third["scores"]["pre"] and first["scores"]["post"] != third["scores"]["post"]
    assert [r["config"]["packed"] for r in (first, third)] == [False, True] and (one / "demo.png").stat().st_size > 5000
    for out, sibling in ((one, "post"), (packed, "packed")):
        for name, source in (("pre", "pre"), ("post", sibling)):
            assert (out / name / "model.safetensors").read_bytes() == (pair() / source / "model.safetensors").read_bytes()
        pre, post, restored = (weights(out / name) for name in ("pre", "post", "restored"))
        for n, w in restored.items(): assert torch.equal(w, pre[n] if re.search(QK, n) else post[n])
    model = HypeNetForCausalLM.from_pretrained(one / "restored", dtype=torch.float32)
    assert evaluate(model, **SIZES)["MF"] == {"256": {**first["scores"]["qk"]["MF"]["256"], "shape": (1, 8, 5)}}
    with pytest.raises(CheckpointError, match="exists: choose a name that is free with --out"): demo(one)
    with pytest.raises(CheckpointError, match="there is no folder .* to put new into: make it first"): demo(tmp_path / "no" / "new")


def test_the_demo_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "demo_sizes", dict(recall=dict(S3=[(128, 1, 1)]), steps=(1,), problems=1))
    with pytest.raises(SystemExit) as e: main(["demo", "--packed", "--out", str(tmp_path / "here")])
    scores, said = json.loads((tmp_path / "here" / "demo.json").read_text())["scores"], capsys.readouterr().out
    assert not e.value.code and table(scores) in said and verdict(scores) in said and str(tmp_path / "here" / "demo.png") in said


def test_names_of_demos_that_are_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("qkrestore-demo", "qkrestore-demo-2", "qkrestore-demo-3"):
        assert experiment._free(None, "qkrestore-demo").name == name
        (tmp_path / name).mkdir()


def made_up(pre: int, post: int, qk: int, vo: int, chains: int = 9) -> dict:
    "Scores of ten questions a cell; look-up is one better than exact match."
    scores = {}
    for v, k in dict(pre=pre, post=post, qk=qk, vo=vo, **{"average 0.9": post}).items():
        scores[v] = {"S3": {"4096": dict(exact=k, lookup=k + 1, n=10)}, "MF": {"1024": dict(exact=k, lookup=k + 1, n=10)}}
        scores[v] |= {f"cot-{t}": {"8": dict(exact=chains, n=10)} for t in "MADH"}
    return scores


def test_table_verdict_and_figure_say_what_the_counts_say():
    scores = made_up(9, 2, 7, 3)
    assert share(scores["qk"], [("S3", "4096"), ("MF", "1024")]) == 70 and share(scores["qk"], [("S3", "4096")], "lookup") == 80
    lines = table(scores).splitlines()
    assert len(lines) == 4 and re.findall(r"\d+ \(\d+\)", lines[1]) == ["90 (100)", "20 (30)", "70 (80)", "30 (40)", "20 (30)"]
    assert lines[3].split()[:3] == ["8-step", "chains", "90"] and lines[3].split()[-1] == "40" and "(" not in lines[3]
    assert verdict(scores) == ("Fine-tuning took 70 of 90 points of recall. Restoring Q and K of the softmax layers recovers 50 of them, V and O 10. "
                               "Chains stay at 90% (90% after SFT).")
    assert verdict(made_up(9, 9, 9, 9)) == "Fine-tuning took 0 points of recall here: there is nothing to restore."
    ax = figure(scores).axes[0]
    assert ax.get_title(loc="left").replace("\n", " ") == verdict(scores)
    assert sorted(round(b.get_height()) for b in ax.patches if b.get_x() < .5) == [20, 20, 30, 30, 30, 40, 70, 80, 90, 100]


def test_the_demos_table_has_ten_lines_at_most():
    cells = {t: {str(c[0]): dict(exact=1, lookup=1, n=2) for c in x} for t, x in experiment.demo_sizes["recall"].items()}
    cells |= {f"cot-{t}": {str(n): dict(exact=1, n=2) for n in experiment.demo_sizes["steps"]} for t in "MADH"}
    assert len(table(dict.fromkeys(names, cells)).splitlines()) <= 10


def test_the_shipped_numbers_are_the_shipped_checkpoints():
    "The record's MF score at 1K, evaluated again here: the same questions, another machine and float32 instead of bfloat16."
    record = json.loads((pair() / "provenance.json").read_text())
    sizes = next(s for s in record["config"]["recipe"]["long"]["recall"]["MF"] if s[0] == 1024)
    for folder, then in (("post", record["scores"]["post"]), ("packed", record["packed"]["scores"]["post"])):
        model = HypeNetForCausalLM.from_pretrained(pair() / folder, dtype=torch.float32)
        here, then = evaluate(model, dict(MF=[sizes]), steps=(), seed=record["seed"])["MF"]["1024"], then["MF"]["1024"]
        assert here["n"] == then["n"] and (bits(here) == bits(then)).mean() > .95 and abs(here["exact"] - then["exact"]) <= .03 * then["n"]

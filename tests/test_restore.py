"What a restore must do to files, modules and state dicts, and what it must leave alone."
import copy
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import KINDS, NAME, hypenet_config, snapshot, tensors, write_checkpoint
from safetensors.torch import load_file

from qkrestore_nb import checkpoints, restore
from qkrestore_nb.checkpoints import CheckpointError, read_config, read_index, sha256
from qkrestore_nb.families import disagreement, layer_kinds, planned_tensors
from qkrestore_nb.restore import qk_restore


def header(file: Path) -> bytes:
    with open(file, "rb") as f: return f.read(int.from_bytes(f.read(8), "little"))


def check(pre: Path, post: Path, out: Path, plan: list[str]):
    "The oracle: names, sizes and headers are post's; bytes differ only inside the plan, where they are pre's."
    a, b, c = map(read_index, (pre, post, out))
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert names(out) == sorted({*names(post), "qk_restore.json"})
    for file in (p for p in post.rglob("*") if p.is_file() and p.name != "qk_restore.json"):
        expected = bytearray(file.read_bytes())
        for name in plan:
            if b[name]["file"] == file: expected[b[name]["start"]:b[name]["end"]] = a[name]["file"].read_bytes()[a[name]["start"]:a[name]["end"]]
        assert bytes(expected) == (out / file.relative_to(post)).read_bytes(), file
        if file.suffix == ".safetensors": assert header(file) == header(out / file.name)
    note = json.loads((out / "qk_restore.json").read_text())
    assert [row["tensor"] for row in note["tensors"]] == plan
    for row in note["tensors"]:
        t = c[row["tensor"]]
        assert row["sha256_restored"] == sha256(t) == sha256(a[row["tensor"]]) and row["sha256_post"] == sha256(b[row["tensor"]])
        assert (row["shape"], row["dtype"], row["bytes"]) == (t["shape"], t["dtype"], t["end"] - t["start"])
    return note


QK = [NAME.format(i, r) for i in (1, 2) for r in "qk"]


@pytest.mark.parametrize("pre_shards", [1, 2, 5])
@pytest.mark.parametrize("post_shards", [1, 3])
def test_only_q_and_k_of_softmax_layers_change(tmp_path, pre_shards, post_shards):
    pre, post = write_checkpoint(tmp_path / "pre", 1, pre_shards), write_checkpoint(tmp_path / "post", 2, post_shards)
    before, out = snapshot(tmp_path), tmp_path / "out"
    assert qk_restore(pre, post, out=out) == out
    note = check(pre, post, out, QK)
    assert (note["pre"], note["post"], note["layers"], note["projections"]) == (str(pre), str(post), "softmax", "qk")
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("layers, projections, plan", [
    ("linear", "qk", [NAME.format(i, r) for i in (0, 3) for r in "qk"]),
    ("all", "o", [NAME.format(i, "o") for i in range(4)]),
    ([3, 1, 3], "kq", [NAME.format(i, r) for i in (1, 3) for r in "kq"]),
    ([0], "qkvo", [NAME.format(0, r) for r in "qkvo"])])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_choices(tmp_path, layers, projections, plan, dtype):
    pre, post = (write_checkpoint(tmp_path / n, s, 2, dtype=dtype) for n, s in (("pre", 1), ("post", 2)))
    layers = layers if isinstance(layers, str) else iter(layers)  # any iterable will do
    check(pre, post, qk_restore(pre, post, tmp_path / "out", layers=layers, projections=projections), plan)


def test_jet_nemotron_moves_weights_of_full_attention_only(tmp_path):
    config = {"model_type": "jet_nemotron", "num_hidden_layers": 4, "layer_types": ["jet", "attn", "swa", "jet"], "hidden_size": 8}
    pre, post = (write_checkpoint(tmp_path / n, s, config=config, biases=True) for n, s in (("pre", 1), ("post", 2)))
    check(pre, post, qk_restore(pre, post, out=tmp_path / "out"), [NAME.format(1, r) for r in "qk"])
    check(pre, post, qk_restore(pre, post, out=tmp_path / "swa", layers=[2], projections="q"), [NAME.format(2, "q")])


@pytest.mark.parametrize("fields", [{"model_type": "hybrid"}, {"model_type": "hybrid", "architectures": ["HybridForCausalLM"]},
                                    {"model_type": None, "architectures": ["HybridForCausalLM"]}, {"mixer_types": [k.replace("-", "_") for k in KINDS]}])
def test_the_published_spellings_are_one_family(fields):
    assert layer_kinds(hypenet_config(**fields)) == ["linear", "softmax", "softmax", "linear"]
    assert disagreement(hypenet_config(), hypenet_config(**fields)) is None


def test_defaults_written_out_are_no_disagreement():
    spelled = hypenet_config(attn_use_rope=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, lightning_nh=2, lightning_nkv=1,
                             lightning_head_dim=4, lightning_scale="1/sqrt(d)", attention_bias=False, attn_logits_scaling=None)
    assert disagreement(hypenet_config(), spelled) is None and disagreement(spelled, hypenet_config(rope_theta=10000, rope_parameters={})) is None
    assert "rope_theta" in disagreement(hypenet_config(), hypenet_config(rope_theta=1e6))
    assert "rope_scaling" in disagreement(hypenet_config(), hypenet_config(rope_scaling={"type": "yarn", "factor": 4.0}))
    assert layer_kinds({k: v for k, v in hypenet_config().items() if k != "mixer_types"}) == layer_kinds(hypenet_config(mixer_types=[])) == ["softmax"] * 4


@pytest.mark.parametrize("kw", [dict(layers="softmx"), dict(layers=[4]), dict(layers=[-1]), dict(layers=[]), dict(layers=3), dict(layers=None), dict(layers=["1"]),
                                dict(layers=[1.5]), dict(projections="x"), dict(projections=""), dict(projections="qq"), dict(projections=None), dict(projections=["q"])])
def test_choices_that_cannot_be_read(pair, tmp_path, kw):
    with pytest.raises(CheckpointError, match="layers=|projections="): qk_restore(*pair, **({"out": tmp_path / "out"} | kw))
    with pytest.raises(CheckpointError, match="layers=|projections="): qk_restore(tensors(1), tensors(2), config=hypenet_config(), **kw)
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


def test_bad_input_says_one_sentence_and_leaves_everything_alone(bad, tmp_path):
    paths, sentence = bad
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as error: qk_restore(**paths)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_a_disk_that_is_too_small(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="make room"): qk_restore(*pair, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["overwrite", "copy", "sync", "note"])
def test_whatever_breaks_nothing_is_left(pair, tmp_path, monkeypatch, where, error):
    before, calls = snapshot(tmp_path), []
    def breaks(*args, **kw):
        calls.append(args)
        assert not (tmp_path / "out").exists()
        if len(calls) > 1 or where == "note": raise error
        return real(*args, **kw)
    target, name = {"overwrite": (restore, "overwrite"), "copy": (shutil, "copystat"), "sync": (checkpoints, "to_disk"), "note": (restore, "write_result")}[where]
    real = getattr(target, name)
    monkeypatch.setattr(target, name, breaks)
    with pytest.raises((KeyboardInterrupt, RuntimeError, OSError, CheckpointError)): qk_restore(*pair, out=tmp_path / "out")
    assert calls and snapshot(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_not_touched(pair, tmp_path, monkeypatch):
    def rude(*args): (tmp_path / "out").mkdir()
    monkeypatch.setattr(restore, "write_result", rude)
    with pytest.raises(CheckpointError, match="has appeared"): qk_restore(*pair, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "post", "pre"] and not os.listdir(tmp_path / "out")


def test_a_hub_snapshot_of_links_becomes_regular_files(pair, tmp_path):
    pre, post = pair
    repo = tmp_path / "models--me--post"
    (repo / "blobs").mkdir(parents=True), (repo / "snapshots" / "abc").mkdir(parents=True)
    for i, file in enumerate(sorted(p for p in post.iterdir() if p.is_file())):
        shutil.copy(file, repo / "blobs" / str(i))
        (repo / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{i}")
    before = snapshot(tmp_path)
    out = qk_restore(pre, repo / "snapshots" / "abc", out=tmp_path / "out")
    assert all(stat.S_ISREG(p.lstat().st_mode) for p in out.iterdir())
    check(pre, repo / "snapshots" / "abc", out, QK)
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


def test_read_only_inputs(pair, tmp_path):
    for path in sorted(pair[1].rglob("*"), reverse=True): path.chmod(0o555 if path.is_dir() else 0o444)
    pair[1].chmod(0o555)
    before = snapshot(tmp_path)
    out = qk_restore(*pair, out=tmp_path / "out")
    check(*pair, out, QK)
    assert all(p.stat().st_mode & 0o200 for p in (out, *out.rglob("*")))
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


def test_odd_paths(tmp_path, monkeypatch):
    pre, post = write_checkpoint(tmp_path / "mit Lücke" / "vor", 1), write_checkpoint(tmp_path / "-x" / "後", 2)
    monkeypatch.chdir(tmp_path / "-x")
    assert qk_restore("../mit Lücke/vor", "後", out="./-out/") == Path("-out")
    check(pre, post, tmp_path / "-x" / "-out", QK)


def test_a_second_restore_remembers_the_first_and_can_undo_it(pair, tmp_path):
    pre, post = pair
    first = qk_restore(pre, post, out=tmp_path / "first")
    second = qk_restore(post, first, out=tmp_path / "second")
    check(post, first, second, QK)
    assert json.loads((second / "qk_restore.json").read_text())["before"] == json.loads((first / "qk_restore.json").read_text())
    for file in post.glob("*.safetensors"): assert file.read_bytes() == (second / file.name).read_bytes()


# ---- state dicts

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_state_dicts(tmp_path):
    pre, post = tensors(1), tensors(2)
    expected = post | {n: pre[n] for n in QK}
    a, b = copy.deepcopy(pre), copy.deepcopy(post)
    fixed = qk_restore(a, b, config=hypenet_config())
    assert same(fixed, expected) and same(a, pre) and same(b, post) and type(fixed) is type(b)
    assert not {t.data_ptr() for t in fixed.values()} & {t.data_ptr() for t in (*a.values(), *b.values())}
    assert qk_restore(a, b, config=hypenet_config(), inplace=True) is b and same(b, expected) and same(a, pre)


def test_state_dicts_equal_folders(pair, tmp_path):
    out = qk_restore(*pair, out=tmp_path / "out")
    load = lambda f: {n: t for file in f.glob("*.safetensors") for n, t in load_file(file).items()}
    assert same(load(out), qk_restore(load(pair[0]), load(pair[1]), config=read_config(pair[1])))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix):
    pre, post = tensors(1), {prefix + n: t for n, t in tensors(2).items()}
    fixed = qk_restore(pre, post, config=hypenet_config())
    assert all(torch.equal(fixed[prefix + n], (pre if n in QK else tensors(2))[n]) for n in pre)
    bare = {n.removeprefix("model."): t for n, t in pre.items()}
    assert same(qk_restore(bare, post, config=hypenet_config()), fixed)


def test_two_towers_are_ambiguous():
    two = {f"{p}.{n}": t for p in ("a", "b") for n, t in tensors(1).items()}
    with pytest.raises(CheckpointError, match="language model alone"): qk_restore(two, tensors(2), config=hypenet_config())


def test_state_dict_errors():
    pre, post, config = tensors(1), tensors(2), hypenet_config()
    for a, b, kw, sentence in [
            (pre, post, {}, "pass config="), (pre, post, dict(config=config, out="x"), "out= is for"), (pre, "post", dict(config=config), "one kind"),
            (pre, tensors(2, "float32"), dict(config=config), "dtype"), (pre, {}, dict(config=config), "post has no tensor"),
            (pre, {n: t.to("meta") for n, t in post.items()}, dict(config=config), "meta"), (post, post, dict(config=config), "share their memory"),
            (pre, post, dict(config=config | {"mixer_types": ["lightning-attn"] * 4}), "no softmax layer")]:
        with pytest.raises(CheckpointError, match=sentence): qk_restore(a, b, **kw)
    assert same(post, tensors(2)) and same(pre, tensors(1))


def test_folder_errors(pair, tmp_path):
    for kw, sentence in [({}, "out="), (dict(out=tmp_path / "o", inplace=True), "in place"), (dict(out=tmp_path / "o", config={}), "config= is for")]:
        with pytest.raises(CheckpointError, match=sentence): qk_restore(*pair, **kw)
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


# ---- models

def models():
    from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
    config = HypeNetConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=16, mixer_types=KINDS, attn_use_rope=False, attn_logits_scaling="hype 500", rope_theta=1e6, tie_word_embeddings=True)
    for seed in (1, 2):
        torch.manual_seed(seed)
        yield HypeNetForCausalLM(config).eval()


def test_models():
    pre, post = models()
    a, b = ({n: t.clone() for n, t in m.state_dict().items()} for m in (pre, post))
    fixed = qk_restore(pre, post)
    assert same(fixed.state_dict(), b | {n: a[n] for n in QK}) and type(fixed) is type(post)
    assert same(pre.state_dict(), a) and same(post.state_dict(), b)
    assert not {p.data_ptr() for p in fixed.parameters()} & {p.data_ptr() for m in (pre, post) for p in m.parameters()}
    assert fixed.lm_head.weight is fixed.model.embed_tokens.weight
    wrapped = torch.compile(post)
    assert qk_restore(pre, wrapped, inplace=True) is wrapped and same(post.state_dict(), fixed.state_dict()) and same(pre.state_dict(), a)


def test_model_errors():
    pre, post = models()
    with pytest.raises(CheckpointError, match="share their memory"): qk_restore(post, post)
    with pytest.raises(CheckpointError, match="one kind"): qk_restore(pre.state_dict(), post)
    with pytest.raises(CheckpointError, match="has no config"): qk_restore(pre, torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="meta"): qk_restore(pre, copy.deepcopy(post).to("meta"))
    with pytest.raises(CheckpointError, match="dtype"): qk_restore(pre, copy.deepcopy(post).bfloat16())
    with pytest.raises(CheckpointError, match="save_pretrained"): qk_restore(pre, post, out="x")


def test_the_restored_folder_loads_and_is_the_restored_model(tmp_path):
    from transformers import AutoModelForCausalLM
    pre, post = models()
    for name, model in (("pre", pre), ("post", post)): model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    assert len(list((tmp_path / "post").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out")).eval()
    check(tmp_path / "pre", tmp_path / "post", tmp_path / "out", QK)
    ids = torch.arange(24)[None]
    with torch.no_grad(): logits = [m(ids).logits for m in (loaded, qk_restore(pre, post), post)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])

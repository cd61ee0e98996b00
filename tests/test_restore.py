"qk_restore on folders, models and state dicts: what it changes, what it leaves, and what it refuses."
import json
import os
import shutil

import pytest
import torch
from conftest import snapshot, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qkrestore_nb.hypenet  # noqa: F401  registers the family
from qkrestore_nb import checkpoints, restore
from qkrestore_nb.checkpoints import CheckpointError, read_index
from qkrestore_nb.cli import main
from qkrestore_nb.restore import qk_restore

PLAN = [f"model.layers.{i}.self_attn.{r}_proj.weight" for i in (1, 2) for r in "qk"]


def check_oracle(pre, post, out, plan):
    "Same files, sizes and headers as post; bytes differ only inside the planned ranges, where they equal pre's."
    files = lambda f: {p.name: p.stat().st_size for p in f.iterdir()}
    assert {k: v for k, v in files(out).items() if k != "qk_restore.json"} == files(post)
    a, b, c = read_index(pre), read_index(post), read_index(out)
    assert {n: {**t, "file": t["file"].name} for n, t in c.items()} == {n: {**t, "file": t["file"].name} for n, t in b.items()}
    for name in files(post):
        new, old = bytearray((out / name).read_bytes()), (post / name).read_bytes()
        for n in plan:
            if b[n]["file"].name != name: continue
            s, e = b[n]["start"], b[n]["end"]
            assert bytes(new[s:e]) == a[n]["file"].read_bytes()[a[n]["start"]:a[n]["end"]], n
            new[s:e] = old[s:e]
        assert bytes(new) == old, name


@pytest.mark.parametrize("pre_shards, post_shards", [(1, 1), (3, 1), (1, 4), (2, 5)])
def test_folders(tmp_path, pre_shards, post_shards):
    pre, post, out = write_checkpoint(tmp_path / "pre", 1, pre_shards), write_checkpoint(tmp_path / "post", 2, post_shards), tmp_path / "out"
    before = (snapshot(pre), snapshot(post))
    assert qk_restore(pre, str(post), out=out) == out
    check_oracle(pre, post, out, PLAN)
    assert (snapshot(pre), snapshot(post)) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "post", "pre"]
    model, a, b = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).state_dict() for f in (out, pre, post))
    for n, w in model.items(): assert torch.equal(w, (a if n in PLAN else b)[n])


def test_note(pair, tmp_path):
    import hashlib
    out = qk_restore(*pair, out=tmp_path / "out")
    note = json.loads((out / "qk_restore.json").read_text())
    assert [t["tensor"] for t in note["tensors"]] == PLAN
    for t in note["tensors"]:
        for key, folder in (("sha256_restored", pair[0]), ("sha256_post", pair[1])):
            w = load_file(folder / "model.safetensors")[t["tensor"]]
            assert t[key] == hashlib.sha256(w.view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("layers, projections, n", [("linear", "qk", 4), ("all", "qkvo", 16), ([0, 2], "v", 2), ((1,), "kq", 2), ("softmax", "o", 2)])
def test_choices(pair, tmp_path, layers, projections, n):
    out = qk_restore(*pair, out=tmp_path / "out", layers=layers, projections=projections)
    plan = [t["tensor"] for t in json.loads((out / "qk_restore.json").read_text())["tensors"]]
    assert len(plan) == n
    check_oracle(*pair, out, plan)


def test_models_and_state_dicts_agree_with_folders(pair, tmp_path):
    pre, post = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in pair)
    before = [{n: w.clone() for n, w in m.state_dict().items()} for m in (pre, post)]
    files = AutoModelForCausalLM.from_pretrained(qk_restore(*pair, out=tmp_path / "out"), dtype=torch.bfloat16).state_dict()
    model, state = qk_restore(pre, post), qk_restore(pre.state_dict(), post.state_dict(), config=post.config)
    for n, w in files.items(): assert torch.equal(w, model.state_dict()[n]) and torch.equal(w, state[n])
    for m, old in zip((pre, post), before):
        for n, w in m.state_dict().items(): assert torch.equal(w, old[n])
    with torch.no_grad():  # no memory is shared with the inputs
        for p in model.parameters(): p.zero_()
        for w in state.values(): w.zero_()
    for n, w in pre.state_dict().items(): assert torch.equal(w, before[0][n])
    assert qk_restore(pre, post, inplace=True) is post
    for n, w in files.items(): assert torch.equal(w, post.state_dict()[n])


def test_published_2b_naming(tmp_path):
    naming = dict(architectures=["HybridForCausalLM"], model_type="hybrid", mixer_types=["lightning_attn", "attn", "attn", "lightning_attn"])
    pre, post = (write_checkpoint(tmp_path / n, s) for n, s in (("pre", 1), ("post", 2)))
    for f in (pre, post): (f / "config.json").write_text(json.dumps({**json.loads((f / "config.json").read_text()), **naming}))
    check_oracle(pre, post, qk_restore(pre, post, out=tmp_path / "out"), PLAN)


def test_symlinked_snapshot(pair, tmp_path):
    "A hub cache is a folder of links into a folder of blobs: read through them, write regular files."
    blobs, snap = tmp_path / "blobs", tmp_path / "snapshot"
    pair[1].rename(blobs), snap.mkdir()
    for p in blobs.iterdir(): (snap / p.name).symlink_to(p)
    out = qk_restore(pair[0], snap, out=tmp_path / "out")
    assert not any(p.is_symlink() for p in out.iterdir())
    check_oracle(pair[0], blobs, out, PLAN)


# ---- bad input: one sentence, exit code 2, nothing written, inputs untouched

def _config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **fields}.items() if v is not ...}))


def _drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _retype(folder, name, **change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change["f"](tensors[name])
    save_file(tensors, folder / "model.safetensors")


def _index(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _double(folder):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    _index(folder, {"x": "a.safetensors", "y": "b.safetensors"})


def _twice_in_header(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    name, entry = next((k, v) for k, v in json.loads(raw[8:8 + n]).items() if k != "__metadata__")
    header = raw[8:8 + n].rstrip()[:-1] + f',"{name}":{json.dumps(entry)}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n:])


BAD = {
    "wrong path": (lambda pre, post: shutil.rmtree(pre), "there is no folder"),
    "no config": (lambda pre, post: (post / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda pre, post: (post / "config.json").write_text("{"), "not valid JSON"),
    "no softmax layer": (lambda pre, post: [_config(f, mixer_types=["lightning-attn"] * 4) for f in (pre, post)], "no softmax layer"),
    "unknown mixer": (lambda pre, post: _config(post, mixer_types=["mamba"] * 4), "unknown kind of layer mamba"),
    "unknown family": (lambda pre, post: _config(post, model_type="llama", architectures=["LlamaForCausalLM"]), "not a family"),
    "other size": (lambda pre, post: _config(post, hidden_size=16), "hidden_size differs"),
    "other heads": (lambda pre, post: _config(post, num_key_value_heads=2), "num_key_value_heads differs"),
    "other scale": (lambda pre, post: _config(post, attn_logits_scaling=...), "attn_logits_scaling differs"),
    "other rope": (lambda pre, post: _config(post, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "rope_theta differs"),
    "other layer kinds": (lambda pre, post: _config(post, mixer_types=["attn", "lightning-attn"] * 2), "kinds of layers differ"),
    "other shape": (lambda pre, post: _retype(post, PLAN[0], f=lambda w: w[:4].contiguous()), "has shape"),
    "other dtype": (lambda pre, post: _retype(post, PLAN[1], f=lambda w: w.float()), "has dtype"),
    "quantized": (lambda pre, post: [_retype(f, PLAN[1], f=lambda w: w.to(torch.int8)) for f in (pre, post)], "quantized"),
    "missing tensor in pre": (lambda pre, post: _drop(pre, PLAN[0]), "pre has no tensor"),
    "missing tensor in post": (lambda pre, post: _drop(post, PLAN[3]), "post has no tensor"),
    "adapter": (lambda pre, post: (post / "adapter_config.json").write_text("{}"), "is an adapter"),
    "pickled": (lambda pre, post: (post / "model.safetensors").rename(post / "pytorch_model.bin"), "pickled"),
    "no weights": (lambda pre, post: (post / "model.safetensors").unlink(), "no model.safetensors"),
    "missing shard": (lambda pre, post: _index(post, {"x": "gone.safetensors"}), "lacks its shard"),
    "path in index": (lambda pre, post: _index(post, {"x": "../pre/model.safetensors"}), "no file of this folder"),
    "tensor in two shards": (lambda pre, post: _double(post), "stands in a.safetensors and in b.safetensors"),
    "truncated": (lambda pre, post: os.truncate(post / "model.safetensors", 5000), "not a sound safetensors file"),
    "key twice": (lambda pre, post: _twice_in_header(post), "twice in the header"),
}


def refuse(tmp_path, capsys, words, *args):
    "The call ends with code 2 and one sentence, and leaves everything as it was."
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as e: main(["restore", *map(str, args)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert words in err, err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input(pair, tmp_path, capsys, case):
    harm, words = BAD[case]
    harm(*pair)
    refuse(tmp_path, capsys, words, *pair, tmp_path / "out")


@pytest.mark.parametrize("where, words", [("out", "exists"), ("pre", "is one of the inputs"), ("post", "is one of the inputs"), ("pre/in", "inside the input"),
                                          ("post/deep/in", "inside the input"), (".", "above the input"), ("no/such/out", "no folder"), ("link", "exists")])
def test_bad_output(pair, tmp_path, capsys, where, words):
    if where == "out": (tmp_path / "out").mkdir()  # even an empty folder belongs to somebody
    if where == "link": (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuse(tmp_path, capsys, words, *pair, tmp_path / where)


def test_output_through_a_link_into_an_input(pair, tmp_path, capsys):
    (tmp_path / "alias").symlink_to(pair[0])
    refuse(tmp_path, capsys, "inside the input", *pair, tmp_path / "alias" / "out")


@pytest.mark.parametrize("args, words", [(["--layers", "9"], "numbers from 0 to 3"), (["--layers", "hard"], "choose softmax"), (["--layers", "1,x"], "numbers as in"),
                                         (["--projections", "qz"], "letters q, k, v, o"), (["--projections", ""], "letters q, k, v, o")])
def test_bad_choice(pair, tmp_path, capsys, args, words):
    refuse(tmp_path, capsys, words, *pair, tmp_path / "out", *args)


def test_same_folder_twice(pair, tmp_path, capsys):
    refuse(tmp_path, capsys, "the same folder", pair[0], pair[0], tmp_path / "out")


def test_disk_too_small(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 0))
    refuse(tmp_path, capsys, "make room", *pair, tmp_path / "out")


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_trouble_in_the_middle_leaves_nothing(pair, tmp_path, monkeypatch, trouble):
    before, calls = snapshot(tmp_path), []

    def overwrite(*args):
        calls.append(args)
        if len(calls) == 3: raise trouble
        return checkpoints.overwrite(*args)

    monkeypatch.setattr(restore, "overwrite", overwrite)
    with pytest.raises(trouble if isinstance(trouble, type) else type(trouble)): qk_restore(*pair, out=tmp_path / "out")
    assert len(calls) == 3 and snapshot(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["post", "pre"]


def test_bad_objects(pair, tmp_path):
    pre, post = (AutoModelForCausalLM.from_pretrained(f) for f in pair)
    for args, kw, words in [((pre, pair[1]), {}, "of one kind"), ((pre, post), dict(out="x"), "checkpoint folders"), (pair, {}, "out="),
                            (pair, dict(out=tmp_path / "o", inplace=True), "in place"), ((pre.state_dict(), post.state_dict()), {}, "config="),
                            ((torch.nn.Linear(2, 2), post), {}, "no config"), ((pre.state_dict(), {}), dict(config=post.config), "post has no tensor")]:
        with pytest.raises(CheckpointError, match=words): qk_restore(*args, **kw)
    with torch.device("meta"): ghost = type(post)(post.config).bfloat16()
    with pytest.raises(CheckpointError, match="meta"): qk_restore(ghost, post.bfloat16())
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]

"LoRA adapters that peft writes and loads, and checkpoints on the hub, which is played by its cache and by stand-ins: no network."
import json
import re
import shutil
import warnings

import pytest
import torch
import yaml
from conftest import KINDS, NAME, snapshot, write_checkpoint
from safetensors.torch import load_file, save_file

from qkrestore_nb import checkpoints, hub
from qkrestore_nb.adapters import CONFIG, WEIGHTS
from qkrestore_nb.checkpoints import CheckpointError, read_config
from qkrestore_nb.in_place import verify
from qkrestore_nb.restore import qk_restore

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- adapters

def base(kind: str = "hypenet"):
    if kind == "qwen3_next":
        from test_families import CASES, model
        return model("qwen3_next", CASES["qwen3_next"][0], 1).float()
    from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
    torch.manual_seed(1)
    return HypeNetForCausalLM(HypeNetConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                            mixer_types=KINDS, attn_use_rope=False, attn_logits_scaling="hype 500", rope_theta=1e6)).eval()


def tuned(tmp_path, kind="hypenet", seed=2, **kw):
    "A base model and an adapter on top of it, both saved; the adapter's weights are random, as if trained."
    peft = pytest.importorskip("peft")
    base(kind).save_pretrained(tmp_path / "pre")
    model = peft.get_peft_model(base(kind), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"], **kw))
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n: p.copy_(torch.randn(p.shape).abs() + .1)
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "tokenizer.json").write_text("{}")
    return tmp_path / "pre", tmp_path / "lora"


def merged(adapter, kind="hypenet") -> dict:
    from peft import PeftModel
    return PeftModel.from_pretrained(base(kind), adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("kw", [{}, dict(use_dora=True), dict(exclude_modules=["lm_head"]), dict(exclude_modules=r".*lm_head"), dict(target_modules=r".*\.(q_proj|k_proj|v_proj)")])
def test_an_adapter_without_q_and_k_of_softmax_layers(tmp_path, kw):
    if "target_modules" in kw:
        pre, lora = tuned(tmp_path)
        config = json.loads((lora / CONFIG).read_text())
        (lora / CONFIG).write_text(json.dumps(config | {"target_modules": r".*\.(q_proj|k_proj|v_proj)"}))
    else: pre, lora = tuned(tmp_path, **kw)
    before, out = snapshot(tmp_path), tmp_path / "out"
    assert qk_restore(pre, lora, out=out) == out
    want, b = merged(lora), base().state_dict()
    planned = [NAME.format(i, r) for i in (1, 2) for r in "qk"]
    assert all(not torch.equal(want[n], b[n]) for n in planned)
    assert all(torch.equal(w, b[n] if n in planned else want[n]) for n, w in merged(out).items())
    from peft import PeftModel
    modules = {n for n, m in PeftModel.from_pretrained(base(), out).named_modules() if "lora_A" in n and n.endswith("default")}
    assert modules and not [n for n in modules if re.search(r"layers\.[12]\.self_attn\.[qk]_proj", n)] and [n for n in modules if "layers.0.self_attn.q_proj" in n]
    assert [r["equals"] for r in verify(out)] == ["pre"] * (8 if not kw.get("use_dora") else 12)
    assert (out / "tokenizer.json").read_text() == "{}"
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


def test_a_gated_projection_keeps_its_gate(tmp_path):
    pre, lora = tuned(tmp_path, "qwen3_next")
    out = qk_restore(pre, lora, out=tmp_path / "out")
    got, post, b = merged(out, "qwen3_next"), merged(lora, "qwen3_next"), base("qwen3_next").state_dict()
    q, k = (NAME.format(3, r) for r in "qk")
    view = lambda w: w.view(4, 2, 8, 16)
    assert torch.equal(view(got[q])[:, 0], view(b[q])[:, 0]) and torch.equal(view(got[q])[:, 1], view(post[q])[:, 1]) and not torch.equal(view(post[q]), view(b[q]))
    assert torch.equal(got[k], b[k]) and all(torch.equal(got[n], post[n]) for n in got if n not in (q, k))
    assert {r["equals"] for r in verify(out)} == {"pre"}
    with pytest.raises(CheckpointError, match="DoRA"):
        config = json.loads((lora / CONFIG).read_text())
        weights = load_file(lora / WEIGHTS)
        weights["base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(64)
        save_file(weights, lora / WEIGHTS)
        (lora / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
        qk_restore(pre, lora, out=tmp_path / "dora")


def test_a_merged_adapter_takes_the_ordinary_path(tmp_path):
    from peft import PeftModel
    pre, lora = tuned(tmp_path)
    PeftModel.from_pretrained(base(), lora).merge_and_unload().save_pretrained(tmp_path / "post")
    out, left = qk_restore(pre, tmp_path / "post", out=tmp_path / "out"), qk_restore(pre, lora, out=tmp_path / "left")
    from qkrestore_nb.hypenet import HypeNetForCausalLM
    a, b = HypeNetForCausalLM.from_pretrained(out).state_dict(), merged(left)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("what, kw, sentence", [
    ("other type", {}, "merge_and_unload"), ("only q and k", {}, "would be"), ("no q and k", {}, "nothing to restore"), ("broken", {}, "not valid JSON"),
    ("fine", dict(strength=.5), "as a whole"), ("fine", dict(include="norms"), "nothing to choose from"), ("fine", dict(inplace=True), "as a whole"), ("fine", dict(sync=False), "as a whole"), ("truncated", {}, "not a sound")])
def test_adapters_that_cannot_be_restored(tmp_path, what, kw, sentence):
    pre, lora = tuned(tmp_path)
    config, weights = json.loads((lora / CONFIG).read_text()), load_file(lora / WEIGHTS)
    mine = lambda n: re.search(r"layers\.[12]\.self_attn\.[qk]_proj", n)
    if what == "other type": (lora / CONFIG).write_text(json.dumps(config | {"peft_type": "IA3"}))
    if what == "broken": (lora / CONFIG).write_text("{")
    if what == "only q and k": save_file({n: t for n, t in weights.items() if mine(n)}, lora / WEIGHTS)
    if what == "no q and k": save_file({n: t for n, t in weights.items() if not mine(n)}, lora / WEIGHTS)
    if what == "truncated": (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:-1])
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=sentence): qk_restore(pre, lora, **({} if kw.get("inplace") else dict(out=tmp_path / "out")), **kw)
    assert snapshot(tmp_path) == before


def test_verify_of_an_adapter_sees_what_came_back(tmp_path):
    pre, lora = tuned(tmp_path)
    out = qk_restore(pre, lora, out=tmp_path / "out")
    shutil.copy(lora / WEIGHTS, out / WEIGHTS)
    assert {r["equals"] for r in verify(out)} == {"neither"}


# ---- every kind of adapter that peft writes: what peft merges is the oracle

def biased(seed=1):
    "Gated, grouped queries, and biases."
    from test_families import CASES, model
    return model("qwen3_next", CASES["qwen3_next"][0] | dict(attention_bias=True), seed).float()


def written(tmp_path, make, seed=2, **kw):
    "Base and adapter, saved; everything that the adapter trains is random."
    peft = pytest.importorskip("peft")
    make().save_pretrained(tmp_path / "pre")
    model = peft.get_peft_model(make(), peft.LoraConfig(**dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"]) | kw))
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad: p.copy_(torch.randn(p.shape).abs() + .1)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "pre", tmp_path / "lora"


def merged_into(make, adapter) -> dict:
    from peft import PeftModel
    return PeftModel.from_pretrained(make(), adapter).merge_and_unload().state_dict()


KINDS_OF_LORA = {
    "plain": {}, "rslora": dict(use_rslora=True), "rank and alpha by pattern": dict(rank_pattern={"q_proj": 4}, alpha_pattern={"k_proj": 9}), "all linear": dict(target_modules="all-linear"),
    "regex": dict(target_modules=r".*\.[qv]_proj"), "some layers": dict(layers_to_transform=[0, 1]), "trained tokens": dict(trainable_token_indices=[1, 2]),
    "whole head": dict(modules_to_save=["lm_head"]), "whole q": dict(target_modules=["k_proj", "v_proj"], modules_to_save=["q_proj"]), "whole norms": dict(modules_to_save=["q_norm"]),
    "whole attention": dict(target_modules=["up_proj"], modules_to_save=["self_attn"]),
    "pissa": dict(init_lora_weights="pissa"), "olora": dict(init_lora_weights="olora"), "gaussian": dict(init_lora_weights="gaussian"), "not from zero": dict(init_lora_weights=False), "dora": dict(use_dora=True),
    "parameters": dict(target_modules=["v_proj"], target_parameters=["q_proj.weight"]), "all biases": dict(bias="all"), "biases of lora": dict(bias="lora_only"),
}


@pytest.mark.parametrize("name", KINDS_OF_LORA)
def test_peft_merges_the_same(tmp_path, name):
    "Restored and merged, or merged and restored: one result."
    pre, lora = written(tmp_path, base, **KINDS_OF_LORA[name])
    out = qk_restore(pre, lora, out=tmp_path / "out")
    post, got, b = merged_into(base, lora), merged_into(base, out), base().state_dict()
    want = qk_restore(b, post, config=base().config)
    assert all(torch.allclose(got[n], want[n], atol=1e-6) for n in want), [n for n in want if not torch.allclose(got[n], want[n], atol=1e-6)]
    assert any(not torch.equal(post[n], want[n]) for n in want) and any(not torch.equal(b[n], want[n]) for n in want)
    assert {r["equals"] for r in verify(out)} == {"pre"} and "adds to W_" in hub.model_card(out)


@pytest.mark.parametrize("name, kw, sentence", [("plain", {}, None), ("all biases", dict(bias="all"), None), ("biases of lora", dict(bias="lora_only"), None), ("k alone is whole", dict(target_modules=["q_proj"], modules_to_save=["k_proj"]), None),
                                                ("whole q", dict(target_modules=["k_proj", "v_proj"], modules_to_save=["q_proj"]), None), ("nothing of lora left", dict(target_modules=["k_proj"], modules_to_save=["q_proj"]), "nothing would be left of LoRA"), ("whole attention", dict(target_modules=["out_proj"], modules_to_save=["self_attn"]), None),
                                                ("dora", dict(use_dora=True), "DoRA"), ("pissa", dict(init_lora_weights="pissa"), "rows are chosen")])
def test_where_only_rows_are_q(tmp_path, name, kw, sentence):
    pre, lora = written(tmp_path, biased, **kw)
    if sentence:
        before = snapshot(tmp_path)
        with pytest.raises(CheckpointError, match=sentence): qk_restore(pre, lora, out=tmp_path / "out")
        assert snapshot(tmp_path) == before
        return
    out = qk_restore(pre, lora, out=tmp_path / "out")
    post, got, b = merged_into(biased, lora), merged_into(biased, out), biased().state_dict()
    want = qk_restore(b, post, config=biased().config)
    assert all(torch.allclose(got[n], want[n], atol=1e-6) for n in want), [n for n in want if not torch.allclose(got[n], want[n], atol=1e-6)]
    assert any(not torch.equal(post[n], want[n]) for n in want)


def test_biases_that_lora_adds_go_with_it(tmp_path):
    pre, lora = written(tmp_path, biased, lora_bias=True)
    out = load_file(qk_restore(pre, lora, out=tmp_path / "out") / WEIGHTS)
    name = "base_model.model.model.layers.3.self_attn.{}_proj.lora_B.{}"
    for part in ("weight", "bias"):
        q = out[name.format("q", part)].view(4, 2, 8, -1)
        assert not q[:, 0].any() and q[:, 1].all() and name.format("k", part) not in out and name.format("v", part) in out


@pytest.mark.parametrize("kw, sentence", [(dict(layer_replication=[[0, 3], [1, 4]]), "makes copies of layers")])
def test_adapters_whose_layers_are_not_the_base_models(tmp_path, kw, sentence):
    pre, lora = tuned(tmp_path)
    config = json.loads((lora / CONFIG).read_text())
    (lora / CONFIG).write_text(json.dumps(config | kw))
    with pytest.raises(CheckpointError, match=sentence): qk_restore(pre, lora, out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "IA3", "HRA", "FOURIERFT", "RANDLORA", "SHIRA", "XLORA", "PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING", None])
def test_other_types_of_adapters_are_told(tmp_path, kind):
    pre, lora = tuned(tmp_path)
    (lora / CONFIG).write_text(json.dumps(json.loads((lora / CONFIG).read_text()) | {"peft_type": kind}))
    words = "leaves W_Q and W_K as they are" if kind in ("PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING") else "merge it into its base model first"
    with pytest.raises(CheckpointError, match=words): qk_restore(pre, lora, out=tmp_path / "out")


def test_what_lies_beside_an_adapter(tmp_path):
    "The base model's config.json; keys of a compiled model; the name of another base model."
    pre, lora = tuned(tmp_path)
    want = load_file(qk_restore(pre, lora, out=tmp_path / "want") / WEIGHTS)
    shutil.copy(pre / "config.json", lora)
    out = qk_restore(pre, lora, out=tmp_path / "out")
    assert load_file(out / WEIGHTS).keys() == want.keys() and (out / "config.json").read_bytes() == (pre / "config.json").read_bytes()
    save_file({n.replace("base_model.model.", "base_model.model._orig_mod."): w for n, w in load_file(lora / WEIGHTS).items()}, lora / WEIGHTS)
    got = load_file(qk_restore(pre, lora, out=tmp_path / "compiled") / WEIGHTS)
    assert {n.replace("_orig_mod.", "") for n in got} == want.keys()
    for said, warns in (("somebody/else", True), ("somebody/pre", False), (str(pre), False), (None, False)):
        (lora / CONFIG).write_text(json.dumps(json.loads((lora / CONFIG).read_text()) | {"base_model_name_or_path": said}))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            qk_restore(pre, lora, out=tmp_path / f"base{said and len(said)}")
        assert any("are they the same" in str(w.message) for w in told) == warns


# ---- the hub

@pytest.fixture
def cache(pair, tmp_path, monkeypatch):
    "A hub cache as huggingface_hub makes it, with both checkpoints in it; no network."
    root = tmp_path / "cache"
    for folder, commit in zip(pair, ("a" * 40, "b" * 40)):
        repo = root / f"models--me--{folder.name}"
        (repo / "blobs").mkdir(parents=True), (repo / "refs").mkdir(), (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        for i, file in enumerate(p for p in sorted(folder.iterdir()) if p.is_file()):
            shutil.copy(file, repo / "blobs" / str(i))
            (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{i}")
    import huggingface_hub
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: real(name, cache_dir=root, local_files_only=True, **kw))
    return root


def test_hub_ids_from_the_cache(pair, cache, tmp_path):
    before = snapshot(tmp_path)
    out = qk_restore("me/pre", f"me/post@{'b' * 40}", out=tmp_path / "out")
    note = json.loads((out / "qk_restore.json").read_text())
    assert (note["pre"], note["post"]) == (f"me/pre@{'a' * 40}", f"me/post@{'b' * 40}")  # the commits that were read
    same = qk_restore(*pair, out=tmp_path / "same")
    for file in same.glob("*.safetensors"): assert (out / file.name).read_bytes() == file.read_bytes() and not (out / file.name).is_symlink()
    for folder in (out, same): shutil.rmtree(folder)
    assert snapshot(tmp_path) == before
    with pytest.raises(CheckpointError, match="on the hub and cannot be changed in place"): qk_restore("me/pre", "me/post", inplace=True)


@pytest.mark.parametrize("name", ["me/nothing", "me/post@v9"])
def test_what_the_hub_does_not_give(cache, tmp_path, name):
    with pytest.raises(CheckpointError, match="the hub does not give it") as error: qk_restore("me/pre", name, out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_revision_and_token_arrive(monkeypatch, tmp_path):
    import huggingface_hub
    calls = []
    def fake(name, **kw):
        calls.append((name, kw["revision"], kw["token"]))
        raise RuntimeError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(CheckpointError): qk_restore("me/pre@v1", "me/post", out=tmp_path / "out", token="secret")
    assert calls == [("me/pre", "v1", "secret")]


def test_a_mistyped_path_is_not_looked_up(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: pytest.fail("no"))
    assert not checkpoints.is_hub_id("pre/nothing") and not checkpoints.is_hub_id("post") and checkpoints.is_hub_id("nobody/nothing")
    with pytest.raises(CheckpointError, match="no folder"): qk_restore("pre/nothing", "post", out="out")


def test_the_model_card(pair, tmp_path):
    out = qk_restore(*pair, out=tmp_path / "out", strength=.5)
    before, card = snapshot(out), hub.model_card(out)
    note = json.loads((out / "qk_restore.json").read_text())
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == dict(library_name="transformers", license="unknown", tags=["qk-restore", "long-context"])  # no path of this machine
    assert card.split("---\n")[2].startswith("# model 2\n") and card.count("## QK-Restore") == 1 and "arxiv.org/abs/2606.11052" in card and "strength: 0.5" in card
    assert all(r["sha256_restored"] in card and r["tensor"] in card for r in note["tensors"]) and str(pair[0]) in card
    (out / "README.md").write_text(card + "\n## More\nmine\n")
    again = hub.model_card(out)
    assert again.count("## QK-Restore") == 1 and "## More\nmine" in again
    assert again.count("---\n") == card.count("---\n") and again.startswith(card.split("# model 2")[0])
    (out / "README.md").write_text("# model 2\n")
    assert snapshot(out)["README.md"][2] == before["README.md"][2]
    with pytest.raises(CheckpointError, match="not the result"): hub.model_card(pair[1])


@pytest.mark.parametrize("pre, post, adapter, head, expected", [
    ("me/a@", "me/b@", False, "", dict(base_model=["me/b", "me/a"], base_model_relation="merge")),
    ("me/a@", "runs/b", False, "base_model: other/x\nlicense: mit\ntags: chat", dict(base_model=["me/a"], base_model_relation="finetune", license="mit", tags=["chat", "qk-restore", "long-context"])),
    ("runs/a", "runs/b", False, "base_model: other/x", dict(base_model="other/x")),
    ("me/a@", "me/b@", True, "base_model: other/x", dict(base_model="other/x", library_name="peft")),
    ("me/a@", "runs/b", True, "", dict(base_model=["me/a"], base_model_relation="adapter")),
])
def test_what_the_hub_reads_of_a_card(pre, post, adapter, head, expected):
    "Lineage from what came from the hub; what post's card says stays."
    from huggingface_hub import ModelCard

    from qkrestore_nb.families import Selection
    from qkrestore_nb.note import Note
    commit = lambda name: name + "c" * 40 if name.endswith("@") else name
    note = Note("QK-Restore", commit(pre), commit(post), Selection(), [], left_out=[] if adapter else None)
    card = hub._front_matter((f"---\n{head}\n---\n" if head else "") + "# Mine\n---\nend\n", note)
    data = ModelCard(card).data.to_dict()  # as the hub's own library reads it
    assert data.items() >= expected.items() and card.endswith("---\n# Mine\n---\nend\n")
    assert hub._front_matter(card, note) == card


@pytest.mark.parametrize("head", ["tags: [x", "just words"])
def test_a_card_whose_yaml_is_broken(pair, tmp_path, head):
    out = qk_restore(*pair, out=tmp_path / "out")
    (out / "README.md").write_text(f"---\n{head}\n---\n# x\n")
    with pytest.raises(CheckpointError, match="YAML that cannot be read") as said: hub.push_to_hub(out, "me/fixed")
    assert "\n" not in str(said.value) and len(str(said.value)) <= 160


@pytest.mark.parametrize("theirs, stays", [("# Somebody's model\n", True), ("# ours\n\n## QK-Restore\n\nold\n", False)])
def test_a_card_that_exists(pair, tmp_path, monkeypatch, theirs, stays):
    "One that a restore did not write is left alone, and nothing is sent."
    import huggingface_hub
    done, card = [], tmp_path / "theirs.md"
    card.write_text(theirs)
    class Api:
        def __init__(self, token=None): pass
        def file_exists(self, repo, name): return name == "README.md"
        def hf_hub_download(self, repo, name): return str(card)
        def create_repo(self, repo, **kw): done.append("repo")
        def create_commit(self, repo, operations, commit_message): done.append("commit")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = qk_restore(*pair, out=tmp_path / "out")
    if stays:
        with pytest.raises(CheckpointError, match="me/x has a model card of its own"): hub.push_to_hub(out, "me/x")
    else: hub.push_to_hub(out, "me/x")
    assert done == ([] if stays else ["repo", "commit"])


def test_a_gated_repository(monkeypatch, tmp_path, capsys):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError
    from test_cli import call
    error = GatedRepoError.__new__(GatedRepoError)  # its own constructor wants the answer of a server
    Exception.__init__(error, "403 Client Error.\n\nAccess is restricted")
    def refused(name, **kw): raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    assert call("restore", "me/pre", "me/post", tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "me/pre is gated: ask for access on its page on the hub, then hf auth login" in said and said.count("\n") == 1


def test_push(pair, tmp_path, monkeypatch):
    import huggingface_hub
    out, done = qk_restore(*pair, out=tmp_path / "out"), {}
    class Api:
        def __init__(self, token=None): done["token"] = token
        def file_exists(self, repo, name): return False
        def create_repo(self, repo, **kw): done["repo"] = (repo, kw)
        def create_commit(self, repo, operations, commit_message):
            done["files"] = {o.path_in_repo: o.path_or_fileobj for o in operations}
            return "https://example.org/commit"
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    before = snapshot(out)
    assert hub.push_to_hub(out, "me/fixed", token="t") == "https://example.org/commit"
    assert done["repo"] == ("me/fixed", dict(private=True, exist_ok=True)) and done["token"] == "t" and snapshot(out) == before
    assert sorted(done["files"]) == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert b"## QK-Restore" in done["files"]["README.md"]
    with pytest.raises(CheckpointError, match="no name on the hub"): hub.push_to_hub(out, "fixed")

    (tmp_path / "id_rsa").write_text("secret")
    (out / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    done.clear()
    with pytest.raises(CheckpointError, match="leads out of the folder"): hub.push_to_hub(out, "me/fixed")
    assert done.keys() <= {"token"}  # nothing was made or sent


def merge(recipe: dict, checkpoints: dict) -> dict:
    "mergekit's linear method with filters, in a few lines: the first condition whose filter is part of the tensor's name decides."
    def weight(model, name): return next(c["value"] for c in model["parameters"]["weight"] if c.get("filter", "") in name)
    total = lambda name: sum(weight(m, name) * checkpoints[m["model"]][name].double() for m in recipe["models"])
    return {n: total(n).to(t.dtype) for n, t in checkpoints[recipe["base_model"]].items()}


@pytest.mark.parametrize("strength", [1., .5])
def test_the_mergekit_recipe_says_the_same(tmp_path, strength):
    yaml = pytest.importorskip("yaml")
    names = {"num_hidden_layers": 12, "mixer_types": ["attn" if i in (1, 10, 11) else "lightning-attn" for i in range(12)]}
    from conftest import hypenet_config
    pre, post = (write_checkpoint(tmp_path / n, s, config=hypenet_config(**names), layers=12, dtype="float32") for n, s in (("pre", 1), ("post", 2)))
    recipe = yaml.safe_load(hub.mergekit_yaml(pre, post, strength=strength))
    assert recipe["merge_method"] == "linear" and recipe["dtype"] == "float32" and recipe["parameters"]["normalize"] is False
    load = lambda f: load_file(f / "model.safetensors")
    out = load(qk_restore(pre, post, out=tmp_path / "out", strength=strength))
    got = merge(recipe, {str(pre): load(pre), str(post): load(post)})
    assert all(torch.allclose(got[n], out[n], rtol=1e-6) for n in out) and any(not torch.equal(got[n], load(post)[n]) for n in out)


def test_what_mergekit_cannot_say(tmp_path):
    from test_families import CASES, model
    for seed, folder in ((1, "pre"), (2, "post")): model("qwen3_next", CASES["qwen3_next"][0], seed).save_pretrained(tmp_path / folder)
    with pytest.raises(CheckpointError, match="which mergekit cannot say"): hub.mergekit_yaml(tmp_path / "pre", tmp_path / "post")
    assert read_config(tmp_path / "pre")["model_type"] == "qwen3_next"

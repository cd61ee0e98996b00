"The note, and what is made of it: verify, the model card, the commit message, the recipe. Each says what moved, whatever was asked."
import json

import pytest
import torch
from conftest import NAME, hypenet_config, tensors, write_checkpoint

from qkrestore_nb import hub
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.families import Selection
from qkrestore_nb.in_place import undo, verify
from qkrestore_nb.note import Note, Row, note_dict, note_of, read_note, summary
from qkrestore_nb.procrustes import qk_pro
from qkrestore_nb.restore import qk_restore

CHOICES = {  # keywords -> what the card must say, and must not
    "the paper's": (dict(), "W_Q and W_K of the softmax layers (1, 2) were restored", "W_V"),
    "values of linear layers": (dict(layers="linear", projections="vo"), "W_V and W_O of the linear layers (0, 3) were restored", "W_Q"),
    "keys": (dict(projections="k"), "W_K of the softmax layers (1, 2) were restored", "W_Q"),
    "numbers": (dict(layers=[0, 2]), "W_Q and W_K of layers 0, 2 were restored", "softmax"),
    "all": (dict(layers="all", projections="q"), "W_Q of all layers (0, 1, 2, 3)", "softmax"),
    "one head": (dict(heads=[1]), "of query heads 1 of the softmax layers", "W_V"),
    "norms": (dict(include="norms"), "with the gains of their norms", "biases"),
    "by hand": (dict(tensors=r"[vo]_proj", layers=[0]), "the tensors that match `[vo]_proj` of layer 0 were", "W_Q"),
    "rows by hand": (dict(tensors="o_proj", layers=[3], rows="0:2"), "(rows 0:2) of layer 3", "W_Q"),
    "half": (dict(strength=.5), "are a mixture, 0.5 of the way", "were restored"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_card_says_what_moved(pair, tmp_path, name):
    choice, words, never = CHOICES[name]
    out = qk_restore(*pair, out=tmp_path / "out", **choice)
    note = read_note(out)
    section = hub.model_card(out).split(hub.HEADING)[1]
    said = summary(note)
    assert words in said and never not in said and said in section
    assert all(r.sha256_restored in section for r in note.rows) and ("mixture" in section) == (name == "half")
    assert {r["equals"] for r in verify(out)} == {"restored" if name == "half" else "pre"}
    assert note_dict(note_of(json.loads(json.dumps(note_dict(note))))) == json.loads((out / "qk_restore.json").read_text())


@pytest.fixture
def solvable(tmp_path):
    "Two checkpoints whose Q and K have the heads that the config says."
    return tuple(write_checkpoint(tmp_path / n, s, dtype="float32") for n, s in (("pre", 1), ("post", 2)))


def test_the_card_of_qk_pro(solvable, tmp_path):
    out = qk_pro(*solvable, out=tmp_path / "out", lam=.3, space="head")
    note, card = read_note(out), hub.model_card(out)
    assert "W_K of the softmax layers (1, 2) is restored" in summary(note) and "W_Q was solved for (QK-Pro, lambda 0.3, head space, per kv_head)" in summary(note)
    assert summary(note) in card and card.count("| solved for |") == card.count("| pre |") == 2
    states = {r["tensor"]: r["equals"] for r in verify(out)}
    assert {states[NAME.format(i, "q")] for i in (1, 2)} == {"restored"} and {states[NAME.format(i, "k")] for i in (1, 2)} == {"pre"}
    only_k = qk_pro(*solvable, out=tmp_path / "inf", lam=float("inf"))
    assert {r["equals"] for r in verify(only_k)} <= {"pre", "both", "restored"}


def test_what_is_pushed_says_it_too(solvable, tmp_path, monkeypatch):
    import huggingface_hub
    said = []
    class Api:
        def __init__(self, token=None): pass
        def file_exists(self, repo, name): return False
        def create_repo(self, repo, **kw): pass
        def create_commit(self, repo, operations, commit_message): said.append(commit_message)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    hub.push_to_hub(qk_restore(*solvable, out=tmp_path / "v", projections="v"), "me/v")
    hub.push_to_hub(qk_pro(*solvable, out=tmp_path / "pro"), "me/pro")
    assert "W_V of the softmax layers" in said[0] and "W_Q" not in said[0] and said[1].startswith("QK-Pro: W_K of the softmax") and "solved for" in said[1]
    recipe = hub.mergekit_yaml(*solvable, layers="linear", projections="o", strength=.5)
    assert "W_O of the linear layers (0, 3) are a mixture, 0.5" in recipe.splitlines()[0]
    with pytest.raises(CheckpointError, match="strength=2"): hub.mergekit_yaml(*solvable, strength=2)


def test_by_hand_the_layers_are_those_that_moved(tmp_path):
    "A family whose linear layers carry the same names: nothing may say softmax."
    config = hypenet_config(model_type="new", architectures=[])
    pre, post = (write_checkpoint(tmp_path / n, s, config=config) for n, s in (("pre", 1), ("post", 2)))
    with pytest.raises(CheckpointError, match="--layers 3,7.*all"): qk_restore(pre, post, out=tmp_path / "out", tensors="q_proj")
    note = json.loads((qk_restore(pre, post, out=tmp_path / "all", tensors="q_proj", layers="all") / "qk_restore.json").read_text())
    assert note["layers"] == [0, 1, 2, 3] and "projections" not in note and note["tensors_chosen"] == "q_proj"
    out = qk_restore(pre, post, out=tmp_path / "one", tensors="q_proj", layers=[2])
    assert read_note(out).layers == [2] and "softmax" not in hub.model_card(out).split(hub.HEADING)[1]


def test_mla_is_recorded_as_what_moved(tmp_path):
    from test_families import CASES, model
    for seed, folder in enumerate(("pre", "post")): model("kimi_linear", CASES["kimi_linear"][0], seed).save_pretrained(tmp_path / folder)
    q = qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "q", mla="q_only")
    both = qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "both", mla="with_latent")
    assert json.loads((q / "qk_restore.json").read_text())["projections"] == "q" and summary(read_note(q)).startswith("W_Q of the softmax layers")
    assert "with the latent that K and V share" in summary(read_note(both))


def test_notes_of_the_first_edition_can_be_read(solvable, tmp_path):
    "Without layers and roles in the rows; those of QK-Pro do not say which tensors were solved for."
    for made, equals in ((qk_restore(*solvable, out=tmp_path / "a"), {"pre"}), (qk_pro(*solvable, out=tmp_path / "b"), {"pre", "restored"})):
        raw = json.loads((made / "qk_restore.json").read_text())
        for row in raw["tensors"]:
            for key in ("layer", "role", "solved"): row.pop(key, None)
        if "restored" in equals: raw.pop("projections")
        (made / "qk_restore.json").write_text(json.dumps(raw))
        assert {r["equals"] for r in verify(made)} == equals and read_note(made).layers == [1, 2]
        assert "softmax" in hub.model_card(made)


@pytest.mark.parametrize("spoil", [lambda n: [], lambda n: n | {"tensors": None}, lambda n: n | {"tensors": [{}]}, lambda n: n | {"tensors": [n["tensors"][0] | {"spans": [[3, 1]]}]},
                                   lambda n: n | {"tensors": [n["tensors"][0] | {"sha256_post": 3}]}, lambda n: n | {"layers": "softmx"}, lambda n: {k: v for k, v in n.items() if k != "tensors"},
                                   lambda n: n | {"tensors": "abc"}, lambda n: n | {"left_out": 3}])
def test_notes_that_are_none(pair, tmp_path, spoil):
    out = qk_restore(*pair, out=tmp_path / "out")
    raw = json.loads((out / "qk_restore.json").read_text())
    (out / "qk_restore.json").write_text(json.dumps(spoil(raw)))
    for read in (verify, hub.model_card, read_note):
        with pytest.raises(CheckpointError, match="cannot be read") as e: read(out)
        assert "\n" not in str(e.value)


def test_in_place_for_qk_pro(solvable, tmp_path):
    before = (solvable[1] / "model.safetensors").read_bytes()
    want = qk_pro(*solvable, out=tmp_path / "out", lam=.1)
    assert qk_pro(*solvable, lam=.1, inplace=True) == solvable[1]
    assert (solvable[1] / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes() != before
    undo(solvable[1])
    assert (solvable[1] / "model.safetensors").read_bytes() == before


def test_a_selection_is_read_once():
    assert Selection(layers="1,3", heads="5,0,5") == Selection(layers=iter([3, 1]), heads=[0, 5])
    assert Selection(tensors="x", rows="4:6,0:2") == Selection(tensors="x", rows=[(0, 2), (4, 6)])
    for kw, words in [(dict(rows="0:2"), "give both"), (dict(tensors="x", rows="2:1"), "rows="), (dict(tensors="x", rows="a"), "rows="), (dict(tensors="x", rows=[(1,)]), "rows="), (dict(heads=[True]), "heads="),
                      (dict(heads=""), "heads="), (dict(tensors="x", heads=[1]), "by hand"), (dict(tensors=3), "regular expression"), (dict(mla="x"), "mla="), (dict(include=["norms"]), "include=")]:
        with pytest.raises(CheckpointError, match=words): Selection(**kw)
    note = Note("m", "a", "b", Selection(tensors="Wqkv", layers=[1], rows="qk"), [Row("model.layers.1.attn.Wqkv.weight", "BF16", [8, 2], 4, "a" * 64, "b" * 64, 1)])
    assert note_of(note_dict(note)) == note and torch.is_tensor(tensors(1)[NAME.format(0, "q")])

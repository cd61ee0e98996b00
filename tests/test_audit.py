"The audit: its interval, its rule, what it asks, the page, and that nothing is left behind."
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import snapshot
from qkrestore_nb import audit as a
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.experiment import pair
from test_cli import call


def test_paired_differences():
    assert a.paired([[1, 1]] * 5, [[1, 1]] * 5)[0] == 0
    d, low, high = a.paired([[0, 4], [1, 4]], [[4, 4], [2, 4]])
    assert d == pytest.approx(62.5) and low < d < high <= 100
    assert [round(x, 6) for x in a.paired([[2, 4]] * 3, [[1, 4]] * 3)] == [round(-x, 6) for x in (lambda t: (t[0], t[2], t[1]))(a.paired([[1, 4]] * 3, [[2, 4]] * 3))]
    with pytest.raises(ValueError, match="no haystack was evaluated"): a.paired([], [])
    with pytest.raises(ValueError): a.paired([[1, 1]], [[1, 1]] * 2)


RULES = [  # damage, regained, reasoning -> what the rule says
    ((-40, -50, -30), (30, 20, 40), None, "restore"), ((-40, -50, -30), (30, 20, 40), (0, -3, 3), "restore"), ((-40, -50, -30), (30, 20, 40), (-8, -12, -4), "inconclusive"),
    ((-40, -50, -30), (30, 20, 40), (0, -20, 20), "inconclusive"), ((-40, -50, -30), (2, -8, 12), None, "inconclusive"), ((-40, -50, -30), (1, -2, 4), None, "do not"), ((-40, -50, -30), (-9, -15, -3), None, "do not"),
    ((-1, -4, 2), (0, -3, 3), None, "do not"), ((-8, -18, 2), (5, 1, 9), None, "inconclusive"), ((5, -10, 20), (0, -10, 10), None, "inconclusive")]


@pytest.mark.parametrize("damage, regained, reasoning, wanted", RULES)
def test_the_rule(damage, regained, reasoning, wanted):
    what, why = a.verdict(damage, regained, reasoning)
    assert what == wanted and (f"{damage[0]:+.0f} points" in why or f"{regained[0]:+.0f} points" in why)


def test_answers():
    for said, answer, right in (("2 + 3 = 5. The answer is 5.", "5", True), ("it is 5, not 6", "5", False), ("1,200", "1200", True), ("-3.0", "-3", True), ("so the answer is 12", "2", False), ("", "5", False),
                                ("first\nParis it is", "paris", True), ("Paris\nno, Rome", "paris", False), ("", "paris", False)):
        assert a.solves(said, answer) is right, (said, answer)


@pytest.fixture
def post(folder, tmp_path):
    "A post beside the fixture's pre: a little more of every weight."
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, tmp_path / "post")
    save_file({k: 1.01 * t for k, t in load_file(folder / "model.safetensors").items()}, tmp_path / "post" / "model.safetensors", metadata=dict(format="pt"))
    return tmp_path / "post"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "The shipped pair, briefly, with tasks that no model of it can read as numbers."
    folder = tmp_path_factory.mktemp("audit")
    for name in ("pre", "post"): shutil.copytree(pair() / name, folder / name)  # a copy of its own: nothing else looks at it meanwhile
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(dict(prompt="QM", answer=x)) + "\n" for x in ("d1", "d2")))
    before = snapshot(folder)
    found = a.audit(folder / "pre", folder / "post", (512,), 4, tasks, room=4, device="cpu")
    assert snapshot(folder) == before  # neither folder is touched, and the restored one is gone
    return found


def test_an_audit_of_the_shipped_pair(result):
    from qkrestore_nb.recall import recall_test, score
    from qkrestore_nb.scale import load
    assert result["verdict"] in ("restore", "do not", "inconclusive") and result["differences"]["damage"][0] < 0
    assert {"seed", "config", "versions", "device", "wall_s"} <= result.keys() and json.loads(json.dumps(result, default=list))
    cell = result["scores"]["post"]["MF"]["512"]
    model, _ = load(pair() / "post", 512, "cpu")
    assert int(score(model, recall_test("MF", 4, 512, 8, 0)).exact.sum()) == cell["correct"] and cell["n"] == 32 == sum(n for _, n in cell["each"])
    softmax = {r["layer"] for r in result["drift"] if r["kind"] == "softmax"}
    assert softmax and {r["role"] for r in result["drift"]} == set("qkvo")
    each = {n: [h for c in s.values() for x in c.values() for h in x["each"]] for n, s in result["scores"].items()}
    assert tuple(result["differences"]["regained"]) == a.paired(each["post"], each["restored"])


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


def test_the_page_stands_alone(result, tmp_path):
    found = a.page(result, tmp_path / "audit.html")
    page = Page(found.read_text())
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert len(links) == 1 and links[0].startswith("data:image/svg+xml;base64,") and "alt" in dict(next(attrs for tag, attrs in page.tags if tag == "img"))
    assert result["why"] in page.text and all(line in page.text for line in a.report(result).splitlines()[:9])
    assert [p.name for p in tmp_path.iterdir()] == ["audit.html"]
    with pytest.raises(CheckpointError, match="exists"): a.page(result, tmp_path / "audit.html")
    evil = {**result, "why": "<script>", "config": {**result["config"], "pre": "a<b"}}
    assert "<script>" not in a.page(evil, tmp_path / "evil.html").read_text()


def test_prose_is_asked_of_a_model_that_reads_it(folder, post, tmp_path, capsys):
    "On the command line: neither knows anything, so there is no damage, and it says so."
    assert call("audit", folder, post, "--lengths", "1024", "--haystacks", "1", "--device", "cpu", "--json") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["scores"]["pre"].keys() == {"single_2", "single_3", "multikey_2"} and got["differences"]["damage"][0] == 0 and got["verdict"] != "restore"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "post"]


def test_bad_input(folder, post, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, text in (("broken", '{"prompt": "x", "answer": 1}\n{'), ("half", '{"prompt": "x"}'), ("empty", "\n")): (tmp_path / name).write_text(text)
    (tmp_path / "taken.html").write_text("")
    before = snapshot(tmp_path)
    for words, says in (((folder, tmp_path / "adapter"), "is an adapter: merge it"), ((folder, post, "--tasks", tmp_path / "broken"), "line 2 is not JSON"), ((folder, post, "--tasks", tmp_path / "half"), 'line 1 needs "prompt" and "answer"'),
                        ((folder, post, "--tasks", tmp_path / "empty"), "holds no task"), ((folder, post, "--tasks", tmp_path / "none"), "cannot be read"), ((folder, post, "--html", tmp_path / "taken.html"), "exists"),
                        ((folder, post, "--haystacks", "0"), "at least one"), ((folder, post, "--lengths", "many"), "--lengths"), ((folder, post, "--lengths", "100"), "ask for more"), ((folder, folder), "same folder")):
        assert call("audit", *words) == 2, words
        said = capsys.readouterr().err
        assert says in said and said.strip().splitlines()[-1].startswith("Error: "), said
    assert snapshot(tmp_path) == before


# ---- other families, and what cannot be seen

FAMILIES = ["qwen3_next", "qwen3_5_text", "jamba", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "minimax", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2", "falcon_h1", "gpt_oss", "gemma3_text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_of_what_is_known_by_name(tmp_path, family):
    "Every softmax layer has its drift; kinds of layers whose tensors are not in the table are left out, and named."
    from test_families import CASES, model
    from qkrestore_nb.audit import _drifts
    from qkrestore_nb.checkpoints import read_config
    from qkrestore_nb.families import family_of, layer_kinds
    fields, choice, _ = CASES[family]
    for seed, folder in ((1, "pre"), (2, "post")): model(family, fields, seed).save_pretrained(tmp_path / folder)
    drift, left, moved = _drifts(tmp_path / "pre", tmp_path / "post", choice)
    config = read_config(tmp_path / "post")
    kinds, named = layer_kinds(config), family_of(config)["named"]
    shared = family == "zamba2"  # saved under the first layer that uses it
    assert moved and {r["layer"] for r in drift if r["kind"] == "softmax"} <= {i for i, k in enumerate(kinds) if k == "softmax"} and (shared or {r["layer"] for r in drift} == {i for i, k in enumerate(kinds) if k in named})
    assert {"q", "k", "o"} <= {r["role"] for r in drift} and all(.3 < r["drift"] < 3 for r in drift)
    assert left == sorted({k for k in kinds if k in ("softmax", "swa", "linear")} - set(named))


def test_q_and_k_that_did_not_move(tmp_path):
    from qkrestore_nb.audit import _drifts
    from qkrestore_nb.families import planned_tensors
    from safetensors.torch import load_file
    from conftest import hypenet_config, tensors, write_checkpoint
    pre = write_checkpoint(tmp_path / "pre", 1)
    post = write_checkpoint(tmp_path / "post", 2, weights=tensors(2) | {n: load_file(pre / "model.safetensors")[n] for n in planned_tensors(hypenet_config())})
    drift, _, moved = _drifts(pre, post, {})
    assert not moved and any(r["drift"] for r in drift) and _drifts(pre, post, dict(projections="v"))[2]
    assert "not to blame" in a.verdict((-40., -50., -30.), (0., -3., 3.), moved=False)[1] and a.verdict((-40., -50., -30.), (0., -3., 3.), moved=False)[0] == "do not"
    assert a.verdict((-1., -3., 1.), (0., -1., 1.), before=2.)[0] == "inconclusive" != a.verdict((-1., -3., 1.), (0., -1., 1.), before=90.)[0]


def test_latent_attention_is_asked_for(tmp_path):
    from test_families import CASES, model
    for seed, folder in ((1, "pre"), (2, "post")): model("kimi_linear", CASES["kimi_linear"][0], seed).save_pretrained(tmp_path / folder)
    with pytest.raises(CheckpointError, match="--mla q_only"): a.audit(tmp_path / "pre", tmp_path / "post")


def test_by_hand_and_whole_for_a_family_with_linear_layers(tmp_path, tokenizer, monkeypatch):
    "From folders to the verdict, for a hybrid whose linear layers are not in the table; and the same by hand. The questions are played: nothing is found."
    from qkrestore_nb import scale
    from test_families import CASES, model
    for seed, folder in ((1, "pre"), (2, "post")):
        model("qwen3_next", CASES["qwen3_next"][0] | dict(vocab_size=1000, max_position_embeddings=2048), seed).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    asked = []
    monkeypatch.setattr(scale, "recall", lambda model, *args, **kw: asked.append(model.config.model_type) or {"single_2": {"1024": dict(correct=0, n=2, each=[[0, 1], [0, 1]])}})
    before = sorted(p.name for p in tmp_path.iterdir())
    result = a.audit(tmp_path / "pre", tmp_path / "post", lengths=(1024,), haystacks=2, device="cpu")
    assert result["verdict"] == "inconclusive" and "nothing is found" in result["why"] and result["drift_left_out"] == ["linear"]
    assert asked == ["qwen3_next"] * 3
    assert "linear layers: left out" in a.report(result) and sorted(p.name for p in tmp_path.iterdir()) == before
    hand = a.audit(tmp_path / "pre", tmp_path / "post", lengths=(1024,), haystacks=2, device="cpu", layers=[3], tensors="k_proj")
    assert {(r["layer"], r["role"]) for r in hand["drift"]} == {(3, "k")}

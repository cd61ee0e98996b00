"Counting before loading, one reading for many questions, lm-eval, and other hybrids from end to end."
import copy
import json
import warnings
from pathlib import Path

import pytest
import torch

from conftest import write_sums
from qkrestore_nb import scale
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM, prefill
from qkrestore_nb.prose import prose_test
from test_cli import call
from test_families import CASES

RESULTS = Path(__file__).parent.parent / "results" / "scale"


@pytest.mark.parametrize("size, parameters", [("2B", 1.926e9), ("5B", 4.825e9), ("9B", 8.852e9)])
def test_needs_are_what_was_measured(size, parameters):
    assert scale.needs(HypeNetConfig.preset(size))["parameters"] == pytest.approx(parameters, rel=1e-3)
    runs = [json.loads(p.read_text()) for p in RESULTS.glob(f"prefill_{size.lower()}_*.json")]
    assert len(runs) == 2
    for r in runs: assert scale.needs(HypeNetConfig.preset(size), r["tokens"])["total_gb"] == pytest.approx(r["peak_gpu_gb"], rel=.04)


def test_needs_count_what_a_model_holds(model, tokenizer, folder):
    "Weights and cache, counted from the config and weighed."
    n = scale.needs(folder, 300)
    assert n["parameters"] == sum(p.numel() for p in model.parameters()) and 2 * n["parameters"] == pytest.approx(1e9 * n["weights_gb"])
    cache = prefill(model, torch.randint(0, 1000, (1, 300)))[1]
    kv = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if hasattr(layer, "keys"))
    states = sum(layer.recurrent_states[0].numel() for layer in cache.layers if hasattr(layer, "recurrent_states"))
    assert 2 * kv == pytest.approx(1e9 * n["kv_gb"]) and 4 * states == pytest.approx(1e9 * n["states_gb"])


# ---- every family: what the model itself keeps and computes

FAMILIES = [case for case in CASES if "," not in case]
LONG = 100  # tokens: more than the windows of these, and than are read to count


def in_a_cache(x, name: str = ""):
    "Name and tensor of all that a cache holds."
    if isinstance(x, torch.Tensor): yield name, x
    elif isinstance(x, (list, tuple)): yield from (found for v in x for found in in_a_cache(v, name))
    elif hasattr(x, "__dict__") or isinstance(x, dict):
        for k, v in (x if isinstance(x, dict) else vars(x)).items(): yield from in_a_cache(v, k if isinstance(k, str) else name)


@pytest.fixture(params=FAMILIES)
def read(request):
    "A tiny model of a family with weights, which reads 100 tokens: its config, what it hands back, and its FLOPs by operation."
    from transformers import AutoConfig, AutoModelForCausalLM
    from torch.utils.flop_counter import FlopCounterMode
    config = AutoConfig.for_model(request.param, **CASES[request.param][0])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as count: out = model(torch.zeros(1, LONG, dtype=torch.long), use_cache=True)
    return config, model, out, {str(op).split(".")[1]: n for op, n in count.get_flop_counts()["Global"].items()}


def test_needs_count_what_every_family_keeps(read):
    config, model, out, _ = read
    n, cache = scale.needs(config, LONG), getattr(out, "cache", None)
    assert n["parameters"] == sum(p.numel() for p in model.parameters())
    if cache is None and config.model_type == "recurrent_gemma":  # it keeps its states in its modules, and the keys and values of a window
        inside = sum(x.numel() * x.element_size() for m in model.modules() for k, x in vars(m).items() if k in ("recurrent_states", "conv1d_state"))
        window = sum(4 * m.k_proj.out_features * config.attention_window_size for m in model.modules() if hasattr(m, "k_proj"))
        assert inside and (n["states_gb"], n["kv_gb"]) == (pytest.approx(inside / 1e9), pytest.approx(window / 1e9))
        return
    sizes = dict(kv=0, states=0)
    for name, x in in_a_cache(cache):
        if x.dim() > 1: sizes["kv" if name in ("keys", "values") else "states"] += x.numel() * x.element_size()
    assert sizes == {k: pytest.approx(1e9 * n[f"{k}_gb"]) for k in sizes} and sizes["kv"] > 0


def test_needs_count_what_every_family_computes(read):
    "Products with weights: two operations a weight and token, of the experts that are chosen alone."
    config, model, _, flops = read
    weights = sum(flops.get(op, 0) for op in ("mm", "addmm", "baddbmm")) // (2 * LONG) - model.get_output_embeddings().weight.numel()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3)
    assert scale.needs(config, LONG)["active"] == weights + experts // 2  # one of two is chosen


@pytest.mark.parametrize("name, fields, total, active, kv_gb", [
    ("qwen3_next", {}, 80e9, 3e9, 3.2),
    ("kimi_linear", {}, 48e9, 3e9, .906),  # six of 27 layers keep 576 numbers a token
])
def test_needs_of_published_shapes(name, fields, total, active, kv_gb):
    "What their names promise: 80B-A3B, 48B-A3B; keys and values of 131,072 tokens by their papers' shapes."
    from transformers import AutoConfig
    n = scale.needs(AutoConfig.for_model(name, **fields))
    assert n["parameters"] == pytest.approx(total, rel=.03) and n["active"] == pytest.approx(active, rel=.15)
    assert n["kv_gb"] == pytest.approx(kv_gb, rel=.03) and n["states_gb"] > .01 and n["flops"] < 3e15


def test_needs_on_the_command_line(folder, capsys, monkeypatch):
    built, build = [], scale.built
    monkeypatch.setattr(scale, "_counted", {})
    monkeypatch.setattr(scale, "built", lambda config: built.append(config) or build(config))
    assert call("needs", str(folder), "--tokens", "65536") == 0
    said = capsys.readouterr().out
    assert len(built) == 1
    assert "reading 65,536 tokens" in said and "on 8" in said and len(said.strip().splitlines()) == 3
    assert call("needs", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == scale.needs(folder)["parameters"]
    (folder / "config.json").write_text("{")
    assert call("needs", str(folder)) == 2 and capsys.readouterr().err.count("\n") == 1


def test_loading_says_what_fits(folder, monkeypatch):
    n = scale.needs(folder, 4096)
    monkeypatch.setattr(scale, "room_gb", lambda device: 2 * n["total_gb"])
    assert scale.load(folder, 4096)[0].config.model_type == "hypenet"
    with pytest.raises(CheckpointError, match="about 4,0.. tokens would fit"): scale.load(folder, 10 * 4096)
    monkeypatch.setattr(scale, "room_gb", lambda device: n["weights_gb"])
    with pytest.raises(CheckpointError, match="the weights alone do not fit"): scale.load(folder, 4096)


def test_float16_below_sm_80(folder, monkeypatch):
    "An older GPU only emulates bfloat16."
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(scale, "room_gb", lambda device: 100)
    monkeypatch.setattr(HypeNetForCausalLM, "to", lambda self, device: asked.append((device, self.dtype)) or self)
    scale.load(folder), scale.load(folder, dtype=torch.float32), scale.load(folder, device="cpu")
    assert asked == [("cuda", torch.float16), ("cuda", torch.float32), ("cpu", torch.float32)]


def test_logits_that_are_no_numbers_are_said(model, tokenizer):
    broken = copy.deepcopy(model)
    with torch.no_grad(): broken.model.layers[0].mlp.down_proj.weight.fill_(65504)
    broken.half()
    with pytest.raises(CheckpointError, match="not numbers in torch.float16"): scale.ask(broken, tokenizer, prose_test("single_1", tokenizer, 600, 1)[0], room=4)


def test_a_long_text_is_noted(folder):
    "NoPE and log scale reach beyond max_position_embeddings; a model with positions does not."
    def said(T, **fields):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scale.load(folder, T)
        return " ".join(str(w.message) for w in seen if "max_position_embeddings" in str(w.message))
    assert said(512, max_position_embeddings=1024) == ""
    assert "this is meant to work" in said(2048, max_position_embeddings=1024)
    assert "never trained" in said(2048, max_position_embeddings=1024, attn_use_rope=True)


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    from transformers import AutoConfig
    def missing(*_, **__): raise OSError("no such repository\nand much more")
    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    for look in (scale.needs, scale.load):
        with pytest.raises(CheckpointError, match="config.json"): look(tmp_path)
        with pytest.raises(CheckpointError, match="no/such-model is no checkpoint that transformers can read: no such repository$"): look("no/such-model")


def _without(folder, pattern):
    for path in folder.glob(pattern): path.unlink()


def _evil(folder):
    _without(folder, "*.safetensors")
    torch.save(dict(x=torch.ones(1)), folder / "pytorch_model.bin")


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=64)))


@pytest.mark.parametrize("spoil, says", [
    (lambda f: _without(f, "*.safetensors"), "no model.safetensors"),
    (_evil, "pickled weights"),
    (lambda f: _without(f, "token*"), "cannot be loaded"),
    (_other_shape, "cannot be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
])
def test_what_cannot_be_loaded_is_one_sentence(folder, spoil, says, capsys):
    "Weights that are not there, pickled, of another shape or broken; a tokenizer that is missing."
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as e: scale.load(folder)
    assert "\n" not in str(e.value) and len(str(e.value).replace(str(folder), "/data/model")) <= 160


@pytest.mark.parametrize("static", [True, False])
def test_many_questions_after_one_reading(model, tokenizer, static):
    "The same words as with a reading for each, and as generate says; a cache that is used again keeps its tensors' addresses."
    from transformers import DynamicCache, StaticCache
    hays = [prose_test("multikey_1", tokenizer, T, 1, questions=3)[0] for T in (700, 600)]
    make = lambda: StaticCache(config=model.config, max_cache_len=800) if static else DynamicCache(config=model.config)
    shared, addresses = make(), []
    for hay in hays:
        together = scale.ask(model, tokenizer, hay, room=8, chunk=100, cache=shared if static else make())
        alone = [scale.ask(model, tokenizer, hay | dict(questions=[q]), room=8)[0] for q in hay["questions"]]
        for q, words in zip(hay["questions"], together):
            ids = tokenizer(hay["context"] + q["question"] + " " + q["prefix"], return_tensors="pt")["input_ids"]
            said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
            assert tokenizer.decode(said, skip_special_tokens=True) == words
        assert together == alone and len(set(together)) > 1
        addresses.append([t.data_ptr() for layer in shared.layers for v in vars(layer).values() for t in (v.values() if isinstance(v, dict) else [v]) if isinstance(t, torch.Tensor)])
    assert not static or addresses[0] == addresses[1]


@pytest.mark.parametrize("room", [2, 5, 16, 40])
def test_a_step_that_runs_ahead_says_the_same(model, tokenizer, monkeypatch, room):
    "Sixteen tokens are looked at together: also where a text ends among them, and where there is room for fewer."
    from transformers import StaticCache
    hay, fed = prose_test("multikey_1", tokenizer, 600, 1, questions=2)[0], []
    def step(**how):
        fed.append(how["input_ids"])
        return model(**how)
    def asked(step=None): return scale.ask(model, tokenizer, hay, room=room, cache=StaticCache(config=model.config, max_cache_len=700), step=step)
    free = asked()
    assert asked(step) == free and len(fed) == 2 * (room - 1)
    monkeypatch.setattr(model.generation_config, "eos_token_id", int(fed[(room - 1) // 2]))  # one of the first answer's
    ended = asked()
    assert asked(step) == ended != free and len(fed) <= 4 * (room - 1)


def test_recall_counts_values(model, tokenizer, monkeypatch):
    "Right answers are counted as RULER counts them, a part for a part."
    def knows(model, tokenizer, hay, *rest): return [" ".join(q["answers"][:len(q["answers"]) // 2 or 1]) for q in hay["questions"]]
    monkeypatch.setattr(scale, "ask", knows)
    got = scale.recall(model, tokenizer, dict(single_1=[(512, 2, 1)], multivalue=[(512, 3, 1)], multikey_2=[(512, 2, 3)]))
    assert got["single_1"]["512"] == dict(correct=2, n=2, each=[[1, 1]] * 2) and got["multivalue"]["512"] == dict(correct=6, n=12, each=[[2, 4]] * 3) and got["multikey_2"]["512"]["n"] == 6


# ---- lm-eval

@pytest.mark.slow
def test_lm_eval_asks_our_model(model, tokenizer):
    "Two tasks, one with an essay, without a network, at a length that its list of metrics has and at one that it has not; a model that knows the answer is found out."
    pytest.importorskip("lm_eval")
    from qkrestore_nb.prose import local_text
    got = scale.lm_eval_scores(model, tokenizer, ["niah_single_1", "niah_single_2"], (512,), limit=2, essay=local_text()[:3000])
    assert got.keys() == {"niah_single_1", "niah_single_2"}
    assert all(r["512,none"] == 0 for r in got.values()), got
    right = HypeNetForCausalLM.generate
    def cheat(self, input_ids, **kw):
        import re
        text = tokenizer.decode(input_ids[0])
        number = re.findall(r"is: (\d{7})\.", text)[0]
        return torch.cat([input_ids, torch.tensor([tokenizer(" " + number)["input_ids"]])], 1)
    model.generate = cheat.__get__(model)
    try: assert scale.lm_eval_scores(model, tokenizer, ["niah_single_1"], (512,), limit=2)["niah_single_1"]["512,none"] == 1
    finally: del model.generate
    assert HypeNetForCausalLM.generate is right


@pytest.mark.parametrize("wrong", [False, True])
def test_lm_eval_leaves_nltk_as_it_was(model, tokenizer, monkeypatch, wrong):
    "With an essay nothing is downloaded meanwhile; afterwards all is as before, also where something goes wrong."
    nltk, lm_eval = pytest.importorskip("nltk"), pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler import prepare_niah
    before, seen = (nltk.download, prepare_niah.get_haystack), []
    def evaluate(*_, **__):
        seen.append((nltk.download("punkt_tab"), prepare_niah.get_haystack("essay")))
        if wrong: raise RuntimeError("not today")
        return dict(results={})
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    try: scale.lm_eval_scores(model, tokenizer, ["niah_single_2"], (512,), essay=["a", "word"])
    except RuntimeError: assert wrong
    assert seen == [(False, ["a", "word"])] and (nltk.download, prepare_niah.get_haystack) == before


# ---- other hybrids: load, a few steps of fine-tuning, restore, evaluate

def qwen3_next():
    from transformers import Qwen3NextConfig
    return Qwen3NextConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                           linear_key_head_dim=16, linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)


def olmo_hybrid():
    from transformers import OlmoHybridConfig
    return OlmoHybridConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, linear_num_key_heads=4, linear_num_value_heads=4,
                            linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0, eos_token_id=0)


def lfm2():
    from transformers import Lfm2Config
    return Lfm2Config(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2, pad_token_id=0, eos_token_id=0, bos_token_id=0)


def jamba():
    from transformers import JambaConfig
    return JambaConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
                       mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, pad_token_id=0)


@pytest.mark.parametrize("config", [qwen3_next, olmo_hybrid, lfm2, jamba], ids=lambda f: f.__name__)
def test_other_hybrids_from_end_to_end(config, tokenizer, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, set_seed
    from qkrestore_nb.families import layer_kinds
    from qkrestore_nb.finetune import finetune
    from qkrestore_nb.restore import qk_restore
    set_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path / "pre"), tokenizer.save_pretrained(tmp_path / "pre")
    write_sums(tmp_path / "sums.jsonl", 60)
    post = finetune(tmp_path / "pre", tmp_path / "sums.jsonl", tmp_path / "post", steps=3, T=64, rows=2, lr=1e-3)
    restored = qk_restore(tmp_path / "pre", post, out=tmp_path / "restored")
    a, b, c = (load_file(tmp_path / n / "model.safetensors") for n in ("pre", "post", "restored"))
    softmax = [i for i, kind in enumerate(layer_kinds(json.loads((post / "config.json").read_text()))) if kind == "softmax"]
    moved = {k for k in b if not torch.equal(b[k], c[k])}
    assert softmax and moved == {k for k in b for i in softmax if f"layers.{i}." in k and k.endswith(("q_proj.weight", "k_proj.weight"))}
    if config is not qwen3_next: assert all(torch.equal(a[k], c[k]) for k in moved)  # there half of q_proj is the output gate, which stays
    model, words = scale.load(restored, 1024)
    assert scale.needs(restored, 1024)["parameters"] == sum(p.numel() for p in model.parameters())
    got = scale.recall(model, words, dict(multikey_1=[(512, 1, 2)]), room=4)
    assert got["multikey_1"]["512"]["n"] == 2

"Every family on tiny checkpoints that transformers itself writes: bytes differ only inside the planned ranges, where they are pre's."
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import snapshot

from qkrestore_nb.checkpoints import CheckpointError, read_config, read_index
from qkrestore_nb.families import families, family_of, layer_kinds, proposal, refused, text_config
from qkrestore_nb.moves import plan
from qkrestore_nb.restore import qk_restore

base = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
moe = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
delta = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
mamba = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8)
latent = dict(kv_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1)
alternate = ["linear_attention", "full_attention"] * 2
L = "model.layers.{}.self_attn.{}_proj.weight"
qk = lambda *layers, name=L: [name.format(i, r) for i in layers for r in "qk"]
zamba_adapters = [f"model.layers.1.shared_transformer.self_attn.linear_{r}_adapter_list.{j}.{s}.weight" for r in "qk" for j in (0, 2) for s in (0, 1)]
zamba_adapters += [f"model.layers.3.shared_transformer.self_attn.linear_{r}_adapter_list.1.{s}.weight" for r in "qk" for s in (0, 1)]
MLA = [n.format(i) for i in (1, 3) for n in ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight", "model.layers.{}.self_attn.kv_b_proj.weight")]

# model_type -> (config, choice, the tensors that must move)
CASES = {
    "minimax": (base | moe, {}, qk(0, 2)),
    "qwen3_next": (base | moe | delta, {}, qk(3)),
    "qwen3_5_text": (base | delta, {}, qk(3)),
    "qwen3_5_moe_text": (base | moe | delta, {}, qk(3)),
    "kimi_linear": (base | moe | latent | dict(linear_head_dim=8, linear_num_heads=2, layer_types=alternate), dict(mla="with_latent"), MLA),
    "kimi_linear, q in two": (base | moe | latent | dict(q_lora_rank=6, linear_head_dim=8, linear_num_heads=2, layer_types=alternate), dict(mla="q_only"),
                              [f"model.layers.{i}.self_attn.q_{s}_proj.weight" for i in (1, 3) for s in "ab"]),
    "bailing_hybrid": (base | moe | latent | dict(layer_group_size=2), dict(mla="with_latent"), [n.replace("self_attn", "attention") for n in MLA]),
    "olmo_hybrid": (base | delta, {}, qk(3)),
    "olmo_hybrid, norms": (base | delta, dict(include="norms"), [n for r in "qk" for n in (L.format(3, r), f"model.layers.3.self_attn.{r}_norm.weight")]),
    "lfm2": (base | dict(layer_types=["conv", "full_attention"] * 2), {}, qk(1, 3)),
    "lfm2, norms": (base | dict(full_attn_idxs=[2]), dict(include="norms"), [n for r in "qk" for n in (L.format(2, r), f"model.layers.2.self_attn.{r}_layernorm.weight")]),
    "lfm2, o": (base | dict(full_attn_idxs=[2]), dict(projections="o"), ["model.layers.2.self_attn.out_proj.weight"]),
    "lfm2_moe": (base | moe | dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1), {}, qk(1, 3)),
    "lfm3": (base | dict(layer_types=["conv", "full_attention", "sliding_attention", "full_attention"]), {}, qk(1, 3)),
    "lara_mini": (base | moe | delta | dict(layer_types=["linear_attention", "full_attention", "sliding_attention", "full_attention"]), {}, qk(1, 3)),
    "jamba": (base | moe | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2), {}, qk(1, 3)),
    "bamba": (base | mamba | dict(attn_layer_indices=[0, 3]), {}, qk(0, 3)),
    "bamba, bias": (base | mamba | dict(attn_layer_indices=[3], attention_bias=True), dict(include="bias"), [L.format(3, r).replace("weight", w) for r in "qk" for w in ("weight", "bias")]),
    "granitemoehybrid": (base | moe | mamba | dict(layer_types=alternate, shared_intermediate_size=8), {}, qk(1, 3)),
    "falcon_h1": (base | mamba | dict(mamba_d_ssm=32), {}, qk(0, 1, 2, 3)),
    "nemotron_h": (base | dict(layers_block_type=["linear_attention", "full_attention", "mlp", "full_attention"], mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=4,
                               n_groups=1, chunk_size=8), {}, qk(1, 3, name="backbone.layers.{}.mixer.{}_proj.weight")),
    "zamba2": (base | dict(num_hidden_layers=6, layers_block_type=["linear_attention", "hybrid"] * 3, n_mamba_heads=4, mamba_d_state=4, num_mem_blocks=2, num_key_value_heads=4,
                           use_shared_attention_adapter=True, adapter_rank=2, chunk_size=8), {},
               qk(1, 3, name="model.layers.{}.shared_transformer.self_attn.{}_proj.weight") + zamba_adapters),
    "zamba": (base | dict(num_hidden_layers=6, layers_block_type=["linear_attention", "hybrid"] * 3, n_mamba_heads=2, mamba_d_state=4, mamba_dt_rank=2, num_key_value_heads=4), {},
              qk(1, name="model.layers.{}.shared_transf.self_attn.{}_proj.weight")),
    "recurrent_gemma": (base | dict(num_hidden_layers=5, lru_width=16, block_types=["recurrent", "recurrent", "attention"], attention_window_size=8), dict(layers="softmax+swa"),
                        qk(2, name="model.layers.{}.temporal_block.{}_proj.weight")),
    "gpt_oss": (base | moe, {}, qk(1, 3)),
    "gpt_oss, bias": (base | moe, dict(include="bias"), [L.format(i, r).replace("weight", w) for i in (1, 3) for r in "qk" for w in ("weight", "bias")]),
    "gpt_oss, swa": (base | moe, dict(layers="softmax+swa"), qk(0, 1, 2, 3)),
    "olmo3": (base | dict(sliding_window=8), {}, qk(3)),
    "cohere2": (base | dict(sliding_window_pattern=2, sliding_window=8), {}, qk(1, 3)),
    "llama4_text": (base | moe | dict(no_rope_layer_interval=2, attention_chunk_size=8, intermediate_size_mlp=32), {}, qk(1, 3)),
    "smollm3": (base, {}, qk(0, 1, 2, 3)),
    "gemma3_text": (base | dict(sliding_window_pattern=2, query_pre_attn_scalar=8, sliding_window=8), {}, qk(1, 3)),
}


def model(model_type: str, fields: dict, seed: int):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields)).bfloat16()
    with torch.no_grad():  # also what starts as ones or zeros must differ between pre and post
        for p in made.parameters(): p.copy_(torch.randn(p.shape))
    return made


def expected_rows(name: str, shape: list[int], config: dict) -> range | list[int]:
    "Written down here once more, independent of the table: the rows that are Q or K."
    if re.search("qwen3", config["model_type"]) and "q_proj" in name:
        d, H = config["head_dim"], config["num_attention_heads"]
        return [r for r in range(shape[0]) if r // d % 2 == 0 and r < 2 * H * d]
    if "kv_b_proj" in name:
        n, v = config["qk_nope_head_dim"], config["v_head_dim"]
        return [r for r in range(shape[0]) if r % (n + v) < n]
    return range(shape[0])


def oracle(pre: Path, post: Path, out: Path, names: list[str]):
    "File names, sizes and headers are post's; each byte is pre's in the rows of `names`, and post's elsewhere."
    a, b, config = read_index(pre), read_index(post), text_config(read_config(post))
    assert sorted(p.name for p in out.iterdir()) == sorted([*(p.name for p in post.iterdir()), "qk_restore.json"])
    moved = 0
    for file in post.iterdir():
        want = bytearray(file.read_bytes())
        for n in (n for n in names if b[n]["file"] == file):
            old = a[n]["file"].read_bytes()[a[n]["start"]:a[n]["end"]]
            width = len(old) // b[n]["shape"][0]
            for r in expected_rows(n, b[n]["shape"], config):
                assert old[r * width:(r + 1) * width] != want[b[n]["start"] + r * width:b[n]["start"] + (r + 1) * width] or width < 8  # short rows may agree by chance
                want[b[n]["start"] + r * width:b[n]["start"] + (r + 1) * width] = old[r * width:(r + 1) * width]
                moved += width
        assert bytes(want) == (out / file.name).read_bytes(), file.name
    return moved


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_written_by_transformers(case, tmp_path):
    fields, choice, names = CASES[case]
    model_type = case.split(",")[0]
    models = [model(model_type, fields, seed) for seed in (1, 2)]
    for folder, m, size in zip(("pre", "post"), models, ("1GB", "8KB")): m.save_pretrained(tmp_path / folder, max_shard_size=size)  # cut differently
    before = snapshot(tmp_path)
    pre, post, out = (tmp_path / n for n in ("pre", "post", "out"))
    qk_restore(pre, post, out=out, **choice)
    note = json.loads((out / "qk_restore.json").read_text())
    assert sorted(r["tensor"] for r in note["tensors"]) == sorted(names)
    assert oracle(pre, post, out, names) == sum(r["bytes"] for r in note["tensors"])
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", [c for c in CASES if "," not in c])
def test_modules_and_files_agree(case, tmp_path):
    "What transformers loads from the restored folder is what a restore of the two models gives."
    from transformers import AutoModelForCausalLM
    fields, choice, _ = CASES[case]
    pre, post = (model(case, fields, seed) for seed in (1, 2))
    for folder, m in (("pre", pre), ("post", post)): m.save_pretrained(tmp_path / folder)
    load = lambda f: AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.bfloat16)
    qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out", **choice)
    files, modules = load("out").state_dict(), qk_restore(load("pre"), load("post"), **choice).state_dict()
    assert files.keys() == modules.keys() and all(torch.equal(files[n], modules[n]) for n in files)
    assert any(not torch.equal(files[n], w) for n, w in load("post").state_dict().items())


@pytest.mark.parametrize("head, kv", [(0, 0), (3, 1)])
def test_one_head_of_a_gated_grouped_projection(tmp_path, head, kv):
    fields, _, names = CASES["qwen3_next"]
    pre, post = (model("qwen3_next", fields, seed) for seed in (1, 2))
    for folder, m in (("pre", pre), ("post", post)): m.save_pretrained(tmp_path / folder)
    out = qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out", heads=[head])
    from safetensors.torch import load_file
    got, a, b = (load_file(f / "model.safetensors") for f in (out, tmp_path / "pre", tmp_path / "post"))
    rows = lambda x, y: {r for r in range(len(x)) if not torch.equal(x[r], y[r])}
    assert rows(got[names[0]], b[names[0]]) == set(range(head * 16, head * 16 + 8)) and torch.equal(got[names[0]][head * 16:head * 16 + 8], a[names[0]][head * 16:head * 16 + 8])
    assert rows(got[names[1]], b[names[1]]) == set(range(kv * 8, kv * 8 + 8))
    fixed = qk_restore(pre, post, heads=[head]).state_dict()
    assert all(torch.equal(fixed[n], got[n]) for n in names)


def test_latent_attention_asks(tmp_path):
    fields = CASES["kimi_linear"][0]
    for seed, folder in enumerate(("pre", "post")): model("kimi_linear", fields, seed).save_pretrained(tmp_path / folder)
    with pytest.raises(CheckpointError, match="q_only.*with_latent"): qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = [m.post for m in plan(tmp_path / "pre", tmp_path / "post", mla="q_only")]
    assert names == ["model.layers.1.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match="heads"): qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out", mla="with_latent", heads=[0])
    with pytest.raises(CheckpointError, match="there are q, k, o alone"): qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out", mla="with_latent", projections="v")


def test_shared_layers_go_together(tmp_path):
    fields = CASES["zamba2"][0]
    for seed, folder in enumerate(("pre", "post")): model("zamba2", fields, seed).save_pretrained(tmp_path / folder)
    with pytest.raises(CheckpointError, match="layers 1, 5 share one copy"): plan(tmp_path / "pre", tmp_path / "post", layers=[1])
    assert {m.layer for m in plan(tmp_path / "pre", tmp_path / "post", layers=[3])} == {3}


def test_window_layers_are_left_alone_unless_asked(tmp_path):
    fields = CASES["recurrent_gemma"][0]
    for seed, folder in enumerate(("pre", "post")): model("recurrent_gemma", fields, seed).save_pretrained(tmp_path / folder)
    with pytest.raises(CheckpointError, match="layers='swa'"): qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out")


def test_a_model_that_sees(tmp_path):
    "post carries the prefix of the form that sees, and a vision tower with its own q_proj; pre is the language model alone."
    from safetensors.torch import save_file
    pre = model("gemma3_text", CASES["gemma3_text"][0], 1)
    pre.save_pretrained(tmp_path / "pre")
    weights = model("gemma3_text", CASES["gemma3_text"][0], 2).state_dict()
    (tmp_path / "post").mkdir()
    seeing = {n.replace("model.", "model.language_model.", 1): t.contiguous() for n, t in weights.items() if n != "lm_head.weight"}
    seeing |= {f"model.vision_tower.encoder.layers.{i}.self_attn.{r}_proj.weight": torch.randn(4, 4) for i in range(4) for r in "qk"}
    save_file(seeing, tmp_path / "post" / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": read_config(tmp_path / "pre"), "vision_config": {"num_hidden_layers": 4}}
    (tmp_path / "post" / "config.json").write_text(json.dumps(config))
    out = qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out")
    a, b, c = (read_index(f) for f in (tmp_path / "pre", tmp_path / "post", out))
    data = lambda t: t["file"].read_bytes()[t["start"]:t["end"]]
    changed = {n for n in b if data(b[n]) != data(c[n])}
    assert changed == {n.replace("model.", "model.language_model.") for n in qk(1, 3)}
    assert all(data(c[n]) == data(a[n.replace("language_model.", "")]) for n in changed)


def test_an_unknown_family_shows_what_it_found_and_how_to_go_on(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    for seed, folder in ((1, "pre"), (2, "post")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**base)).bfloat16().save_pretrained(tmp_path / folder)
    pre, post, out = (tmp_path / n for n in ("pre", "post", "out"))
    with pytest.raises(CheckpointError, match=r"'llama'.*--layers 3,7 --tensors"): qk_restore(pre, post, out=out)
    with pytest.raises(CheckpointError, match=r"model\.layers\.N\.self_attn\.k_proj"): qk_restore(pre, post, out=out, layers=[1], tensors="wq")
    with pytest.raises(CheckpointError, match="no regular expression"): qk_restore(pre, post, out=out, tensors="(")
    qk_restore(pre, post, out=out, layers=[1, 3], tensors=r"[qk]_proj\.weight")
    oracle(pre, post, out, qk(1, 3))


def test_refused_families_say_why():
    for name in refused:
        with pytest.raises(ValueError, match="is refused: .*--tensors"): family_of({"model_type": name})


def test_every_entry_is_tested():
    tested = {c.split(",")[0] for c in CASES}
    elsewhere = {"hypenet", "hybrid", "jet_nemotron"}  # tests/test_restore.py
    own_code = {"bailing_moe_linear", "minimax_text_01", "minimax_m1"}  # not in transformers: written by hand in this file
    assert {m for f in families.values() for m in f["models"]} - elsewhere - own_code == tested


@pytest.mark.parametrize("field, values", [("key_multiplier", (1., .5)), ("rope_theta", (1e4, 1e6)), ("attention_in_multiplier", (1., 2.))])
def test_scales_and_positions_must_agree(tmp_path, field, values):
    fields = CASES["falcon_h1"][0]
    for seed, (folder, value) in enumerate(zip(("pre", "post"), values)):
        model("falcon_h1", fields, seed).save_pretrained(tmp_path / folder)
        config = read_config(tmp_path / folder)
        if field == "rope_theta": config.pop("rope_parameters", None)
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=f"{field} differs"): qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out")


# ---- the model list of transformers

CARRY = re.compile(r"linear_attention|mamba|recurrent|^conv$|hybrid|ssm|delta|lightning|rwkv", re.I)  # words of layers that carry a state
STATE = re.compile(r"^(mamba_d_state|ssm_state_size|linear_conv_kernel_dim|lru_width|conv_L_cache|block_types)$")   # fields that only models with such layers have
NOT_LANGUAGE = re.compile(r"vision|encoder|audio|speech|vit$")


def is_hybrid(config) -> bool:
    "Whether a config speaks of attention and of layers that carry a state."
    fields = config.to_dict() | {k: getattr(config, k, None) for k in ("layer_types", "layers_block_type")}
    words = {w for v in fields.values() if isinstance(v, (list, tuple)) for w in v if isinstance(w, str)}
    carries = any(CARRY.search(w) for w in words) or any(STATE.match(k) for k, v in fields.items() if v is not None)
    return carries and bool(fields.get("num_attention_heads")) and bool(fields.get("vocab_size"))


def hybrids() -> dict:
    from transformers import CONFIG_MAPPING
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CONFIG_MAPPING:
            try:
                config = CONFIG_MAPPING[name]()
                inner = config.get_text_config()
            except Exception: continue  # needs arguments, or has several language models
            if is_hybrid(inner) and not NOT_LANGUAGE.search(inner.model_type): found[inner.model_type] = inner
    return found


def without_entry(found) -> list[str]:
    missing = []
    for name, config in found.items():
        try: family_of(config.to_dict())
        except ValueError as e:
            if name not in refused: missing.append(f"{name}: {e}")
    return missing


def test_the_model_list_of_transformers():
    found = hybrids()
    assert {"qwen3_next", "jamba", "falcon_h1", "zamba2", "recurrent_gemma", "lfm2", "nemotron_h"} <= found.keys()  # the walk sees
    assert without_entry(found) == [], "a hybrid of transformers has neither an entry in families nor a refusal"


def test_the_walk_can_fail(monkeypatch):
    found = hybrids()
    monkeypatch.setitem(families, "jamba", families["jamba"] | dict(models=["nothing"]))
    assert [m.split(":")[0] for m in without_entry(found)] == ["jamba"]


@pytest.mark.parametrize("case", [c for c in CASES if "," not in c])
def test_layer_kinds_agree_with_transformers(case):
    "Our reading of the raw config, against the words of the config object of transformers, which knows all fallbacks."
    from transformers import CONFIG_MAPPING
    config = CONFIG_MAPPING[case](**CASES[case][0])
    theirs = getattr(config, "layer_types", None) or getattr(config, "layers_block_type")
    family = family_of({"model_type": case})
    ours = layer_kinds({**CASES[case][0], "model_type": case})  # as a human would write it, fallbacks open
    to = families[next(n for n, f in families.items() if f is family)]["kinds"]
    if case == "falcon_h1": assert set(theirs) == {"hybrid"} and set(ours) == {"softmax"}
    else: assert ours == [to[w] for w in theirs]

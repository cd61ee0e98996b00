"Plans over what practitioners have: grown vocabularies, fused matrices, unknown families, wrapped and sharded models, folders that are something else."
import copy
import json
import re
import warnings

import pytest
import torch
from conftest import NAME, hypenet_config, snapshot, tensors, write_checkpoint
from safetensors.torch import load_file
from test_families import CASES, model

import qkrestore_nb
from qkrestore_nb.checkpoints import CheckpointError, UserError
from qkrestore_nb.families import layer_kinds, proposal
from qkrestore_nb.hub import mergekit_yaml
from qkrestore_nb.inspection import compare, inspect_checkpoint
from qkrestore_nb.moves import plan
from qkrestore_nb.procrustes import qk_pro
from qkrestore_nb.restore import qk_restore

QK = [NAME.format(i, r) for i in (1, 2) for r in "qk"]
load = lambda folder: {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def rows_of(post: dict, pre: dict, out: dict) -> dict:
    "Tensor -> the rows that are pre's now; everything else must be post's."
    found = {}
    for n in post:
        moved = [r for r in range(len(post[n])) if not torch.equal(out[n][r], post[n][r])]
        assert all(torch.equal(out[n][r], pre[n][r]) for r in moved), n
        if moved: found[n] = moved
    return found


# ---- the front door

def test_the_front_door():
    from qkrestore_nb import plan as a
    from qkrestore_nb import qk_restore as b
    from qkrestore_nb import undo, verify
    assert (a, b) == (plan, qk_restore) and callable(undo) and callable(verify) and "qk_pro" in dir(qkrestore_nb) and qkrestore_nb.qk_pro is qk_pro
    with pytest.raises(AttributeError, match="no attribute 'qk_resort'"): qkrestore_nb.qk_resort
    assert issubclass(CheckpointError, UserError) and issubclass(UserError, ValueError)


@pytest.mark.parametrize("call", [lambda a, b, kw: plan(a, b, **kw), lambda a, b, kw: qk_restore(a, b, out="x", **kw), lambda a, b, kw: qk_pro(a, b, out="x", **kw), lambda a, b, kw: mergekit_yaml(a, b, **kw),
                                  lambda a, b, kw: compare(a, b, **kw), lambda a, b, kw: inspect_checkpoint(b, **kw)])
def test_a_word_that_is_not_known_is_a_type_error(pair, call):
    with pytest.raises(TypeError, match="head"): call(*pair, dict(head=[1]))
    with pytest.raises(TypeError): plan(*pair, "softmax", True, "qk")  # after pre, post, selection by keyword alone


def test_a_programming_error_stays_one(pair, monkeypatch):
    from qkrestore_nb import moves
    def broken(*args): return {}["nothing"]
    monkeypatch.setattr(moves, "stretches", broken)
    with pytest.raises(KeyError): plan(*pair)
    with pytest.raises(TypeError, match="a selection and layers"): plan(*pair, moves.Selection(), layers="all")


def test_one_plan_for_all_kinds(pair):
    a, b = (load(f) for f in pair)
    shown = [(m.layer, m.role, m.post, m.shape, m.dtype, m.spans, m.bytes) for m in plan(*pair)]
    assert shown == [(m.layer, m.role, m.post, m.shape, m.dtype, m.spans, m.bytes) for m in plan(a, b, config=hypenet_config())] and [s[2] for s in shown] == QK


# ---- a grown vocabulary, and what else may differ

def test_a_vocabulary_that_fine_tuning_has_grown(tmp_path):
    pre, post = (model("qwen3_next", CASES["qwen3_next"][0], s) for s in (1, 2))
    post.resize_token_embeddings(40)
    for folder, m in (("pre", pre), ("post", post)): m.save_pretrained(tmp_path / folder)
    out = load(qk_restore(tmp_path / "pre", tmp_path / "post", out=tmp_path / "out"))
    assert rows_of(load(tmp_path / "post"), load(tmp_path / "pre") | {n: w for n, w in out.items() if len(w) == 40}, out).keys() == {NAME.format(3, "q"), NAME.format(3, "k")}
    fixed = qk_restore(pre, post).state_dict()
    assert all(torch.equal(fixed[n], out[n]) for n in (NAME.format(3, "q"), NAME.format(3, "k"))) and fixed["model.embed_tokens.weight"].shape[0] == 40
    assert len(compare(tmp_path / "pre", tmp_path / "post")["tensors"]) == 2
    with pytest.raises(CheckpointError, match=r"shape \[32, 16\] in pre and \[40, 16\]"): plan(tmp_path / "pre", tmp_path / "post", tensors="embed_tokens")


@pytest.mark.parametrize("family", [hypenet_config, lambda **f: {"model_type": "jet_nemotron", "num_hidden_layers": 4, "layer_types": ["jet", "attn", "swa", "jet"], "hidden_size": 8} | f])
def test_vocabularies_of_every_kind_of_table_entry(tmp_path, family):
    pre, post = (write_checkpoint(tmp_path / n, s, config=family(vocab_size=v)) for n, s, v in (("pre", 1, 16), ("post", 2, 20)))
    assert plan(pre, post)


def test_a_difference_that_is_meant(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.}
    pre, post = (write_checkpoint(tmp_path / n, s, config=hypenet_config(**f)) for n, s, f in (("pre", 1, {}), ("post", 2, dict(rope_scaling=yarn))))
    with pytest.raises(CheckpointError, match="rope_scaling differs.*--allow rope_scaling"): plan(pre, post)
    assert [m.post for m in plan(pre, post, allow="rope_scaling")] == QK and qk_restore(pre, post, out=tmp_path / "out", allow="rope_scaling")
    with pytest.raises(CheckpointError, match="which is not compared"): plan(pre, post, allow="rope")


# ---- by hand: rows, biases, layers

def fused(seed: int, layers: int = 4, H: int = 4, n: int = 2, D: int = 2, name: str = "model.layers.{}.attn.Wqkv", only_q=()) -> dict:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(layers):
        rows = H * D if i in only_q else (H + 2 * n) * D
        found |= {f"{name.format(i)}.weight": torch.randn(rows, 8, generator=g), f"{name.format(i)}.bias": torch.randn(rows, generator=g)}
    return found


def write_fused(tmp_path, config, **kw):
    return tuple(write_checkpoint(tmp_path / n, s, config=config, weights=fused(s, **kw)) for n, s in (("pre", 1), ("post", 2)))


PHI = dict(model_type="phi4flash", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=8, mb_per_layer=2, sliding_window=[None, None, None, None])


@pytest.mark.parametrize("rows, want", [("qk", list(range(12))), ("q", list(range(8))), ("k", list(range(8, 12))), ("0:3,6:8", [0, 1, 2, 6, 7]), ([(10, 12)], [10, 11])])
def test_rows_of_a_fused_matrix(tmp_path, rows, want):
    pre, post = write_fused(tmp_path, PHI, only_q=[3] if rows == "q" else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = qk_restore(pre, post, out=tmp_path / "out", layers=[1, 3], tensors="Wqkv", rows=rows)
    assert rows_of(load(post), load(pre), load(out)) == {f"model.layers.{i}.attn.Wqkv.weight": want for i in (1, 3)}  # no bias: nobody said so
    assert all(r["equals"] == "pre" for r in qkrestore_nb.verify(out))
    a, b = (load(f) for f in (pre, post))
    assert all(torch.equal(w, load(out)[n]) for n, w in qk_restore(a, b, config=PHI, layers=[1, 3], tensors="Wqkv", rows=rows).items())


def test_a_matrix_that_holds_v_is_told(tmp_path):
    pre, post = write_fused(tmp_path, PHI)
    with pytest.warns(UserWarning, match="holds more than Q and K.*--rows qk"): qk_restore(pre, post, out=tmp_path / "out", layers=[1], tensors="Wqkv")
    for kw, words in [(dict(rows="0:17"), "has 16 rows"), (dict(rows="16:17"), "reach further")]:
        with pytest.raises(CheckpointError, match=words): plan(pre, post, layers=[1], tensors="Wqkv", **kw)
    with pytest.raises(CheckpointError, match="give rows as numbers"): plan(*(load(f) for f in (pre, post)), config=PHI | {"head_dim": 3}, layers=[1], tensors="Wqkv", rows="qk")
    q = fused(1, only_q=[1])
    with pytest.raises(CheckpointError, match="holds Q alone"): plan(q, fused(2, only_q=[1]), config=PHI, layers=[1], tensors="Wqkv", rows="k")


def test_biases_move_only_where_they_are_named(tmp_path):
    pre, post = (write_checkpoint(tmp_path / n, s, biases=True) for n, s in (("pre", 1), ("post", 2)))
    moved = lambda regex: {m.post.rpartition(".")[2] for m in plan(pre, post, layers=[1], tensors=regex)}
    assert moved("[qk]_proj") == {"weight"} and moved(r"[qk]_proj\.(weight|bias)") == {"weight", "bias"} and moved(r"q_proj\.bias") == {"bias"}


RING = dict(model_type="bailing_moe_linear", architectures=["BailingMoeLinearV2ForCausalLM"], num_hidden_layers=5, layer_group_size=2, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2)


def test_ring_linear(tmp_path):
    "Grouped heads in one matrix; in linear layers as many rows for K and V as for Q. The layers behind the last whole group are softmax layers."
    def weights(seed):
        g = torch.Generator().manual_seed(seed)
        return {f"model.layers.{i}.attention.{n}.weight": torch.randn(rows, 8, generator=g) for i in range(5) for n, rows in (("query_key_value", 16 if i in (1, 3, 4) else 24), ("dense", 8))}
    pre, post = (write_checkpoint(tmp_path / n, s, config=RING, weights=weights(s)) for n, s in (("pre", 1), ("post", 2)))
    out = qk_restore(pre, post, out=tmp_path / "out")
    assert rows_of(load(post), load(pre), load(out)) == {f"model.layers.{i}.attention.query_key_value.weight": list(range(12)) for i in (1, 3, 4)}
    one = qk_restore(pre, post, out=tmp_path / "one", heads=[3], layers=[3])
    assert rows_of(load(post), load(pre), load(one)) == {"model.layers.3.attention.query_key_value.weight": [6, 7, 10, 11]}
    v = qk_restore(pre, post, out=tmp_path / "v", projections="v", layers=[3])
    assert rows_of(load(post), load(pre), load(v)) == {"model.layers.3.attention.query_key_value.weight": list(range(12, 16))}
    seen = compare(pre, post)
    assert [r["role"] for r in sorted(seen["tensors"], key=lambda r: (r["layer"], r["role"]))] == ["k", "q"] * 3 and all(len(r["angles"]) == dict(q=4, k=2)[r["role"]] for r in seen["tensors"])
    pro = load(qk_pro(pre, post, out=tmp_path / "pro", lam=0, space="head"))
    assert all(torch.allclose(w, load(out)[n], atol=1e-5) for n, w in pro.items())


@pytest.mark.parametrize("name", ["minimax_m1", "minimax_text_01", "minimax-m1"])
def test_minimax_as_published(tmp_path, name):
    config = dict(model_type=name, num_hidden_layers=4, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, attn_type_list=[0, 0, 0, 1])
    weights = lambda s: {n: w for n, w in tensors(s).items() if ".3." in n or "self_attn" not in n} | {f"model.layers.{i}.self_attn.qkv_proj.weight": torch.randn(24, 8) for i in range(3)}
    pre, post = (write_checkpoint(tmp_path / n, s, config=config, weights=weights(s)) for n, s in (("pre", 1), ("post", 2)))
    assert [m.post for m in plan(pre, post)] == [NAME.format(3, r) for r in "qk"]


@pytest.mark.parametrize("word", ["gdn", "kda", "mamba2", "rwkv7", "lightning_attn"])
def test_other_mixers_of_hypenet_are_linear(tmp_path, word):
    config = hypenet_config(mixer_types=[word, "attn", "attn", word])
    pre, post = (write_checkpoint(tmp_path / n, s, config=config) for n, s in (("pre", 1), ("post", 2)))
    assert [m.post for m in plan(pre, post)] == QK and layer_kinds(config) == ["linear", "softmax", "softmax", "linear"]


def test_layers_and_tensors_by_hand_ask_nothing_of_the_table(tmp_path):
    "Words that the family does not have, too few of them, or none: numbers and names are enough."
    for i, config in enumerate((hypenet_config(model_type="qwen3_next", architectures=[], layer_types=["new", "full_attention", "x", "y"]), hypenet_config(mixer_types=["attn"]),
                                {k: v for k, v in hypenet_config(model_type="jet_nemotron", architectures=[]).items() if k != "mixer_types"}, hypenet_config(model_type="glm5_next", architectures=[]))):
        pre, post = (write_checkpoint(tmp_path / f"{n}{i}", s, config=config) for n, s in (("pre", 1), ("post", 2)))
        with pytest.raises(CheckpointError): plan(pre, post)
        assert sorted(m.post for m in plan(pre, post, layers=[1, 2], tensors=r"[qk]_proj\.weight")) == sorted(QK)
        assert len(inspect_checkpoint(post, layers=[1], tensors="q_proj")["tensors"]) == 1 and len(compare(pre, post, layers=[1, 2], tensors="[qk]_proj")["tensors"]) == 4


# ---- configs that say the kinds in other words: a proposal that can be typed

SAID = {
    "fla": (dict(model_type="gated_deltanet", attn=dict(layers=[1, 3], num_heads=2)), "--layers 1,3 "),
    "apriel": (dict(model_type="apriel_h1", hybrid_block_layout=["m2", "t", "m2", "t"]), "--layers 1,3 "),
    "types": (dict(model_type="new", attn_type_list=[0, 1, 0, 0]), "--layers 1 "),
    "layer_types": (dict(model_type="gemma9", layer_types=["sliding_attention", "full_attention"] * 2), "--layers 1,3 "),
    "nested": (dict(model_type="gemma9_vl", text_config=dict(model_type="gemma9_text", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])), r"--layers 1 --tensors 'language_model.*"),
    "blocks": (dict(model_type="new", layers_block_type=["mamba", "attention", "mamba", "mamba"]), "--layers 1 "),
    "every so many": (dict(model_type="new", full_attention_interval=2), "--layers 1,3 "),
    "period and offset": (dict(model_type="new", attn_layer_period=4, attn_layer_offset=2), "--layers 2 "),
    "indices": (dict(model_type="new", full_attn_idxs=[0, 2]), "--layers 0,2 "),
    "phi": (PHI | dict(sliding_window=[None, 8, None, None]), r"--layers 3 --tensors 'Wqkv\.weight' --rows qk"),
    "plamo": (dict(model_type="plamo2", full_attention_idx=[1]), r"--layers 1 --tensors 'qkv_proj\.weight' --rows qk"),
    "a window in all of them": (dict(model_type="samba", attn=dict(layers=[1, 3], window_size=8)), "as in --layers 3,7"),
    "nothing": (dict(model_type="llama"), "as in --layers 3,7"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_refusal_proposes_what_to_type(tmp_path, name):
    config, words = SAID[name]
    config = dict(num_hidden_layers=4) | config
    assert proposal(config).startswith(words)
    pre, post = (write_checkpoint(tmp_path / n, s, config=config) for n, s in (("pre", 1), ("post", 2)))
    for call in (lambda: plan(pre, post), lambda: inspect_checkpoint(post), lambda: compare(pre, post), lambda: qk_pro(pre, post, out=tmp_path / "out")):
        with pytest.raises(CheckpointError) as e: call()
        assert "is not a known family" in str(e.value) and str(e.value).endswith(proposal(config)) and len(str(e.value)) <= 160


def test_the_proposal_can_be_typed(tmp_path, capsys):
    from qkrestore_nb.cli import main
    config = hypenet_config(model_type="new", architectures=[], layer_types=["linear_attention", "full_attention", "full_attention", "linear_attention"])
    pre, post = (write_checkpoint(tmp_path / n, s, config=config) for n, s in (("pre", 1), ("post", 2)))
    words = re.fullmatch(r"--layers (\S+) --tensors '(\S+)'", proposal(config))
    for command in (["restore", pre, post, tmp_path / "out"], ["inspect", post], ["inspect", post, pre], ["restore", pre, post, "--dry-run"]):
        with pytest.raises(SystemExit) as end: main([*map(str, command), "--layers", words[1], "--tensors", words[2]])
        assert not end.value.code and "layers.1.self_attn.q_proj" in capsys.readouterr().out or command[2:] == [post, tmp_path / "out"]
    assert rows_of(load(post), load(pre), load(tmp_path / "out")).keys() == set(QK)


# ---- quantized, unmerged, sharded: told by name

SCHEMES = {"fp8": ("weight_scale_inv", "float8_e4m3fn"), "compressed": ("weight_packed", "int32"), "awq": ("qweight", "int32"), "bnb": ("weight.absmax", "uint8"), "quanto": ("weight._data", "int8"), "int8": ("SCB", "int8"),
           "hqq": ("W_q", "uint8"), "aqlm": ("codes", "int8")}


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_is_named_before_shapes_are_compared(tmp_path, scheme, side):
    suffix, dtype = SCHEMES[scheme]
    weights, stays = tensors(2), scheme in ("fp8", "bnb", "int8")
    for n in QK:
        w = weights.pop(n)
        weights[n.removesuffix("weight") + suffix] = torch.zeros(3, 2, dtype=torch.int32).to(getattr(torch, dtype))
        if stays: weights[n] = torch.zeros(w.shape[0], 2).to(getattr(torch, dtype))
    folders = {n: write_checkpoint(tmp_path / n, 1, weights=weights if n == side else None) for n in ("pre", "post")}
    with pytest.raises(CheckpointError, match="quantized"): plan(folders["pre"], folders["post"])
    dicts = {n: weights if n == side else tensors(1) for n in folders}
    with pytest.raises(CheckpointError, match=f"{side}.*quantized"): plan(dicts["pre"], dicts["post"], config=hypenet_config())


def test_a_scheme_that_hides_behind_its_shape(tmp_path):
    "No scales beside the weight, the same dtype: the config says it."
    weights = tensors(2) | {n: tensors(2)[n][:, :4].contiguous() for n in QK}
    pre = write_checkpoint(tmp_path / "pre", 1)
    post = write_checkpoint(tmp_path / "post", 2, weights=weights, config=hypenet_config(quantization_config={"quant_method": "newq"}))
    with pytest.raises(CheckpointError, match="post is quantized .newq., restore before quantizing"): plan(pre, post)
    left = write_checkpoint(tmp_path / "left", 2, config=hypenet_config(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]}))
    assert len(plan(pre, left)) == 4  # what is not converted can be restored


@pytest.mark.parametrize("inside", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_wrappers_inside_of_layers_are_looked_through(tmp_path, inside):
    post = {re.sub(r"layers\.(\d)\.", rf"layers.\1.{inside}.", n): w for n, w in tensors(2).items()}
    fixed = qk_restore(tensors(1), post, config=hypenet_config())
    assert fixed.keys() == post.keys() and all(torch.equal(fixed[re.sub(r"layers\.(\d)\.", rf"layers.\1.{inside}.", n)], tensors(1)[n]) for n in QK)
    pre, folder = write_checkpoint(tmp_path / "pre", 1), write_checkpoint(tmp_path / "post", 2, weights=post)
    assert len(plan(pre, folder)) == 4 and len(plan(pre, folder, layers=[1], tensors=r"1\.self_attn\.q_proj")) == 1
    assert qk_restore(pre, folder, out=tmp_path / "out")


def test_adapters_that_were_not_merged(tmp_path):
    peft = pytest.importorskip("peft")
    from test_adapters_hub import base
    pre, post = base(), peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="post holds an adapter that is not merged.*merge_and_unload"): qk_restore(pre, post)
    other = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(CheckpointError, match="not merged"): qk_restore(pre, other)
    folder = write_checkpoint(tmp_path / "post", 2, weights={n.replace("q_proj.", "q_proj.base_layer."): w for n, w in tensors(2).items()})
    with pytest.raises(CheckpointError, match="post holds an adapter that is not merged"): plan(write_checkpoint(tmp_path / "pre", 1), folder)
    with torch.no_grad():
        for n, p in post.named_parameters(): p.add_(torch.randn(p.shape) * ("lora" in n))
    assert qk_restore(pre, post.merge_and_unload())


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_training_leaves_in_memory(one_process):
    from test_restore import models
    pre, post = models()
    ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(post))
    with pytest.raises(CheckpointError, match="wrapped .DistributedDataParallel.: pass post.module"): qk_restore(pre, ddp)
    assert qk_restore(pre, ddp.module)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    sharded = fully_shard(copy.deepcopy(post), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(CheckpointError, match="sharded over processes"): qk_restore(pre, sharded)
    with pytest.raises(CheckpointError, match="pre is sharded over processes"): qk_restore(sharded, post)
    with pytest.raises(CheckpointError, match="sharded over processes"): qk_restore(pre.state_dict(), sharded.state_dict(), config=pre.config)


def test_stand_ins_for_what_needs_gpus():
    "FSDP, DeepSpeed and offloaded models, by what they are known by."
    from test_restore import models
    pre, post = models()
    class FullyShardedDataParallel(torch.nn.Module):
        def __init__(self, module): super().__init__(); self.module, self.config = module, module.config
    class DeepSpeedEngine(FullyShardedDataParallel): pass
    with pytest.raises(CheckpointError, match="sharded by FSDP.*FULL_STATE_DICT"): qk_restore(pre, FullyShardedDataParallel(post))
    with pytest.raises(CheckpointError, match="pass post.module.*ZeRO-3"): qk_restore(pre, DeepSpeedEngine(post))
    zero3 = {n: w.clone() for n, w in post.state_dict().items()}
    for w in zero3.values(): w.ds_id = 1
    with pytest.raises(CheckpointError, match="ZeRO-3"): qk_restore(pre.state_dict(), zero3, config=pre.config)
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(copy.deepcopy(post), execution_device="cpu")
    with pytest.raises(CheckpointError, match="offloaded by accelerate.*without device_map"): qk_restore(pre, offloaded)


# ---- folders that are something else

def folder(tmp_path, **files):
    tmp_path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


CONFIG = json.dumps(hypenet_config())
ELSE = {
    "ZeRO": ({"config.json": CONFIG, "zero_to_fp32.py": "", "latest": "global_step5", "global_step5/x.pt": ""}, "zero_to_fp32.py"),
    "ZeRO without config": ({"zero_to_fp32.py": "", "global_step5/x.pt": ""}, "DeepSpeed"),
    "FSDP": ({"config.json": CONFIG, "pytorch_model_fsdp_0/__0_0.distcp": "", "pytorch_model_fsdp_0/.metadata": ""}, "accelerate merge-weights .*pytorch_model_fsdp_0"),
    "FSDP without config": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "merge-weights"),
    "DCP": ({"config.json": CONFIG, "__0_0.distcp": "", ".metadata": ""}, "merge-weights"),
    "GGUF": ({"config.json": CONFIG, "model-q4.gguf": ""}, "GGUF"),
    "shards without index": ({"config.json": CONFIG, "model-00001-of-00002.safetensors": "", "model-00002-of-00002.safetensors": ""}, "no model.safetensors.index.json"),
    "another name": ({"config.json": CONFIG, "model.fp16.safetensors": ""}, "model.fp16.safetensors: rename"),
    "yet another name": ({"config.json": CONFIG, "pytorch_model.safetensors": ""}, "rename"),
    "a run": ({"checkpoint-500/config.json": CONFIG, "checkpoint-1000/config.json": CONFIG, "x.txt": ""}, "give one of them, as .*checkpoint-1000"),
    "the parent of an adapter": ({"mine/adapter_config.json": "{}", "x.txt": ""}, "has an adapter in it, mine: give"),
    "pickled": ({"config.json": CONFIG, "pytorch_model.bin": ""}, "pickled"),
    "nothing": ({"config.json": CONFIG}, "still downloading"),
}


@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("name", ELSE)
def test_a_folder_is_named_for_what_it_is(tmp_path, name, which):
    files, words = ELSE[name]
    good, strange = write_checkpoint(tmp_path / "good", 1), folder(tmp_path / "it", **files)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=words) as e: qk_restore(*((strange, good) if which == "pre" else (good, strange)), out=tmp_path / "out")
    assert str(e.value).count("\n") == 0 and snapshot(tmp_path) == before


def test_an_optimizer_beside_the_weights_is_told(pair, tmp_path):
    (pair[1] / "optimizer.pt").write_text("")
    with pytest.warns(UserWarning, match="do not resume training of the result"): qk_restore(*pair, out=tmp_path / "out")


# ---- QK-Pro has everything that the restore has

def test_qk_pro_has_every_check_of_the_restore(tmp_path):
    pre, post = (write_checkpoint(tmp_path / n, s, dtype="float32") for n, s in (("pre", 1), ("post", 2)))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="the same bytes"): qk_pro(pre, write_checkpoint(tmp_path / "again", 1, dtype="float32"), out=out)
    with pytest.raises(CheckpointError, match="quantized"): qk_pro(pre, write_checkpoint(tmp_path / "fp8", 2, weights=tensors(2, "float32") | {QK[0] + "_scale_inv": torch.zeros(1)}), out=out)
    (pre / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match="swapped"): qk_pro(pre, post, out=out)
    told = []
    qk_pro(pre, post, out=tmp_path / "told", progress=told.append, include="norms")
    assert sum(told) == sum(p.stat().st_size for p in post.rglob("*") if p.is_file())
    with pytest.raises(CheckpointError, match="needs one of each"): qk_pro(pre, post, out=tmp_path / "x", layers=[1], tensors="q_proj")
    half = write_checkpoint(tmp_path / "half", 2, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="--cast"): qk_pro(pre, half, out=tmp_path / "x")
    assert qk_pro(pre, half, out=tmp_path / "x", cast=True)
    config = {"model_type": "jet_nemotron", "num_hidden_layers": 4, "layer_types": ["jet", "attn", "swa", "jet"], "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    jet = [write_checkpoint(tmp_path / f"jet{s}", s, config=config, dtype="float32") for s in (1, 2)]
    got = load(qk_pro(*jet, out=tmp_path / "swa", layers="softmax+swa"))
    assert rows_of(load(jet[1]), got, got).keys() == set(QK)


@pytest.mark.parametrize("form", [dict(), dict(per="kv_head"), dict(space="head")])
def test_qk_pro_by_hand_and_by_heads(tmp_path, form):
    pre, post = tensors(1, "float32"), tensors(2, "float32")
    want = qk_pro(pre, post, config=hypenet_config(), lam=.1, **form)
    hand = qk_pro(pre, post, config=hypenet_config(model_type="new", architectures=[]), lam=.1, layers=[1, 2], tensors=r"[qk]_proj\.weight", **form)
    assert all(torch.equal(want[n], hand[n]) for n in want)
    one = qk_pro(pre, post, config=hypenet_config(), lam=.1, heads=[1], **form)
    q = NAME.format(1, "q")
    assert torch.equal(one[q][:4], post[q][:4]) and torch.allclose(one[q][4:], want[q][4:], atol=1e-5)
    assert torch.equal(one[NAME.format(1, "k")], pre[NAME.format(1, "k")])  # one key head for both


@pytest.mark.parametrize("form", [dict(per="kv_head"), dict(space="head")])
def test_heads_that_share_key_heads_unevenly(form):
    "Query heads 0, 1 and 2 of four read key heads 0, 0 and 1: each must be what a solve of all four gives it."
    config = hypenet_config(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    g = lambda s: {n: torch.randn(4 if "k_proj" in n else 8, 8, generator=torch.Generator().manual_seed(s + len(n) + int(n[13]))) for i in range(4) for r in "qk" for n in [NAME.format(i, r)]}
    pre, post = g(1), g(50)
    whole, some = (qk_pro(pre, post, config=config, lam=.1, **form, **kw) for kw in ({}, dict(heads=[0, 1, 2])))
    q = NAME.format(1, "q")
    assert torch.allclose(some[q][:6], whole[q][:6], atol=1e-5) and torch.equal(some[q][6:], post[q][6:]) and not torch.equal(some[q][:6], post[q][:6])


def test_qk_pro_leaves_the_gate_of_a_gated_projection():
    pre, post = (model("qwen3_next", CASES["qwen3_next"][0], s).float() for s in (1, 2))
    got, copied = qk_pro(pre, post, lam=0., space="head").state_dict(), qk_restore(pre, post).state_dict()
    assert all(torch.allclose(got[n], copied[n], atol=1e-5) for n in got)


def test_a_solve_is_written_in_several_pieces(tmp_path):
    "A matrix of more numbers than a file is written at once."
    config = hypenet_config(hidden_size=512, num_attention_heads=2, num_key_value_heads=1, head_dim=512)
    def weights(seed):
        g = torch.Generator().manual_seed(seed)
        return {NAME.format(i, r): torch.randn(1024 if r == "q" else 512, 512, generator=g) for i in (1, 2) for r in "qk"}
    pre, post = (write_checkpoint(tmp_path / n, s, config=config, weights=weights(s)) for n, s in (("pre", 1), ("post", 2)))
    got, want = load(qk_pro(pre, post, out=tmp_path / "out", lam=.1)), qk_pro(weights(1), weights(2), config=config, lam=.1)
    assert all(torch.equal(got[n], want[n]) for n in want)

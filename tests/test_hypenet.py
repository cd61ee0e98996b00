"Parity with the public reference implementation, on tiny checkpoints with its inputs and outputs; padding; transformers' ways."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM, document_borders, document_groups

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(params=["tiny-a", "tiny-c"])
def golden(request):
    folder = GOLDENS / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_hidden_states(golden, attention):
    model, g, _ = golden
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out = model(g["input_ids"], output_hidden_states=True)
        long = model(g["long.input_ids"]).logits
    assert_close(out.logits, g["logits"], atol=5e-5, rtol=0)
    assert_close(long, g["long.logits"], atol=5e-5, rtol=0)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for i, h in enumerate(out.hidden_states): assert_close(h, g[f"hidden.{i}"], atol=5e-5, rtol=0)


def test_loss_and_gradients(golden):
    model, g, meta = golden
    loss = model(g["input_ids"], labels=g["labels"], use_cache=False).loss
    assert_close(loss, g["loss"], atol=5e-5, rtol=0)
    loss.backward()
    ours = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    assert ours.keys() == meta["grad_norms"].keys()
    for name, norm in meta["grad_norms"].items(): assert ours[name] == pytest.approx(norm, rel=1e-5), name


def test_prefill_and_decode(golden):
    model, g, _ = golden
    with torch.no_grad():
        out = model(g["input_ids"][:, :24], use_cache=True)
        assert_close(out.logits, g["prefill.logits"], atol=5e-5, rtol=0)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1)
        for i, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention":
                assert_close(cache.layers[i].recurrent_states[0], g[f"prefill.cache.{i}.state"], atol=2e-4, rtol=0)
            else:
                assert_close(cache.layers[i].keys, g[f"prefill.cache.{i}.key"], atol=5e-5, rtol=0)
                assert_close(cache.layers[i].values, g[f"prefill.cache.{i}.value"], atol=5e-5, rtol=0)
        for i in range(8):
            assert token.tolist() == g["decode.ids"][:, i].tolist()
            out = model(token[:, None], past_key_values=cache, use_cache=True)
            assert_close(out.logits[:, -1], g["decode.logits"][:, i], atol=5e-5, rtol=0)
            token = out.logits[:, -1].argmax(-1)
        for i, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention":
                assert_close(cache.layers[i].recurrent_states[0], g[f"decode.cache.{i}.state"], atol=2e-4, rtol=0)


def test_generate_is_greedy_decoding(golden):
    model, g, _ = golden
    out = model.generate(g["input_ids"][:, :24], attention_mask=torch.ones(2, 24, dtype=torch.long), max_new_tokens=8,
                         do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[:, 24:].tolist() == g["decode.ids"].tolist()


def _tiny(**fields):
    torch.manual_seed(0)
    config = HypeNetConfig(**{**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=8, mixer_types=["lightning-attn", "attn", "attn", "lightning-attn"],
                                     attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="hype 50",
                                     lightning_use_qk_norm=True, lightning_use_output_norm=True, lightning_use_output_gate=True), **fields})
    model = HypeNetForCausalLM(config).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)  # default weights are too small to show a mistake
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, conv, attention):
    model = _tiny(lightning_use_short_conv=conv)  # no pad_token_id: the pad row of the embedding is not zero
    model.set_attn_implementation(attention)
    ids, pad = torch.randint(1, 64, (1, 90)), 13
    padded, mask = torch.zeros(2, 90 + pad, dtype=torch.long), torch.zeros(2, 90 + pad, dtype=torch.long)
    where = slice(pad, None) if side == "left" else slice(0, 90)
    padded[0, where], mask[0, where], padded[1], mask[1] = ids[0], 1, torch.randint(1, 64, (90 + pad,)), 1
    with torch.no_grad():
        alone, batch = model(ids).logits, model(padded, attention_mask=mask).logits
    assert_close(batch[0, where], alone[0], atol=1e-5, rtol=0)


def test_left_padded_generation():
    model = _tiny(lightning_use_short_conv=True)
    ids = torch.randint(1, 64, (1, 40))
    padded, mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1), torch.tensor([[0] * 9 + [1] * 40])
    keep = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **keep)[:, 40:]
    assert model.generate(padded, attention_mask=mask, **keep)[:, 49:].tolist() == alone.tolist()


@pytest.mark.parametrize("fields", [{}, dict(lightning_use_short_conv=True), dict(attn_use_rope=True, attn_logits_scaling=2),
                                    dict(lightning_head_dim=16, lightning_nh=3, lightning_nkv=1), dict(tie_word_embeddings=True, attention_bias=True)])
def test_saved_loads_and_decodes_the_same(tmp_path, fields):
    model, ids = _tiny(**fields), torch.randint(1, 64, (2, 100))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert json.loads((tmp_path / "config.json").read_text())["mixer_types"] == model.config.mixer_types
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(again(ids).logits, whole, atol=0, rtol=0)
        head = again(ids[:, :70], use_cache=True)
        parts = [head.logits]
        for a, b in ((70, 97), (97, 98), (98, 100)):
            parts.append(again(ids[:, a:b], past_key_values=head.past_key_values, use_cache=True).logits)
    assert_close(torch.cat(parts, 1), whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize("fields, word", [(dict(mixer_types=["attn", "mamba", "attn", "attn"]), "mamba"), (dict(mixer_types=["attn"]), "num_hidden_layers"),
                                          (dict(num_key_value_heads=3), "3 key heads"), (dict(attn_logits_scaling="yarn 4"), "yarn"),
                                          (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn")])
def test_a_config_that_cannot_be(fields, word):
    with pytest.raises(ValueError, match=word): _tiny(**fields)


@pytest.mark.parametrize("size, parameters, qk", [("2B", "1.926", "44.0"), ("5B", "4.825", "118.0"), ("9B", "8.852", "188.7")])
def test_presets_have_the_published_counts(size, parameters, qk):
    with torch.device("meta"): model = HypeNetForCausalLM(HypeNetConfig.preset(size))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f}" == parameters
    softmax = [layer.self_attn for kind, layer in zip(model.config.layer_types, model.model.layers) if kind == "full_attention"]
    assert f"{sum(m.q_proj.weight.numel() + m.k_proj.weight.numel() for m in softmax) / 1e6:.1f}" == qk


@pytest.mark.parametrize("model_type", ["hypenet", "hybrid"])
def test_the_published_naming_of_the_2b(tmp_path, model_type):
    model = _tiny()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    theirs = json.loads(file.read_text()) | {"model_type": model_type, "architectures": ["HybridForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_hybrid.HybridConfig", "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM"},
        "gdn_nh": None, "kda_head_dim": 64, "expand_kv_proj": False, "lightning_rope_scaling": None}
    file.write_text(json.dumps(theirs))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # no trust_remote_code, and no question asked
    assert isinstance(again, HypeNetForCausalLM) and again.config.kda_head_dim == 64
    ids = torch.randint(1, 64, (1, 20))
    with torch.no_grad(): assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again/config.json").read_text())
    name = type(again.config).__name__.removesuffix("Config")  # its code went along in place of theirs
    assert saved["auto_map"]["AutoModelForCausalLM"] == f"hypenet.{name}ForCausalLM" and (tmp_path / "again/hypenet.py").is_file()
    assert saved["kda_head_dim"] == 64 and "base_model_tp_plan" not in saved


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("borders_as", ["position_ids", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(conv, attention, borders_as):
    model, lengths = _tiny(lightning_use_short_conv=conv), (70, 1, 3, 64, 21)
    model.set_attn_implementation(attention)
    documents = [torch.randint(1, 64, (1, n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    how = dict(position_ids=positions)
    if borders_as == "cu_seq_lens": how |= dict(cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0))
    packed = model(torch.cat(documents, 1), **how)  # use_cache is on by default and must not bring the leak back
    assert packed.past_key_values is None
    alone = torch.cat([model(d).logits for d in documents], 1)
    assert_close(packed.logits, alone, atol=2e-5, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), list(model.parameters())) for x in (packed.logits, alone)]
    for a, b in zip(*grads): assert_close(a, b, atol=1e-4 * b.abs().max().item() + 1e-6, rtol=0)


def test_documents_are_grouped_by_length():
    "Every token stands once in its own document's row, in order; padding at most doubles what is read; two packed rows at once are two packed rows."
    lengths = torch.tensor([1, 200, 3, 70, 64, 65, 1, 96])
    documents = torch.arange(8).repeat_interleave(lengths).view(2, 250)  # the third document is cut by the end of the first row
    padded, borders = document_borders(documents)
    assert borders == [0, 1, 201, 204, 250, 274, 338, 403, 404, 500] and padded.tolist() == borders + [500] * (257 - len(borders))
    groups = document_groups(borders, "cpu")
    tokens = torch.cat([places.flatten()[real] for places, real in groups])
    assert tokens.sort().values.tolist() == list(range(500)) and sum(places.numel() for places, _ in groups) <= 2 * 500
    row = torch.arange(500) // 250
    for places, real in groups:
        own = torch.zeros(places.numel(), dtype=torch.bool).index_fill(0, real, True).view(places.shape)
        for line, mine in zip(places, own):
            assert mine[0] and (line[mine].diff() == 1).all() and len(documents.flatten()[line].unique()) == 1 and len(row[line].unique()) == 1
    model = _tiny()
    positions = torch.cat([torch.arange(n) for n in (1, 200, 3, 46, 24, 64, 65, 1, 96)]).view(2, 250)
    ids = torch.randint(1, 64, (2, 250))
    both = model(ids, position_ids=positions, use_cache=False).logits
    for i in range(2): assert_close(both[i:i + 1], model(ids[i:i + 1], position_ids=positions[i:i + 1], use_cache=False).logits, atol=2e-5, rtol=0)


def test_packed_documents_want_no_cache():
    model, ids = _tiny(), torch.randint(1, 64, (1, 12))
    from transformers import DynamicCache
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=torch.arange(6).repeat(2)[None], past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("conv", [False, True])
def test_static_cache_prefill_in_pieces_and_decode(conv):
    from transformers import StaticCache
    from qkrestore_nb.hypenet import prefill
    model, ids = _tiny(lightning_use_short_conv=conv), torch.randint(1, 64, (2, 60))
    with torch.no_grad():
        whole, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=60)
        last, _ = prefill(model, ids[:, :50], 16, cache)
        assert_close(last, whole[:, 49:50], atol=5e-5, rtol=0)
        for t in range(50, 60): assert_close(model(ids[:, t:t + 1], past_key_values=cache).logits, whole[:, t:t + 1], atol=5e-5, rtol=0)
        with pytest.raises(ValueError, match="room for 60 tokens and 61"): model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("ways", [dict(), dict(num_beams=3), dict(cache_implementation="static"), dict(prefill_chunk_size=7)])
def test_ways_to_generate_agree(ways, conv):
    model, ids = _tiny(lightning_use_short_conv=conv), torch.randint(1, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    keep = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    if "num_beams" in ways: reference = model.generate(ids, use_cache=False, num_beams=3, **keep)
    else: reference = model.generate(ids, use_cache=False, **keep)
    assert model.generate(ids, **keep, **ways).tolist() == reference.tolist()


def test_gradient_checkpointing_changes_nothing():
    model, ids = _tiny().train(), torch.randint(1, 64, (2, 70))
    grads = []
    for on in (False, True):
        if on: model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids, use_cache=False).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads): assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_the_training_step_compiles_in_one_graph(packed):
    model, ids = _tiny(lightning_use_short_conv=True).train(), torch.randint(1, 64, (2, 128))
    how = dict(labels=ids, use_cache=False) | (dict(position_ids=torch.arange(64).repeat(2).expand(2, -1)) if packed else {})
    step = torch.compile(lambda **x: model(**x).loss, fullgraph=True, backend="aot_eager")
    losses = [f(input_ids=ids, **how) for f in (lambda **x: model(**x).loss, step)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert_close(*losses)
    for a, b in zip(*grads): assert_close(a, b, atol=1e-4 * a.abs().max().item() + 1e-6, rtol=1e-3)


def test_decoding_in_a_static_cache_compiles_in_one_graph():
    from transformers import StaticCache
    model, ids = _tiny(), torch.randint(1, 64, (2, 40))
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        whole, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=48)
        model(ids[:, :30], past_key_values=cache)
        for t in range(30, 40): assert_close(step(input_ids=ids[:, t:t + 1], past_key_values=cache).logits, whole[:, t:t + 1], atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, .15), (torch.float16, .02)])
def test_half_precision(dtype, error):
    model, ids = _tiny(), torch.randint(1, 64, (2, 100))
    with torch.no_grad():
        exact = model(ids).logits
        half = model.to(dtype)(ids).logits.float()
    assert (half - exact).norm() / exact.norm() < error


def test_float16_sums_of_the_linear_layers_do_not_overflow():
    model, ids = _tiny(), torch.full((1, 1500), 7)  # the same token again and again: the state adds it up
    layer = model.model.layers[0].self_attn
    layer.v_proj.weight.data *= 300
    for norm in (layer.q_norm, layer.k_norm): norm.weight.data.fill_(3)
    seen = []
    layer.o_norm.register_forward_pre_hook(lambda m, x: seen.append(x[0].float().abs().max().item()))
    with torch.no_grad():
        exact = model(ids).logits
        half = model.half()(ids).logits.float()
    assert seen[-1] > 65504, "this test must reach what float16 cannot hold"
    assert half.isfinite().all() and (half - exact).norm() / exact.norm() < .02


def test_padding_in_the_middle_is_refused():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="row 1 .* padding between tokens"): _tiny()(torch.randint(1, 64, (2, 10)), attention_mask=mask)


def test_contradicting_layer_lists():
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    assert _tiny(layer_types=kinds).config.layer_types == kinds
    with pytest.raises(ValueError, match="contradict"): _tiny(layer_types=kinds[::-1] + ["full_attention"])


def test_device_map_offloads(tmp_path):
    model, ids = _tiny(), torch.randint(1, 64, (2, 30))
    model.save_pretrained(tmp_path)
    where = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head")}
    where |= {"model.layers.1": "disk", "model.layers.3": "disk"}
    again = HypeNetForCausalLM.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "off")
    with torch.no_grad(): assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)


@pytest.mark.slow
def test_tensor_parallel_on_two_processes(tmp_path):
    import socket, subprocess, sys
    model, ids = _tiny(), torch.arange(1, 31)[None]
    model.save_pretrained(tmp_path)
    with torch.no_grad(): torch.save(model(ids).logits, tmp_path / "logits.pt")
    script = tmp_path / "run.py"
    script.write_text(f"""
import torch
from qkrestore_nb.hypenet import HypeNetForCausalLM
model = HypeNetForCausalLM.from_pretrained({str(tmp_path)!r}, tp_plan="auto").eval()
split = model.model.layers[1].mlp.up_proj.weight
assert getattr(split, "to_local", lambda: split)().shape[0] == 24, split.shape
with torch.no_grad(): logits = model(torch.arange(1, 31)[None]).logits
torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), atol=2e-5, rtol=0)
print("same")
""")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", str(script)],
                         capture_output=True, text=True, timeout=300, env={**__import__("os").environ, "OMP_NUM_THREADS": "1"})
    assert out.stdout.count("same") == 2, out.stderr[-2000:]


def test_the_choice_of_kernels_is_a_constant_to_the_compiler(monkeypatch):
    from qkrestore_nb import linear_attention as la
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    la._look_for_triton.cache_clear()
    try: step = torch.compile(lambda x: x + (1 if la._why_no_triton(torch.device("cuda", 0)) is None else 2), fullgraph=True, backend="eager")(torch.zeros(1))
    finally: la._look_for_triton.cache_clear()
    assert step.item() in (1, 2)  # with and without the kernels installed; a graph break would have raised


def test_a_backend_of_ones_own_choice(monkeypatch):
    from qkrestore_nb.linear_attention import pick_backend
    monkeypatch.setenv("QKRESTORE_BACKEND", "quadratic")
    assert pick_backend(1000, torch.device("cpu"))[0] == "quadratic"
    model, ids = _tiny(), torch.randint(1, 64, (1, 80))
    with torch.no_grad(): a = model(ids).logits
    monkeypatch.setenv("QKRESTORE_BACKEND", "recurrent")
    with torch.no_grad(): assert_close(model(ids).logits, a, atol=2e-5, rtol=0)
    monkeypatch.setenv("QKRESTORE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="choose one of recurrent"): pick_backend(1000, torch.device("cpu"))


def test_missing_kernels_say_what_to_install():
    from importlib.util import find_spec
    from qkrestore_nb.linear_attention import fla_kernels
    if find_spec("fla"): pytest.skip("flash-linear-attention is installed here")
    with pytest.raises(ImportError, match="qkrestore_nb\\[gpu\\]"): fla_kernels()


def test_the_activation_behind_the_short_convolution(tmp_path):
    "None is no activation, saved and loaded as null; SiLU is the default and what the reference has; they are different models."
    ids, logits = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(0)), {}
    for activation in ("silu", None):
        model = _tiny(lightning_use_short_conv=True, lightning_conv_activation=activation)
        model.save_pretrained(tmp_path / str(activation))
        assert json.loads((tmp_path / str(activation) / "config.json").read_text())["lightning_conv_activation"] == activation
        again = HypeNetForCausalLM.from_pretrained(tmp_path / str(activation)).eval()
        assert again.config.lightning_conv_activation == activation
        with torch.no_grad():
            logits[activation] = model(ids).logits
            assert_close(again(ids).logits, logits[activation], atol=0, rtol=0)
    default = _tiny(lightning_use_short_conv=True)
    assert default.config.lightning_conv_activation == "silu"
    with torch.no_grad(): assert_close(default(ids).logits, logits["silu"], atol=0, rtol=0)
    assert (logits["silu"] - logits[None]).abs().max() > .1
    x = torch.randn(2, 3, 32)
    mixer = _tiny(lightning_use_short_conv=True, lightning_conv_activation=None).model.layers[0].self_attn
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    one = mixer.short_conv(q, k, v, None, None)
    for a, b in zip(mixer.short_conv(-2 * q, -2 * k, -2 * v, None, None), one): assert_close(a, -2 * b)  # nothing but linear


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_cache_says_what_the_whole_row_says_with_either_activation(activation):
    from transformers import DynamicCache
    model, ids = _tiny(lightning_use_short_conv=True, lightning_conv_activation=activation), torch.randint(1, 64, (2, 45))
    with torch.no_grad():
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        assert_close(model(ids[:, :20], past_key_values=cache).logits, whole[:, :20], atol=5e-5, rtol=0)
        assert_close(model(ids[:, 20:30], past_key_values=cache).logits, whole[:, 20:30], atol=5e-5, rtol=0)
        for t in range(30, 45):
            assert_close(model(ids[:, t:t + 1], past_key_values=cache).logits, whole[:, t:t + 1], atol=5e-5, rtol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_padding_and_documents_with_either_activation(activation):
    model, ids = _tiny(lightning_use_short_conv=True, lightning_conv_activation=activation), torch.randint(1, 64, (1, 50))
    padded, mask = torch.cat([torch.full((1, 7), 9), ids], 1), torch.tensor([[0] * 7 + [1] * 50])
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        assert_close(model(padded, attention_mask=mask).logits[:, 7:], model(ids).logits, atol=5e-5, rtol=0)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for where in (slice(0, 20), slice(20, 50)): assert_close(packed[:, where], model(ids[:, where]).logits, atol=5e-5, rtol=0)


def test_an_unknown_activation_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="lightning_conv_activation 'swishy'") as e:
        _tiny(lightning_use_short_conv=True, lightning_conv_activation="swishy")
    assert len(str(e.value)) <= 160 and "null" in str(e.value)

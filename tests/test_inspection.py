"Inspect: the numbers against torch, whatever the family, and the layers that hold them."
import json

import pytest
import torch
from conftest import NAME, hypenet_config, tensors, write_checkpoint
from test_cli import call
from test_families import CASES, model

from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.inspection import compare, inspect_checkpoint, principal_angles, strip
from qkrestore_nb.moves import plan


@pytest.mark.parametrize("case", [c for c in CASES if "," not in c])
def test_every_family_can_be_looked_at(case, tmp_path):
    fields, choice, names = CASES[case]
    for seed, folder in ((1, "pre"), (2, "post")): model(case, fields, seed).save_pretrained(tmp_path / folder)
    seen = compare(tmp_path / "pre", tmp_path / "post", **choice)
    json.dumps(seen)
    assert sorted(r["tensor"] for r in seen["tensors"]) == sorted(names) and len(strip(seen["kinds"])) == fields["num_hidden_layers"]
    planned = {m.post: m.bytes for m in plan(tmp_path / "pre", tmp_path / "post", **choice)}
    assert {r["tensor"]: r["bytes"] for r in seen["tensors"]} == planned and seen["moved_bytes"] == sum(planned.values())
    assert all(.5 < r["drift"] < 3 for r in seen["tensors"])  # two independent random matrices
    drifts = [r["drift"] for r in seen["tensors"]]
    assert drifts == sorted(drifts, reverse=True)


def test_angles_against_torch():
    g = torch.Generator().manual_seed(0)
    for turn in (1e-6, 1e-3, .1, 10.):
        a = torch.randn(8, 64, generator=g, dtype=torch.float64)
        b = a + turn * torch.randn(8, 64, generator=g, dtype=torch.float64)
        basis = lambda w: torch.linalg.qr(w.T)[0]
        sines = torch.linalg.svdvals(basis(b) - basis(a) @ (basis(a).T @ basis(b)))
        got = torch.tensor(principal_angles(a.numpy(), b.numpy()).copy())
        assert torch.allclose(torch.deg2rad(got), torch.asin(sines.clamp(max=1)), rtol=1e-5, atol=1e-9) and (got.diff() <= 1e-9).all()


def test_nothing_moved_and_nothing_there(tmp_path):
    weights = {f"model.layers.{i}.self_attn.{r}_proj.weight": torch.zeros(8 if r in "qo" else 4, 8) for i in range(4) for r in "qkvo"}
    pre, post = (write_checkpoint(tmp_path / n, s, weights=weights) for n, s in (("pre", 1), ("post", 2)))
    assert [r["drift"] for r in compare(pre, post)["tensors"]] == [None] * 4  # no length to compare with
    same = compare(write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 1))
    assert [r["drift"] for r in same["tensors"]] == [0] * 4 and all(max(r["angles"]) < 1e-5 for r in same["tensors"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["pre", "post"])
def test_weights_that_are_no_numbers(tmp_path, capsys, value, which):
    "One sentence with the tensor's name, and no figure; without a second checkpoint nothing is measured."
    weights = tensors(2)
    weights[NAME.format(2, "k")][0, 0] = value
    broken, sound = write_checkpoint(tmp_path / "broken", 1, weights=weights), write_checkpoint(tmp_path / "sound", 3)
    words = [sound, broken] if which == "pre" else [broken, sound]
    for more in ([], ["--figure", tmp_path / "f.png"], ["--json"]):
        assert call("inspect", *words, *more) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"Error: {NAME.format(2, 'k')} of {which} holds NaN or inf") and err.count("\n") == 1 and not out
    assert not (tmp_path / "f.png").exists()
    assert call("inspect", broken, "--figure", tmp_path / "f.png") == 0 and (tmp_path / "f.png").stat().st_size


def test_bad_checkpoints(bad, tmp_path):
    paths, sentence = bad
    for which in ("pre", "post"):
        try: inspect_checkpoint(paths[which])
        except CheckpointError as e: assert "\n" not in str(e)


def test_latent_attention_is_shown_in_full(tmp_path):
    for seed, folder in ((1, "pre"), (2, "post")): model("kimi_linear", CASES["kimi_linear"][0], seed).save_pretrained(tmp_path / folder)
    seen = inspect_checkpoint(tmp_path / "post")
    assert seen["latent"] and any("kv_b_proj" in r["tensor"] and r["part"] for r in seen["tensors"])
    assert len(inspect_checkpoint(tmp_path / "post", mla="q_only")["tensors"]) == 2
    with pytest.raises(CheckpointError, match="mla="): inspect_checkpoint(write_checkpoint(tmp_path / "h", 1, config=hypenet_config()), mla="q_only")


def test_an_adapter_by_the_pattern_spares_q_and_k(tmp_path):
    "peft takes the pattern that inspect prints, on HypeNet and on a family with other names."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
    from conftest import small_hybrid
    from qkrestore_nb.inspection import inspect_checkpoint
    qwen = Qwen3NextConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=2,
                           num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
                           linear_key_head_dim=16, linear_value_head_dim=16)
    for name, model, held in (("hypenet", small_hybrid(), (1, 3)), ("qwen", Qwen3NextForCausalLM(qwen), (3,))):
        model.save_pretrained(tmp_path / name)
        pattern = inspect_checkpoint(tmp_path / name)["spare"]
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / name), LoraConfig(r=2, target_modules=pattern))
        got = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in adapted.named_parameters() if ".lora_A" in n}
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head" and (name == "hypenet" or ".mlp." not in n)}  # experts: peft's own way
        spared = {f"model.layers.{i}.self_attn.{p}_proj" for i in held for p in "qk"}
        assert spared <= linear and linear - spared <= got and not got & spared, (name, linear - spared - got, got & spared)

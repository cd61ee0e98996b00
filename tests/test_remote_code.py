"Checkpoints whose model code lies beside their weights: a tiny one of Jet-Nemotron's format from loading to the audit, and nothing run that was not let in."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import snapshot, write_sums
from test_cli import call
from test_finetune import launch

from qkrestore_nb import scale
from qkrestore_nb.audit import audit
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.finetune import finetune, training_needs
from qkrestore_nb.restore import qk_restore

CODE = Path(__file__).parent / "jet_nemotron"
FILES = {"config.json", "configuration_jet_nemotron.py", "modeling_jet_nemotron.py"}
SETTINGS = dict(steps=3, T=64, rows=2, lr=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A folder with pre/ (config.json and code as they are in tests/jet_nemotron, random weights), sums.jsonl, and post/."
    from conftest import small_tokenizer
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    folder = tmp_path_factory.mktemp("jet")
    shutil.copytree(CODE, folder / "pre", ignore=lambda _, names: set(names) - FILES)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "pre", trust_remote_code=True), trust_remote_code=True)
    save_file({k: t for k, t in model.state_dict().items() if k != "lm_head.weight"}, folder / "pre" / "model.safetensors", metadata=dict(format="pt"))
    small_tokenizer().save_pretrained(folder / "pre")
    write_sums(folder / "sums.jsonl", 60)
    finetune(folder / "pre", folder / "sums.jsonl", folder / "post", trust_remote_code=True, **SETTINGS)
    return folder


def test_the_format(base, tmp_path):
    "Names and shapes for the published 2B's numbers, and its size."
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    kinds = ["attn" if i in (14, 19) else "swa" if i in (20, 21) else "jet" for i in range(28)]
    jet = dict(conv_size=4, dconv_generator_reduction=8, expand_v=2.6666666667, head_dim=96, norm_eps="1e-5", num_heads=12)
    shutil.copytree(CODE, tmp_path / "2b")
    (tmp_path / "2b" / "config.json").write_text(json.dumps(json.loads((CODE / "config.json").read_text()) | dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, layer_types=kinds,
        efficient_attention_config=dict(jet=jet, swa=dict(window_size=1152)))))
    config = AutoConfig.from_pretrained(tmp_path / "2b", trust_remote_code=True)
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    shapes = {k.removeprefix("model.layers."): list(p.shape) for k, p in model.named_parameters()}
    for i in (14, 20): assert [shapes[f"{i}.self_attn.{x}"] for x in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.bias", "o_proj.weight")] == [[1536, 1536], [1536], [256, 1536], [256], [1536, 1536]]
    assert {k.removeprefix("0.self_attn."): s for k, s in shapes.items() if k.startswith("0.self_attn.")} == {
        "q_proj.weight": [1152, 1536], "k_proj.weight": [1152, 1536], "v_proj.weight": [3072, 1536], "g_proj.weight": [3072, 1536], "a_proj.weight": [12, 1536], "b_proj.weight": [12, 1536],
        "o_proj.weight": [1536, 3072], "A_log": [12], "dt_bias": [12], "o_norm.weight": [256],
        "dynamic_conv1d.kernel_generator.w1.weight": [192, 1536], "dynamic_conv1d.kernel_generator.w2.weight": [12288, 192], "dynamic_conv1d.kernel_generator.w2.bias": [12288]}
    n = scale.needs(config, 131072)
    assert n["parameters"] == pytest.approx(1.9e9, rel=.01) and n["kv_gb"] == pytest.approx(4 * 2 * 128 * 2 * (131072 + 1151) / 1e9)  # its cache keeps a window less one
    names = {name.split(".self_attn.")[1] for name in load_file(base / "pre" / "model.safetensors") if ".0.self_attn." in name}
    assert names == {k.removeprefix("0.self_attn.") for k in shapes if k.startswith("0.self_attn.")}


def test_its_model_is_one_model(base):
    "In pieces through the cache, with padding, and at once: the same."
    from transformers import DynamicCache

    from qkrestore_nb.hypenet import CACHE
    model, _ = scale.load(base / "pre", trust_remote_code=True)
    x = torch.randint(0, 1000, (1, 130), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model(x, use_cache=False).logits, DynamicCache(config=model.config)
        parts = [model(part, use_cache=True, **{CACHE: cache}).logits for part in x.split([50, 50, 1, 29], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-3)
    padded, mask = torch.cat([torch.ones(1, 7, dtype=torch.long), x[:, :60]], 1), (torch.arange(67) >= 7).long()[None]
    say = lambda ids, mask: model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
    assert say(padded, mask) == say(x[:, :60], mask[:, 7:])


def test_from_end_to_end(base, tmp_path):
    "Post has pre's format and its code, the restore moves Q and K of the one softmax layer, and all three are asked."
    from safetensors.torch import load_file
    restored = qk_restore(base / "pre", base / "post", out=tmp_path / "restored")
    a, b, c = (load_file(folder / "model.safetensors") for folder in (base / "pre", base / "post", restored))
    assert {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()} and not any(torch.equal(a[k], b[k]) for k in a if "proj.weight" in k)
    moved = {k for k in b if not torch.equal(b[k], c[k])}
    assert moved == {f"model.layers.1.self_attn.{r}_proj.weight" for r in "qk"} and all(torch.equal(a[k], c[k]) for k in moved)
    for folder in (base / "post", restored):
        for name in FILES - {"config.json"}: assert (folder / name).read_text() == (CODE / name).read_text()
        config, published = (json.loads((x / "config.json").read_text()) for x in (folder, CODE))
        assert all(config[k] == published[k] for k in ("auto_map", "layer_types", "efficient_attention_config", "architectures", "model_type"))
    log = json.loads((base / "post" / "finetune.json").read_text())["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    model, words = scale.load(restored, 1024, trust_remote_code=True)
    assert scale.needs(restored, 1024, trust_remote_code=True)["parameters"] == sum(p.numel() for p in model.parameters())
    assert scale.recall(model, words, dict(multikey_1=[(512, 1, 2)]), room=4)["multikey_1"]["512"]["n"] == 2
    got = audit(base / "pre", base / "post", (1024,), 1, device="cpu", trust_remote_code=True)
    assert {(r["layer"], r["kind"]) for r in got["drift"]} == {(0, "linear"), (1, "softmax"), (2, "swa"), (3, "linear")} and got["verdict"] != "restore"


@pytest.mark.slow
def test_sharded_weights_have_their_code_too(base, tmp_path):
    "FSDP makes a class of its own of the model; what is saved is the model's."
    done = launch(base, "sharded", tmp_path / "post")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (tmp_path / "post").glob("*.py")} == FILES - {"config.json"}
    assert json.loads((tmp_path / "post" / "config.json").read_text())["auto_map"] == json.loads((CODE / "config.json").read_text())["auto_map"]


def test_nothing_runs_that_was_not_let_in(base, tmp_path):
    "One sentence from every way in, and its code leaves no trace, though the same process has let in another's; when it is let in, it does."
    shutil.copytree(base / "pre", tmp_path / "evil")
    file = tmp_path / "evil" / "configuration_jet_nemotron.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + file.read_text())
    ways = (lambda x: scale.needs(x), lambda x: scale.load(x), lambda x: training_needs(x), lambda x: finetune(x, base / "sums.jsonl", tmp_path / "post", **SETTINGS), lambda x: audit(x, base / "post", (512,), 1))
    for way in ways:
        with pytest.raises(CheckpointError, match="evil brings model code of its own: trust_remote_code=True") as e: way(tmp_path / "evil")
        assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["evil"]
    assert scale.needs(tmp_path / "evil", trust_remote_code=True) and (tmp_path / "ran").exists()


OLDER = """
class JetNemotronConfig(PreTrainedConfig):
    model_type = "jet_nemotron"
    def __init__(self, layer_types=(), num_hidden_layers=4, **fields):
        self.layer_types, self.num_hidden_layers = layer_types, num_hidden_layers
        super().__init__(**fields)
"""
CANNOT = {  # what is added to which file, and what the sentence says: kernels that are missing; a config that tells transformers its own words for layers, as was allowed once
    "lacking": ("modeling_jet_nemotron.py", "import no_such_kernels", "is no causal language model that transformers can build: .*no_such_kernels"),
    "older": ("configuration_jet_nemotron.py", OLDER, "is no checkpoint that transformers can read: .*`layer_types` entries must be")}


@pytest.mark.parametrize("name", CANNOT)
def test_code_that_cannot_run_here(base, tmp_path, name):
    "What is wrong with it is said in one sentence."
    file, line, says = CANNOT[name]
    shutil.copytree(base / "pre", tmp_path / name)
    with open(tmp_path / name / file, "a") as f: f.write(f"\n{line}\n")
    for way in (scale.needs, scale.load):
        with pytest.raises(CheckpointError, match=f"{name} {says}") as e: way(tmp_path / name, trust_remote_code=True)
        assert "\n" not in str(e.value)


def test_on_the_command_line(base, tmp_path, capsys):
    pre, post, before = base / "pre", tmp_path / "post", snapshot(base)
    for words in (["needs", pre], ["finetune", pre, base / "sums.jsonl", post], ["audit", pre, base / "post", "--lengths", "512", "--haystacks", "1"]):
        assert call(*words) == 2
        said = capsys.readouterr().err
        assert "(--trust-remote-code)" in said and said.count("\n") == 1 and not post.exists()
    trusted = lambda *words: call(*words, "--trust-remote-code")
    assert trusted("needs", pre, "--json") == 0 and json.loads(capsys.readouterr().out)["parameters"] == scale.needs(pre, trust_remote_code=True)["parameters"]
    assert trusted("finetune", pre, base / "sums.jsonl", post, "--steps", "2", "--tokens", "64", "--rows", "1", "--lr", "1e-3") == 0
    assert f"qkrestore audit {pre} {post} --trust-remote-code" in capsys.readouterr().out
    assert trusted("audit", pre, post, "--lengths", "1024", "--haystacks", "1", "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"].keys() == {"pre", "post", "restored"}
    assert snapshot(base) == before


# ---- the other way round: what is saved for HypeNet, opened by a process that cannot import this package

WITHOUT = """
import sys
class Refused:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "qkrestore_nb": raise ModuleNotFoundError("qkrestore_nb")
sys.meta_path.insert(0, Refused())
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, ids = sys.argv[1], torch.arange(1, 41).reshape(2, 20)
load = lambda auto, name, **more: auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True, **more).eval()
"""


def elsewhere(code: str, folder: Path, **more: str) -> str:
    "What a fresh process without the package prints, whose transformers has seen no code before."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_HOME=str(folder / "hub"), CUDA_VISIBLE_DEVICES="", **more)
    done = subprocess.run([sys.executable, "-c", WITHOUT + code, str(folder)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    "pre/ and post/ of our HypeNet, restored/ made of them, and what each says to one text."
    from conftest import small_hybrid, small_tokenizer
    folder, models = tmp_path_factory.mktemp("ours"), {}
    ids = torch.arange(1, 41).reshape(2, 20)
    for name, shift in (("pre", 0.), ("post", .01)):
        model = small_hybrid()
        with torch.no_grad():
            for p in model.parameters(): p += shift * torch.randn_like(p)
        model.save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
    qk_restore(folder / "pre", folder / "post", out=folder / "restored")
    for name in ("pre", "post", "restored"):
        model, _ = scale.load(folder / name, dtype=torch.float32)
        with torch.no_grad(): models[name] = model(ids).logits.double().sum().item()
    return folder, models


def test_hypenet_is_loaded_without_the_package(ours):
    "Equal logits from pre and from the restored folder in one process; saved again there, its code goes along again; every door opens."
    folder, expected = ours
    got = json.loads(elsewhere("""
found = {}
for name in ("pre", "restored"):
    model = load(AutoModelForCausalLM, name)
    with torch.no_grad(): found[name] = model(ids).logits.double().sum().item()
model.save_pretrained(f"{folder}/again")
with torch.no_grad(): found["again"] = load(AutoModelForCausalLM, "again")(ids).logits.double().sum().item()
found["doors"] = [type(load(AutoModel, "again")).__name__, type(load(AutoModelForSequenceClassification, "again", num_labels=3)).__name__]
found["text"] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1]
print(json.dumps(found))
""", folder).splitlines()[-1])
    assert got["doors"] == ["HypeNetModel", "HypeNetForSequenceClassification"] and got["text"] == 24
    assert got["pre"] == pytest.approx(expected["pre"], abs=1e-3) and got["again"] == got["restored"]
    assert got["restored"] == pytest.approx(expected["restored"], abs=1e-3) != pytest.approx(expected["pre"], abs=1e-3)
    code = {"hypenet.py", "linear_attention.py", "softmax_attention.py"}
    for name in ("pre", "restored", "again"): assert {p.name for p in (folder / name).glob("*.py")} == code
    saved = json.loads((folder / "again" / "config.json").read_text())["auto_map"]
    assert saved == json.loads((folder / "pre" / "config.json").read_text())["auto_map"] and len(saved) == 4


def test_the_code_that_goes_along_needs_little(ours):
    "Of each file of a hub repository transformers asks for all that is imported, inside functions too: only torch here."
    from transformers.dynamic_module_utils import get_imports
    folder, _ = ours
    needs = {name for path in (folder / "restored").glob("*.py") for name in get_imports(path)}
    assert needs - set(sys.stdlib_module_names) == {"torch", "transformers"}
    (folder / "wanting.py").write_text("def f():\n    from fla.ops import x\n")
    assert get_imports(folder / "wanting.py") == ["fla"]  # it would be seen


def test_hypenet_is_loaded_from_a_hub_repository(ours):
    "Not from a folder: transformers fetches and checks the files of code one by one."
    folder, expected = ours
    repo, commit = folder / "hub" / "hub" / "models--some--hypenet", "0" * 40
    shutil.copytree(folder / "restored", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    said = elsewhere("""
model = AutoModelForCausalLM.from_pretrained("some/hypenet", trust_remote_code=True).eval()
with torch.no_grad(): print(model(ids).logits.double().sum().item())
""".replace("import os\nos.environ[\"HF_HUB_OFFLINE\"] = \"1\"\n", ""), folder, HF_HUB_OFFLINE="1")
    assert float(said.splitlines()[-1]) == pytest.approx(expected["restored"], abs=1e-3)


def test_without_trust_it_is_refused_elsewhere(ours):
    "Nothing that lies in a folder runs without a word."
    folder, _ = ours
    said = elsewhere("""
try: AutoModelForCausalLM.from_pretrained(f"{folder}/pre", trust_remote_code=False)
except ValueError as e: print("refused", "trust_remote_code" in str(e))
""", folder)
    assert said.splitlines()[-1] == "refused True"


def test_here_the_package_is_taken(ours, tmp_path):
    "With the package imported its own classes load the folder, trusted or not, and what lies there does not run."
    from transformers import AutoModelForCausalLM

    from qkrestore_nb.hypenet import HypeNetForCausalLM
    shutil.copytree(ours[0] / "pre", tmp_path / "pre")
    with open(tmp_path / "pre" / "hypenet.py", "a") as f: f.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    for trusted in (False, True): assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "pre", trust_remote_code=trusted)) is HypeNetForCausalLM
    assert not (tmp_path / "ran").exists()


def test_trl_takes_a_path(ours):
    "SFTTrainer by path, in a process without the package."
    pytest.importorskip("trl")
    folder, _ = ours
    said = elsewhere("""
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
rows = Dataset.from_list([dict(prompt="1 and 2?", completion="3.")] * 4)
args = SFTConfig(f"{folder}/trl", max_steps=1, per_device_train_batch_size=2, max_length=32, report_to=[], use_cpu=True, save_strategy="no",
                 bf16=False, gradient_checkpointing=False, model_init_kwargs=dict(trust_remote_code=True))
trainer = SFTTrainer(model=f"{folder}/pre", args=args, train_dataset=rows)
trainer.train()
trainer.save_model(f"{folder}/trained")
print(type(load(AutoModelForCausalLM, "trained")).__name__, trainer.state.global_step)
""", folder)
    assert said.splitlines()[-1] == "HypeNetForCausalLM 1"

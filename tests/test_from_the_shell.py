"""Foreign commands on a HypeNet folder, in processes that do not import this package: lm_eval, trl sft, mergekit-yaml.

Four minutes, once a week: FOREIGN_TESTS=1 asks for lm_eval and trl, MERGEKIT=PATH/TO/mergekit-yaml for mergekit,
which wants an environment of its own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_hybrid, small_tokenizer
from safetensors.torch import load_file

from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.hub import mergekit_yaml
from qkrestore_nb.restore import qk_restore

CODE = {"hypenet.py", "linear_attention.py", "softmax_attention.py"}
TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["3.", "4."]
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
SFT = """model_name_or_path: {folder}/restored
trust_remote_code: true
datasets: [{{path: json, data_files: {data}, split: train}}]
output_dir: {folder}/trl
max_steps: 1
max_length: 32
report_to: none
use_cpu: true
bf16: false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "pre/, post/, restored/ as a user has them, sums.jsonl, and an empty cache."
    folder = tmp_path_factory.mktemp("shell")
    for name, shift in (("pre", 0.0), ("post", 0.01)):
        model = small_hybrid()
        with torch.no_grad():
            for p in model.parameters(): p += shift * torch.randn_like(p)
        model.save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
    qk_restore(folder / "pre", folder / "post", out=folder / "restored")
    rows = [dict(prompt="1 and 2?", completion="3.", right=0), dict(prompt="2 and 2?", completion="4.", right=1)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shell(command: str | Path, *words, cwd: Path):
    "A command as from a shell, without this package's folder on its path and without a network."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= dict(HF_HOME=str(cwd / "hub"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run([str(command), *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def script(name: str) -> Path:
    if os.environ.get("FOREIGN_TESTS") != "1": pytest.skip("FOREIGN_TESTS=1 asks for it")
    path = Path(sys.executable).parent / name
    return path if path.exists() else pytest.skip(f"{name} is not installed")


def test_lm_eval(folder):
    (folder / "task").mkdir()
    (folder / "task" / "sums.yaml").write_text(TASK.format(data=folder / "sums.jsonl"))
    what = ("--tasks", "sums", "--include_path", "task", "--device", "cpu", "--model", "hf", "--model_args")
    done = shell(script("lm_eval"), *what, f"pretrained={folder}/restored,trust_remote_code=True", cwd=folder)
    assert done.returncode == 0 and "|sums|" in done.stdout.replace(" ", ""), done.stderr[-3000:]


def test_trl_sft(folder):
    "It trains, and what it saves can be opened in its turn."
    config = folder / "sft.yaml"
    config.write_text(SFT.format(folder=folder, data=folder / "sums.jsonl"))
    done = shell(script("trl"), "sft", "--config", config, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert CODE <= {p.name for p in (folder / "trl").iterdir()}
    assert len(load_file(folder / "trl" / "model.safetensors")) > 20


@pytest.fixture
def mergekit() -> Path:
    return Path(os.environ.get("MERGEKIT") or pytest.skip("MERGEKIT does not name a mergekit-yaml")).absolute()


def test_mergekit_makes_the_same(folder, mergekit):
    "The recipe's result is `qk_restore`'s, bit for bit, and carries its code."
    (folder / "recipe.yaml").write_text(mergekit_yaml(folder / "pre", folder / "post"))
    done = shell(mergekit, "recipe.yaml", "merged", "--trust-remote-code", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (load_file(folder / name / "model.safetensors") for name in ("merged", "restored"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert CODE <= {p.name for p in (folder / "merged").iterdir()}


def test_mergekit_in_part(folder, mergekit):
    "Half of the way, to the last digits."
    half = qk_restore(folder / "pre", folder / "post", out=folder / "half", strength=0.5)
    (folder / "half.yaml").write_text(mergekit_yaml(folder / "pre", folder / "post", strength=0.5))
    done = shell(mergekit, "half.yaml", "merged-half", "--trust-remote-code", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder / "merged-half", half))
    for k in ours: torch.testing.assert_close(theirs[k], ours[k], rtol=1e-6, atol=1e-7)


def test_mergekit_stops_without_trust(folder, mergekit):
    "And leaves no weights that could be taken for a result."
    (folder / "recipe.yaml").write_text(mergekit_yaml(folder / "pre", folder / "post"))
    done = shell(mergekit, "recipe.yaml", "refused", cwd=folder)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr
    assert not list((folder / "refused").glob("*.safetensors"))


@pytest.mark.parametrize("family, lost", [
    *((name, 0) for name in ("gemma3_text", "olmo3", "smollm3", "lfm2", "falcon_h1", "granitemoehybrid", "bamba")),
    ("olmo_hybrid", 12), ("jamba", 24)])
def test_mergekit_on_other_families(tmp_path, mergekit, monkeypatch, family, lost):
    "Bit for bit what it writes; of two families it leaves out tensors, which chapter 11d says."
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks" / "checks")
    from serve import written
    written(family, tmp_path)
    (tmp_path / "recipe.yaml").write_text(mergekit_yaml(tmp_path / "pre", tmp_path / "post"))
    done = shell(mergekit, "recipe.yaml", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {name: sorted((tmp_path / name).glob("*.safetensors")) for name in ("merged", "restored")}
    theirs, ours = ({k: t for p in paths for k, t in load_file(p).items()} for paths in files.values())
    assert len(ours.keys() - theirs.keys()) == lost and theirs.keys() <= ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_a_recipe_that_mergekit_cannot_follow(tmp_path, monkeypatch):
    "Rows of a gated projection: said before a recipe is written."
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks" / "checks")
    from serve import written
    written("qwen3_next", tmp_path)
    with pytest.raises(CheckpointError, match="which mergekit cannot say"):
        mergekit_yaml(tmp_path / "pre", tmp_path / "post")

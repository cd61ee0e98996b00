"The command line: what it prints, and that errors are one sentence with exit code 2."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import snapshot, write_checkpoint

from qkrestore_nb import __version__
from qkrestore_nb.cli import main


def call(*words) -> int:
    with pytest.raises(SystemExit) as end: main([str(w) for w in words])
    return end.value.code


def real(*words, **kw):
    "In a process of its own, as a user runs it."
    return subprocess.run([sys.executable, "-c", "from qkrestore_nb.cli import main; main()", *map(str, words)], capture_output=True, text=True, **kw)


def test_bad_input_is_one_sentence_and_exit_code_2(bad, tmp_path, capsys):
    paths, sentence = bad
    before = snapshot(tmp_path)
    assert call("restore", paths["pre"], paths["post"], paths["out"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("Error: ") and err.count("\n") == 1 and sentence in err and not out
    assert len(err.replace(str(tmp_path), "/data")) <= len("Error: ") + 160 + 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("words", [["--layers", "softmx"], ["--layers", "9"], ["--layers", "3,,7"], ["--layers", "-1"], ["--layers", ""], ["--projections", "qx"], ["--projections", ""]])
def test_bad_choices(pair, tmp_path, words, capsys):
    assert call("restore", *pair, tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and err.count("\n") == 1 and words[0].strip("-") in err
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_needs_of_a_family_that_is_not_known(tmp_path, kind, capsys):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=kind, vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)))
    assert call("needs", tmp_path) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"Error: {tmp_path} cannot be counted") and f"model_type '{kind}' is not a known family" in err and "--tensors" not in err and err.count("\n") == 1 and not out


def test_wrong_words_and_no_traceback(tmp_path):
    for words in (["restore"], ["restore", "a", "b", "c", "d"], ["restroe"], ["restore", "a", "b", "c", "--fast"], ["experiment", "--profile", "laptop"]):
        done = real(*words, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr and done.stderr, words
    assert not os.listdir(tmp_path)


def test_restore(pair, tmp_path):
    before = snapshot(tmp_path)
    done = real("restore", "pre", "post", "out", "--layers", "1,3", "--projections", "q", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "W_Q of layers 1, 3 were restored from the checkpoint before fine-tuning. 2 tensors, 256 bytes, 2 of them had changed" in done.stdout and "out" in done.stdout
    note = json.loads((tmp_path / "out" / "qk_restore.json").read_text())
    assert (note["pre"], note["post"], note["layers"]) == ("pre", "post", [1, 3])
    assert {k: v for k, v in snapshot(tmp_path).items() if k.split("/")[0] != "out"} == before
    again = real("restore", "pre", "post", "out", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("Error: ") and "Traceback" not in again.stderr


def test_the_operating_system_says_no(pair, tmp_path, monkeypatch, capsys):
    "An OSError is a sentence as well: here, no permission to make the copy."
    def forbidden(*args, **kw): raise PermissionError(13, "Permission denied", str(tmp_path))
    monkeypatch.setattr("qkrestore_nb.checkpoints.tempfile.mkdtemp", forbidden)
    assert call("restore", *pair, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and "Permission denied" in err and err.count("\n") == 1


def test_demo_and_experiment_refuse_a_folder_that_is_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for words in (["demo", "--out"], ["experiment", "--profile", "smoke", "--out"]):
        assert call(*words, tmp_path / "mine") == 2
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and "exists" in err and err.count("\n") == 1
    assert not os.listdir(tmp_path / "mine")


def test_version_and_help(capsys):
    assert call("--version") == 0 and capsys.readouterr().out.split() == ["qkrestore_nb", __version__]
    for command in ("restore", "demo", "experiment"):
        assert call(command, "--help") == 0 and f"qkrestore {command} " in capsys.readouterr().out


# ---- look, check, take back

def answer(capsys, *words, code=0) -> dict:
    assert call(*words, "--json") == code
    out, err = capsys.readouterr()
    assert not err and out.count("\n") == 1
    return json.loads(out)


def test_a_dry_run_writes_nothing(pair, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert call("restore", *pair, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "4 tensors, 384 bytes would be written" in said and "model.layers.1.self_attn.q_proj.weight" in said
    planned = answer(capsys, "restore", *pair, "--dry-run")
    assert snapshot(tmp_path) == before
    done = answer(capsys, "restore", *pair, tmp_path / "out")
    assert [r["name"] for r in planned["tensors"]] == [r["tensor"] for r in done["tensors"]] and planned["bytes"] == sum(r["bytes"] for r in done["tensors"])
    assert done["out"] == str(tmp_path / "out")


def test_in_place_verify_undo(pair, tmp_path, capsys):
    pre, post = pair
    before = snapshot(tmp_path)
    assert call("restore", *pair, "--in-place") == 0 and f"qkrestore undo {post}" in capsys.readouterr().out
    assert answer(capsys, "verify", post)["restored"] is True
    assert call("verify", post) == 0 and "all of 4 tensors" in capsys.readouterr().out
    row = next(r for r in json.loads((post / "qk_restore.json").read_text())["tensors"])
    from qkrestore_nb.checkpoints import read_index
    t = read_index(post)[row["tensor"]]
    with open(t["file"], "r+b") as f: f.seek(t["start"]), f.write(b"\x00\x01")
    bad = answer(capsys, "verify", post, code=1)
    assert bad["restored"] is False and bad["tensors"][0]["equals"] == "neither"
    assert answer(capsys, "undo", post)["bytes"] == 384 and snapshot(tmp_path) == before
    assert call("undo", post) == 2 and "undone already" in capsys.readouterr().err


def test_inspect(pair, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert call("inspect", pair[1]) == 0
    said = capsys.readouterr().out
    assert "·SS·" in said and "384 bytes" in said and "hypenet" in said
    seen = answer(capsys, "inspect", pair[1], pair[0], "--projections", "q")
    assert seen["kinds"] == ["linear", "softmax", "softmax", "linear"] and [r["role"] for r in seen["tensors"]] == ["q", "q"]
    from safetensors.torch import load_file
    for r in seen["tensors"]:
        a, b = (next(t[r["tensor"]] for f in folder.glob("*.safetensors") if r["tensor"] in (t := load_file(f))).double() for folder in pair)
        assert r["drift"] == pytest.approx(((b - a).norm() / a.norm()).item()) and len(r["angles"]) == 2 and all(0 < x <= 90 for x in r["angles"])
    assert seen["tensors"][0]["drift"] >= seen["tensors"][1]["drift"]
    assert snapshot(tmp_path) == before


def test_inspect_draws(pair, tmp_path):
    assert call("inspect", *pair, "--figure", tmp_path / "drift.png") == 0 and (tmp_path / "drift.png").read_bytes()[:4] == b"\x89PNG"
    assert call("inspect", pair[0], "--figure", tmp_path / "strip.svg") == 0 and "<svg" in (tmp_path / "strip.svg").read_text()


def test_inspecting_one_checkpoint_imports_nothing_heavy(pair):
    code = ("import sys\nfrom qkrestore_nb.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
            "assert not {'torch', 'transformers', 'matplotlib', 'numpy'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code, "inspect", str(pair[0])], check=True, stdout=subprocess.DEVNULL)


def test_options_of_a_partial_restore(pair, tmp_path, capsys):
    assert call("restore", *pair, tmp_path / "half", "--strength", "0.5") == 0
    said = capsys.readouterr().out
    assert "Strength asked 0.5, achieved after rounding 0." in said
    note = answer(capsys, "restore", *pair, tmp_path / "heads", "--heads", "1", "--projections", "q")
    assert [r["bytes"] for r in note["tensors"]] == [64, 64] and note["heads"] == [1]
    note = answer(capsys, "restore", *pair, tmp_path / "hand", "--layers", "0,2", "--tensors", r"[vo]_proj")
    assert [r["tensor"].split(".")[2] for r in note["tensors"]] == ["0", "0", "2", "2"] and note["tensors_chosen"] == r"[vo]_proj"
    for words in (["--heads", "x"], ["--strength", "2"], ["--include", "gains"], ["--mla", "q_only"], ["--tensors", "("]):
        assert call("restore", *pair, tmp_path / "no", *words) == 2
        assert capsys.readouterr().err.startswith("Error: ") and not (tmp_path / "no").exists()
    assert call("restore", *pair) == 2 and "OUT" in capsys.readouterr().err


def test_a_mergekit_recipe(pair, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert call("restore", *pair, "--mergekit", tmp_path / "recipe.yaml") == 0
    assert "merge_method: linear" in (tmp_path / "recipe.yaml").read_text()
    assert call("restore", *pair, "--mergekit", tmp_path / "recipe.yaml") == 2 and "exists" in capsys.readouterr().err
    assert {k: v for k, v in snapshot(tmp_path).items() if k != "recipe.yaml"} == before


def test_push_after_a_restore(pair, tmp_path, capsys, monkeypatch):
    from qkrestore_nb import hub
    monkeypatch.setattr(hub, "push_to_hub", lambda folder, repo: f"https://example.org/{repo}")
    assert answer(capsys, "restore", *pair, tmp_path / "out", "--push", "me/fixed")["pushed"] == "https://example.org/me/fixed"


def test_a_warning_is_one_line(pair, tmp_path, capsys):
    (pair[0] / "trainer_state.json").write_text("{}")
    assert call("restore", *pair, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert err.startswith("Warning: are pre and post swapped?") and err.count("\n") == 1


def test_progress_in_bytes_on_a_terminal(pair, tmp_path):
    "A pseudo-terminal, and a bound that is passed: the bar counts bytes."
    import fcntl
    import pty
    import struct
    import termios
    code = ("import sys\nfrom qkrestore_nb import cli\nreal = cli._bytes_done\n"
            "cli._bytes_done = lambda total, show: real(total + 200_000_000, show)\ncli.main(sys.argv[1:])")
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    run = subprocess.Popen([sys.executable, "-c", code, "restore", *map(str, pair), str(tmp_path / "out")], stderr=theirs, stdout=subprocess.DEVNULL)
    run.wait()
    os.write(theirs, b"end")  # so that reading ends even where no bar was drawn
    said = ""
    while "end" not in said: said += os.read(mine, 10000).decode()
    os.close(theirs), os.close(mine)
    assert run.returncode == 0 and "/200M" in said and "B/s" in said


def test_every_command_helps_with_an_example(capsys):
    for command in ("restore", "inspect", "verify", "undo", "demo", "experiment"):
        assert call(command, "--help") == 0
        said = capsys.readouterr().out
        assert f"Example: qkrestore {command} " in " ".join(said.split())


def test_shell_completion():
    code = "import sys; sys.argv[0] = 'qkrestore'; from qkrestore_nb.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "_QKRESTORE_COMPLETE": "complete_bash", "COMP_WORDS": "qkrestore un", "COMP_CWORD": "1"})
    assert "undo" in done.stdout.split() and "restore" not in done.stdout.split()


# ---- one choice, everywhere

def test_options_that_would_be_ignored_are_told(pair, tmp_path, capsys):
    before = snapshot(tmp_path)
    for words, sentence in [([tmp_path / "out", "--mergekit", tmp_path / "r.yml"], "OUT"), (["--mergekit", tmp_path / "r.yml", "--push", "me/x"], "--push"), (["--mergekit", tmp_path / "r.yml", "--in-place"], "--in-place"),
                            (["--mergekit", tmp_path / "r.yml", "--cast"], "--cast"), (["--dry-run", "--push", "me/x"], "--push"), (["--dry-run", "--strength", "7"], "strength=7"),
                            (["--mergekit", tmp_path / "r.yml", "--strength", "2"], "strength=2"), ([tmp_path / "out", "--rows", "qk"], "rows="), ([tmp_path / "out", "--allow", "nothing"], "allow=")]:
        assert call("restore", *pair, *words) == 2
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and sentence in err and err.count("\n") == 1, words
    assert snapshot(tmp_path) == before


def test_pro_has_the_options_of_restore(tmp_path, capsys, monkeypatch):
    from qkrestore_nb import hub
    monkeypatch.setattr(hub, "push_to_hub", lambda folder, repo: f"https://example.org/{repo}")
    pre, post = (write_checkpoint(tmp_path / n, s, dtype="float32") for n, s in (("pre", 1), ("post", 2)))
    before = snapshot(post)
    note = answer(capsys, "pro", pre, post, tmp_path / "out", "--layers", "2", "--include", "norms", "--lam", "0.5", "--push", "me/pro")
    assert (note["layers"], note["lam"], note["include"], note["pushed"]) == ([2], .5, "norms", "https://example.org/me/pro") and note["tensors"][0]["solved"] is True
    assert call("pro", pre, post, "--in-place", "--heads", "1") == 0 and "qkrestore undo" in capsys.readouterr().out
    assert answer(capsys, "verify", post)["restored"] is True and call("undo", post) == 0 and snapshot(post) == before
    capsys.readouterr()
    assert call("pro", pre, post) == 2 and "OUT" in capsys.readouterr().err
    assert call("pro", "me/nowhere", post, tmp_path / "x") == 2 and "the hub does not give it" in capsys.readouterr().err


def test_the_choice_reaches_inspect(pair, capsys):
    seen = answer(capsys, "inspect", pair[1], "--layers", "0", "--tensors", "o_proj", "--rows", "0:2")
    assert [(r["tensor"], r["bytes"], r["part"]) for r in seen["tensors"]] == [("model.layers.0.self_attn.o_proj.weight", 32, True)]
    assert len(answer(capsys, "inspect", pair[1], pair[0], "--layers", "0", "--tensors", "o_proj")["tensors"]) == 1


def test_needs_of_a_family_that_lists_its_layers(tmp_path, capsys):
    "Nemotron-H says its layers in a pattern, and transformers keeps no number of them."
    from test_families import CASES, model
    model("nemotron_h", CASES["nemotron_h"][0], 1).save_pretrained(tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    for key in ("layers_block_type", "layer_types", "num_hidden_layers"): config.pop(key, None)
    (tmp_path / "published" / "config.json").write_text(json.dumps(config | dict(hybrid_override_pattern="M*-*")))
    capsys.readouterr()
    said = answer(capsys, "needs", tmp_path / "published", "--tokens", "1024")
    assert said["training_gb"]["1"] > said["total_gb"] > 0


def unlisted(page: str) -> list[str]:
    "Options that the list of chapter 14 does not name, as COMMAND --option."
    import typer

    from qkrestore_nb.cli import app
    found = []
    for name, command in typer.main.get_command(app).commands.items():
        text = page.partition(f"\nqkrestore {name} ")[2].partition("\nqkrestore ")[0]
        words = set(re.findall(r"--[a-z-]+", text))
        found += [f"{name} {o}" for p in command.params for o in p.opts if o.startswith("--") and o != "--help" and o not in words]
    return found


def test_chapter_14_lists_every_option():
    page = next("".join(c["source"]) for c in json.loads((Path(__file__).parent.parent / "nbs" / "14_cli.ipynb").read_text())["cells"] if c["id"] == "3dcb2c59")
    assert unlisted(page) == []
    assert unlisted(page.replace("[--cast] [--allow FIELD]\n                                   [--dry-run]", "")) == ["restore --cast", "restore --allow", "restore --dry-run"]

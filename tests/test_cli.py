"The command line: what it prints, and that errors are one sentence with exit code 2."
import json
import os
import subprocess
import sys

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
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("words", [["--layers", "softmx"], ["--layers", "9"], ["--layers", "3,,7"], ["--layers", "-1"], ["--layers", ""], ["--projections", "qx"], ["--projections", ""]])
def test_bad_choices(pair, tmp_path, words, capsys):
    assert call("restore", *pair, tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and err.count("\n") == 1 and words[0].strip("-") in err
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


def test_wrong_words_and_no_traceback(tmp_path):
    for words in (["restore"], ["restore", "a", "b", "c", "d"], ["restroe"], ["restore", "a", "b", "c", "--fast"], ["experiment", "--profile", "laptop"]):
        done = real(*words, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr and done.stderr, words
    assert not os.listdir(tmp_path)


def test_restore(pair, tmp_path):
    before = snapshot(tmp_path)
    done = real("restore", "pre", "post", "out", "--layers", "1,3", "--projections", "q", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "2 tensors (q of layers 1, 3; 256 bytes) put back from pre, 2 of them had changed" in done.stdout and "out" in done.stdout
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

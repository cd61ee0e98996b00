"Folders that lie, inputs that change, runs that are stopped, files that nobody can read: one sentence, nothing lost, nothing written elsewhere."
import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NAME, hypenet_config, snapshot, tensors, write_checkpoint, write_sums
from safetensors.torch import load_file
from test_cli import call

from qkrestore_nb import checkpoints, in_place, procrustes, restore
from qkrestore_nb.checkpoints import (
    JOURNAL,
    MARK,
    NOTE,
    CheckpointError,
    half_written,
    leftovers,
    new_folder,
    printable,
    read_config,
    read_index,
    read_json,
    watch,
)
from qkrestore_nb.in_place import undo, verify
from qkrestore_nb.note import raw_note
from qkrestore_nb.restore import qk_restore

QK = [NAME.format(i, r) for i in (1, 2) for r in "qk"]
load = lambda folder: {n: t for f in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(f).items()}
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
DEEP = "[" * 100_000


def sentence(err: str) -> bool: return err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err and "fault of qkrestore" not in err


@pytest.fixture
def secret(tmp_path):
    "A file of somebody's, outside of every checkpoint."
    file = tmp_path / "home" / "authorized_keys"
    file.parent.mkdir()
    file.write_text("mine\n")
    return file


# ---- nothing is written through a link

@pytest.mark.parametrize("name", [f"{JOURNAL}.part", f"{NOTE}.part", JOURNAL, NOTE])
@pytest.mark.parametrize("what", ["in place", "undo", "out"])
def test_planted_links(pair, tmp_path, secret, name, what):
    "Every name that a restore has ever written under leads out of the folder; whatever happens, the file there stays as it is."
    pre, post = pair
    if what == "undo": qk_restore(pre, post, inplace=True)
    (post / name).unlink(missing_ok=True)
    (post / name).symlink_to(secret)
    try: undo(post) if what == "undo" else qk_restore(pre, post, **(dict(inplace=True) if what == "in place" else dict(out=tmp_path / "out")))
    except CheckpointError as e: assert str(post) in str(e)
    assert secret.read_text() == "mine\n" and (post / name).is_symlink() and os.readlink(post / name) == str(secret)
    assert not (tmp_path / "out").exists() or not any(p.is_symlink() or "mine" in p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_a_journal_may_be_written_beside_a_link_of_the_old_name(pair, secret):
    "The name that could be guessed in the first edition is nobody's now: the restore works, and can be undone."
    pre, post = pair
    before = load(post)
    (post / f"{JOURNAL}.part").symlink_to(secret)
    qk_restore(pre, post, inplace=True)
    undo(post)
    assert same(load(post), before) and secret.read_text() == "mine\n"


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "pipe", "gone"])
def test_undo_looks_at_its_targets(pair, tmp_path, kind):
    pre, post = pair
    qk_restore(pre, post, inplace=True)
    shard, elsewhere = post / "model-00001-of-00002.safetensors", tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    dict(link=lambda: shard.symlink_to(elsewhere), folder=shard.mkdir, pipe=lambda: os.mkfifo(shard), gone=lambda: None, **{"hard link": lambda: os.link(elsewhere, shard)})[kind]()
    content = elsewhere.read_bytes()
    with pytest.raises((CheckpointError, OSError)) as e: undo(post)
    if kind != "folder": assert dict(link="is a link", pipe="no regular file", gone="replaced since", **{"hard link": "other names"})[kind] in str(e.value)
    assert elsewhere.read_bytes() == content and (post / JOURNAL).exists()


def write_journal(folder: Path, data: bytes = b"\0" * 16, **change):
    "A journal as anybody can write it; `change` replaces fields of its header, or of its only move."
    move = dict(file="model.safetensors", size=(folder / "model.safetensors").stat().st_size, spans=[[200, 216]], sha256=__import__("hashlib").sha256(data).hexdigest())
    header = dict(version=1, note=None, moves=[move | {k: v for k, v in change.items() if k in move}]) | {k: v for k, v in change.items() if k not in move}
    text = header["raw"] if "raw" in header else json.dumps(header).encode()
    (folder / JOURNAL).write_bytes(len(text).to_bytes(8, "little") + text + data)


LIES = {"a parent": dict(file="../home/authorized_keys"), "dots": dict(file=".."), "nothing": dict(file=""), "absolute": dict(file="/etc/passwd.safetensors"), "another kind": dict(file="config.json"),
        "a number": dict(file=5), "itself": dict(file=JOURNAL), "size": dict(size="x"), "negative size": dict(size=-1), "before": dict(spans=[[-16, 0]]), "behind": dict(spans=[[10**9, 10**9 + 16]]),
        "backwards": dict(spans=[[216, 200]]), "overlap": dict(spans=[[200, 208], [204, 212]]), "no spans": dict(spans=[]), "spans null": dict(spans=None), "spans words": dict(spans=[["a", "b"]]),
        "true": dict(spans=[[True, 17]]), "huge": dict(spans=[[0, 10**30]]), "hash": dict(sha256=7), "other hash": dict(sha256="0" * 64), "note a number": dict(note=5), "note a list": dict(note=["x"]),
        "no moves": dict(moves=[]), "moves null": dict(moves=None), "moves of numbers": dict(moves=[5]), "a list": dict(raw=b"[]"), "deep": dict(raw=DEEP.encode()), "not UTF-8": dict(raw=b"\xff\xfe{}"), "empty": dict(raw=b"")}


@pytest.mark.parametrize("name", LIES)
def test_a_journal_is_not_believed(tmp_path, secret, name, capsys):
    folder = write_checkpoint(tmp_path / "post", 2)
    write_journal(folder, **LIES[name])
    before = snapshot(tmp_path)
    for command in ("undo", "verify", "inspect"): assert call(command, folder) == 2 and sentence(capsys.readouterr().err), command
    assert snapshot(tmp_path) == before


def test_a_journal_is_not_believed_about_other_files(tmp_path):
    "Sound in every number, and it names the config: nothing but weights is ever put back."
    folder = write_checkpoint(tmp_path / "post", 2)
    size = (folder / "config.json").stat().st_size
    write_journal(folder, file="config.json", size=size, spans=[[0, 16]])
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="config.json"): undo(folder)
    assert snapshot(tmp_path) == before


def test_a_planted_note_that_is_a_link(tmp_path):
    "Also one that leads nowhere else: no restore makes links."
    folder = write_checkpoint(tmp_path / "post", 2)
    (folder / "real.json").write_text("{}")
    (folder / NOTE).symlink_to("real.json")
    with pytest.raises(CheckpointError, match="is a link"): raw_note(folder)
    (folder / NOTE).unlink()
    assert raw_note(folder) is None


def test_what_changes_is_noticed_at_the_same_size(tmp_path):
    "Written over in place, as long as before: only the time tells."
    folder = write_checkpoint(tmp_path / "post", 2)
    unchanged, file = checkpoints.watch(folder), folder / "model.safetensors"
    unchanged()
    then = file.stat()
    with open(file, "r+b") as f:
        f.seek(then.st_size - 1)
        f.write(b"x")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="changed while it was read"): unchanged()


def test_two_moves_of_one_place(tmp_path):
    folder = write_checkpoint(tmp_path / "post", 2)
    write_journal(folder)
    move = json.loads((folder / JOURNAL).read_bytes()[8:-16])["moves"][0]
    write_journal(folder, b"\0" * 32, moves=[move, move | dict(spans=[[208, 224]])])
    with pytest.raises(CheckpointError, match="overlap"): undo(folder)
    write_journal(folder)  # and the check can pass
    assert undo(folder) == 16


# ---- what a restore may bring into its output

@pytest.mark.parametrize("where", ["file", "folder", "below", "weights", "parent", "itself"])
def test_links_out_of_post(pair, tmp_path, secret, where):
    pre, post = pair
    name, to = dict(file=("vocab.txt", secret), folder=("extra", secret.parent), below=("logs/key", secret), weights=("model-00001-of-00002.safetensors", tmp_path / "w"),
                    parent=("up", ".."), itself=("self", "."))[where]
    if where == "weights": (post / name).rename(tmp_path / "w")
    (post / name).symlink_to(to)
    with pytest.raises(CheckpointError, match="is a link"): qk_restore(pre, post, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_called_blobs_is_not_the_hubs(pair, tmp_path, secret):
    pre, post = pair
    (tmp_path / "blobs").mkdir()
    shutil.copy(secret, tmp_path / "blobs" / "key")
    (post / "vocab.txt").symlink_to(tmp_path / "blobs" / "key")
    with pytest.raises(CheckpointError, match="is a link"): qk_restore(pre, post, out=tmp_path / "out")


def test_links_within_the_folder_are_files_in_the_result(pair, tmp_path):
    pre, post = pair
    (post / "vocab.json").symlink_to("tokenizer.json")
    (post / "logs" / "latest.txt").symlink_to("train.txt")
    out = qk_restore(pre, post, out=tmp_path / "out")
    assert (out / "vocab.json").read_bytes() == (post / "tokenizer.json").read_bytes() and not any(p.is_symlink() for p in out.rglob("*"))


def test_a_journal_is_not_copied(pair, tmp_path, capsys):
    "What was restored in place and is then an input: the new result has nothing to undo, and the old one still has."
    pre, post = pair
    qk_restore(pre, post, inplace=True)
    for left in (f"{JOURNAL}.part", f".{JOURNAL}.abcd1234.part", f".{NOTE}.abcd1234.part"): (post / left).write_bytes(b"x")
    (post / "mine.part").write_bytes(b"y")
    out = qk_restore(pre, post, out=tmp_path / "out", projections="vo")
    assert not [p.name for p in out.iterdir() if JOURNAL in p.name or p.name.startswith(".")] and (out / "mine.part").read_bytes() == b"y"
    with pytest.raises(CheckpointError, match="nothing was restored there in place"): undo(out)
    assert json.loads((out / NOTE).read_text())["before"]["projections"] == "qk"
    undo(post)


def cut_off(pre, post, monkeypatch):
    "A restore in place that ends after the first tensor."
    calls, real = [], restore.overwrite
    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == 2: raise RuntimeError("power")
        return real(*args, **kw)
    with monkeypatch.context() as m:
        m.setattr(restore, "overwrite", dies)
        with pytest.raises(RuntimeError) as e: qk_restore(pre, post, inplace=True)
    return e.value


@pytest.mark.parametrize("noted", [False, True])
def test_a_half_written_folder_is_no_input(pair, tmp_path, monkeypatch, capsys, noted):
    pre, post = pair
    if noted: shutil.move(qk_restore(pre, post, out=tmp_path / "first", projections="v"), tmp_path / "noted"); post = tmp_path / "noted"
    before = snapshot(post)
    e = cut_off(pre, post, monkeypatch)
    assert f"qkrestore undo {post}" in e.__notes__[0] and half_written(post)
    other = write_checkpoint(tmp_path / "third", 3)
    for words in (["restore", pre, post, tmp_path / "out"], ["restore", post, other, tmp_path / "out"], ["pro", pre, post, tmp_path / "out"], ["verify", post], ["inspect", post], ["restore", pre, post, "--in-place"]):
        assert call(*words) == 2
        assert f"undo {post}" in (err := capsys.readouterr().err) and sentence(err), words
    undo(post)
    assert snapshot(post) == before and not half_written(post)
    qk_restore(pre, post, inplace=True)
    assert not half_written(post)  # whole, and may be an input


# ---- inputs that change meanwhile

def _again(folder, seed):
    "Somebody saves the checkpoint again: the same names and sizes, other numbers."
    file = sorted(folder.glob("*.safetensors"))[0]
    from safetensors.torch import save_file
    new = {n: t + seed for n, t in load_file(file).items()}
    save_file(new, file, metadata={"format": "pt"})


CHANGES = {"weights": lambda f: _again(f, 3), "config": lambda f: (f / "config.json").write_text(json.dumps(hypenet_config())), "a new shard": lambda f: (f / "model-9.safetensors").write_bytes(b"x"),
           "a file is gone": lambda f: (f / "generation_config.json").unlink()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("when", ["before the copy", "first write", "last write"])
@pytest.mark.parametrize("how", ["out", "in place", "pro"])
def test_an_input_that_changes_is_noticed(pair, tmp_path, monkeypatch, how, which, when, change):
    pre, post = pair
    if how == "in place" and which == "post" and when != "before the copy": pytest.skip("then it is we who change it")
    target, name, nth = {"before the copy": (restore, "check_in_place" if how == "in place" else "check_out", 1), "first write": (restore, "overwrite", 1), "last write": (restore, "overwrite", 4)}[when]
    calls, real = [], getattr(target, name)
    def meanwhile(*args, **kw):
        calls.append(1)
        if len(calls) == nth: CHANGES[change](tmp_path / which)
        return real(*args, **kw)
    monkeypatch.setattr(target, name, meanwhile)
    before = load(post)
    with pytest.raises(CheckpointError, match="changed while it was|lacks its shard|are no longer"):
        procrustes.qk_pro(pre, post, out=tmp_path / "out") if how == "pro" else qk_restore(pre, post, **(dict(inplace=True) if how == "in place" else dict(out=tmp_path / "out")))
    assert len(calls) >= nth and sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]
    if how == "in place":
        if which == "post": assert not (post / JOURNAL).exists()
        else: undo(post); assert same(load(post), before)


def test_a_file_that_grows_while_it_is_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    real = checkpoints._copy
    def grows(a, b, *rest):
        real(a, b, *rest)
        with open(tmp_path / "a", "ab") as f: f.write(b"y")
    monkeypatch.setattr(checkpoints, "_copy", grows)
    with pytest.raises(CheckpointError, match="changed while it was copied"): checkpoints.copy_file(tmp_path / "a", tmp_path / "b")


def test_lengths_that_differ(pair):
    "Tensors of other lengths, or dtypes without a rule for them: refused before the first byte."
    index = read_index(pair[1])
    before = snapshot(pair[1])
    for source, target in ((QK[0], QK[1]), (QK[1], QK[0])):
        with pytest.raises(CheckpointError, match="disagree on the length"): checkpoints.overwrite(index[target], index[source])
    with pytest.raises(CheckpointError, match="disagree on the length"): checkpoints.overwrite(index[QK[0]], index[QK[1]] | dict(dtype="U8"))
    assert snapshot(pair[1]) == before


def test_watching_is_quiet_where_nothing_changes(pair):
    unchanged = watch(*pair)
    load(pair[0]), (pair[1] / "README.md").write_text("not looked at"), (pair[1] / NOTE).write_text("{}")
    unchanged()


# ---- what a killed run left

def stale(root: Path, out: str = "out", name: str | None = None, **mark) -> Path:
    work = root / (name or f".{out}.abcd1234.part")
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_bytes(b"x" * 100)
    (work / MARK).write_text(json.dumps(dict(made_by="qkrestore_nb", out=out) | mark))
    return work


@pytest.mark.parametrize("out", ["out", "o*", "o[ab]t", "a?b", "out.1"])
def test_stale_folders_go_and_others_stay(pair, tmp_path, out, secret):
    "Names with letters that patterns know; folders that look like ours and are not."
    gone, ours_of_others = stale(tmp_path, out), [stale(tmp_path, n) for n in ("outer", "oat", "ob", "axb", "ou") if n != out]
    theirs = [stale(tmp_path, out, f".{out}.part"), stale(tmp_path, out, f".{out}.ABCD1234.part"), stale(tmp_path, out, f".{out}.abcd12345.part"), stale(tmp_path, out, f".{out}.abcd1235.part", made_by="me"),
              stale(tmp_path, out, f".{out}.abcd1236.part", made_for="x")]
    (theirs[-1] / MARK).write_text(json.dumps(dict(made_by="qkrestore_nb", out="x")))
    (unmarked := tmp_path / f".{out}.abcd1237.part").mkdir()
    more = stale(tmp_path, out, f".{out}.abcd1238.part")
    (more / "thesis.tex").write_text("years")
    (link := tmp_path / f".{out}.abcd1239.part").symlink_to(secret.parent)
    with new_folder(pair[1], tmp_path / out): pass
    assert not gone.exists() and all(p.exists() for p in (*ours_of_others, *theirs, unmarked, more, link, secret))


def test_links_in_a_stale_folder_lead_nowhere(pair, tmp_path, secret):
    gone = stale(tmp_path)
    secret.chmod(0o400), secret.parent.chmod(0o500)
    (gone / "new" / "a").symlink_to(secret), (gone / "new" / "b").symlink_to(secret.parent), (gone / "new" / "c").symlink_to("nowhere")
    with new_folder(pair[1], tmp_path / "out"): pass
    assert not gone.exists() and secret.read_text() == "mine\n" and secret.stat().st_mode & 0o777 == 0o400 and secret.parent.stat().st_mode & 0o777 == 0o500
    secret.parent.chmod(0o700)


def test_without_locks_nothing_is_stale(pair, tmp_path, monkeypatch):
    work = stale(tmp_path)
    def flock(*args): raise OSError(95, "Operation not supported")
    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", flock)
        with new_folder(pair[1], tmp_path / "out"): pass
        assert work.exists() and leftovers(tmp_path, remove=True)[0].state == "unknown" and work.exists()
    assert leftovers(tmp_path, remove=True)[0].state == "stale" and not work.exists()


def test_a_run_at_work_is_left_alone(pair, tmp_path):
    with new_folder(pair[1], tmp_path / "out") as part:
        with new_folder(pair[1], tmp_path / "other"): pass
        found = leftovers(tmp_path, remove=True)
        assert part.exists() and [(x.kind, x.state) for x in found] == [("copy", "at work")]
        with pytest.raises(CheckpointError, match="has appeared"):
            with new_folder(pair[1], tmp_path / "out"): (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "config.json").exists() and not leftovers(tmp_path)


def test_leftovers(pair, tmp_path, monkeypatch, capsys):
    pre, post = pair
    other = write_checkpoint(tmp_path / "open", 5)
    qk_restore(pre, post, inplace=True)
    cut_off(pre, other, monkeypatch)
    stale(tmp_path), (pre / f".{JOURNAL}.abcd1234.part").write_bytes(b"x" * 7), (pre / f"{NOTE}.part").write_bytes(b"")
    (pre / f".{JOURNAL}.mine.part").write_bytes(b""), (tmp_path / "x.run").mkdir(), (tmp_path / "x.run" / "recipe.json").write_text("{}")
    (tmp_path / "mine.run").mkdir()
    assert call("leftovers", tmp_path, "--json") == 0
    rows = {Path(r["path"]).name if r["kind"] != "journal" else Path(r["path"]).parent.name: (r["kind"], r["state"], r["removed"]) for r in json.loads(capsys.readouterr().out)["found"]}
    assert rows == {".out.abcd1234.part": ("copy", "stale", False), "open": ("journal", "open", False), "post": ("journal", "done", False), f".{JOURNAL}.abcd1234.part": ("file", "stale", False),
                    f"{NOTE}.part": ("file", "stale", False), "x.run": ("run", "resumable", False)}
    assert call("leftovers", tmp_path, "--remove") == 0 and "6 leftovers, 3 removed" in capsys.readouterr().out
    assert {x.kind for x in leftovers(tmp_path)} == {"journal", "run"} and (pre / f".{JOURNAL}.mine.part").exists()
    undo(other)
    assert call("leftovers", tmp_path / "nowhere") == 2 and call("leftovers", pre) == 0 and "no leftovers" in capsys.readouterr().out


def test_a_killed_journal_is_swept_by_the_next_run(pair):
    pre, post = pair
    (post / f".{JOURNAL}.abcd1234.part").write_bytes(b"x")
    qk_restore(pre, post, inplace=True)
    assert not list(post.glob(".*.part"))
    (post / f".{NOTE}.abcd1234.part").write_bytes(b"x")
    undo(post)
    assert not list(post.glob("*.part"))


# ---- files that nobody can read

BROKEN = {"deep": DEEP, "not UTF-8": b"\xff\xfe\x00", "a list": "[1]", "a number": "5", "cut off": '{"a": ', "empty": "", "null": "null"}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["pre/config.json", "post/config.json", "post/model.safetensors.index.json", "post/" + NOTE, "out/" + NOTE])
def test_json_that_is_none(pair, tmp_path, name, content, capsys):
    pre, post = pair
    out = qk_restore(pre, post, out=tmp_path / "out")
    file = tmp_path / name
    file.write_bytes(BROKEN[content] if isinstance(BROKEN[content], bytes) else BROKEN[content].encode())
    before = snapshot(tmp_path)
    words = ["verify", out] if name.startswith("out") else ["restore", pre, post, "--in-place"]
    assert call(*words) == 2 and sentence(err := capsys.readouterr().err) and Path(name).name in err
    assert snapshot(tmp_path) == before


def test_a_bound_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}'.ljust(100))
    assert read_json(tmp_path / "a.json", 100) == {"a": 1}
    with pytest.raises(CheckpointError, match="larger than"): read_json(tmp_path / "a.json", 99)


@pytest.mark.parametrize("kind", ["pipe", "large", "folder", "device"])
def test_files_that_are_no_files(tmp_path, kind, capsys):
    folder = write_checkpoint(tmp_path / "pre", 1)
    (folder / "config.json").unlink()
    dict(pipe=lambda p: os.mkfifo(p), large=lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 3 << 30), folder=lambda p: p.mkdir(), device=lambda p: p.symlink_to("/dev/zero"))[kind](folder / "config.json")
    start = time.time()
    assert call("inspect", folder) == 2 and sentence(capsys.readouterr().err) and time.time() - start < 20


@pytest.mark.parametrize("n", [10**7, 10**12, 1e30, float("inf"), float("nan"), 10**400])
def test_too_many_layers(tmp_path, n, capsys):
    for config in (dict(model_type="jamba", num_hidden_layers=n), dict(model_type="falcon_h1", num_hidden_layers=n), dict(model_type="x", text_config=dict(num_hidden_layers=n))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert call("inspect", tmp_path) == 2 and "100,000 layers" in (err := capsys.readouterr().err) and sentence(err)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="x", num_hidden_layers=100_000)))
    assert read_config(tmp_path)["num_hidden_layers"] == 100_000


@pytest.mark.parametrize("change", [dict(dtype=[]), dict(dtype={}), dict(dtype=None), dict(dtype="x" * 100_000), dict(shape=[2**70]), dict(shape=[1] * 1000), dict(shape=[2**62] * 60), dict(shape=None), dict(data_offsets="ab")])
def test_headers_of_wrong_types(tmp_path, change, capsys):
    from conftest import _edit, _header
    folder = write_checkpoint(tmp_path / "pre", 1)
    def spoil(text):
        header = json.loads(text)
        name = next(k for k in header if k != "__metadata__")
        return json.dumps(header | {name: header[name] | change})
    _edit("pre/model.safetensors", lambda data: _header(data, spoil))(tmp_path)
    assert call("inspect", folder) == 2
    err = capsys.readouterr().err
    assert sentence(err) and "not a sound safetensors file" in err and len(err) < 1100


def raw_file(file: Path, **entries) -> Path:
    "Tensors of F32 with offsets as given, and as many bytes as the last of them needs."
    text = json.dumps({n: dict(dtype="F32", shape=shape, data_offsets=at) for n, (shape, at) in entries.items()}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(max(at[1] for _, at in entries.values())))
    return file


@pytest.mark.parametrize("entries, says", [(dict(a=([4], [0, 16]), b=([4], [0, 16])), "overlaps"), (dict(a=([4], [0, 16]), b=([4], [8, 24])), "overlaps"), (dict(a=([4], [0, 16]), b=([4], [20, 36])), "hole"),
                                           (dict(a=([3], [0, 16])), "not those of its shape"), (dict(a=([5], [0, 16])), "not those of its shape"), (dict(a=([4], [4, 20])), "hole")])
def test_headers_that_are_wrong_in_one_thing(tmp_path, entries, says):
    with pytest.raises(CheckpointError, match=says): checkpoints.read_header(raw_file(tmp_path / "a.safetensors", **entries))
    assert len(checkpoints.read_header(raw_file(tmp_path / "b.safetensors", a=([4], [0, 16]), b=([4], [16, 32])))) == 2


@pytest.mark.parametrize("meta", [False, [], -0.0, "x", 0, {"a": 1}])
def test_metadata_that_is_none(tmp_path, meta):
    from conftest import _edit, _header
    write_checkpoint(tmp_path / "pre", 1)
    _edit("pre/model.safetensors", lambda data: _header(data, lambda t: json.dumps(json.loads(t) | {"__metadata__": meta})))(tmp_path)
    with pytest.raises(CheckpointError, match="metadata"): read_index(tmp_path / "pre")


def test_half_a_character_is_no_name(tmp_path):
    from conftest import _edit, _header
    write_checkpoint(tmp_path / "pre", 1)
    _edit("pre/model.safetensors", lambda data: _header(data, lambda t: t.replace("model.norm.weight", "\\ud800")))(tmp_path)
    with pytest.raises(CheckpointError, match="not a sound"): read_index(tmp_path / "pre")


# ---- the note, and verify

NOTES = {"null": dict(tensors=None), "numbers": dict(tensors=[5]), "empty rows": dict(tensors=[{}]), "a word": dict(tensors="abc"), "none": dict(x=1), "name": lambda r: r | dict(tensor=[]), "no name": lambda r: r | dict(tensor=None),
         "spans": lambda r: r | dict(spans=5), "spans of words": lambda r: r | dict(spans=[["a", 1]]), "nothing": lambda r: r | dict(spans=[[0, 0]]), "outside": lambda r: r | dict(spans=[[0, 10**9]]), "negative": lambda r: r | dict(spans=[[-4, 0]]),
         "bytes": lambda r: r | dict(bytes="x"), "fewer bytes": lambda r: r | dict(bytes=1), "hash": lambda r: r | dict(sha256_restored=5), "adapter": dict(left_out=5, zeroed={}), "adapter rows": dict(left_out=[], zeroed=[1])}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_is_not_believed(pair, tmp_path, name, capsys):
    out = qk_restore(*pair, out=tmp_path / "out")
    note = json.loads((out / NOTE).read_text())
    change = NOTES[name]
    (out / NOTE).write_text(json.dumps(change if isinstance(change, dict) else note | dict(tensors=[change(r) for r in note["tensors"]])))
    assert call("verify", out) == 2 and sentence(capsys.readouterr().err)


def test_a_note_of_nothing_is_not_fine(pair, tmp_path, capsys):
    out = qk_restore(*pair, out=tmp_path / "out")
    note = json.loads((out / NOTE).read_text())
    (out / NOTE).write_text(json.dumps(note | dict(tensors=[])))
    assert call("verify", out) == 1
    (out / NOTE).write_text(json.dumps(note | dict(tensors=note["tensors"] * 2)))
    assert call("verify", out) == 2 and "twice" in capsys.readouterr().err


def test_verify_against_pre(pair, tmp_path, capsys):
    pre, post = pair
    out = qk_restore(pre, post, out=tmp_path / "out", heads=[1])
    assert call("verify", out, "--pre", pre) == 0
    other = write_checkpoint(tmp_path / "other", 7)
    assert call("verify", out) == 0 and call("verify", out, "--pre", other) == 1 and "neither" in capsys.readouterr().out
    note = json.loads((out / NOTE).read_text())  # a note that says that post's bytes are pre's
    index = {n: t for n, t in read_index(post).items()}
    (out / NOTE).write_text(json.dumps(note | dict(tensors=[r | dict(tensor=NAME.format(0, "v"), spans=[[0, 64]], bytes=64, sha256_restored=__import__("hashlib").sha256(index[NAME.format(0, "v")]["file"].read_bytes()[
        index[NAME.format(0, "v")]["start"]:][:64]).hexdigest()) for r in note["tensors"][:1]])))
    assert call("verify", out) == 0 and call("verify", out, "--pre", pre) == 1
    assert call("verify", out, "--pre", tmp_path / "nowhere") == 2


def test_what_is_not_pres_is_not_called_pres(pair, tmp_path):
    "A mixture, and W_Q of QK-Pro, stand in neither: restored, also beside pre. W_K of QK-Pro is pre's."
    half, pro = qk_restore(*pair, out=tmp_path / "half", strength=.5), procrustes.qk_pro(*pair, out=tmp_path / "pro")
    assert {r["equals"] for r in verify(half)} == {r["equals"] for r in verify(half, pair[0])} == {"restored"}
    for rows in (verify(pro), verify(pro, pair[0])): assert all(r["equals"] == ("restored" if "q_proj" in r["tensor"] else "pre") for r in rows) and len(rows) == 4
    assert {r["equals"] for r in verify(qk_restore(*pair, out=tmp_path / "whole"), pair[0])} == {"pre"}


def test_numbers_that_json_does_not_have(tmp_path):
    bad = {n: t.clone() for n, t in tensors(1).items()}
    bad[QK[0]][0, 0] = float("inf")
    pre, post = write_checkpoint(tmp_path / "pre", weights=bad), write_checkpoint(tmp_path / "post", 2)
    out = qk_restore(pre, post, out=tmp_path / "out", strength=.5)
    def no(word): raise AssertionError(word)
    note = json.loads((out / NOTE).read_text(), parse_constant=no)
    assert note["tensors"][0]["strength_achieved"] is None and 0 < note["tensors"][1]["strength_achieved"] < 1
    assert in_place.strict([float("nan"), float("inf"), 1, {"a": -float("inf")}]) == [None, "inf", 1, {"a": "-inf"}]


def test_who_may_read_the_weights_may_read_the_journal_and_nobody_else(pair):
    pre, post = pair
    for mode in (0o600, 0o640, 0o644):
        for p in post.glob("*.safetensors"): p.chmod(0o644)
        (post / "model-00002-of-00002.safetensors").chmod(mode)
        qk_restore(pre, post, inplace=True)
        assert {(post / n).stat().st_mode & 0o777 for n in (JOURNAL, NOTE)} == {mode}
        undo(post)


# ---- on the disk before anything depends on it

def test_everything_is_synced_before_the_rename(pair, tmp_path, monkeypatch):
    "Each file and folder of a result goes through fsync after the last write and before the rename, the folder above after that."
    told, real, write = [], os.fsync, os.pwrite
    def fsync(fd): told.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)
    def pwrite(fd, *rest): told.append("write"); return write(fd, *rest)
    rename = Path.rename
    def named(self, target): told.append(("rename", str(self), str(target))); return rename(self, target)
    monkeypatch.setattr(os, "fsync", fsync), monkeypatch.setattr(os, "pwrite", pwrite), monkeypatch.setattr(Path, "rename", named)
    out = qk_restore(*pair, out=tmp_path / "out")
    at, (_, part, _) = next((i, t) for i, t in enumerate(told) if t[0] == "rename" and t[2] == str(out))
    last = at - 1 - told[:at][::-1].index("write")
    assert {part, *(f"{part}/{p.relative_to(out)}" for p in out.rglob("*"))} <= {t for t in told[last:at] if isinstance(t, str)}
    assert str(tmp_path) in told[at + 1:]


def test_no_sync_waits_for_no_disk(pair, tmp_path, monkeypatch):
    "The same bytes without a single fsync; in place it is refused."
    want = load(qk_restore(*pair, out=tmp_path / "synced"))
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("not asked for"))
    assert same(load(qk_restore(*pair, out=tmp_path / "out", sync=False)), want)
    assert call("restore", *pair, tmp_path / "cli", "--no-sync") == 0 and same(load(tmp_path / "cli"), want)
    assert call("restore", *pair, "--in-place", "--no-sync") == 2
    with pytest.raises(CheckpointError, match="journal must be on the disk"): qk_restore(*pair, inplace=True, sync=False)


def test_after_an_error_no_other_file_is_copied(tmp_path, monkeypatch):
    "The copies that run are ended between two pieces, the others are not begun, and the error is the first one."
    (tmp_path / "post").mkdir()
    for i in range(12): (tmp_path / "post" / f"{i:02}.bin").write_bytes(bytes(1000))
    begun, ended, real = [], [], checkpoints.copy_file
    def copy(a, b, told):
        begun.append(a)
        if a == begun[0]:
            while len(begun) < 2: time.sleep(.001)  # another one runs
            raise OSError(errno.ENOSPC, "No space left on device")
        for _ in range(300_000): told(1)  # a large file, which is ended before all of it is copied
        ended.append(a)
    monkeypatch.setattr(checkpoints, "copy_file", copy)
    with pytest.raises(CheckpointError, match="could not be copied.*No space left"):
        with new_folder(tmp_path / "post", tmp_path / "out"): pass
    assert len(begun) <= 5 and not ended and os.listdir(tmp_path) == ["post"]
    monkeypatch.setattr(checkpoints, "copy_file", real)
    with new_folder(tmp_path / "post", tmp_path / "out"): pass
    assert len(os.listdir(tmp_path / "out")) == 12


def test_the_journal_is_on_the_disk_before_the_first_write(pair, monkeypatch):
    pre, post = pair
    told, real, write = [], os.fsync, os.pwrite
    def fsync(fd): told.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)
    def pwrite(fd, *rest): told.append("write"); return write(fd, *rest)
    monkeypatch.setattr(os, "fsync", fsync), monkeypatch.setattr(os, "pwrite", pwrite)
    qk_restore(pre, post, inplace=True)
    first, last = told.index("write"), len(told) - 1 - told[::-1].index("write")
    assert [JOURNAL in t for t in told[:first]].count(True) == 1 and told[first - 1] == str(post)
    shards = {str(p) for p in post.glob("*.safetensors")}
    assert shards <= set(told[last + 1:])
    del told[:]
    undo(post)
    assert shards <= set(told[len(told) - told[::-1].index("write"):])


def test_undo_reads_what_it_has_written(pair, monkeypatch):
    "A disk that does not keep what it is given: the journal stays."
    pre, post = pair
    qk_restore(pre, post, inplace=True)
    with monkeypatch.context() as m:
        m.setattr(in_place, "write_all", lambda fd, data, at: checkpoints.write_all(fd, bytes(len(data)), at))
        with pytest.raises(CheckpointError, match="does not hold what was written"): undo(post)
    assert (post / JOURNAL).exists()
    undo(post)
    assert same(load(post), load(write_checkpoint(post.parent / "again", 2, shards=2)))


# ---- what reaches a terminal

@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\rb", "a\x08b", "\x9b31m", "\u202egnp.exe", "\ud800", "a\nb"])
def test_control_characters_are_shown(text):
    shown = printable(f"<{text}>")
    assert shown.isprintable() and shown.startswith("<") and shown.encode()
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b" and printable("x" * 5000).count("x") == 1000 and printable("äöü 注意 é") == "äöü 注意 é"


def test_names_of_strangers(tmp_path, capsys):
    evil = "\x1b]0;owned\x07"
    for config in (hypenet_config(model_type=evil), hypenet_config(mixer_types=[evil] * 4), hypenet_config(model_type="x" * 100_000)):
        folder = write_checkpoint(tmp_path / "x", 1, config=config)
        call("inspect", folder)
        out, err = capsys.readouterr()
        assert (out + err) and all(c.isprintable() or c == "\n" for c in out + err) and len(err) < 1100
        shutil.rmtree(folder)
    pre, post = write_checkpoint(tmp_path / "pre", 1), write_checkpoint(tmp_path / "post", 2)
    out = qk_restore(pre, post, out=tmp_path / "out")
    note = json.loads((out / NOTE).read_text())
    (out / NOTE).write_text(json.dumps(note | dict(tensors=[r | dict(tensor=evil) for r in note["tensors"][:1]])))
    assert call("verify", out) == 2 and "\x1b" not in capsys.readouterr().err


def test_an_error_that_nobody_foresaw(pair, tmp_path, monkeypatch, capsys):
    def breaks(*args, **kw): raise ZeroDivisionError("a\x1b b")
    monkeypatch.setattr(restore, "write_result", breaks)
    assert call("restore", *pair, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("Error: ZeroDivisionError: a\\x1b b") and "report" in err and "--debug" in err and "Traceback" not in err
    for words in (["--debug", "restore", *pair, tmp_path / "out"], ["restore", *pair, tmp_path / "out", "--debug"]):
        assert call(*words) == 2 and "Traceback" in (err := capsys.readouterr().err) and "in breaks" in err
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]
    def full(*args, **kw): raise MemoryError
    monkeypatch.setattr(restore, "write_result", full)
    assert call("restore", *pair, tmp_path / "out") == 2 and capsys.readouterr().err == "Error: there is not enough memory for this\n"


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(27, "File too large"), CheckpointError("y")])
def test_in_place_on_the_command_line_is_taken_back_at_once(pair, tmp_path, monkeypatch, error, capsys):
    pre, post = pair
    before = snapshot(tmp_path)
    def breaks(*args, **kw): raise error
    monkeypatch.setattr(restore, "write_result", breaks)
    assert call("restore", pre, post, "--in-place") == 2
    assert "is again what it was" in capsys.readouterr().err and snapshot(tmp_path) == before
    monkeypatch.setattr(in_place, "_put_back", breaks)  # and where that is not possible either
    if isinstance(error, RuntimeError): return
    assert call("restore", pre, post, "--in-place") == 2 and f"is half restored: qkrestore undo {post}" in capsys.readouterr().err
    monkeypatch.undo()
    undo(post)
    assert snapshot(tmp_path) == before


# ---- stopped

STOPS = int(os.environ.get("QKRESTORE_STOPS", 4))


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    root = tmp_path_factory.mktemp("heavy")
    for n, s in (("pre", 1), ("post", 2)):
        g = torch.Generator().manual_seed(s)
        weights = {f"model.layers.{i}.self_attn.{r}_proj.weight": torch.randn(512, 1024, generator=g) for i in range(4) for r in "qkvo"}
        write_checkpoint(root / n, s, shards=3, weights=weights, config=hypenet_config(hidden_size=1024))
    return root


def _start(root, *words):
    return subprocess.Popen([sys.executable, "-c", "from qkrestore_nb.cli import main; main()", "restore", str(root / "pre"), str(root / "post"), *map(str, words)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])  # nohup and & ignore them


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("words", [["out"], ["--in-place"]])
def test_a_stopped_run_leaves_nothing(heavy, number, words):
    "At any moment: the exit code of the signal and one sentence, or a complete result; and what was there before is there."
    words = [heavy / "out" if w == "out" else w for w in words]
    before, stopped = snapshot(heavy), 0
    work = lambda: list(heavy.glob(".out.*")) or (heavy / "post" / JOURNAL).exists() or list((heavy / "post").glob(".*.part"))
    for i in range(STOPS):
        run = _start(heavy, *words)
        while not work() and run.poll() is None: time.sleep(.001)
        time.sleep(random.Random(i).uniform(0, .03))
        run.send_signal(number)
        if i % 2: run.send_signal(number)  # impatience
        err = run.communicate()[1]
        assert run.returncode in (128 + number, -number, 0), err  # -number: it was done, and Python was leaving
        if run.returncode > 0:
            stopped += 1
            assert err.startswith(f"Error: stopped by {number.name}") and err.count("\n") == 1
        if (heavy / "out").exists():
            assert len(verify(heavy / "out")) == 4
            shutil.rmtree(heavy / "out")
        if (heavy / "post" / JOURNAL).exists():  # the signal came when all was written
            assert {r["equals"] for r in verify(heavy / "post", heavy / "pre")} == {"pre"}
            undo(heavy / "post")
        assert snapshot(heavy) == before, (i, err)
    assert stopped, "no signal fell into the work"


def test_handlers_are_put_back(pair, capsys):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    call("verify", pair[0])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# ---- fine-tuning: what it goes on from, and what it is given

SETTINGS = dict(steps=6, T=128, rows=4, lr=3e-3, every=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from conftest import small_hybrid, small_tokenizer
    folder = tmp_path_factory.mktemp("finetune")
    small_hybrid().save_pretrained(folder / "pre")
    small_tokenizer().save_pretrained(folder / "pre")
    write_sums(folder / "sums.jsonl")
    return folder


def tune(base, out, **more):
    from qkrestore_nb.finetune import finetune
    return finetune(base / "pre", base / "sums.jsonl", out, **SETTINGS | more)


def stop_at(n):
    def look(step, loss):
        if step == n: raise KeyboardInterrupt
    return look


class Evil:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f"touch {self.file}",)


def test_no_pickle_is_opened(base, tmp_path):
    "Whatever lies in OUT.run under the names that accelerate and torch use, and under those of our own."
    with pytest.raises(KeyboardInterrupt) as e: tune(base, tmp_path / "post", look=stop_at(5))
    assert e.value.__notes__ == ["the same command goes on from state 4"]
    state = tmp_path / "post.run" / "state-4"
    assert sorted(p.suffix for p in state.iterdir()) == [".json", ".safetensors", ".safetensors"]
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin", "scaler.pt"): torch.save(Evil(tmp_path / "PWNED"), state / name)
    (state / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "PWNED")))
    for own in ("part-0.safetensors", "random-0.safetensors"):
        good = (state / own).read_bytes()
        torch.save(Evil(tmp_path / "PWNED"), state / own)
        with pytest.raises(CheckpointError, match="is damaged"): tune(base, tmp_path / "post")
        (state / own).write_bytes(good)
    tune(base, tmp_path / "post")
    assert not (tmp_path / "PWNED").exists() and not (tmp_path / "post.run").exists()
    tune(base, tmp_path / "whole")
    assert same(load(tmp_path / "post"), load(tmp_path / "whole"))


def test_a_process_that_ends_elsewhere(base, tmp_path):
    "What torch.distributed says then is a sentence; another error of the machine stays what it is."
    def lost(said):
        def look(step, loss):
            if step == 5: raise RuntimeError(said)
        return look
    with pytest.raises(CheckpointError, match="another process of this run has ended, .*: the same command goes on from state 4") as e:
        tune(base, tmp_path / "post", look=lost("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711"))
    assert len(str(e.value)) <= 160
    with pytest.raises(RuntimeError, match="out of paper") as e: tune(base, tmp_path / "post", look=lost("out of paper"))
    assert not isinstance(e.value, CheckpointError) and e.value.__notes__ == ["the same command goes on from state 4"]


def test_an_adapter_goes_on_as_if_nothing_had_been(base, tmp_path):
    with pytest.raises(KeyboardInterrupt): tune(base, tmp_path / "post", look=stop_at(5), rank=4)
    kept = load_file(tmp_path / "post.run" / "state-4" / "part-0.safetensors")
    assert kept and all("lora" in k for k in kept if k.startswith("weight/"))  # the frozen weights are pre's
    tune(base, tmp_path / "post", rank=4), tune(base, tmp_path / "whole", rank=4)
    assert same(load(tmp_path / "post"), load(tmp_path / "whole"))


def test_states_that_do_not_fit(base, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    with pytest.raises(KeyboardInterrupt): tune(base, tmp_path / "post", look=stop_at(5))
    run = tmp_path / "post.run"
    part, done = run / "state-4" / "part-0.safetensors", run / "state-4" / "done.json"
    kept, good = load_file(part), done.read_text()
    name = next(k for k in kept if k.startswith("weight/"))
    for other in ({k: t for k, t in kept.items() if k != name}, kept | {name: kept[name][:1].clone()}, kept | {"moment/exp_avg/nobody": torch.zeros(2)}):
        save_file(other, part)
        with pytest.raises(CheckpointError, match="other tensors"): tune(base, tmp_path / "post")
    save_file(kept, part)
    for content, says in (("{", "not valid JSON"), (DEEP, "not valid JSON"), ("[]", "no object"), ("{}", "not a state"), (good.replace('"processes": 1', '"processes": 2'), "saved by 2 processes")):
        done.write_text(content)
        with pytest.raises(CheckpointError, match=says): tune(base, tmp_path / "post")
    done.write_text(good)
    with monkeypatch.context() as m:
        m.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(CheckpointError, match="not a folder of yours"): tune(base, tmp_path / "post")
    for content in ("", "{", DEEP, "[]"):
        good, _ = (run / "recipe.json").read_text(), (run / "recipe.json").write_text(content)
        with pytest.raises(CheckpointError, match="begin anew"): tune(base, tmp_path / "post")
        (run / "recipe.json").write_text(good)
    tune(base, tmp_path / "post")


def test_data_that_changed_is_noticed(base, tmp_path):
    from qkrestore_nb.finetune import finetune
    data = tmp_path / "sums.jsonl"
    shutil.copy(base / "sums.jsonl", data)
    with pytest.raises(KeyboardInterrupt): finetune(base / "pre", data, tmp_path / "post", look=stop_at(3), **SETTINGS)
    with open(data, "a") as f: f.write('{"prompt": "1", "completion": "2"}\n')
    with pytest.raises(CheckpointError, match="was changed since"): finetune(base / "pre", data, tmp_path / "post", **SETTINGS)


def test_two_fine_tunings_of_one_name(base, tmp_path):
    "The second one says so, and the first is not disturbed."
    told = []
    def look(step, loss):
        if step == 3:
            with pytest.raises(CheckpointError, match="another run is at work") as e: tune(base, tmp_path / "post")
            told.append(str(e.value))
    tune(base, tmp_path / "post", look=look)
    assert told and (tmp_path / "post").exists() and not (tmp_path / "post.run").exists()


def test_an_output_that_appears_while_it_trains(base, tmp_path):
    def look(step, loss):
        if step == 6: (tmp_path / "post").mkdir(), (tmp_path / "post" / "x").write_text("")
    with pytest.raises(CheckpointError, match="has appeared"): tune(base, tmp_path / "post", look=look)
    shutil.rmtree(tmp_path / "post")
    tune(base, tmp_path / "post")


LINES = {"latin-1": '{"prompt": "é", "completion": "b"}'.encode("latin-1"), "half a character": b'{"prompt": "\\ud800", "completion": "b"}', "deep": DEEP.encode(), "long": b'{"prompt": "' + b"a" * 11_000_000 + b'", "completion": "b"}',
         "binary": bytes(range(256))}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_are_none(base, tmp_path, name, capsys):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + LINES[name].replace(b"\n", b"") + b"\n")
    assert call("finetune", base / "pre", data, tmp_path / "post") == 2
    assert "line 2" in (err := capsys.readouterr().err) and sentence(err) and [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_nothing_to_learn_from(base, tmp_path):
    "Empty conversations with a tokenizer that adds nothing, and answers that lie behind the end of every row."
    from transformers import AutoTokenizer

    from qkrestore_nb.finetune import finetune
    shutil.copytree(base / "pre", tmp_path / "pre")
    tokenizer = AutoTokenizer.from_pretrained(base / "pre")
    tokenizer.chat_template, tokenizer.eos_token = None, None
    tokenizer.save_pretrained(tmp_path / "pre")
    (tmp_path / "pre" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "none.jsonl").write_text('{"prompt": "", "completion": ""}\n' * 3)
    (tmp_path / "late.jsonl").write_text(json.dumps(dict(prompt="and " * 300, completion="b")) + "\n")
    for data in ("none.jsonl", "late.jsonl"):
        with pytest.raises(CheckpointError, match="nothing to learn"): finetune(tmp_path / "pre", tmp_path / data, tmp_path / "post", **SETTINGS)
    (tmp_path / "late.jsonl").write_text((json.dumps(dict(prompt="a", completion="b " * 300)) + "\n") * 2 + '{"prompt": "a", "completion": "b"}\n')
    with pytest.warns(UserWarning, match="2 of the first 3 conversations are longer than 128 tokens"): finetune(base / "pre", tmp_path / "late.jsonl", tmp_path / "post", **SETTINGS)
    cut = json.loads((tmp_path / "post" / "finetune.json").read_text())["config"]["cut"]
    assert cut["conversations"] == 3 and cut["longer"] == 2 and cut["tokens_cut"] > 200


def test_pickled_weights_are_not_trained(base, tmp_path, capsys):
    pre = tmp_path / "pre"
    shutil.copytree(base / "pre", pre)
    (pre / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "PWNED"), pre / "pytorch_model.bin")
    assert call("finetune", pre, base / "sums.jsonl", tmp_path / "post") == 2
    assert "pickled weights" in (err := capsys.readouterr().err) and sentence(err) and not (tmp_path / "PWNED").exists()


# ---- every other file that is written under another name first

def test_no_writer_follows_a_link_of_its_old_name(tmp_path, secret):
    from transformers import LlamaConfig, LlamaForCausalLM

    from qkrestore_nb import experiment, training
    (tmp_path / "a.part").symlink_to(secret), (tmp_path / "m.part").symlink_to(secret.parent)
    experiment._write(tmp_path / "a.json", dict(x=1))
    training._save(tmp_path / "a.pt", x=torch.ones(1))
    assert json.loads((tmp_path / "a.json").read_text()) == dict(x=1) and torch.load(tmp_path / "a.pt")["x"] == 1
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    experiment.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").exists() and secret.read_text() == "mine\n" and [p.name for p in secret.parent.iterdir()] == [secret.name]
    assert not [p for p in tmp_path.glob(".*.part")]

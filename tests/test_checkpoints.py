"Files under stress: kills, two runs at once, full disks, copies that fall back, casts, strengths, undo and verify."
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NAME, hypenet_config, snapshot, tensors, write_checkpoint
from safetensors.torch import load_file

from qkrestore_nb import checkpoints, in_place, restore
from qkrestore_nb.checkpoints import CheckpointError, locked, read_index
from qkrestore_nb.in_place import JOURNAL, undo, verify
from qkrestore_nb.moves import encode, plan
from qkrestore_nb.restore import qk_restore

QK = [NAME.format(i, r) for i in (1, 2) for r in "qk"]
load = lambda folder: {n: t for f in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(f).items()}
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- in place, undo, verify

def test_in_place_and_back(pair, tmp_path):
    pre, post = pair
    before, want = snapshot(tmp_path), load(post) | {n: load(pre)[n] for n in QK}
    assert qk_restore(pre, post, inplace=True) == post
    assert same(load(post), want) and (post / JOURNAL).exists()
    assert [r["equals"] for r in verify(post)] == ["pre"] * 4
    assert {k: v for k, v in snapshot(tmp_path).items() if k.startswith("pre/")} == {k: v for k, v in before.items() if k.startswith("pre/")}
    with pytest.raises(CheckpointError, match="qkrestore undo"): qk_restore(pre, post, inplace=True)
    assert undo(post) == sum(m.bytes for m in plan(pre, post))
    assert snapshot(tmp_path) == before
    with pytest.raises(CheckpointError, match="nothing was restored there in place"): undo(post)


def test_undo_brings_back_an_earlier_note(pair, tmp_path):
    pre, post = pair
    first = qk_restore(pre, post, out=tmp_path / "first")
    before = snapshot(first)
    qk_restore(post, first, inplace=True)
    assert json.loads((first / "qk_restore.json").read_text())["before"]["post"] == str(post)
    undo(first)
    assert snapshot(first) == before


@pytest.mark.parametrize("where, nth", [("overwrite", 2), ("to_disk", 1), ("to_disk", 2), ("write_result", 1)])
def test_a_crash_in_the_middle_can_be_undone(pair, tmp_path, monkeypatch, where, nth):
    pre, post = pair
    before, calls, module = snapshot(tmp_path), [], in_place if where == "to_disk" else restore
    real = getattr(module, where)
    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == nth: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(module, where, dies)
    with pytest.raises(KeyboardInterrupt): qk_restore(pre, post, inplace=True)
    assert snapshot(post) != {k.removeprefix("post/"): v for k, v in before.items() if k.startswith("post/")}
    undo(post)
    assert snapshot(tmp_path) == before


def test_a_full_disk_while_the_journal_is_written(pair, tmp_path, monkeypatch):
    before = snapshot(tmp_path)
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(in_place.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): qk_restore(*pair, inplace=True)
    assert snapshot(tmp_path) == before


def test_in_place_does_not_reach_out_of_the_folder(pair, tmp_path):
    pre, post = pair
    shard = post / "model-00001-of-00002.safetensors"
    (tmp_path / "blobs").mkdir()
    shard.rename(tmp_path / "blobs" / "x")
    shard.symlink_to(tmp_path / "blobs" / "x")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="is a link"): qk_restore(pre, post, inplace=True)
    assert snapshot(tmp_path) == before
    shard.unlink()
    os.link(tmp_path / "blobs" / "x", shard)
    with pytest.raises(CheckpointError, match="other names"): qk_restore(pre, post, inplace=True)


def test_undo_of_files_that_were_replaced_or_a_damaged_journal(pair, tmp_path):
    pre, post = pair
    qk_restore(pre, post, inplace=True)
    journal, shard = post / JOURNAL, post / "model-00001-of-00002.safetensors"
    good, bytes_now = journal.read_bytes(), shard.read_bytes()
    for spoiled, sentence in ((good[:-1], "cut off"), (good[:-1] + bytes([good[-1] ^ 1]), "damaged"), (b"", "cannot be read"), (b"\xff" * 40, "cannot be read"),
                              (good.replace(b"model-00001", b"../../00001"), "cannot be read")):
        journal.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=sentence): undo(post)
        assert shard.read_bytes() == bytes_now
    journal.write_bytes(good)
    shard.write_bytes(bytes_now + b"x")
    with pytest.raises(CheckpointError, match="replaced since"): undo(post)
    shard.write_bytes(bytes_now)
    undo(post)
    assert same(load(post), {n: t for n, t in load(write_checkpoint(tmp_path / "again", 2, shards=2)).items()})


def test_verify_tells_which_is_which(pair, tmp_path):
    pre, post = pair
    out = qk_restore(pre, post, out=tmp_path / "out", include="norms")
    index, a, b = read_index(out), read_index(pre), read_index(post)
    data = lambda t: t["file"].read_bytes()[t["start"]:t["end"]]
    def put(name, content):
        with open(index[name]["file"], "r+b") as f: f.seek(index[name]["start"]), f.write(content)
    put(QK[0], data(b[QK[0]]))
    put(QK[1], bytes(index[QK[1]]["end"] - index[QK[1]]["start"]))
    states = {r["tensor"]: r["equals"] for r in verify(out)}
    norm = "model.layers.1.self_attn.q_norm.weight"
    assert [states[n] for n in (QK[0], QK[1], QK[2], norm)] == ["post", "neither", "pre", "pre"]
    with pytest.raises(CheckpointError, match="not the result of a restore"): verify(post)
    (out / "qk_restore.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"): verify(out)


# ---- two runs at once

def test_two_runs_in_one_folder(pair, tmp_path):
    pre, post = pair
    before = snapshot(tmp_path)
    with locked(post, "x"):
        with pytest.raises(CheckpointError, match="another run is at work"): qk_restore(pre, post, inplace=True)
    assert snapshot(tmp_path) == before
    qk_restore(pre, post, inplace=True)
    with locked(post, "x"):
        with pytest.raises(CheckpointError, match="another run is at work"): undo(post)


def test_two_processes_for_one_output(tmp_path):
    "Both may copy; one of them arrives, the other says so, and nothing is left of it."
    big = {f"model.fill.{i}": torch.zeros(1 << 20) for i in range(8)}
    for n, s in (("pre", 1), ("post", 2)): write_checkpoint(tmp_path / n, weights=tensors(s) | big)
    before = snapshot(tmp_path)
    code = "import sys\nfrom qkrestore_nb.cli import main\nmain(sys.argv[1:])"
    runs = [subprocess.Popen([sys.executable, "-c", code, "restore", *(str(tmp_path / n) for n in ("pre", "post", "out"))], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            for _ in range(3)]
    ends = [(r.communicate()[1], r.returncode) for r in runs]
    assert sorted(code for _, code in ends) == [0, 2, 2] and all("appeared" in e or "exists" in e for e, code in ends if code)
    assert same(load(tmp_path / "out"), load(tmp_path / "post") | {n: load(tmp_path / "pre")[n] for n in QK})
    shutil.rmtree(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_name_taken_at_the_last_moment(tmp_path, monkeypatch):
    "Between the look and the rename something may still come: told in the same sentence, and what is finished stays where it is."
    from qkrestore_nb.checkpoints import arrive
    (tmp_path / "made").mkdir(), (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x"), (tmp_path / "made" / "ours").write_text("y"), (tmp_path / "file").write_text("z")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    for name in ("out", "file"):
        with pytest.raises(CheckpointError, match="has appeared while the copy was made: nothing"): arrive(tmp_path / "made", tmp_path / name)
    assert (tmp_path / "out" / "theirs").read_text() == "x" and (tmp_path / "made" / "ours").read_text() == "y" and (tmp_path / "file").read_text() == "z"
    arrive(tmp_path / "made", tmp_path / "free")
    assert (tmp_path / "free" / "ours").read_text() == "y"


# ---- kill -9

KILLS = int(os.environ.get("QKRESTORE_KILLS", 12))  # 50 for the long run


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    "A pair of 48 MB, so that there is time to be killed in; how long a run takes; and what it must give."
    root = tmp_path_factory.mktemp("heavy")
    for n, s in (("pre", 1), ("post", 2)):
        g = torch.Generator().manual_seed(s)
        weights = {f"model.layers.{i}.self_attn.{r}_proj.weight": torch.randn(512, 1024, generator=g) for i in range(4) for r in "qkvo"}
        write_checkpoint(root / n, s, shards=3, weights=weights, config=hypenet_config(hidden_size=1024))
    times = []
    for words in ((root / "out",), ("--in-place",)):
        start = time.time()
        _start(root, *words).wait()
        times.append(time.time() - start)
    want = load(root / "out")
    undo(root / "post")
    shutil.rmtree(root / "out")
    return root, times, want


def _start(root, *words):
    return subprocess.Popen([sys.executable, "-c", "import sys\nfrom qkrestore_nb.cli import main\nmain(sys.argv[1:])", "restore", str(root / "pre"), str(root / "post"), *map(str, words)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill_after(process, delay):
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_kill_9_with_an_output(heavy):
    root, (whole, _), want = heavy
    before, seen = snapshot(root), set()
    for i in range(4 * KILLS):  # a busy machine takes longer than the run that was timed: then kills fall before the work
        if i >= KILLS and "journal" in seen: break
        _kill_after(_start(root, root / "out"), random.Random(i).uniform(.02, 1.1 * whole))
        seen.add("out" if (root / "out").exists() else "part" if list(root.glob(".out.*")) else "nothing")
        if (root / "out").exists():
            assert same(load(root / "out"), want) and len(verify(root / "out")) == 4
            shutil.rmtree(root / "out")
    assert {"part", "out"} & seen, "no kill fell into the work"
    assert _start(root, root / "out").wait() == 0  # what was left over is taken away
    assert same(load(root / "out"), want)
    shutil.rmtree(root / "out")
    assert snapshot(root) == before


def test_kill_9_in_place(heavy):
    root, (_, whole), want = heavy
    before, seen = snapshot(root), set()
    for i in range(4 * KILLS):  # a busy machine takes longer than the run that was timed: then kills fall before the work
        if i >= KILLS and "journal" in seen: break
        _kill_after(_start(root, "--in-place"), random.Random(i).uniform(.02, 1.1 * whole))
        seen.add("journal" if (root / "post" / JOURNAL).exists() else "nothing")
        if (root / "post" / JOURNAL).exists(): undo(root / "post")
        assert {k: v for k, v in snapshot(root).items() if not k.endswith(".part")} == before, i
    assert "journal" in seen, "no kill fell into the work"
    for part in (root / "post").glob("*.part"): part.unlink()


def test_kill_9_while_undoing(heavy):
    root, _, want = heavy
    before = snapshot(root)
    assert _start(root, "--in-place").wait() == 0
    code = f"from qkrestore_nb.in_place import undo\nundo({str(root / 'post')!r})"
    for i in range(max(4, KILLS // 4)):
        _kill_after(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL), random.Random(i).uniform(.02, .2))
    if (root / "post" / JOURNAL).exists(): undo(root / "post")
    assert snapshot(root) == before


# ---- copies

@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, None])
def test_a_copy_falls_back(pair, tmp_path, monkeypatch, error):
    calls = []
    def refuses(*args):
        calls.append(args)
        if error is None: return 0  # copies nothing and says so
        raise OSError(error, os.strerror(error))
    monkeypatch.setattr(checkpoints.os, "copy_file_range", refuses)
    out = qk_restore(*pair, out=tmp_path / "out")
    assert calls and same(load(out), load(pair[1]) | {n: load(pair[0])[n] for n in QK})


def test_other_errors_of_a_copy_are_not_swallowed(pair, tmp_path, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoints.os, "copy_file_range", full)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="No space left"): qk_restore(*pair, out=tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_across_file_systems(pair, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev: pytest.skip("one file system only")
    out = other / f"qkrestore-{os.getpid()}"
    try:
        qk_restore(*pair, out=out)
        assert same(load(out), load(pair[1]) | {n: load(pair[0])[n] for n in QK})
    finally: shutil.rmtree(out, ignore_errors=True)


def test_where_blocks_are_shared_a_full_disk_is_no_reason(pair, tmp_path, monkeypatch):
    "What FICLONE does is played by a plain copy: the file system here may not have it."
    def play(source, target):
        with open(source, "rb", closefd=False) as f: os.write(target, f.read())
        return True
    monkeypatch.setattr(checkpoints, "clone", play)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(checkpoints.os, "copy_file_range", lambda *a: pytest.fail("not needed"))
    out = qk_restore(*pair, out=tmp_path / "out")
    assert same(load(out), load(pair[1]) | {n: load(pair[0])[n] for n in QK})


def test_modes_times_and_progress(pair, tmp_path):
    shard, told = pair[1] / "model-00001-of-00002.safetensors", []
    shard.chmod(0o640)
    out = qk_restore(*pair, out=tmp_path / "out", progress=told.append)
    assert (out / shard.name).stat().st_mode & 0o777 == 0o640
    assert sum(told) == sum(p.stat().st_size for p in pair[1].rglob("*") if p.is_file())


def test_a_pipe_in_the_folder(pair, tmp_path):
    os.mkfifo(pair[1] / "pipe")
    with pytest.raises(CheckpointError, match="no regular file"): qk_restore(*pair, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


def test_what_post_has_stays(tmp_path):
    "Tied weights, no lm_head, an index with metadata of its own, other files: byte for byte post's."
    pre, post = write_checkpoint(tmp_path / "pre", 1), write_checkpoint(tmp_path / "post", 2, shards=3)
    index = json.loads((post / "model.safetensors.index.json").read_text())
    (post / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {"total_size": 1, "mine": "x"}}))
    (post / "chat_template.jinja").write_text("{{ x }}")
    out = qk_restore(pre, post, out=tmp_path / "out")
    for file in (p for p in post.rglob("*") if p.is_file() and p.suffix != ".safetensors"): assert file.read_bytes() == (out / file.relative_to(post)).read_bytes()


# ---- numbers

@pytest.mark.parametrize("a, b", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16"), ("float64", "float32"), ("float64", "bfloat16")])
def test_a_cast_is_torchs(tmp_path, a, b):
    pre, post = write_checkpoint(tmp_path / "pre", 1, dtype=a), write_checkpoint(tmp_path / "post", 2, shards=2, dtype=b)
    with pytest.raises(CheckpointError, match="cast=True"): qk_restore(pre, post, out=tmp_path / "out")
    out = qk_restore(pre, post, out=tmp_path / "out", cast=True)
    assert same(load(out), load(post) | {n: load(pre)[n].to(getattr(torch, b)) for n in QK})
    assert {r["cast_from"] for r in json.loads((out / "qk_restore.json").read_text())["tensors"]} == {dict(float32="F32", bfloat16="BF16", float16="F16", float64="F64")[a]}


def test_rounding_of_every_kind_of_number():
    x = torch.randint(-2**31, 2**31 - 1, (1 << 20,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.tensor([0., -0., float("inf"), -float("inf"), 65504., 65520., 65519.9, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40])])
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        assert encode(x.numpy(), name) == x.to(dtype).view(torch.uint8).numpy().tobytes(), name
    assert torch.frombuffer(bytearray(encode(torch.tensor([float("nan")]).numpy(), "BF16")), dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("strength", [0., .3, .5, 1.])
def test_strength_is_the_same_on_files_and_state_dicts(tmp_path, dtype, strength):
    pre, post = (write_checkpoint(tmp_path / n, s, dtype=dtype) for n, s in (("pre", 1), ("post", 2)))
    out = qk_restore(pre, post, out=tmp_path / "out", strength=strength)
    a, b = load(pre), load(post)
    want = b | {n: (b[n].double() + strength * (a[n].double() - b[n].double())).to(b[n].dtype) for n in QK}
    assert same(load(out), want) and same(qk_restore(a, b, config=hypenet_config(), strength=strength), want)
    note = json.loads((out / "qk_restore.json").read_text())
    step = {n: (want[n].double() - b[n].double(), a[n].double() - b[n].double()) for n in QK}
    if strength < 1:
        assert note["strength"] == strength
        reached = sum((x * y).sum() for x, y in step.values()) / sum((y * y).sum() for _, y in step.values())
        assert note["strength_achieved"] == pytest.approx(reached.item(), abs=1e-9) and abs(reached - strength) < .02
    else: assert "strength" not in note


@pytest.mark.parametrize("x", [-.1, 1.1, "1", None, True, float("nan")])
def test_strengths_that_make_no_sense(pair, tmp_path, x):
    with pytest.raises(CheckpointError, match="from 0 .post. to 1"): qk_restore(*pair, out=tmp_path / "out", strength=x)


@pytest.mark.parametrize("choice", [dict(heads=[1]), dict(heads=[0], projections="qkvo"), dict(heads=[0, 1]), dict(include="norms"), dict(include="norms,bias", layers=[1]), dict(tensors=r"\.[vo]_proj", layers=[2]),
                                    dict(tensors="embed"), dict(heads=[1], strength=.5)])
def test_parts_are_the_same_on_files_and_state_dicts(tmp_path, choice):
    pre, post = (write_checkpoint(tmp_path / n, s, 2, biases=True) for n, s in (("pre", 1), ("post", 2)))
    a, b = load(pre), load(post)
    out = load(qk_restore(pre, post, out=tmp_path / "out", **choice))
    assert same(out, qk_restore(a, b, config=hypenet_config(), **choice))
    changed = {n for n in b if not torch.equal(out[n], b[n])}
    assert changed == {m.post for m in plan(pre, post, **{k: v for k, v in choice.items() if k != "strength"})}
    if choice == dict(heads=[1]):
        n = NAME.format(1, "q")
        assert torch.equal(out[n][4:], a[n][4:]) and torch.equal(out[n][:4], b[n][:4])
        n = NAME.format(1, "k")  # one key head: both query heads read it
        assert torch.equal(out[n], a[n])
    if "o" in choice.get("projections", ""):
        n = NAME.format(1, "o")  # head 0 speaks through its columns
        assert torch.equal(out[n][:, :4], a[n][:, :4]) and torch.equal(out[n][:, 4:], b[n][:, 4:])


@pytest.mark.parametrize("choice, sentence", [(dict(heads=[2]), "heads="), (dict(heads=[]), "heads="), (dict(include="gains"), "include="), (dict(include="bias"), "no such tensors"),
                                              (dict(heads=[0], include="norms"), "shared by all heads"), (dict(tensors="x", include="norms"), "nothing to add"),
                                              (dict(mla="q_only"), "latent"), (dict(tensors="nothing"), "no tensor fits"), (dict(tensors="q_proj", heads=[0]), "by hand")])
def test_parts_that_cannot_be_had(pair, tmp_path, choice, sentence):
    with pytest.raises(CheckpointError, match=sentence): qk_restore(*pair, out=tmp_path / "out", **choice)
    assert sorted(os.listdir(tmp_path)) == ["post", "pre"]


def test_swapped_order_is_suspected(pair, tmp_path):
    pre, post = pair
    (pre / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match="swapped"): qk_restore(pre, post, out=tmp_path / "out")
    (post / "trainer_state.json").write_text("{}")
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk_restore(pre, post, out=tmp_path / "out2")
    config = json.loads((pre / "config.json").read_text())
    (pre / "config.json").write_text(json.dumps(config | {"_name_or_path": "somewhere/post"}))
    with pytest.warns(UserWarning, match="made from post"): qk_restore(pre, post, out=tmp_path / "out3")


# ---- memory

def test_memory_does_not_grow_with_the_files(tmp_path):
    "The peak of the whole process, in copies of the same work at 2 MB and at 256 MB."
    peaks = []
    for n, rows in ((0, 1), (1, 128)):
        root = tmp_path / str(n)
        for which, s in (("pre", 1), ("post", 2)):
            g = torch.Generator().manual_seed(s)
            weights = {f"model.layers.{i}.self_attn.{r}_proj.weight": torch.randn(rows * 32, 1024, generator=g) for i in range(4) for r in "qkvo"}
            write_checkpoint(root / which, s, weights=weights, config=hypenet_config(hidden_size=1024))
        code = ("import sys, resource\nfrom qkrestore_nb.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
                "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))\nassert 'numpy' not in sys.modules")
        done = subprocess.run([sys.executable, "-c", code, "restore", *(str(root / x) for x in ("pre", "post", "out"))], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        shutil.rmtree(root)
    assert peaks[1] < peaks[0] + 8 and max(peaks) < 80, peaks

"Files made up by hypothesis: a header, a config, a note or a journal is read as what it is, or refused in a sentence, and nothing else happens."
import json
import shutil
import struct

import pytest
from conftest import snapshot, write_checkpoint

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from qkrestore_nb.checkpoints import (
    JOURNAL,
    NOTE,
    CheckpointError,
    bits,
    overwrite,
    pieces,
    printable,
    read_config,
    read_header,
    read_index,
    read_json,
)
from qkrestore_nb.in_place import undo, verify, write_journal
from qkrestore_nb.restore import qk_restore

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
number = st.one_of(st.integers(-5, 300), st.integers(-10**30, 10**30), st.floats(), st.booleans())
word = st.one_of(st.text(max_size=12), st.sampled_from(["../x", "..", "", ".", "/etc/passwd", "model.safetensors", "config.json", "\x1b[2J", "\ud800", "F32", "BF16"]))
anything = st.recursive(st.one_of(st.none(), number, word), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(word, inner, max_size=4)), max_leaves=8)
wild = lambda x: json.dumps(x).encode()


def refused_or(call):
    "What a call returns; None where it refuses in a sentence that does nothing to a terminal."
    try: return call()
    except (CheckpointError, OSError) as e:
        assert str(e) and printable(e).isprintable()
        return None


# ---- headers

def file_of(header, data: bytes) -> bytes:
    text = wild(header)
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def sound_headers(draw):
    "Tensors one after the other, as a writer makes them."
    header, at = {}, 0
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, max_size=5)):
        if name == "__metadata__": continue
        dtype, shape = draw(st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL", "F8_E4M3"])), draw(st.lists(st.integers(0, 4), max_size=3))
        n = bits[dtype] // 8
        for d in shape: n *= d
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + n])
        at += n
    if draw(st.booleans()): header["__metadata__"] = draw(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.text(st.characters(codec="utf-8"), max_size=4), max_size=2))
    return header, at


@quick
@given(sound_headers())
def test_sound_headers_are_read_as_safetensors_reads_them(tmp_path, made):
    header, size = made
    file = tmp_path / "x.safetensors"
    file.write_bytes(file_of(header, bytes(range(256)) * (size // 256 + 1))[:len(file_of(header, b"")) + size])
    found = read_header(file)
    with safe_open(file, "np") as theirs: assert set(found) == set(theirs.keys())
    for name, t in found.items():
        assert t["shape"] == header[name]["shape"] and t["end"] - t["start"] == header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        assert b"".join(pieces(t)) == file.read_bytes()[t["start"]:t["end"]]


@quick
@given(sound_headers(), st.data())
def test_spoiled_headers(tmp_path, made, data):
    "One field, one tensor or the length replaced by anything: refused, or every tensor lies within the file; and what safetensors refuses, we do."
    header, size = made
    entries = [k for k in header if k != "__metadata__"]
    how = data.draw(st.sampled_from(["field", "entry", "metadata", "extra", "cut", "longer", "whole"] if entries else ["metadata", "extra", "whole"]))
    if how == "field": header[data.draw(st.sampled_from(entries))][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(anything)
    if how == "entry": header[data.draw(st.sampled_from(entries))] = data.draw(anything)
    if how == "metadata": header["__metadata__"] = data.draw(anything)
    if how == "extra": header[data.draw(word)] = data.draw(anything)
    if how == "whole": header = data.draw(anything)
    content = file_of(header, bytes(size))
    if how == "cut": content = content[:data.draw(st.integers(0, len(content) - 1))]
    if how == "longer": content += b"x"
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    found = refused_or(lambda: read_header(file))
    try:
        with safe_open(file, "np") as f: f.keys()
    except (SafetensorError, ValueError, OSError, UnicodeError): assert found is None
    for t in (found or {}).values(): assert 8 <= t["start"] <= t["end"] <= len(content)


# ---- configs, and every other JSON

@quick
@given(st.one_of(anything.map(wild), st.binary(max_size=40), st.integers(1, 10**5).map(lambda n: b"[" * n)))
def test_any_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for found in (refused_or(lambda: read_json(tmp_path / "config.json")), refused_or(lambda: read_config(tmp_path))):
        assert found is None or isinstance(found, dict)


@quick
@given(st.dictionaries(word, st.one_of(word, anything), max_size=5), st.one_of(st.none(), anything))
def test_any_index(tmp_path, names, other):
    folder = tmp_path / "post"
    if not folder.exists(): write_checkpoint(folder, 2, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names} if other is None else other))
    found = refused_or(lambda: read_index(folder))
    assert all(t["file"].parent == folder for t in (found or {}).values())


# ---- notes and journals

@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    root = tmp_path_factory.mktemp("restored")
    return qk_restore(write_checkpoint(root / "pre", 1), write_checkpoint(root / "post", 2), out=root / "out")


@quick
@given(st.data())
def test_any_note(restored, data):
    "With one field, one row or all of it replaced: refused, or a row for each that it has; and only what is as it was written is called pre's."
    file = restored / NOTE
    good = json.loads(file.read_text())
    note = json.loads(file.read_text())
    how = data.draw(st.sampled_from(["field", "row", "rows", "top", "adapter", "whole"]))
    row = data.draw(st.integers(0, len(note["tensors"]) - 1))
    if how == "field": note["tensors"][row][data.draw(st.sampled_from(["tensor", "bytes", "spans", "sha256_post", "sha256_restored", "strength"]))] = data.draw(anything)
    if how == "row": note["tensors"][row] = data.draw(anything)
    if how == "rows": note["tensors"] = data.draw(anything)
    if how == "top": note[data.draw(st.sampled_from(["lam", "tensors", "left_out", "zeroed"]))] = data.draw(anything)
    if how == "adapter": note |= dict(left_out=data.draw(anything), zeroed=data.draw(anything))
    if how == "whole": note = data.draw(anything)
    try:
        file.write_text(json.dumps(note))
        rows = refused_or(lambda: verify(restored))
    finally: file.write_text(json.dumps(good))
    if how == "field" and rows: assert len(rows) == 4 and sum(r["equals"] in ("pre", "restored") for r in rows) >= 3


@quick
@given(st.data())
def test_any_journal(tmp_path, data):
    "Whatever it says: nothing outside of the folder changes, no file of it gets another length, and no file but weights another content."
    root = tmp_path / "root"
    if root.exists(): shutil.rmtree(root)
    folder = write_checkpoint(root / "post", 2)
    (root / "x.safetensors").write_bytes(b"mine")
    targets = list(read_index(folder).values())[:2]
    write_journal(folder, targets)
    whole = (folder / JOURNAL).read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header, tail = json.loads(whole[8:8 + n]), whole[8 + n:]
    how = data.draw(st.sampled_from(["field", "move", "moves", "note", "whole", "cut"]))
    if how == "field": header["moves"][0][data.draw(st.sampled_from(["file", "size", "spans", "sha256"]))] = data.draw(st.one_of(anything, st.lists(st.lists(st.integers(-10, 10**4), min_size=2, max_size=2), max_size=3)))
    if how == "move": header["moves"][0] = data.draw(anything)
    if how == "moves": header["moves"] = data.draw(anything)
    if how == "note": header["note"] = data.draw(anything)
    if how == "whole": header = data.draw(anything)
    content = file_of(header, tail)
    (folder / JOURNAL).write_bytes(content[:data.draw(st.integers(0, len(content)))] if how == "cut" else content)
    before = snapshot(root)
    done = refused_or(lambda: undo(folder))
    after = snapshot(root)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert changed <= {f"post/{JOURNAL}", f"post/{NOTE}"} if done is not None else not changed  # the old bytes are what is there


@quick
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 20)), min_size=1, max_size=6), st.binary(min_size=64, max_size=64), st.integers(0, 10**6))
def test_every_change_can_be_undone(tmp_path, pairs, new, cut):
    "Stretches of a tensor are changed, all or a part of them, and come back to the last byte."
    import torch
    from safetensors.torch import save_file
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)
    save_file(dict(q=torch.arange(64, dtype=torch.uint8), k=torch.zeros(3)), folder / "model.safetensors")
    save_file(dict(q=torch.frombuffer(bytearray(new), dtype=torch.uint8)), folder / "source.st")
    before = (folder / "model.safetensors").read_bytes()
    a, b = read_header(folder / "model.safetensors")["q"], read_header(folder / "source.st")["q"]
    spans, at = [], 0
    for gap, n in sorted(pairs):
        start = max(at, gap)
        if start + n <= 64: spans.append((start, start + n)); at = start + n
    if not spans: return
    there = lambda t: t | dict(spans=[(t["start"] + x, t["start"] + y) for x, y in spans])
    write_journal(folder, [there(a)])
    overwrite(there(a), there(b))
    now = (folder / "model.safetensors").read_bytes()
    assert all(now[a["start"] + i] == (new[i] if any(x <= i < y for x, y in spans) else i) for i in range(64))
    with open(folder / "model.safetensors", "r+b") as f: f.seek(a["start"] + spans[0][0]), f.write(bytes([cut % 256]))
    assert undo(folder) == sum(y - x for x, y in spans) and (folder / "model.safetensors").read_bytes() == before

"""Do the tests fail where they should? `python benchmarks/checks/mutations.py results/mutations.json [--only WORD] [--list]`.

Each mutant is one change of one line of the library, as somebody in a hurry might make it, and the tests that must notice. It is made in a copy of the
tree; the tests run there. killed: a test failed. survived: none did, which is a hole in the tests. timeout: the tests did not end, twice, the second time with three times
the limit; it counts as noticed, and is told apart. stale: the line is no longer in the module, so the mutant must be written anew. At the end
stands noticed / all. Results are kept as they come, and a run goes on where the one before ended."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOTICED = ("killed", "timeout")
ROOT = Path(__file__).resolve().parent.parent.parent
RELIABILITY, CHECKPOINTS, PINNED, RESTORE, CLI = (f"tests/test_{n}.py" for n in ("reliability", "checkpoints", "pinned", "restore", "cli"))
MOVES, NOTE, ADAPTERS = (f"tests/test_{n}.py" for n in ("moves", "note", "adapters_hub"))
LIGHT = "not kill and not memory and not stopped"

# module, what stands there, what stands there instead, tests (files), and which of them (-k)
MUTANTS = [
    # ---- files: headers, JSON, links
    ("checkpoints", "    try: os.fsync(fd)\n", "    try: pass\n", RELIABILITY, "synced or on_the_disk"),
    ("checkpoints", "            if sync: os.fsync(fd)\n        part.replace", "        part.replace", RELIABILITY, "on_the_disk"),
    ("checkpoints", "            if sync: os.fsync(fd)\n        part.replace", "            os.fsync(fd)\n        part.replace", RELIABILITY, "no_sync"),
    ("checkpoints", "            _side_by_side(to_disk, [*part", "            _side_by_side(str, [*part", RELIABILITY, "synced"),
    ("checkpoints", "                if stop.is_set() or not todo:", "                if not todo:", RELIABILITY, "no_other_file"),
    ("checkpoints", "        if stop.is_set():\n            # ends this", "        if False:\n            # ends this", RELIABILITY, "no_other_file"),
    ("checkpoints", "if start != at:", "if start < at:", CLI, "bad_input"),
    ("checkpoints", "if start != at:", "if start > at:", RELIABILITY, "wrong_in_one_thing"),
    ("checkpoints", "if 8 + n + at != size:", "if 8 + n + at > size:", CLI, "bad_input"),
    ("checkpoints", "if len(pairs) != len(found):", "if False:", CLI, "bad_input"),
    ("checkpoints", "if n % 8 or stop - start != n // 8:", "if n % 8 or stop - start < n // 8:", RELIABILITY, "wrong_in_one_thing"),
    ("checkpoints", "if not isinstance(dtype, str) or dtype not in bits:", "if dtype not in bits:", RELIABILITY, "headers"),
    ("checkpoints", "if len(data) > most:", "if False:", RELIABILITY, "bound"),
    ("checkpoints", "except (ValueError, RecursionError) as e:  # what is no UTF-8", "except ValueError as e:  # what is no UTF-8", RELIABILITY, "json_that_is_none"),
    ("checkpoints", "    if not to.is_relative_to(home):", "    if False:", RELIABILITY, "links"),
    ("checkpoints", 'if home.parent.name == "snapshots" and to.parent == home.parent.parent / "blobs": return', 'if to.parent.name == "blobs": return', RELIABILITY, "blobs"),
    ("checkpoints", "Path(name).name != name or not name", "not name", CLI, "bad_input"),
    ("checkpoints", 'and not n <= 100_000:', 'and n > 10**15:', RELIABILITY, "too_many_layers"),
    ("checkpoints", "c.isprintable() or c in keep", "True", RELIABILITY, "control or strangers"),
    # ---- files: writing
    ("checkpoints", "os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)", "os.open(file, os.O_RDWR | os.O_NONBLOCK)", RELIABILITY, "targets"),
    ("checkpoints", "and s.st_nlink == 1: return fd", "and s.st_nlink: return fd", RELIABILITY, "targets"),
    ("checkpoints", "    if count(source, a) != count(target, b) or mix is None and a != b:", "    if False:", RELIABILITY, "lengths"),
    ("checkpoints", "                h.update(new)\n", "", RESTORE, "folders or note or paths"),
    ("checkpoints", "    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):", "    if False:", RELIABILITY, "grows"),
    ("checkpoints", "s.st_size, s.st_mtime_ns)\n        return", "s.st_size)\n        return", RELIABILITY, "is_noticed"),
    ("checkpoints", "            os.fchmod(fd, mode)\n", "            os.fchmod(fd, 0o644)\n", RELIABILITY, "who_may_read"),
    ("checkpoints", "        except BlockingIOError: raise CheckpointError(busy) from None", "        except BlockingIOError: pass", CHECKPOINTS, "two_runs"),
    ("checkpoints", '        and mark.get("out") == m[1]\n', "", RELIABILITY, "stale"),
    ("checkpoints", '        and {p.name for p in work.iterdir()} <= {MARK, "new"}\n', "", RELIABILITY, "stale"),
    ("checkpoints", "        except OSError: continue  # no locks here", "        except OSError: fd = os.open(work, os.O_RDONLY)  # no locks here", RELIABILITY, "without_locks"),
    ("checkpoints", "        if not path.is_symlink(): path.chmod", "        if path.exists(): path.chmod", RELIABILITY, "stale"),
    ("checkpoints", "if Path(folder) == post and (n == JOURNAL or", "if Path(folder) == post and (", RELIABILITY, "copied"),
    ("checkpoints", "    if os.path.lexists(out): raise taken", "    if False: raise taken", "tests/test_repair.py tests/test_reliability.py", "at_work or meanwhile"),
    ("checkpoints", "            held.callback(_remove, work)\n", "", RESTORE, "whatever_breaks"),
    ("checkpoints", '        if not remove or x.state != "stale": continue', '        if not remove: continue', RELIABILITY, "leftovers"),
    ("checkpoints", 'return head[0]["note"] == (', 'return head[0]["note"] != (', RELIABILITY, "half"),
    ("checkpoints", "        if folder in real.parents:", "        if False:", CLI, "bad_input"),
    ("checkpoints", "    if size > free and not", "    if size > 10**15 and not", f"{CHECKPOINTS} {RESTORE}", "room or disk"),
    # ---- in place, journal, note
    ("in_place", "    if os.path.lexists(Path(folder) / JOURNAL):", "    if False:", CHECKPOINTS, "in_place_and_back"),
    ("note", "not s[0] < s[1] <= size:", "not s[0] < s[1]:", RELIABILITY, "journal_is_not or note_is_not"),
    ("note", "    if any(b > c for (_, b), (c, _) in pairwise(spans)):", "    if False:", RELIABILITY, "journal_is_not or two_moves"),
    ("in_place", "        for spans in taken.values(): sound_spans(sorted(spans), 1 << 63)\n", "", RELIABILITY, "two_moves"),
    ("in_place", 'or Path(name).name != name or not name.endswith(".safetensors")', 'or not name.endswith(".safetensors")', f"{RELIABILITY} {CHECKPOINTS}", "journal_is_not or damaged_journal"),
    ("in_place", 'or Path(name).name != name or not name.endswith(".safetensors")', "or Path(name).name != name", RELIABILITY, "not_believed"),
    ("in_place", "        if at != path.stat().st_size: raise", "        if False: raise", CHECKPOINTS, "damaged_journal"),
    ("in_place", '            if sha256(source) != target["sha256"]:', "            if False:", CHECKPOINTS, "damaged_journal"),
    ("in_place", '(t for t, _ in pairs if sha256(t) != t["sha256"])', "(t for t, _ in pairs if False)", RELIABILITY, "undo_reads"),
    ("in_place", "        write_note(folder, note)\n        (folder / JOURNAL)", "        (folder / JOURNAL)", CHECKPOINTS, "in_place_and_back or earlier_note"),
    ("in_place", "        for file in {t[\"file\"] for t, _ in pairs}: to_disk(file)\n", "", RELIABILITY, "on_the_disk"),
    ("in_place", '            if file.stat().st_size != target["size"]:', "            if False:", CHECKPOINTS, "damaged_journal"),
    ("in_place", "    sweep(folder)\n    for t in targets", "    for t in targets", RELIABILITY, "swept"),
    ("note", "    if path.is_symlink():\n", "    if False:\n", RELIABILITY, "planted"),
    ("note", "return not self.solved and self.strength in (None, 1)", "return self.strength in (None, 1)", RELIABILITY, "not_called"),
    ("note", "return not self.solved and self.strength in (None, 1)", "return not self.solved", RELIABILITY, "not_called"),
    ("in_place", "        if sha256(source) != now:", "        if False:", RELIABILITY, "against_pre"),
    ("note", "    if len({(r.tensor, str(r.spans)) for r in rows}) != len(rows):", "    if False:", RELIABILITY, "note_of_nothing"),
    ("in_place", "    if sum(b - a for a, b in spans) != row.bytes:\n", "    if False:\n", RELIABILITY, "note_is_not"),
    ("in_place", "None if math.isnan(x) else str(x)", "x", RELIABILITY, "json_does_not_have"),
    ("in_place", "reduce(and_, (p.stat()", "max((p.stat()", RELIABILITY, "who_may_read"),
    # ---- restore, plan, procrustes
    ("moves", "made = encode(b + self.strength * (a - b), self.target)", "made = encode(a + self.strength * (b - a), self.target)", CHECKPOINTS, "strength"),
    ("restore", "return old + self.strength * (read(\"pre\", move).double() - old) if", "return old + (1 - self.strength) * (read(\"pre\", move).double() - old) if", CHECKPOINTS, "strength"),
    ("moves", "+ (0x7FFF + ((u >> 16) & 1))", "+ 0x8000", CHECKPOINTS, "rounding or cast"),
    ("restore", "        pre.unchanged()\n", "", RELIABILITY, "is_noticed"),
    ("restore", "            post.unchanged()\n", "            pass\n", RELIABILITY, "is_noticed"),
    ("in_place", "            try:\n                unchanged()\n", "            try:\n                pass\n", RELIABILITY, "is_noticed"),
    ("in_place", "                e.half_restored = folder", "                e.other = folder", RELIABILITY, "taken_back"),
    ("restore", "    if _same(moves, pre, post):", "    if False:", CLI, "bad_input"),
    ("restore", "    if left(pre) and not left(post) or named:", "    if left(post) and not left(pre) or named:", CHECKPOINTS, "swapped"),
    ("moves", "    if a.dtype != b.dtype and not cast:", "    if False:", CLI, "bad_input"),
    ("moves", "    if a.shape != b.shape and not grown:", "    if False:", CLI, "bad_input"),
    ("restore", "result = post.model if inplace else copy.deepcopy(post.model)", "result = post.model", RESTORE, "dict or model"),
    ("procrustes", "lam * gram.diagonal(dim1=-2, dim2=-1).mean(-1)", "lam * gram.diagonal(dim1=-2, dim2=-1).sum(-1)", PINNED, "ridge"),
    ("procrustes", "torch.where(read, w / (w + shift[..., 0]), 0)", "torch.where(read, w / (w + 2 * shift[..., 0]), 0)", f"tests/test_procrustes.py {PINNED}", ""),
    ("procrustes", "    if not tensor.sum().isfinite() and not tensor.isfinite().all():", "    if False:", "tests/test_procrustes.py", ""),
    ("procrustes", "(pre - rearrange(lost", "(pre + rearrange(lost", PINNED, "ridge"),
    ("families", "    head_dim=128,\n    rms_norm_eps=1e-6,\n", "    head_dim=128,\n", PINNED, "foreign"),
    ("families", "        if one != other and ... not in (one, other):", "        if one != other and ... not in (one, other) and name != 'rope_theta':", PINNED, "foreign"),
    # ---- choose, plan, note
    ("families", "return dict(q=(0, H * D), k=(H * D, n * D), v=((H + n) * D, n * D))", "return dict(q=(0, H * D), k=(0, n * D), v=((H + n) * D, n * D))", MOVES, "rows_of or ring"),
    ("families", "(biases or not n.endswith(\".bias\"))", "True", MOVES, "biases"),
    ("families", "    if \"tail\" in rule:", "    if False:", MOVES, "ring"),
    ("families", "        kinds[n // period * period :] = ", "        kinds[n // period :] = ", MOVES, "ring"),
    ("moves", "    if selection.layers == \"all\":\n        return None\n", "", NOTE, "by_hand"),
    ("moves", "{unwrapped(n): n for n in tensors}", "{n: n for n in tensors}", MOVES, "wrappers"),
    ("moves", "    if dtype not in _torch_dtypes.values():", "    if False:", CLI, "bad_input"),
    ("moves", "    if selection.tensors is None or selection.rows is not None:", "    if True:", MOVES, "holds_v"),
    ("moves", "if a.folder and b.folder and a.folder.resolve() == b.folder.resolve():", "if False:", CLI, "bad_input"),
    ("note", "s.layers if isinstance(s.layers, str) and not by_hand else note.layers", "s.layers", NOTE, "by_hand"),
    ("note", "    if not by_hand:\n        said[\"projections\"]", "    if True:\n        said[\"projections\"]", NOTE, "by_hand"),
    ("moves", "data[at - len(old) : at]", "data[: len(old)]", MOVES, "in_several_pieces"),
    ("procrustes", "read = [h * n_kv // H for h in", "read = [h % n_kv for h in", MOVES, "uneven"),
    ("adapters", "    if not any(\"lora_\" in _module(k)[1] for k in keys.keys() - drop):", "    if False:", ADAPTERS, "only_rows"),
    ("adapters", "            k: what for k, what in its.items() if what != \"bias\"\n", "            k: what for k, what in its.items()\n", ADAPTERS, "peft_merges or only_rows"),
    ("adapters", "k.replace(\"base_layer.bias\", \"bias\")", "k", ADAPTERS, "peft_merges or only_rows"),
    # ---- statistics
    ("core", "zz / (4 * n)", "zz / (2 * n)", PINNED, "wilson"),
    ("core", "(p + zz / 2 - half) / (1 + zz)", "(p + zz / 2 - half)", PINNED, "wilson"),
    ("audit", "    e = [*d, 1.0, -1.0]", "    e = [*d, *d]", PINNED, "paired"),
    ("audit", "/ (len(e) - 1) / len(e))", "/ len(e) / len(e))", PINNED, "paired"),
    ("audit", "    if damage[1] > -margin:", "    if damage[1] > margin:", "tests/test_audit.py", "rule"),
    ("audit", "    if regained[1] <= 0:\n", "    if regained[1] <= -50:\n", "tests/test_audit.py", "rule"),
    ("audit", "plain(found[-1])", "plain(found[0])", "tests/test_audit.py", "answer or task"),
    ("diagnostics", "draw = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), samples).astype(float)", "draw = np.ones((samples, len(x)))", PINNED, "bootstrap or width"),
    # ---- fine-tuning
    ("finetune", '("labels", [-100] + labels[1:])', '("labels", labels)', PINNED, "begins"),
    ("finetune", "islice(stream(), start * rows + me, None, world)", "islice(stream(), me, None, world)", RELIABILITY, "no_pickle"),
    ("finetune", "steps, last_epoch=start - 1, min", "steps, last_epoch=-1, min", RELIABILITY, "no_pickle"),
    ("finetune", "        if value.ndim: _local(moments[name][what]).copy_(value)\n", "", RELIABILITY, "no_pickle"),
    ("finetune", '    with locked(run, f"another', '    with locked(run.parent, None) if False else nullcontext(f"another', RELIABILITY, "two_fine"),
    ("finetune", '    if note.get("data_sha256") != recipe["data_sha256"]:', "    if False:", RELIABILITY, "data_that"),
    ("finetune", "    if not weight:", "    if False:", RELIABILITY, "nothing_to_learn"),
    # ---- the search for a repair
    ("audit", "q / m - worth * p / n for", "q / m - p / n for", "tests/test_repair.py", "gain"),
    ("repair", "answers[name].tasks, keep)\n", "answers[name].tasks)\n", "tests/test_repair.py", "halving or constraint or doubt"),
    ("repair", "(missed(name), -share(answers[name].recall))", "-share(answers[name].recall)", "tests/test_repair.py", "constraint or halving"),
    ("repair", "(missed(name), -share(answers[name].recall))", "(missed(name), share(answers[name].recall))", "tests/test_repair.py", "constraint or halving"),
    ("repair", "/ len(d) - doubt * centre_and_error(d)[1]", "/ len(d)", "tests/test_repair.py", "doubt"),
    ("repair", "if n in first(order, ceil(len(order) / 2), protect)", "if n in order[: ceil(len(order) / 2)]", "tests/test_repair.py", "halving or group"),
    ("repair", "slice(end(r - 1), end(r))", "slice(0, end(r))", "tests/test_repair.py", "rounds"),
    ("repair", "y[1] >= x[1] and y != x", "y[1] >= x[1]", "tests/test_repair.py", "front"),
    ("repair", "np.random.default_rng(seed).permutation", "np.random.default_rng(0).permutation", "tests/test_repair.py", "halves"),
    ("repair", 'list({t["prompt"]: t for t in tasks}.values())', "list(tasks)", "tests/test_repair.py", "halves"),
    ("repair", "2 * seed + i), half", "2 * seed), half", "tests/test_repair.py", "seed_of_its_own"),
    ("repair", "            if (at := self.post.tensors[move.post].data_ptr()) not in seen:\n", "            if (at := move.post) not in seen:\n", "tests/test_repair.py", "worn"),
    ("repair", "                self.post.tensors[m.post].copy_(self.kept[m.post])", "                pass", "tests/test_repair.py", "worn"),
    ("repair", "    if more[0] <= 0:", "    if more[0] < -100:", "tests/test_repair.py", "verdict or fresh"),
    ("repair", "    if kept[2] < 0:", "    if kept[2] < -100:", "tests/test_repair.py", "verdict"),
    ("repair", "    if more[1] <= 0:", "    if more[1] <= -100:", "tests/test_repair.py", "verdict"),
    ("repair", '        if outcome != "nothing":', "        if True:", "tests/test_repair.py", "fresh"),
    ("repair", "    if after >= before or paired", "    if paired", "tests/test_repair.py", "nothing_to_repair"),
    ("repair", "    if before < margin:", "    if False:", "tests/test_repair.py", "nothing_to_repair"),
    ("repair", "        return Answers(*([[0, m] for", "        return Answers(*([[m, m] for", "tests/test_repair.py", "breaks"),
    ("repair", "tokenizer if len(tokenizer) <= model.get_input_embeddings().num_embeddings else own", "tokenizer", "tests/test_repair.py", "words_that_pre"),
    ("moves", "    spans = ((0, prod(a.shape)),) if grown else b.spans", "    spans = b.spans", "tests/test_repair.py", "grown"),
    ("moves", "all_layers and b.layer is None and not b.role and b.whole", "all_layers", "tests/test_repair.py", "may_grow"),
    ("moves", "and a.shape[0] < b.shape[0]", "", "tests/test_repair.py", "may_grow"),
    ("finetune", "noise * x.abs().max()", "1e9", "tests/test_finetune.py", "leaks"),
    ("variants", "* agree).sum(0) / agree.sum(0).clamp(min=1)", "* agree).sum(0) / len(posts)", "tests/test_repair.py", "ties_as"),
    ("variants", "trimmed.sign() == trimmed.sum(0).sign()", "trimmed.sign() == trimmed.sign().sum(0).sign()", "tests/test_repair.py", "ties_as"),
    ("variants", "* (post - pre) / (1 - drop)", "* (post - pre)", "tests/test_repair.py", "dare_as"),
    ("variants", "(1 - share) * (1 - _depth(move.post, layers))", "(1 - share) * _depth(move.post, layers)", "tests/test_repair.py", "variants"),
    # ---- the command line
    ("cli", "    if isinstance(e, Stopped): return said, 128 + e.number", "    if isinstance(e, Stopped): return said, 1", RELIABILITY, "stopped"),
    ("cli", "        for s in before: signal.signal(s, signal.SIG_IGN)\n", "", RELIABILITY, "stopped"),
    ("cli", "    fine = bool(rows) and kept == len(rows)", "    fine = kept == len(rows)", RELIABILITY, "note_of_nothing"),
    ("cli", "        for s, old in before.items(): signal.signal(s, old)", "        pass", RELIABILITY, "handlers"),
]


def copy_of_the_tree(folder: Path) -> Path:
    for name in ("qkrestore_nb", "tests", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache", ".*.part"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def tested(folder: Path, files: str, which: str, limit: float) -> tuple[str, float]:
    "killed, survived or nothing (no test was chosen); and the seconds that it took."
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", "--durations=0", "--no-header", *files.split(), "-k", which or LIGHT]
    then = time.time()
    env = os.environ | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", QKRESTORE_STOPS="4")
    try: code = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit, start_new_session=True).returncode
    except subprocess.TimeoutExpired: return "timeout", time.time() - then
    return {0: "survived", 1: "killed", 5: "nothing"}.get(code, f"pytest ended with {code}"), time.time() - then


def run(tree: Path, mutant: tuple, limit: float) -> dict:
    "One mutant in the copy of the tree, which is as before afterwards."
    module, old, new, files, which = mutant
    said = dict(module=module, old=old, new=new, tests=files, which=which)
    file = tree / "qkrestore_nb" / f"{module}.py"
    text = file.read_text()
    if text.count(old) != 1: return said | dict(result="stale", seconds=0)
    file.write_text(text.replace(old, new))
    try:
        result, seconds = tested(tree, files, which, limit)
        if result == "timeout": result, seconds = tested(tree, files, which, 3 * limit)  # the machine may have been busy
    finally: file.write_text(text)
    return said | dict(result=result, seconds=round(seconds, 1))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", type=Path), ask.add_argument("--only", default="")
    ask.add_argument("--limit", type=float, default=300, help="seconds that the tests of one mutant may take"), ask.add_argument("--list", action="store_true")
    args = ask.parse_args()
    stale = [m[:2] for m in MUTANTS if (ROOT / "qkrestore_nb" / f"{m[0]}.py").read_text().count(m[1]) != 1]
    if args.list: return print(f"{len(MUTANTS)} mutants, {len(stale)} stale", *stale, sep="\n")
    key = lambda r: (r["module"], r["old"], r["new"])
    kept = {key(r): r for r in json.loads(args.out.read_text())["each"]} if args.out.exists() else {}
    chosen = [m for m in MUTANTS if args.only in " ".join(m) and kept.get(m[:3], {}).get("result") not in NOTICED]
    groups = sorted({m[3:] for m in chosen})
    killed, late, now = 0, 0, []
    with tempfile.TemporaryDirectory() as work:
        tree = copy_of_the_tree(Path(work))
        for files, which in groups:  # without a mutant each of these must pass
            tries = (tested(tree, files, which, 2 * args.limit)[0] for _ in range(2))  # a busy machine may fail one by time
            if (found := next((t for t in tries if t == "survived"), "killed")) != "survived": sys.exit(f"{files} -k {which!r} without a mutant: {found}")
        for mutant in chosen:
            r = run(tree, mutant, args.limit)
            kept[key(r)] = r
            print(f"{r['result']:9} {r['seconds']:6.1f} s  {r['module']}: {r['old'].strip()[:70]}", flush=True)
            now = [kept[m[:3]] for m in MUTANTS if m[:3] in kept]
            killed, late = (sum(r["result"] == what for r in now) for what in NOTICED)
            record = dict(killed=killed, timeouts=late, tried=len(now), mutants=len(MUTANTS), score=round((killed + late) / len(now), 3), each=now)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{killed} of {len(now)} killed, {late} by time; there are {len(MUTANTS)}") if chosen else print("nothing to do")


if __name__ == "__main__": main()

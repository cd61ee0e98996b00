"results/index.json against the folder: every file has one entry, every entry has files, a script that is there, and readers that name them."
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
INDEX = json.loads((RESULTS / "index.json").read_text())


def wrong(index: dict, root: Path = ROOT) -> list[str]:
    "What index and folder do not agree about."
    results, said = root / "results", []
    found = {glob: set(results.glob(glob)) for glob in index}
    for path in sorted(p for p in results.rglob("*") if p.is_file() and p.name not in ("index.json", "LOG.md")):
        name = path.relative_to(results)
        entries = [glob for glob in index if path in found[glob]]
        if len(entries) != 1: said.append(f"{name} has {len(entries)} entries")
    for glob, entry in index.items():
        if not found[glob]: said.append(f"{glob} matches no file")
        if not (root / entry["script"]).is_file(): said.append(f"{glob}: there is no {entry['script']}")
        if entry["script"] not in entry["command"]: said.append(f"{glob}: its command does not call {entry['script']}")
        if not entry["read_by"]: said.append(f"{glob} has no reader")
        for reader in entry["read_by"]:
            if not (root / reader).is_file(): said.append(f"{glob}: there is no {reader}")
            elif not names(text(root / reader), glob): said.append(f"{reader} does not name {glob}")
    return said


@cache
def text(path: Path) -> str: return path.read_text()


def names(text: str, glob: str) -> bool:
    "Whether every part of a path stands in a text: a reader may join them itself."
    return all(part in text for part in re.split(r"[/*]", glob.removesuffix(".json") if "*" in glob else glob) if part)


def test_index_and_folder_agree(): assert not wrong(INDEX)


@pytest.mark.parametrize("change, sentence", [
    (lambda i: i.pop("packing-cpu.json"), "packing-cpu.json has 0 entries"), (lambda i: i.update({"pack*.json": i["packing-cpu.json"]}), "packing-cpu.json has 2 entries"),
    (lambda i: i.update({"no.json": i["packing-cpu.json"]}), "no.json matches no file"),
    (lambda i: i["packing-cpu.json"].update(script="benchmarks/no.py"), "packing-cpu.json: there is no benchmarks/no.py"),
    (lambda i: i["packing-cpu.json"].update(script="benchmarks/jobs.py"), "packing-cpu.json: its command does not call benchmarks/jobs.py"),
    (lambda i: i["packing-cpu.json"].update(read_by=[]), "packing-cpu.json has no reader"),
    (lambda i: i["packing-cpu.json"].update(read_by=["nbs/no.ipynb"]), "packing-cpu.json: there is no nbs/no.ipynb"),
    (lambda i: i["packing-cpu.json"].update(read_by=["LICENSE"]), "LICENSE does not name packing-cpu.json")])
def test_this_check_can_fail(change, sentence):
    index = json.loads(json.dumps(INDEX))
    change(index)
    assert sentence in wrong(index)


def test_a_reader_names_every_part():
    assert names('Path("../results/real_model") / f"second/{x}"', "real_model/second/*.json") and not names("real_model", "real_model/second/*.json")
    assert names("hypenet-gpu-{name}.json", "hypenet-gpu-*.json") and not names("packing", "packing-cpu.json")

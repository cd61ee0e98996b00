"A contributor's tools: nbdev's commands, make, git on notebooks, the hooks before a commit, ruff; and each can say no."
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
MADE_BY_NBDEV = {"nbs/_quarto.yml", "nbs/nbdev.yml", "nbs/styles.css"}  # in .gitignore


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(cwd), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg"}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


def git(*words, cwd):
    done = run("git", "-c", "user.name=a", "-c", "user.email=a@b.org", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need(module: str):
    "A tool of the `dev` extra that an older environment may lack."
    return pytest.importorskip(module, reason=f"{module} comes with the dev extra")


@pytest.fixture
def checkout(tmp_path):
    "The checkout as a contributor has it: a repository with one commit."
    unread = shutil.ignore_patterns("pair", "__pycache__", "site", "pages", ".mathjax", ".axe", ".ipynb_checkpoints")
    for name in ("nbs", "qkrestore_nb", "docs", ".github", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unread)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git": shutil.copy(path, tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "colab-like.json", tmp_path / "results")
    git("init", "-q", cwd=tmp_path)
    git("add", "-A", cwd=tmp_path)
    git("commit", "-qm", "all", cwd=tmp_path)
    return tmp_path


def changed(folder: Path) -> list[str]:
    return [line[3:] for line in git("status", "--porcelain", cwd=folder).splitlines()]


def test_prepare(checkout):
    "nbdev_prepare exports, runs and cleans, and leaves README alone; a wrong notebook ends it."
    for path in (checkout / "nbs").glob("*.ipynb"):
        if path.name != "00_core.ipynb": path.unlink()
    git("commit", "-qam", "one chapter", cwd=checkout)
    done = run(BIN / "nbdev_prepare", cwd=checkout)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr
    assert set(changed(checkout)) <= {"qkrestore_nb/_modidx.py"}  # which now lacks the other chapters
    notebook = checkout / "nbs" / "00_core.ipynb"
    nb = json.loads(notebook.read_text())
    wrong = dict(cell_type="code", id="last", metadata={}, execution_count=None, outputs=[], source="assert 1 == 2")
    nb["cells"].append(wrong)
    notebook.write_text(json.dumps(nb))
    assert run(BIN / "nbdev_prepare", cwd=checkout).returncode != 0


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_make_lists_what_there_is(checkout):
    done = run("make", cwd=checkout)
    named = re.findall(r"^make (\w+)\t\S", done.stdout, flags=re.M)
    assert done.returncode == 0 and {"setup", "export", "run", "test", "site"} <= set(named)
    said = (ROOT / "CONTRIBUTING.md").read_text()
    for name in named:
        assert run("make", "-n", name, cwd=checkout).returncode == 0 and (name == "help" or f"make {name}" in said)


@needs_make
def test_make_export(checkout):
    "A checkout is in step; an edited notebook changes its module and nothing else."
    assert run("make", "export", cwd=checkout).returncode == 0 and changed(checkout) == []
    path = checkout / "nbs" / "00_core.ipynb"
    path.write_text(path.read_text().replace("def wilson(", "def willson("))
    done = run("make", "export", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert set(changed(checkout)) == {"nbs/00_core.ipynb", "qkrestore_nb/core.py", "qkrestore_nb/_modidx.py"}


def edit(path: Path, **fields) -> None:
    nb = json.loads(path.read_text())
    nb["cells"][3] |= fields
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def merged(folder: Path, driver: bool) -> bool:
    "Whether git merges two branches: one ran a cell again, the other edited it."
    if driver: run(sys.executable, "-m", "nbdime", "config-git", "--enable", cwd=folder)
    path, home = folder / "nbs" / "00_core.ipynb", git("branch", "--show-current", cwd=folder).strip()
    edit(path, execution_count=None, outputs=[dict(output_type="stream", name="stdout", text="1")], source="print(1)")
    git("commit", "-qam", "before", cwd=folder)
    git("checkout", "-qb", "other", cwd=folder)
    edit(path, execution_count=7, outputs=[dict(output_type="stream", name="stdout", text="2")])
    git("commit", "-qam", "ran it again", cwd=folder)
    git("checkout", "-q", home, cwd=folder)
    edit(path, execution_count=9, source="print(1)  # one")
    git("commit", "-qam", "edited it", cwd=folder)
    done = run("git", "-c", "user.name=a", "-c", "user.email=a@b.org", "merge", "-q", "--no-edit", "other", cwd=folder)
    if done.returncode: return False
    cell = json.loads(path.read_text())["cells"][3]
    return "# one" in "".join(cell["source"]) and cell["outputs"][0]["text"] in ("2", ["2"])


def test_merge_of_notebooks(checkout):
    "What .gitattributes names is switched on by one command, and merges what git alone leaves in conflict."
    need("nbdime")
    plain = checkout.with_name(checkout.name + "-plain")
    shutil.copytree(checkout, plain)
    assert not merged(plain, driver=False)
    assert merged(checkout, driver=True)
    assert "*.ipynb" in (ROOT / ".gitattributes").read_text()
    assert "nbdime config-git --enable" in (ROOT / "Makefile").read_text()


def test_hooks_before_a_commit(checkout):
    "They pass on a clean checkout, and each stops what it is for."
    need("pre_commit")
    hooks = lambda *words: run(sys.executable, "-m", "pre_commit", "run", "--all-files", *words, cwd=checkout)
    done = hooks()
    assert done.returncode == 0, done.stdout + done.stderr
    plants = {"ruff": ("docs/stamp.py", "x = lambda: undefined_name\n"), "export": ("qkrestore_nb/core.py", "x = 1\n"),
              "readme": ("README.md", "more\n"), "stamp": ("CITATION.cff", "# https://github.com/other/qkrestore_nb\n")}
    for hook, (name, line) in plants.items():
        with open(checkout / name, "a") as f: f.write(line)
        git("add", "-A", cwd=checkout)
        assert hooks(hook).returncode == 1, hook
        git("reset", "-q", "--hard", cwd=checkout)
    edit(checkout / "nbs" / "00_core.ipynb", metadata=dict(collapsed=True))
    git("add", "-A", cwd=checkout)
    assert hooks("clean").returncode == 1


def found(*words) -> set[tuple[str, str]]:
    "File and rule of all that ruff says."
    done = run(BIN / "ruff", "check", "--output-format", "json", "--quiet", *words, cwd=ROOT)
    return {(Path(r["filename"]).relative_to(ROOT).as_posix(), r["code"]) for r in json.loads(done.stdout)}


def test_ruff(tmp_path):
    assert found() == set(), "run ruff check"
    (tmp_path / "wrong.py").write_text("import os\nx: Optional[int] = '" + "x" * 120 + "'\n")
    options = ("--config", ROOT / "pyproject.toml", "--output-format", "concise")
    done = run(BIN / "ruff", "check", *options, tmp_path, cwd=tmp_path)
    assert {"E501", "F401", "F821"} <= set(re.findall(r" ([A-Z]+\d+) ", done.stdout))


def test_exemptions_are_needed():
    "Every file and rule in the list of debts still is one: the list only shrinks."
    listed = {(name, rule) for name, rules in RUFF["lint"]["per-file-ignores"].items() for rule in rules}
    there = found("--config", "lint.per-file-ignores={}")
    assert there, "the list is empty: drop this test"
    assert sorted(listed - there) == [], "drop these from per-file-ignores in pyproject.toml"
    assert {"E501", "I001"} <= {rule for _, rule in there}


def too_long(module: Path) -> list[int]:
    "Numbers of the lines over 120 columns, but for `__all__`, which nbdev writes."
    text = module.read_text()
    listed = re.search(r"^__all__ = \[.*?\]", text, re.S | re.M)
    inside = range(text[: listed.start()].count("\n"), text[: listed.end()].count("\n") + 1) if listed else ()
    return [i + 1 for i, line in enumerate(text.split("\n")) if len(line) > 120 and i not in inside]


def test_exported_code_fits_120_columns(tmp_path):
    modules = [p for p in (ROOT / "qkrestore_nb").glob("*.py") if p.name != "_modidx.py"]
    assert modules and {p.name: lines for p in modules if (lines := too_long(p))} == {}
    (tmp_path / "wrong.py").write_text("__all__ = ['" + "a" * 120 + "']\n\nx = '" + "b" * 120 + "'\n")
    assert too_long(tmp_path / "wrong.py") == [3]


def test_dev_container():
    made = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert made["postCreateCommand"] == "make setup" and (ROOT / made["containerEnv"]["PIP_CONSTRAINT"]).is_file()


def test_deposit():
    "Zenodo's record and the citation file say the same of the project and of the paper."
    import yaml
    zenodo, cff = json.loads((ROOT / ".zenodo.json").read_text()), yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for field in ("title", "license", "keywords"): assert zenodo[field] == cff[field]
    assert [c["name"] for c in zenodo["creators"]] == [a["name"] for a in cff["authors"]]
    papers = [cff["preferred-citation"], *cff["references"]]
    related = {r["identifier"] for r in zenodo["related_identifiers"] if r["scheme"] == "arxiv"}
    assert {i["value"] for p in papers for i in p["identifiers"]} == related
    assert all(len(p["authors"]) > 1 and all("family-names" in a for a in p["authors"]) for p in papers)


def test_a_file_stays_with_one_worker(tmp_path):
    "Fixtures of a file are made once, and pages are shared out."
    many = "import time\n\nimport pytest\n\n\n@pytest.mark.parametrize('i', range(8))\ndef test_{}(i): time.sleep(.1)\n"
    for name in ("one", "two", "page"): (tmp_path / f"test_{name}.py").write_text(many.format(name))
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    done = run(sys.executable, "-m", "pytest", "-n", "2", "-vv", "--rootdir", tmp_path, tmp_path, cwd=tmp_path)
    ran = re.findall(r"\[(gw\d)\].* PASSED \S*test_(\w+)\.py", done.stdout)
    workers = {name: {w for w, n in ran if n == name} for name in ("one", "two", "page")}
    assert len(ran) == 24 and [len(w) for w in workers.values()] == [1, 1, 2], done.stdout

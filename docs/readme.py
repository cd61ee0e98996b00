"""README.md from nbs/index.ipynb: `python docs/readme.py` writes it, `--check` says whether it is in step, `--commands`
prints its two set-up commands.

Outputs are the committed ones. Hidden cells go, figures go to docs/images. Links are absolute, since the package index
shows this text, too: notebooks lead to their pages of the site, figures and other files to the repository."""
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, IMAGES = ROOT / "README.md", ROOT / "docs" / "images"
COMMANDS = ["pip install . && qkrestore demo", 'pip install ".[dev]" && pytest']


def commands(text: str) -> list[str]:
    "The lines that set everything up, each in a bash fence of its own. Raises ValueError unless they are those of CI."
    found = [f for f in re.findall(r"^```bash\n(.*?)\n```$", text, flags=re.M | re.S) if f.startswith("pip ")]
    if found != COMMANDS:
        raise ValueError(f"README.md should hold the bash fences {COMMANDS}, each of one line, and has {found}")
    return found


def readme() -> tuple[str, dict[str, bytes]]:
    "The text, and the figures by file name."
    import nbformat
    from nbconvert import MarkdownExporter
    from prepare import addresses, code_cell, relink
    nb, cells = nbformat.read(ROOT / "nbs" / "index.ipynb", 4), []
    for cell in nb.cells:
        cells += code_cell(cell, None, "before, after and restored") if cell.cell_type == "code" else [cell]
    for c in cells:
        if c.cell_type == "code": c.metadata["transient"] = {"remove_source": "remove-input" in c.metadata["tags"]}
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python"}
    places = {"unique_key": "index", "output_files_dir": "docs/images"}
    text, resources = MarkdownExporter().from_notebook_node(nb, places)
    alts = iter([c.metadata["mystnb"]["image"]["alt"] for c in nb.cells if c.cell_type == "code"
                 for o in c.outputs if any(k.startswith("image/") for k in o.get("data", {}))])
    text = re.sub(r"!\[(?:png|svg|jpeg)\]\(docs/images/", lambda m: f"![{next(alts)}](docs/images/", text)
    at = addresses()
    def target(link):
        if link.startswith("docs/images/"): return at["raw"] + link
        if m := re.fullmatch(r"(\w+)\.ipynb(#.*)?", link): return f"{at['site']}{m[1]}.html{m[2] or ''}"
        return at["file"] + os.path.normpath(f"nbs/{link}")
    text = relink(text, target)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", {Path(k).name: v for k, v in resources["outputs"].items()}


def main(mode: str | None = None) -> int:
    if mode == "--commands":
        print(*commands(README.read_text()), sep="\n")
        return 0
    text, images = readme()
    commands(text)
    if mode == "--check":
        there = {p.name: p.read_bytes() for p in IMAGES.glob("*")}
        same = README.is_file() and README.read_text() == text and there == images
        if not same: print("README.md or docs/images is out of step: run `python docs/readme.py`", file=sys.stderr)
        return 0 if same else 1
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("*"): old.unlink()
    for name, data in images.items(): (IMAGES / name).write_bytes(data)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    try: sys.exit(main(*sys.argv[1:]))
    except ValueError as e: sys.exit(str(e))

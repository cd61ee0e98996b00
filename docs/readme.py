"""README.md from nbs/index.ipynb: `python docs/readme.py` writes it, `--check` only says whether it is in step.

Outputs are the committed ones. Hidden cells go, figures go to docs/images, links to notebooks lead to nbs/."""
import base64
import re
import sys
from pathlib import Path

import nbformat
from prepare import directives

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def readme() -> tuple[str, dict[str, bytes]]:
    "The text, and the figures by file name."
    nb, parts, images = nbformat.read(ROOT / "nbs" / "index.ipynb", 4), [], {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", cell.source))
            continue
        found, source = directives(cell.source)
        if "hide" in found: continue
        if "echo: false" not in found: parts.append(f"```python\n{source}\n```")
        for o in cell.get("outputs", []):
            data = o.get("data", {})
            if o.output_type == "stream": parts.append(f"```text\n{o.text.rstrip()}\n```")
            elif "image/png" in data:
                name = f"index-{len(images)}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{o.metadata.get('alt', 'recall and reasoning before, after and restored')}](docs/images/{name})")
            elif "text/markdown" in data: parts.append("".join(data["text/markdown"]))
    return "\n\n".join(p.strip() for p in parts) + "\n", images


def main() -> int:
    text, images = readme()
    if "--check" in sys.argv:
        same = (ROOT / "README.md").is_file() and (ROOT / "README.md").read_text() == text
        same = same and {p.name: p.read_bytes() for p in IMAGES.glob("index-*.png")} == images
        if not same: print("README.md or docs/images is out of step with nbs/index.ipynb: run `python docs/readme.py`", file=sys.stderr)
        return 0 if same else 1
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("index-*.png"): old.unlink()
    for name, data in images.items(): (IMAGES / name).write_bytes(data)
    (ROOT / "README.md").write_text(text)
    return 0


if __name__ == "__main__": sys.exit(main())

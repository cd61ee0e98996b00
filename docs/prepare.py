"""Turn the notebooks into pages for Sphinx: nbs/*.ipynb -> docs/pages/*.ipynb, with a contents tree and a list of everything exported.

What a reader of the site need not see goes, nbdev's directives become myst-nb's tags, an exported function is shown as its entry
(signature, parameters) with the source folded below, its name in prose becomes a link, and the cell below a figure its caption.
Nothing is executed."""
import ast
import configparser
import re
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"default_exp", "export", "hide", "slow", "gpu", "eval", "echo", "code-fold", "fig-alt"}
CAPTION = "**Figure.** "  # begins the cell below a figure
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.M | re.S)


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    ini = configparser.ConfigParser()
    ini.read(root / "settings.ini")
    return ini["DEFAULT"]


def addresses() -> dict[str, str]:
    "Where things are, from user, repo and branch in settings.ini: the repository, its files as pages and as they are, the site. No other place makes an address."
    ini = settings()
    home = f"https://github.com/{ini['user']}/{ini['repo']}"
    return dict(repository=home, file=f"{home}/blob/{ini['branch']}/", raw=f"https://raw.githubusercontent.com/{ini['user']}/{ini['repo']}/{ini['branch']}/",
                site=f"https://{ini['user']}.github.io/{ini['repo']}/")


def repository() -> str: return addresses()["repository"]


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| name value` lines at the top of a cell, and the rest. Raises ValueError for a directive that the site does not know."
    lines = source.split("\n")
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    found = {k.strip(":"): v.strip() for k, _, v in (line[2:].strip().partition(" ") for line in lines[:n])}
    if unknown := found.keys() - KNOWN: raise ValueError(f"`#| {min(unknown)}` is new: say in docs/prepare.py what the site does with it")
    return found, "\n".join(lines[n:]).strip("\n")


def public(source: str) -> dict[str, str]:
    "Functions and classes that a cell defines for users: name -> first paragraph of the docstring."
    defs = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return {n.name: " ".join((ast.get_docstring(n) or "").split("\n\n")[0].split()) for n in defs if not n.name.startswith("_")}


def module_of(nb) -> str | None:
    for cell in nb.cells:
        if cell.cell_type == "code" and (name := directives(cell.source)[0].get("default_exp")): return f"qkrestore_nb.{name}"


def exported(nb) -> dict[str, str]:
    "All that one notebook exports: name -> first paragraph of the docstring."
    cells = [directives(c.source) for c in nb.cells if c.cell_type == "code"]
    return {k: v for found, source in cells if "export" in found for k, v in public(source).items()}


def outside_fences(text: str, change) -> str:
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(text)))


def relink(text: str, target) -> str:
    "Relative links, `](path)`, through the function `target`."
    return outside_fences(text, lambda t: re.sub(r"\]\((?![\w+.-]+:|[#/])([^)\s]+)\)", lambda m: f"]({target(m[1])})", t))


def link_symbols(text: str, names: dict[str, list[str]], module: str | None) -> str:
    "`name` of an exported function -> a link to its entry. Not in headings and links; a name of two modules only in a notebook of one."
    def one(m):
        full = [f for f in names.get(m[1].split(".")[-1], []) if f == m[1] or "." not in m[1]]
        full = full if len(full) == 1 else [f for f in full if f.startswith(f"{module}.")]
        return f"{{py:obj}}`{m[1]} <{full[0]}>`" if len(full) == 1 else m[0]
    def line(s): return s if s.startswith("#") else re.sub(r"(?<![`}])`([A-Za-z_][\w.]*)`(?!`)(?![^\[\]]*\]\()", one, s)
    return outside_fences(text, lambda t: "\n".join(map(line, t.split("\n"))))


def marked(text: str) -> str:
    "Paragraphs that begin with **Quoted.**, **Measured.** or **Open.** in a frame of their kind; notes on the paper into the margin."
    def one(paragraph):
        if m := re.match(r"\*\*(Quoted|Measured|Open)\.\*\* ", paragraph): return f"```{{div}} mark {m[1].lower()}\n{paragraph}\n```"
        if m := re.match(r"> \*\*In the paper\.\*\* (.*)", paragraph): return f"```{{margin}} In the paper\n{m[1]}\n```"
        return paragraph
    return outside_fences(text, lambda t: "\n\n".join(map(one, t.split("\n\n"))))


def entries(module: str, names: list[str], nb_source: str) -> str:
    kinds = {n.name: "autoclass" if isinstance(n, ast.ClassDef) else "autofunction" for n in ast.parse(nb_source).body if hasattr(n, "name")}
    return "```{eval-rst}\n" + "\n".join(f".. {kinds[n]}:: {module}.{n}" for n in names) + "\n```"


def code_cell(cell, module: str | None, heading: str) -> list:
    "The cells that stand for one code cell: none, the cell with its tags, or the entries of what it exports and its source folded."
    found, source = directives(cell.source)
    if "hide" in found or not source: return []
    tags = ["remove-input"] * (found.get("echo") == "false") + ["hide-input"] * (found.get("code-fold") == "true")
    names = list(public(source)) if "export" in found else []
    options = {"image": {"alt": found.get("fig-alt", f"Figure: {heading}").strip("'\"")}}
    if names:
        tags.append("hide-input")
        options |= {"code_prompt_show": "Source of " + ", ".join(names), "code_prompt_hide": "Hide the source"}
    cell.source, cell.metadata = source, nbformat.from_dict({"tags": tags, "mystnb": options})
    return ([nbformat.v4.new_markdown_cell(entries(module, names, source), id=f"api-{cell.id}")] if names else []) + [cell]


def is_figure(cell) -> bool:
    "Whether readers see a picture below this cell."
    return (cell.cell_type == "code" and "hide" not in directives(cell.source)[0]
            and any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {})))


def page(nb, names: dict[str, list[str]], blob: str):
    "A notebook as readers of the site see it. `blob`: where files beside the notebooks are shown."
    module, heading, figure, cells = module_of(nb), "", None, []
    for cell in nb.cells:
        if cell.cell_type == "code": cells += code_cell(cell, module, heading)
        elif cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ +(.+)$", FENCE.sub("", cell.source), flags=re.M) or [heading])[-1]
            cell.source = relink(marked(link_symbols(cell.source, names, module)), lambda t: blob + t[3:] if t.startswith("../") else t)
            if figure and cell.source.startswith(CAPTION): figure.metadata["mystnb"]["figure"] = {"caption": cell.source.removeprefix(CAPTION)}
            else: cells.append(cell)
        figure = cell if is_figure(cell) else None
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def tree(caption: str, pages: list[str]) -> str:
    return f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n" + "\n".join(pages) + "\n```"


def prepare(nbs: Path = ROOT / "nbs", pages: Path = ROOT / "docs" / "pages") -> None:
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    notebooks = {p.stem: nbformat.read(p, 4) for p in sorted(nbs.glob("*.ipynb"))}
    index, names, api = notebooks.pop("index"), {}, ["# Everything exported\n\nThe notebooks define all of it; each name leads to its entry."]
    for stem, nb in notebooks.items():
        if found := exported(nb):
            api.append(f"## {module_of(nb).split('.')[-1]}\n\n`{module_of(nb)}`, from [{stem}]({stem}.ipynb).\n")
            api += [f"- {{py:obj}}`{k} <{module_of(nb)}.{k}>`: {v}" for k, v in found.items()]
            for k in found: names.setdefault(k, []).append(f"{module_of(nb)}.{k}")
    index.cells.append(nbformat.v4.new_markdown_cell(tree("Chapters", list(notebooks)) + "\n\n" + tree("Reference", ["api"]), id="contents"))
    for stem, nb in {"index": index, **notebooks}.items(): nbformat.write(page(nb, names, addresses()["file"]), pages / f"{stem}.ipynb")
    (pages / "api.md").write_text("\n".join(api) + "\n")


if __name__ == "__main__": prepare()

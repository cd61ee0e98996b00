"""Turn the notebooks into pages for Sphinx: nbs/*.ipynb -> docs/pages/*.ipynb, contents, a reference page a module.

What a reader of the site need not see goes or is folded: hidden cells, imports, helpers, long sources. nbdev's
directives become myst-nb's tags. Names, arXiv numbers, files of the repository and words of the glossary become links,
and the cell below a figure its caption. Nothing is executed."""
import ast
import configparser
import re
import shutil
from pathlib import Path
from tomllib import loads

import nbformat

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"default_exp", "export", "hide", "slow", "gpu", "eval", "echo", "code-fold", "fig-alt"}
CAPTION = "**Figure.** "  # begins the cell below a figure
EVERYDAY = {"lines", "control", "order", "document", "seed", "pre", "post", "front"}  # ordinary words, too
OPEN, HELPER = 25, 6  # lines of an exported source that stay open: of what a chapter teaches, of what is private
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.M | re.S)
CODE = r"(?<!`)`[^`\n]+`(?!`)"
LINK = r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\([^)]*\)"
ROLE, FORMULA, TAG = r"\{\w+:?\w*\}`[^`]*`", r"\$\$.*?\$\$|\$[^$\n]+\$", r"<[^>\n]+>"
MARKUP = re.compile(rf"({ROLE}|{CODE}|``.*?``|{LINK}|{FORMULA}|{TAG})", flags=re.S)
ARXIV = re.compile(r"\barXiv[ :](\d{4}\.\d{5})\b")
FILE = re.compile(r"`((?:results|benchmarks|docs|tests|nbs)/[\w./-]*|[A-Z]+\.md|CITATION\.cff)`")
BADGE = re.compile(r"\[!\[([^\]]+)\]\([^)]+\)\]")  # a picture from another host that is a link: its text is enough


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    ini = configparser.ConfigParser()
    ini.read(root / "settings.ini")
    return ini["DEFAULT"]


def addresses() -> dict[str, str]:
    "Where things are, from settings.ini: the repository, its files as pages and as they are, the site."
    ini = settings()
    home, raw = (f"https://{host}/{ini['user']}/{ini['repo']}" for host in ("github.com", "raw.githubusercontent.com"))
    return dict(repository=home, file=f"{home}/blob/{ini['branch']}/", raw=f"{raw}/{ini['branch']}/",
                site=f"https://{ini['user']}.github.io/{ini['repo']}/")


def name_of(path: Path) -> str: return re.sub(r"^\d+\w?_", "", path.stem)


def parts(root: Path = ROOT) -> dict[str, dict[str, dict]]:
    "The parts of the book in their order: caption -> name of a notebook -> what docs/chapters.toml says of it."
    return loads((root / "docs" / "chapters.toml").read_text())


def chapter(path: Path, root: Path = ROOT) -> dict:
    "What docs/chapters.toml says of a notebook. Raises ValueError for one that it lacks."
    said = {k: v for named in parts(root).values() for k, v in named.items()} | {"index": {"read": 5}}
    if (name := name_of(path)) in said: return said[name]
    line = f"`{name} = {{ title = .., read = MINUTES }}`"
    raise ValueError(f"docs/chapters.toml has no line for {path.name}: add {line} to a part")


def repository() -> str: return addresses()["repository"]


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| name value` lines at the top of a cell, and the rest. Raises ValueError for a directive that is not known."
    lines = source.split("\n")
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    found = {k.strip(":"): v.strip() for k, _, v in (line[2:].strip().partition(" ") for line in lines[:n])}
    if unknown := found.keys() - KNOWN:
        raise ValueError(f"`#| {min(unknown)}` is new: say in docs/prepare.py what the site does with it")
    rest = [line for line in lines[n:] if not line.startswith("#@title ")]  # Colab's word for a folded cell
    return found, "\n".join(rest).strip("\n")


def defined(source: str) -> list:
    "The functions and classes of a cell, as syntax trees."
    return [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def public(source: str) -> dict[str, str]:
    "Functions and classes that a cell defines for users: name -> first paragraph of the docstring."
    first = lambda n: " ".join((ast.get_docstring(n) or "").split("\n\n")[0].split())
    return {n.name: first(n) for n in defined(source) if not n.name.startswith("_")}


def module_of(nb) -> str | None:
    for cell in nb.cells:
        name = cell.cell_type == "code" and directives(cell.source)[0].get("default_exp")
        if name: return f"qkrestore_nb.{name}"


def exported(nb) -> dict[str, str]:
    "All that one notebook exports: name -> first paragraph of the docstring."
    cells = [directives(c.source) for c in nb.cells if c.cell_type == "code"]
    return {k: v for found, source in cells if "export" in found for k, v in public(source).items()}


def outside_fences(text: str, change) -> str:
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(text)))


def relink(text: str, target) -> str:
    "Relative links, `](path)`, through the function `target`."
    relative = r"\]\((?![\w+.-]+:|[#/])([^)\s]+)([^)]*)\)"
    return outside_fences(text, lambda t: re.sub(relative, lambda m: f"]({target(m[1])}{m[2]})", t))


def link_symbols(text: str, names: dict[str, list[str]], module: str | None) -> str:
    """`name` of an exported function -> a link to its entry. Not in headings and links.

    A plain word (`noise`) is a link only in the chapter that exports it, for elsewhere it may be a variable or a choice
    of an option; so is a name of two modules. `needle_rows`, `HypeNetConfig`, `audit()` can be nothing else: links."""
    def one(m):
        full = [f for f in names.get(m[1].split(".")[-1], []) if f == m[1] or "." not in m[1]]
        own = [f for f in full if f.startswith(f"{module}.")]
        full = full if len(full) == 1 and (m[2] or re.search(r"[_.A-Z]", m[1])) else own
        return f"{{py:obj}}`{m[1]}{m[2]} <{full[0]}>`" if len(full) == 1 else m[0]
    pattern = r"(?<![`}])`([A-Za-z_][\w.]*)((?:\(\))?)`(?!`)(?![^\[\]]*\]\()"
    def line(s): return s if s.startswith("#") else re.sub(pattern, one, s)
    return outside_fences(text, lambda t: "\n".join(map(line, t.split("\n"))))


def plain_parts(text: str, change) -> str:
    "The prose of a text, changed: not code, links, formulas and headings."
    def block(t): return "".join(part if i % 2 else change(part) for i, part in enumerate(MARKUP.split(t)))
    def lines(t): return "".join(p if p.startswith("#") else block(p) for p in re.split(r"^(#+ .*\n?)", t, flags=re.M))
    return outside_fences(text, lines)


def link_sources(text: str, blob: str) -> str:
    "arXiv numbers, and files of the repository that are there in backticks, as links. `blob`: where files are shown."
    def file(m):
        place = blob.replace("/blob/", "/tree/") if (ROOT / m[1]).is_dir() else blob
        return f"[`{m[1]}`]({place}{m[1].rstrip('/')})" if (ROOT / m[1]).exists() else m[0]
    text = plain_parts(text, lambda t: ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", t))
    return outside_fences(text, lambda t: re.sub(rf"(?<!\[){FILE.pattern}", file, t))


def glossary(nb) -> dict[str, tuple[str, str]]:
    "The words of the glossary -> (entry, what it says). **a, b (c)** ([08](..)): Text has three names."
    found = {}
    for cell in nb.cells:
        for names, said in re.findall(r"^\*\*(.+?)\*\* \(\[\w+\]\(.+?\)\): (.+)", cell.source, flags=re.M):
            plain = re.sub(r"[*`$]|\[([^\]]*)\]\([^)]*\)", r"\1", said).replace('"', "'")
            for name in re.split(r", | \(", names.rstrip(")")): found[re.sub(r"[*`$]", "", name)] = names, plain
    return found


class Terms:
    "Where a page first uses a word of the glossary, it becomes a link which says on hovering what the word means."
    def __init__(self, words: dict[str, tuple[str, str]], page: str):
        self.words, self.page, self.seen = {w.lower(): entry for w, entry in words.items()}, page, set()
        names = sorted((w for w in words if len(w) > 1 and w not in EVERYDAY), key=len, reverse=True)
        # an abbreviation only as it stands, MK and S1; a word also where it begins a sentence
        each = "|".join(re.escape(w) if len(w) < 5 and w != w.lower() else f"(?i:{re.escape(w)})" for w in names)
        self.pattern = re.compile(rf"(?<![\w-])(?<!hidden )({each})(?![\w-])") if names else None

    def __call__(self, text: str) -> str:
        def one(m):
            entry, said = self.words[m[1].lower()]
            if entry in self.seen: return m[0]
            self.seen.add(entry)
            return f'[{m[1]}]({self.page} "{said}")'
        return plain_parts(text, lambda t: self.pattern.sub(one, t)) if self.pattern else text


def marked(text: str) -> str:
    "Paragraphs that begin with **Quoted.**, **Measured.** or **Open.** in a frame; notes on the paper into the margin."
    def one(paragraph):
        if m := re.match(r"\*\*(Quoted|Measured|Open)\.\*\* ", paragraph):
            return f"```{{div}} mark {m[1].lower()}\n{paragraph}\n```"
        if m := re.match(r"> \*\*In the paper\.\*\* (.*)", paragraph): return f"```{{margin}} In the paper\n{m[1]}\n```"
        return paragraph
    return outside_fences(text, lambda t: "\n\n".join(map(one, t.split("\n\n"))))


def entries(module: str, source: str) -> str:
    kinds = {n.name: "autoclass" if isinstance(n, ast.ClassDef) else "autofunction" for n in defined(source)}
    return "```{eval-rst}\n" + "\n".join(f".. {kinds[n]}:: {module}.{n}" for n in public(source)) + "\n```"


def signature(node) -> str:
    "name(a, b=1) of a function, without types; a class's bare name. The reference has the rest."
    if isinstance(node, ast.ClassDef): return node.name
    node = ast.parse(ast.unparse(node)).body[0]
    for arg in (a for a in ast.walk(node.args) if isinstance(a, ast.arg)): arg.annotation = None
    said = f"{node.name}({ast.unparse(node.args)})"
    return node.name if re.search(r"[`<>]", said) or len(said) > 88 else said


def introduced(module: str, source: str) -> str:
    "What stands above a folded source: signature, which leads to the reference, and first sentences."
    said = public(source)
    named = [n for n in defined(source) if n.name in said]
    return "\n\n".join(f"{{py:obj}}`{signature(n)} <{module}.{n.name}>`: {said[n.name]}" for n in named)


def fold(source: str, exported: bool) -> str | None:
    "The words on the fold that covers a cell, or None where it stands open."
    try: body = ast.parse(source).body
    except SyntaxError: return None  # IPython's own commands
    inner = [x for n in body for x in (n.body if isinstance(n, ast.If) else [n])]
    if inner and all(isinstance(n, ast.Import | ast.ImportFrom) for n in inner): return "Imports"
    names, lines = [n.name for n in defined(source)], source.count("\n") + 1
    if not exported: return None
    if public(source): return "Source of " + ", ".join(names) if lines > OPEN else None
    names += [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    what = ", ".join(names[:4]) + " and more" * (len(names) > 4) or "set-up"
    private = all(n.startswith("_") for n in names)
    return f"Helper code: {what}" if lines > (HELPER if private else OPEN) else None


def code_cell(cell, module: str | None, heading: str) -> list:
    "The cells that stand for one code cell: none, the cell with its tags, or what it exports and its source folded."
    found, source = directives(cell.source)
    if "hide" in found or not source: return []
    tags = ["remove-input"] * (found.get("echo") == "false") + ["hide-input"] * (found.get("code-fold") == "true")
    options = {"image": {"alt": found.get("fig-alt", f"Figure: {heading}").strip("'\"")}}
    if tags == ["hide-input"] and heading.startswith("Exercise"):
        options |= {"code_prompt_show": "Solution", "code_prompt_hide": "Hide the solution"}
    if not tags and (words := fold(source, "export" in found)):
        tags, options = ["hide-input"], options | {"code_prompt_show": words, "code_prompt_hide": f"Hide: {words}"}
    above = introduced(module, source) if "export" in found and "hide-input" in tags and public(source) else None
    cell.source, cell.metadata = source, nbformat.from_dict({"tags": tags, "mystnb": options})
    return ([nbformat.v4.new_markdown_cell(above, id=f"api-{cell.id}")] if above else []) + [cell]


def is_figure(cell) -> bool:
    "Whether readers see a picture below this cell."
    return (cell.cell_type == "code" and "hide" not in directives(cell.source)[0]
            and any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {})))


def page(nb, names: dict[str, list[str]], blob: str, terms: Terms):
    "A notebook as readers of the site see it. `blob`: where files beside the notebooks are shown."
    module, heading, figure, cells = module_of(nb), "", None, []
    def prose(text):
        text = link_sources(BADGE.sub(r"[\1]", marked(link_symbols(text, names, module))), blob)
        return relink(terms(text), lambda t: blob + t[3:] if t.startswith("../") else t)
    for cell in nb.cells:
        if cell.cell_type == "code": cells += code_cell(cell, module, heading)
        elif cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ +(.+)$", FENCE.sub("", cell.source), flags=re.M) or [heading])[-1]
            cell.source = prose(cell.source)
            if figure and cell.source.startswith(CAPTION):
                figure.metadata["mystnb"]["figure"] = {"caption": cell.source.removeprefix(CAPTION)}
            else: cells.append(cell)
        figure = cell if is_figure(cell) else None
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def contents(stems: list[str], root: Path = ROOT) -> dict[str, list[tuple[str, str]]]:
    """The sidebar: caption of a part -> (title, page) in reading order. `Next` at a page's end follows it.

    Raises ValueError for a line of docs/chapters.toml without its notebook."""
    pages, found = {name_of(Path(stem)): stem for stem in stems}, {}
    for part, named in parts(root).items():
        if gone := named.keys() - pages.keys():
            raise ValueError(f"docs/chapters.toml names {min(gone)}, and no notebook is called so")
        found[part] = [(said["title"], pages[name]) for name, said in named.items()]
    found["Reference"].append(("All functions", "api"))
    found["Log"].insert(0, ("What was tried", "log"))
    return found


def tree(caption: str, pages: list[tuple[str, str]]) -> str:
    lines = "\n".join(f"{title} <{page}>" for title, page in pages)
    return f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{lines}\n```"


def reference(stem: str, nb) -> str:
    "The page of one module: everything that its notebook exports, in its order."
    cells = [directives(c.source) for c in nb.cells if c.cell_type == "code"]
    parts = [entries(module_of(nb), source) for found, source in cells if "export" in found and public(source)]
    head = ["---\norphan: true\n---", f"# {module_of(nb)}", f"Made in [{stem}]({stem}.ipynb), where its source stands."]
    return "\n\n".join(head + parts) + "\n"


def released(folder: Path = ROOT / "docs" / "versions") -> list[str]:
    "The releases whose sites lie in a folder, as v0.1.0.tar.gz; the newest first."
    number = lambda name: [int(x) for x in re.findall(r"\d+", name)]
    return sorted((p.name.removesuffix(".tar.gz") for p in folder.glob("v*.tar.gz")), key=number, reverse=True)


def versions(names: list[str], site: str) -> str:
    "The page of versions."
    head = "---\norphan: true\n---\n\n# Versions\n\nThis is the site of the development version. "
    rows = "".join(f"\n- [{name}]({site}{name}/index.html)" for name in names)
    return head + (f"Each release keeps its own:\n{rows}\n" if names else "No release has a site of its own yet.\n")


LOST = """---
orphan: true
---

# No page of this name

It may have moved. The [home page](index.ipynb) lists all chapters, the [reference](api.md) all functions, and the
search looks through both.
"""


def prepare(nbs: Path = ROOT / "nbs", pages: Path = ROOT / "docs" / "pages") -> None:
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    notebooks = {p.stem: nbformat.read(p, 4) for p in sorted(nbs.glob("*.ipynb"))}
    index, names = notebooks.pop("index"), {}
    api = ["# Everything exported\n\nThe notebooks define all of it; each name leads to its entry."]
    for stem, nb in notebooks.items():
        if found := exported(nb):
            module = module_of(nb)
            short = module.split(".")[-1]
            api.append(f"## {short}\n\n[{module}](api_{short}.md), from [{stem}]({stem}.ipynb).\n")
            api += [f"- {{py:obj}}`{k} <{module}.{k}>`: {v}" for k, v in found.items()]
            (pages / f"api_{short}.md").write_text(reference(stem, nb))
            for k in found: names.setdefault(k, []).append(f"{module}.{k}")
    (pages / "api.md").write_text("\n".join(api) + "\n")
    (pages / "404.md").write_text(LOST)
    (pages / "versions.md").write_text(versions(released(), addresses()["site"]))
    words = next(((stem, glossary(nb)) for stem, nb in notebooks.items() if stem.endswith("glossary")), ("", {}))
    (pages / "log.md").write_text(link_sources((ROOT / "results" / "LOG.md").read_text(), addresses()["file"]))
    trees = "\n\n".join(tree(*part) for part in contents(list(notebooks)).items())
    index.cells.append(nbformat.v4.new_markdown_cell(trees, id="contents"))
    for stem, nb in {"index": index, **notebooks}.items():
        terms = Terms({} if stem == words[0] else words[1], f"{words[0]}.ipynb")
        nbformat.write(page(nb, names, addresses()["file"], terms), pages / f"{stem}.ipynb")


if __name__ == "__main__": prepare()

"Sphinx: the pages that docs/prepare.py made. `python docs/build.py` runs both."
import inspect
import re
import sys
from dataclasses import is_dataclass
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Annotated, get_args, get_origin

from docutils import nodes

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
from prepare import addresses, repository, settings  # noqa: E402

project, author, copyright = "qkrestore_nb", "The qkrestore_nb authors", "2026, the qkrestore_nb authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the committed outputs are what was run
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables that a cell makes
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
autodoc_typehints = "none"  # types stand in the list of parameters, where a phone has room for them
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries = False
smartquotes = False  # they would turn the -- of a command's options into a dash

html_theme, html_title, html_favicon = "sphinx_book_theme", "qkrestore_nb", "_static/favicon.svg"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_js_files = [(name, {"type": "module"}) for name in ("search.js", "interactive.js")]
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
html_baseurl = addresses()["site"]  # search engines are told one address for each page
html_theme_options = {
    "launch_buttons": {"colab_url": "https://colab.research.google.com"}, "repository_provider": "github",
    "repository_url": repository(), "repository_branch": settings()["branch"], "path_to_docs": "nbs",
    "extra_footer": f'<a href="{addresses()["site"]}versions.html">Versions</a>',
    "use_repository_button": True, "use_issues_button": True, "use_edit_page_button": True,
    "navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": [], "use_download_button": False,
    "use_fullscreen_button": False, "show_toc_level": 2, "home_page_in_toc": True}

if (DOCS / ".mathjax").exists():  # docs/build.py put it there: no request leaves the site
    html_static_path.append(".mathjax")
    mathjax_path = "mathjax/tex-chtml.js"
else: mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3.2.2/es5/tex-chtml.js"


def rst(text: str) -> str:
    "A docstring's plain text and `code` as reStructuredText: nothing else in it is markup."
    parts = re.split(r"`([^`\n]+)`", text)
    return "".join(f"``{p}``" if i % 2 else re.sub(r"([\\*_|<>@])", r"\\\1", p) for i, p in enumerate(parts))


def short(kind: str) -> str:
    "A type as a reader would write it: np.random.Generator, Iterable[int], Path."
    kind = re.sub(r"\bnumpy\.random\._generator\b", "np.random", kind)
    return re.sub(r"\bnumpy\.", "np.", re.sub(r"\b(?:collections\.abc|pathlib|typing)\.", "", kind))


def describe(kind, note: str | None) -> str:
    "Type and comment of one parameter. A command's option has its comment in the annotation."
    if get_origin(kind) is Annotated:
        kind, *extra = get_args(kind)
        note = note or next((e.help for e in extra if getattr(e, "help", None)), None)
    named = "" if kind is inspect.Parameter.empty else f"``{short(inspect.formatannotation(kind))}``"
    return ". ".join(p for p in (named, rst(" ".join((note or "").split()))) if p)


def parameters(app, what, name, obj, options, lines):
    "nbdev's docments, the comments beside the parameters, become a list of parameters below the docstring."
    lines[:] = [f"Example: ``{line[9:].strip()}``" if line.startswith("Example: ") else rst(line) for line in lines]
    if what == "class" and not (is_dataclass(obj) and "__doc__" in vars(obj)) and "__init__" not in vars(obj): return
    if what not in ("function", "method", "class"): return
    from fastcore.docments import docments
    said = getattr(obj.__init__ if what == "class" and not is_dataclass(obj) else obj, "__annotations__", {})
    # only a type that is written down: docments would guess one from the default
    found = docments(obj, full=True, eval_str=False, args_kwargs=True)
    rows = {k: describe(said.get(k, inspect.Parameter.empty), v.docment) for k, v in found.items() if k != "self"}
    returned = rows.pop("return", "")
    back = [f":returns: {returned}"] * (returned not in ("", "``None``"))
    lines += ["", *(f":param {k}: {v}" for k, v in rows.items() if v), *back, ""]


def description(app, pagename, templatename, context, doctree):
    "What search engines and chats show of a page: its title, and its first paragraph or what the package is."
    first = next((p.astext() for p in doctree.findall(nodes.paragraph)), "") if doctree else ""
    said = escape(shorten(" ".join(first.split()) or settings()["description"], 200, placeholder=" ..."))
    if pagename == "index": context["title"] = settings()["description"].split(":")[0]  # its heading is the name only
    title = escape(re.sub(r"<[^>]+>", "", context.get("title", project)))
    tags = {"og:type": "website", "og:site_name": project, "og:title": title, "og:description": said,
            "og:url": f"{html_baseurl}{pagename}.html"}
    written = "".join(f'<meta property="{k}" content="{v}" />\n' for k, v in tags.items())
    context["metatags"] = f'{context.get("metatags", "")}<meta name="description" content="{said}" />\n{written}'
    if context.get("page_source_suffix") != ".ipynb": context["page_source_suffix"] = ""  # no notebook: nothing to edit


def setup(app):
    app.connect("autodoc-process-docstring", parameters)
    app.connect("html-page-context", description)

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
from prepare import repository, settings

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
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
html_theme_options = {"launch_buttons": {"colab_url": "https://colab.research.google.com"}, "repository_provider": "github", "path_to_docs": "nbs",
                      "repository_url": repository(), "repository_branch": settings()["branch"],
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


def describe(kind, note: str | None) -> str:
    "Type and comment of one parameter. A command's option has its comment in the annotation."
    if get_origin(kind) is Annotated:
        kind, *extra = get_args(kind)
        note = note or next((e.help for e in extra if getattr(e, "help", None)), None)
    named = "" if kind is inspect.Parameter.empty else f"``{inspect.formatannotation(kind)}``"
    return ". ".join(p for p in (named, rst(" ".join((note or "").split()))) if p)


def parameters(app, what, name, obj, options, lines):
    "nbdev's docments, the comments beside the parameters, become a list of parameters below the docstring."
    lines[:] = [f"Example: ``{line[9:].strip()}``" if line.startswith("Example: ") else rst(line) for line in lines]
    if what == "class" and not (is_dataclass(obj) and "__doc__" in vars(obj)) and "__init__" not in vars(obj): return
    if what not in ("function", "method", "class"): return
    from fastcore.docments import docments
    said = getattr(obj.__init__ if what == "class" and not is_dataclass(obj) else obj, "__annotations__", {})
    # only a type that is written down: docments would guess one from the default
    rows = {k: describe(said.get(k, inspect.Parameter.empty), v.docment) for k, v in docments(obj, full=True, eval_str=False, args_kwargs=True).items() if k != "self"}
    returned = rows.pop("return", "")
    lines += ["", *(f":param {k}: {v}" for k, v in rows.items() if v), *([f":returns: {returned}"] if returned else []), ""]


def description(app, pagename, templatename, context, doctree):
    "What search engines show below a page's title: its first paragraph, or what the package is."
    first = next((p.astext() for p in doctree.findall(nodes.paragraph)), "") if doctree else ""
    said = " ".join(first.split()) or settings()["description"]
    context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{escape(shorten(said, 200, placeholder=" ..."))}" />\n'


def setup(app):
    app.connect("autodoc-process-docstring", parameters)
    app.connect("html-page-context", description)

"docs/prepare.py and its neighbours: what becomes a link, what is folded, what a reader hovers over; no browser."
import re
from pathlib import Path

import nbformat
import pytest
from build import PRINTED, columns
from figures import axes, letters, pieces, readable, shown, size
from prepare import (
    BADGE,
    Terms,
    code_cell,
    contents,
    fold,
    glossary,
    introduced,
    link_sources,
    link_symbols,
    parts,
    reference,
    signature,
)

ROOT = Path(__file__).parent.parent
BLOB = "https://github.com/a/b/blob/main/"
NAMES = {"noise": ["qkrestore_nb.recall.noise"], "needle_rows": ["qkrestore_nb.recall.needle_rows"],
         "Wide": ["qkrestore_nb.hypenet.Wide"], "load": ["qkrestore_nb.scale.load", "qkrestore_nb.study.load"]}


def test_only_names_become_links():
    "A plain word is a link in the chapter that exports it and nowhere else."
    here, there = (lambda text, m=m: link_symbols(text, NAMES, f"qkrestore_nb.{m}") for m in ("recall", "variants"))
    assert here("`noise`") == "{py:obj}`noise <qkrestore_nb.recall.noise>`" and there("`noise`") == "`noise`"
    for said in ("`needle_rows`", "`noise()`", "`Wide`", "`recall.noise`", "`qkrestore_nb.recall.noise`"):
        assert there(said).startswith("{py:obj}") or said == "`recall.noise`", said
    assert there("`load()`") == "`load()`"
    assert link_symbols("`load`", NAMES, "qkrestore_nb.study").endswith("study.load>`")
    for text in ("# `needle_rows`", "[`needle_rows`](04_recall.ipynb)", "```python\n`needle_rows`\n```", "`other`"):
        assert there(text) == text


def test_sources_become_links():
    "arXiv numbers, and files of the repository that are there."
    link = lambda text: link_sources(text, BLOB)
    assert link("RULER (arXiv 2404.06654)") == "RULER ([arXiv 2404.06654](https://arxiv.org/abs/2404.06654))"
    assert link("in `results/LOG.md`") == f"in [`results/LOG.md`]({BLOB}results/LOG.md)"
    assert link("`results/`") == f"[`results/`]({BLOB.replace('blob', 'tree')}results)"
    assert link("`CITATION.cff`") == f"[`CITATION.cff`]({BLOB}CITATION.cff)"
    for text in ("`results/nowhere.json`", "[arXiv 2404.06654](https://x.org)", "`arXiv 2404.06654`",
                 "$arXiv 2404.06654$", "```text\narXiv 2404.06654 `results/LOG.md`\n```", "## arXiv 2404.06654",
                 f"[`results/LOG.md`]({BLOB}x)"):
        assert link(text) == text


def book(*text):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(t) for t in text])


def test_words_of_the_glossary():
    "The first use in a page is a link with the sentence; one entry with three names is linked once."
    words = glossary(book('**needle, haystack (hay)** ([04](04_recall.ipynb)): A *fact*, "hidden".\n\n'
                          "**MK** ([04](x.ipynb)): Many [keys](k.ipynb)."))
    assert words.keys() == {"needle", "haystack", "hay", "MK"} and words["MK"][1] == "Many keys."
    terms = Terms(words, "g.ipynb")
    assert terms("No mk, but MK.") == 'No mk, but [MK](g.ipynb "Many keys.").'
    assert terms("## Needle\n`needle`, $needle$, [a needle](x): one Needle") == \
        "## Needle\n`needle`, $needle$, [a needle](x): one [Needle](g.ipynb \"A fact, 'hidden'.\")"
    assert terms("A haystack and needles, a needle") == "A haystack and needles, a needle"
    assert "](" not in Terms(words, "g.ipynb")("a hidden hay")  # a hidden state is not the state of a linear layer
    assert Terms({}, "g.ipynb")("A needle") == "A needle"


def test_glossary_is_read():
    found = glossary(nbformat.read(next((ROOT / "nbs").rglob("*glossary.ipynb")), 4))
    assert len(found) > 40 and all(len(said) > 20 for _, said in found.values())


SHORT = "def f(x: int, *, y=None) -> int:\n    \"Adds.\"\n    return x"
LONG = SHORT + "\n    #" * 30


def test_folds():
    "What a chapter teaches stands open; imports, helpers and long sources do not."
    assert fold("import os\nfrom a import b\nif TYPE_CHECKING: from c import d", False) == "Imports"
    assert fold(SHORT, True) is None and fold(LONG, True) == "Source of f" and fold(LONG, False) is None
    helper = "def _g():\n" + "    x = 1\n" * 8
    assert fold(helper, True) == "Helper code: _g" and fold("def _g(): pass", True) is None
    assert fold("%timeit f()", False) is None and fold("x = 1\n" * 4, True) is None
    assert fold("TABLE = {\n" + "    1: 1,\n" * 30 + "}", True) == "Helper code: TABLE"


def test_signature():
    import ast
    of = lambda text: signature(ast.parse(text).body[0])
    assert of(SHORT) == "f(x, *, y=None)" and of("class A(B): pass") == "A" and of("def g(x='<a>'): pass") == "g"
    assert introduced("m", LONG) == "{py:obj}`f(x, *, y=None) <m.f>`: Adds."


def cell(source, heading=""): return code_cell(nbformat.v4.new_code_cell(source), "m", heading)


def test_code_cells():
    assert cell("#| hide\nx") == [] and [c.cell_type for c in cell(f"#| export\n{SHORT}")] == ["code"]
    above, code = cell(f"#| export\n{LONG}")
    assert above.source.startswith("{py:obj}") and code.metadata.tags == ["hide-input"]
    folded = "#| code-fold: true\nx = 1"
    solution, other = (cell(folded, heading)[0].metadata.mystnb for heading in ("Exercises", "End"))
    assert solution.code_prompt_show == "Solution" and "code_prompt_show" not in other
    with pytest.raises(ValueError, match="`#| nonsense` is new"): cell("#| nonsense\nx")


def test_reference_page():
    sources = ("#| default_exp m", f"#| export\n{SHORT}", "#| export\ndef _g(): pass", "def h(): pass")
    text = reference("01_m", nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]))
    assert ".. autofunction:: qkrestore_nb.m.f" in text and "orphan: true" in text
    assert not re.search(r"m\._g|m\.h", text)


def test_printed_output_says_its_width():
    box = '<div class="output stream highlight-myst-ansi"><div class="highlight">'
    text = "ab\n<span>c &lt; d</span>\n</pre>"
    made = re.sub(rf"({PRINTED})<pre>(.*?)</pre>", columns, f"{box}<pre>{text}", flags=re.S)
    assert made == f'{box}<pre tabindex="0" style="--columns: 5">{text}'


def test_badge_is_text_on_the_site():
    assert BADGE.sub(r"[\1]", "[![Open in Colab](https://x/b.svg)](https://y)") == "[Open in Colab](https://y)"


def wrong_next(pages: dict[str, str], order: list[str], needed: set[str]) -> list[str]:
    "Chapters whose `Next` is not the page that follows in the sidebar, or that lack one. pages: name -> all its prose."
    follows, found = dict(zip(order, order[1:])), []
    for stem, text in pages.items():
        said = re.findall(r"^Next: \[[^\]]*\]\((\w+)\.ipynb\)", text, flags=re.M)
        if (said or stem in needed) and said != [follows.get(stem)]:
            found.append(f"{stem} says {said}, and {follows.get(stem)} follows")
    return found


def test_next_is_what_follows():
    "The link at a chapter's end and the one in the page's footer lead to the same page."
    paths = sorted((ROOT / "nbs").glob("*.ipynb"))
    prose = lambda path: "\n\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    pages = {p.stem: prose(p) for p in paths if p.stem != "index"}
    sidebar = contents(list(pages))
    needed = {page for part in ("Ideas", "Evidence", "Why", "Real models") for _, page in sidebar[part]}
    order = [page for part in sidebar.values() for _, page in part]
    assert wrong_next(pages, order, needed) == []
    assert wrong_next({"a": "Next: [c](c.ipynb)", "b": "text"}, ["a", "b", "c"], {"b"}) == \
        ["a says ['c'], and b follows", "b says [], and c follows"]


def test_sidebar(tmp_path):
    "Parts in the order of design, each notebook once, titles that fit on a line."
    stems = [p.stem for p in (ROOT / "nbs").glob("*.ipynb") if p.stem != "index"]
    sidebar = contents(stems)
    assert list(sidebar) == ["Ideas", "Evidence", "Why", "Real models", "Use it", "Reference", "Log"]
    assert sorted(page for part in sidebar.values() for _, page in part) == sorted([*stems, "api", "log"])
    assert all(len(title) <= 30 for part in sidebar.values() for title, _ in part)
    ideas = parts()["Ideas"].values()
    assert len(ideas) <= 8 and sum(said["read"] for said in ideas) <= 240, "an afternoon"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "chapters.toml").write_text("[Ideas]\ngone = { title = 'x', read = 1 }")
    assert list(parts(tmp_path)) == ["Ideas"]
    with pytest.raises(ValueError, match="names gone, and no notebook is called so"): contents(stems, tmp_path)


def drawn(*shape, sharey=False, title=False, bar=False, small=10) -> str:
    "The svg of a figure with panels."
    import io

    import matplotlib
    matplotlib.use("agg")
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8, 3), layout="constrained")
    panels = fig.subplots(*shape, sharey=sharey, squeeze=False)
    for ax in panels.flat: ax.plot([0, 1]), ax.set_ylabel("" if sharey else "y"), ax.text(.2, .2, "a", fontsize=small)
    if bar: fig.colorbar(panels.flat[-1].imshow([[1, 2], [3, 4]]), ax=list(panels.flat))
    if title: fig.suptitle("All")
    fig.savefig(out := io.StringIO(), format="svg")
    return out.getvalue()


def test_panels_below_one_another():
    "Each panel is a piece with its own words; a shared scale is repeated; the widths add up."
    svg = drawn(1, 3)
    width, height = size(svg)
    found = pieces(svg)
    assert len(found) == 3 and [p[4] for p in found] == [0, 0, 0] and sum(p[2] for p in found) == pytest.approx(width)
    second = axes(svg)[1]  # a label that is turned stands left of its place: no piece may cut it
    assert found[1][0] < second.start < second.left - 20
    label = max(float(x) for x in re.findall(r"translate\(([\d.]+) [\d.]+\) rotate", svg) if float(x) < second.left)
    assert found[1][0] <= label - 10
    assert [p[4] > 10 for p in pieces(drawn(1, 2, sharey=True))] == [False, True]
    assert len(pieces(drawn(1, 2, bar=True))) == 2 and len(pieces(drawn(2, 2))) == 2  # the columns of both rows
    img = '<img alt="Two panels, &lt; and more" src="_images/a.svg"/>'
    made = shown(img, svg)
    assert made.startswith('<img alt="Two panels, &lt; and more" src="_images/a.svg" width=') and 'class="side"' in made
    assert made.count("<image ") == 3 and 'aria-label="Two panels, &lt; and more"' in made


def test_what_is_not_stacked():
    "One panel, panels that stand below one another already, and a title of all."
    for svg in (drawn(1, 1), drawn(3, 1), drawn(1, 2, title=True)):
        made = shown('<img alt="x" src="a.svg">', svg)
        assert "stacked" not in made and "class" not in made and made.count("<img") == 1
    small = drawn(1, 2, small=6)
    assert letters(small) == pytest.approx(6) and readable(576, small) == pytest.approx(960)
    assert "side never" in shown('<img alt="x" src="a.svg">', small)  # too small side by side in any window


def test_sites_of_releases(tmp_path):
    "Each lies under its version, the newest is listed first, and nothing of an archive leaves its folder."
    import io
    import tarfile

    from build import unpack_releases
    from prepare import released, versions
    archives, site = tmp_path / "versions", tmp_path / "site"
    archives.mkdir(), site.mkdir()
    assert released(archives) == [] and "No release has a site" in versions([], "https://x.org/")
    for name, file in (("v0.9.0", "index.html"), ("v0.10.0", "index.html"), ("vevil", "../../out.html")):
        with tarfile.open(archives / f"{name}.tar.gz", "w:gz") as tar:
            entry = tarfile.TarInfo(file)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    with pytest.raises(tarfile.FilterError): unpack_releases(site, archives)
    assert not (tmp_path / "out.html").exists()
    (archives / "vevil.tar.gz").unlink()
    unpack_releases(site, archives)
    assert (site / "v0.9.0" / "index.html").read_text() == "v0.9.0" and released(archives) == ["v0.10.0", "v0.9.0"]
    page = versions(released(archives), "https://x.org/")
    assert page.index("https://x.org/v0.10.0/index.html") < page.index("https://x.org/v0.9.0/index.html")

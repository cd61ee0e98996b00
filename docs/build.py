"Build the site into docs/site: `python docs/build.py`. Warnings are errors."
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from html import escape, unescape
from pathlib import Path

from figures import shown

DOCS = Path(__file__).resolve().parent


def npm_package(name: str, folder: Path) -> Path:
    "A package of npm, such as mathjax@3.2.2, unpacked in `folder`. Raises OSError, CalledProcessError if npm fails."
    subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(Path(folder).glob("*.tgz"))) as tar: tar.extractall(folder, filter="data")
    return Path(folder) / "package"


def mathjax(version: str = "3.2.2") -> None:
    "MathJax into docs/.mathjax, once: formulas need no other host then. Without npm they load it from a public one."
    target = DOCS / ".mathjax" / "mathjax"
    if target.exists(): return
    with tempfile.TemporaryDirectory() as folder:
        try: es5, part = npm_package(f"mathjax@{version}", folder) / "es5", Path(folder) / "part"
        except (OSError, subprocess.CalledProcessError) as e:
            print(f"npm did not fetch MathJax ({e}): formulas will load it from a public address", file=sys.stderr)
            return
        shutil.copytree(es5 / "output" / "chtml" / "fonts" / "woff-v2", part / "output" / "chtml" / "fonts" / "woff-v2")
        shutil.copytree(es5 / "input" / "tex" / "extensions", part / "input" / "tex" / "extensions")  # of rare macros
        shutil.copy(es5 / "tex-chtml.js", part)
        target.parent.mkdir(exist_ok=True)
        shutil.move(part, target)


LATER = "clipboard.min|copybutton|design-tabs|sphinx_highlight"
SPHINX_SEARCH = r'\s*<script [^>]*(?:searchtools|language_data|searchindex)\.js[^>]*></script>'  # _static/search.js does it
BUTTONS = r"<p>((?:<a [^>]*>(?:(?!</a>).)*</a>\s*){3})</p>"  # a paragraph of three links
UNSEARCHED = ("genindex", "404", "search", "log", "api")  # lists, and the log


PRINTED = r'<div class="output [^>]*>\s*<div class="highlight[^>]*>(?:<div class="highlight">)?'
REACHED = 'tabindex="0" role="region" aria-label="Figure"'  # by the keyboard: on a phone a figure scrolls sideways


def columns(m: re.Match) -> str:
    "A printed output that says how many columns it has (site.css fits it in) and that the keyboard can scroll."
    longest = max(map(len, unescape(re.sub("<[^>]+>", "", m[2])).split("\n")))
    return f'{m[1]}<pre tabindex="0" style="--columns: {longest}">{m[2]}</pre>'


def lighten(site: Path, titles: dict[str, str]) -> None:
    "Pages appear sooner and do not jump, and what is too wide for a window can be read all the same."
    # the icons come from fonts, too, which have a tenth of the size
    for path in (*site.rglob("*.map"), site / "_static" / "scripts" / "fontawesome.js"): path.unlink()
    def sized(m):
        svg = (site / m[1]).read_text()
        return shown(m[0], svg) if svg.count("pt\" height=\"") else m[0]
    for path in site.glob("*.html"):
        text = re.sub(r"\s*<script [^>]*fontawesome\.js[^>]*></script>", "", path.read_text())
        text = re.sub(SPHINX_SEARCH, "", text)
        if path.name == "index.html": text = re.sub(BUTTONS, r'<p class="buttons">\1</p>', text)
        if path.stem.split("_")[0] not in UNSEARCHED or path.stem.startswith("api_"):
            weight = ' data-pagefind-weight="0.2"' * path.stem.startswith("api_")  # chapters first
            text = text.replace('<article class="bd-article"', f'<article class="bd-article" data-pagefind-body{weight}')
            if path.stem in titles:  # the words of the sidebar's title count as much as those of the page's own
                said = f'<p hidden data-pagefind-weight="10">{escape(titles[path.stem])}</p>'
                text = text.replace("</h1>", f"</h1>{said}", 1)
        text = re.sub(rf'<script (?=src="(?:_static/)?(?:{LATER})\.js)', "<script defer ", text)
        text = text.replace("</strong> -- ", "</strong>: ")  # a dash only where Sphinx may set all dashes
        text = re.sub(rf"({PRINTED})<pre>(.*?)</pre>", columns, text, flags=re.S)
        text = re.sub(r'(<div class="cell_output docutils container")(?=>\s*<(?:img|figure))', rf"\1 {REACHED}", text)
        path.write_text(re.sub(r'<img [^>]*src="(_images/[^"]+\.svg)"[^>]*>', sized, text))


def index(site: Path) -> int:
    "The search's index, from what `lighten` marked."
    for name in ("searchindex.js", "_static/searchtools.js", "_static/language_data.js"): (site / name).unlink(missing_ok=True)
    sentences = ["--exclude-selectors", ".cell_input, .cell_output, .headerlink"]  # functions are found on the pages of the API
    return subprocess.run([sys.executable, "-m", "pagefind", "--site", site, "--quiet", *sentences]).returncode


def unpack_releases(site: Path, folder: Path = DOCS / "versions") -> None:
    "The site of each release into a folder of its name; its search looks through that release alone."
    from prepare import released
    for name in released(folder):
        with tarfile.open(folder / f"{name}.tar.gz") as tar: tar.extractall(site / name, filter="data")


def main() -> int:
    from prepare import chapter, prepare
    mathjax()
    prepare()
    site = DOCS / "site"
    shutil.rmtree(site, ignore_errors=True)
    with tempfile.TemporaryDirectory() as doctrees:
        options = ["-W", "--keep-going", "-n", "-E", "-q", "-b", "html", "-c", DOCS, "-d", doctrees]
        done = subprocess.run([sys.executable, "-m", "sphinx", *options, DOCS / "pages", site])
    shutil.rmtree(DOCS / "jupyter_execute", ignore_errors=True)  # myst-nb's copies of the figures, already in the site
    if done.returncode: return done.returncode
    lighten(site, {p.stem: chapter(p).get("title", "") for p in (DOCS.parent / "nbs").glob("*.ipynb")})
    if failed := index(site): return failed
    unpack_releases(site)
    print(f"{len(list(site.glob('*.html')))} pages: open {site / 'index.html'}")
    return 0


if __name__ == "__main__": sys.exit(main())

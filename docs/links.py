"""Every link of the built site, followed without a browser: `python docs/links.py` counts them, and names dead ones.

Links and anchors inside the site must exist, links into this repository or its published site must name a file that is
here; others are judged by their form only."""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prepare import ROOT, addresses

PLACEHOLDERS = ("example.com", "example.org", "example.net", "localhost", "127.0.0.1", ".test", ".invalid", ".example",
                ".local")
MADE = ("versions.html", "api", "log", "404", "genindex", "search")  # pages without a notebook
FILES = {"link": "href", "img": "src", "script": "src"}


class Page(HTMLParser):
    "What one page offers (ids), where it leads (links), what it loads (files) and which pictures it shows (images)."
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.files, self.images = set(), [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a":
            if a.get("name"): self.ids.add(a["name"])
            if a.get("href") is not None: self.links.append(a["href"])
        if a.get(FILES.get(tag)): self.files.append(a[FILES[tag]])
        if tag == "img" and a.get("src"): self.images.append(a["src"])


def outside(link: str) -> str | None:
    "What is wrong with a link that leaves the site, or None."
    url = urlsplit(link)
    host = url.hostname or ""
    if url.scheme == "mailto": return None if "@" in url.path else "no address"
    if url.scheme not in ("http", "https"): return f"scheme {url.scheme}"
    if any(c.isspace() for c in link) or "." not in host: return "malformed"
    if host.endswith(PLACEHOLDERS): return "a placeholder"
    at, path = addresses(), unquote(url.path)
    for start in (*(at["file"].replace("/blob/", f"/{how}/") for how in ("blob", "tree", "edit")), at["raw"]):
        if link.startswith(start) and not (ROOT / path.removeprefix(urlsplit(start).path)).exists():
            return "no such file in this repository"
    if link.startswith(at["site"]):
        name = path.removeprefix(urlsplit(at["site"]).path) or "index.html"
        if not (name.startswith(MADE) or (ROOT / "nbs" / name).with_suffix(".ipynb").exists()):
            return "no notebook of this name"


def inside(site: Path, name: str, link: str, pages: dict[str, Page]) -> str | None:
    "What is wrong with a link from page `name` to another place of the site, or None."
    url = urlsplit(link)
    target = (site / name).parent / unquote(url.path) if url.path else site / name
    if target.is_dir(): target /= "index.html"
    if not target.resolve().is_relative_to(site.resolve()) or not target.is_file(): return "no such file in the site"
    other, anchor = target.resolve().relative_to(site.resolve()).as_posix(), unquote(url.fragment)
    if anchor and other in pages and anchor not in pages[other].ids: return "no such anchor"


def survey(site: Path) -> dict:
    "Pages, links and sizes of a built site, and the links that are wrong, as sentences."
    site = Path(site)
    pages = {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.glob("*.html"))}
    wrong, count = [], dict(inside=0, outside=0)
    for name, page in pages.items():
        for link in page.links + page.files:
            away = bool(urlsplit(link).scheme or link.startswith("//"))
            count["outside" if away else "inside"] += 1
            if why := outside(link) if away else inside(site, name, link, pages): wrong.append(f"{name}: {link}: {why}")
    local = lambda page: {s for s in page.images if not urlsplit(s).scheme and (site / s).is_file()}
    size = lambda *names: sum((site / n).stat().st_size for n in names)
    sizes = {n: dict(html=size(n), with_images=size(n, *local(p))) for n, p in pages.items()}
    total = sum(p.stat().st_size for p in site.rglob("*") if p.is_file())
    return dict(pages=len(pages), links=count, bytes=total, sizes=sizes, wrong=wrong)


if __name__ == "__main__":
    found = survey(ROOT / "docs" / "site")
    inside, out = found["links"]["inside"], found["links"]["outside"]
    print(f"{found['pages']} pages, {inside} links inside the site, {out} out of it, {found['bytes'] / 1e6:.1f} MB")
    sys.exit("\n".join(found["wrong"]) or None)

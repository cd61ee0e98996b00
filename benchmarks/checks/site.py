"""What the site is like: `python benchmarks/checks/site.py` builds it and writes results/site.json.

Seconds of the build, pages, links, sizes; what a reader meets in the chapters (playwright, 1400 x 900); and Lighthouse's
figures on a phone for four pages, if `lighthouse` is on the PATH (npm install lighthouse; CHROME_PATH says where the browser
is). The pages come from this machine, compressed, as a web server sends them."""
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from statistics import median
from threading import Thread

ROOT = Path(__file__).resolve().parents[2]
SITE, OUT = ROOT / "docs" / "site", ROOT / "results" / "site.json"
PAGES, RUNS = ("index.html", "01_softmax_attention.html", "03_hybrid.html", "10a_seeds.html"), 3
SCREEN = dict(width=1400, height=900)
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import nbformat
from links import survey
from prepare import directives, name_of, parts

from qkrestore_nb.core import provenance


class Compressed(SimpleHTTPRequestHandler):
    "A folder over HTTP, texts compressed."
    def send_head(self):
        path = Path(self.translate_path(self.path))
        if path.suffix not in (".html", ".css", ".js", ".svg") or not path.is_file(): return super().send_head()
        data = gzip.compress(path.read_bytes())
        self.send_response(200)
        for name, value in {"Content-Type": self.guess_type(path), "Content-Encoding": "gzip", "Content-Length": len(data), "Cache-Control": "max-age=600"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        return BytesIO(data)

    def log_message(self, *args): pass


def lighthouse(command: str, address: str) -> dict:
    "Scores of one page on a phone, 0 to 100: the median of some runs, for the speed depends on what else the machine does."
    runs = []
    for _ in range(RUNS):
        done = subprocess.run([command, address, "--quiet", "--output=json", "--chrome-flags=--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage"],
                              capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    scores = {k: round(100 * median(r["categories"][k]["score"] for r in runs)) for k in runs[0]["categories"]}
    seconds = {k: round(median(r["audits"][k]["numericValue"] for r in runs) / 1e3, 1) for k in ("first-contentful-paint", "largest-contentful-paint")}
    return {**scores, "seconds": seconds, "layout_shift": round(median(r["audits"]["cumulative-layout-shift"]["numericValue"] for r in runs), 3), "version": runs[0]["lighthouseVersion"]}


LOOK = """() => {
  const boxes = [...document.querySelectorAll('main pre')].filter(e => e.checkVisibility()), figure = document.querySelector('main figure, main .interactive')
  const sum = (s) => [...document.querySelectorAll(s)].reduce((a, e) => a + e.getBoundingClientRect().height, 0)
  return {height: document.querySelector('article').getBoundingClientRect().height, parameters: sum('article dl.py'), boxes: boxes.length,
    cut: boxes.filter(e => e.scrollWidth > e.clientWidth + 1).length, figure: figure && figure.getBoundingClientRect().top + scrollY}
}"""


def chapters() -> dict:
    "What is written, by part of the book: chapters, words, minutes to read, lines of exported code."
    paths, found = {name_of(p): p for p in (ROOT / "nbs").glob("*.ipynb")}, {}
    for part, named in parts().items():
        row = found[part] = dict(chapters=len(named), words=0, minutes=sum(c["read"] for c in named.values()), exported_lines=0)
        for cell in (c for name in named for c in nbformat.read(paths[name], 4).cells):
            if cell.cell_type == "markdown": row["words"] += len(cell.source.split())
            elif "export" in (d := directives(cell.source))[0]: row["exported_lines"] += sum(map(bool, d[1].split("\n")))
    return found | {"all": {k: sum(r[k] for r in found.values()) for k in row}}


def seen(address: str) -> dict:
    "The chapters' pages in a wide window: screens, the screen of the first figure, boxes cut at their edge, height of parameter lists."
    from playwright.sync_api import sync_playwright
    rows = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get("CHROME_PATH", "/usr/bin/chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SCREEN)
        for path in sorted((ROOT / "nbs").glob("*.ipynb")):
            page.goto(f"{address}/{path.stem}.html")
            rows[path.stem] = page.evaluate(LOOK)
        browser.close()
    total, screens = {k: sum(r[k] for r in rows.values()) for k in ("height", "parameters", "boxes", "cut")}, lambda x: round(x / SCREEN["height"], 1)
    first = {name: screens(r["figure"]) for name, r in rows.items() if r["figure"]}
    return dict(screens=screens(total["height"]), boxes=total["boxes"], cut=total["cut"], parameter_lists=round(total["parameters"] / total["height"], 3),
                first_figure=dict(median=median(first.values()), mean=round(sum(first.values()) / len(first), 1), pages=first))


def main() -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "docs" / "build.py"], check=True)
    build_s = round(time.perf_counter() - start, 1)
    found = survey(SITE)
    name, size = max(found["sizes"].items(), key=lambda s: s[1]["with_images"])
    made = {**provenance(0, lighthouse=dict(pages=PAGES, runs=RUNS, device="mobile")), "build_s": build_s, "pages": found["pages"], "links": found["links"],
            "wrong_links": found["wrong"], "site_mb": round(found["bytes"] / 1e6, 2), "largest_page": dict(name=name, **{f"{k}_mb": round(v / 1e6, 3) for k, v in size.items()})}
    made["versions"] |= {p: version(p) for p in ("sphinx", "myst-nb", "sphinx-book-theme")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Compressed, directory=SITE))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    made |= {"written": chapters(), "seen": seen(address)}
    if command := shutil.which("lighthouse"):
        made["lighthouse"] = {page: lighthouse(command, f"{address}/{page}") for page in PAGES}
        made["versions"]["lighthouse"] = {r.pop("version") for r in made["lighthouse"].values()}.pop()
        made["load_average"] = round(os.getloadavg()[0], 1)
    OUT.write_text(json.dumps(made, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__": main()

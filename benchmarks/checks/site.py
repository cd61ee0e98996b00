"""What the site is like: `python benchmarks/checks/site.py` builds it and writes results/site.json.

Seconds of the build, pages, links, sizes; and Lighthouse's figures on a phone for three pages, if `lighthouse` is on the PATH
(npm install lighthouse; CHROME_PATH says where the browser is). The pages come from this machine, compressed, as a web server sends them."""
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
PAGES, RUNS = ("index.html", "01_softmax_attention.html", "10a_seeds.html"), 3
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
from links import survey

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


def main() -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "docs" / "build.py"], check=True)
    build_s = round(time.perf_counter() - start, 1)
    found = survey(SITE)
    name, size = max(found["sizes"].items(), key=lambda s: s[1]["with_images"])
    made = {**provenance(0, lighthouse=dict(pages=PAGES, runs=RUNS, device="mobile")), "build_s": build_s, "pages": found["pages"], "links": found["links"],
            "wrong_links": found["wrong"], "site_mb": round(found["bytes"] / 1e6, 2), "largest_page": dict(name=name, **{f"{k}_mb": round(v / 1e6, 3) for k, v in size.items()})}
    made["versions"] |= {p: version(p) for p in ("sphinx", "myst-nb", "sphinx-book-theme")}
    if command := shutil.which("lighthouse"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Compressed, directory=SITE))
        Thread(target=server.serve_forever, daemon=True).start()
        made["lighthouse"] = {page: lighthouse(command, f"http://127.0.0.1:{server.server_port}/{page}") for page in PAGES}
        made["versions"]["lighthouse"] = {r.pop("version") for r in made["lighthouse"].values()}.pop()
        made["load_average"] = round(os.getloadavg()[0], 1)
    OUT.write_text(json.dumps(made, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__": main()

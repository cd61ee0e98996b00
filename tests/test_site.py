"""The built site in a real browser: every page on a desktop, on a phone and in the dark; its links, its sizes; and each check can fail.

    python docs/build.py && SITE_TESTS=1 pytest tests/test_site.py

Without Chromium or a built site the tests are skipped, or fail where SITE_TESTS=1 asks for them."""
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE, AXE = ROOT / "docs" / "site", ROOT / "docs" / ".axe" / "axe.min.js"
sys.path.insert(0, str(ROOT / "docs"))
from build import npm_package
from links import survey
from prepare import repository, settings

PAGES = sorted(p.stem for p in SITE.glob("*.html"))
NOTEBOOKS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
DESKTOP, PHONE = dict(width=1280, height=900), dict(width=390, height=844)
MODES = {"desktop": dict(viewport=DESKTOP, color_scheme="light"), "phone": dict(viewport=PHONE, color_scheme="light", has_touch=True),
         "dark": dict(viewport=DESKTOP, color_scheme="dark")}
BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")


def need(thing, reason: str):
    "The thing; without it the test is skipped, or fails where SITE_TESTS=1 asked for these tests."
    if not thing: (pytest.fail if os.environ.get("SITE_TESTS") == "1" else pytest.skip)(reason)
    return thing


@contextmanager
def served(folder: Path):
    "The address of a server of one folder on this machine."
    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown()


@pytest.fixture(scope="module")
def site():
    need((SITE / "index.html").is_file(), "no built site in docs/site: run python docs/build.py")
    with served(SITE) as address: yield address


@pytest.fixture(scope="module")
def axe() -> str:
    "axe-core, fetched once, as docs/build.py fetches MathJax."
    if not AXE.exists():
        with tempfile.TemporaryDirectory() as folder:
            try: found = npm_package("axe-core@4.10.3", folder) / "axe.min.js"
            except (OSError, subprocess.CalledProcessError) as e: return need("", f"npm did not fetch axe-core: {e}")
            AXE.parent.mkdir(exist_ok=True)
            shutil.move(found, AXE)
    return AXE.read_text()


@pytest.fixture(scope="module")
def browser():
    path = need(next(filter(None, map(shutil.which, BROWSERS)), None), "no Chromium or Chrome on the PATH")
    try: from playwright.sync_api import sync_playwright
    except ImportError: return need(None, "playwright is not installed")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser):
    "One window for each mode, kept open: what all pages share is loaded once."
    found = {name: browser.new_context(**mode) for name, mode in MODES.items()}
    yield found
    for context in found.values(): context.close()


LOOK = """async () => {
  const found = [], say = (what, e) => found.push(what + ': ' + (e?.outerHTML ?? e ?? '').replace(/\\s+/g, ' ').slice(0, 120))
  const all = (s) => [...document.querySelectorAll(s)], wide = document.documentElement.clientWidth
  await window.MathJax?.startup?.promise
  for (const d of all('details')) d.open = true
  if (document.documentElement.scrollWidth > wide) say('the page scrolls sideways')
  // site.css clips the page: what is too wide would be cut, and no scroll bar would show it
  const boxed = (e) => e && e !== document.body && (/auto|scroll/.test(getComputedStyle(e).overflowX) || boxed(e.parentElement))
  for (const e of all('body *')) if (e.checkVisibility() && e.getBoundingClientRect().right > wide + 1 && !boxed(e.parentElement) && !e.closest('mjx-assistive-mml, .bd-sidebar-secondary')) {
    say('wider than the window', e)
    break
  }
  for (const e of all('.math')) if (!e.querySelector('mjx-container')) say('a formula is not rendered', e)
  for (const e of all('mjx-merror, [data-mjx-error], mjx-container [style*="color: red"]')) say('a formula has an error', e)
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (words.nextNode()) if (/\\$\\$|\\\\\\(|\\\\\\[/.test(words.currentNode.data) && !words.currentNode.parentElement.closest('pre, code, script, style, mjx-container'))
    say('raw maths', words.currentNode.data)
  for (const e of all('img')) {
    if (!e.complete || !e.naturalWidth) say('an image did not load', e)
    if (!e.closest('a, button') && (e.alt.trim().length < 20 || /^Figure: |\\.(png|svg)$/.test(e.alt))) say('an image says nothing to those who do not see it', e)
  }
  const levels = all('main h1, main h2, main h3, main h4, main h5, main h6').filter(e => e.checkVisibility())
  if (levels.filter(e => e.tagName == 'H1').length != 1) say('not exactly one title')
  levels.reduce((last, e) => { if (e.tagName[1] - last > 1) say('a level of headings is left out', e); return +e.tagName[1] }, 0)
  return found
}"""
# Thousands of coloured words make axe slow: each colour of code is judged once, then code and drawn formulas become plain for it.
AXE_RUN = """async (only) => {
  const found = [], seen = new Set()
  const light = (c) => c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0)
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number)
  const ground = (e) => { const c = numbers(getComputedStyle(e).backgroundColor); return c.length == 4 && c[3] < 1 && e.parentElement ? ground(e.parentElement) : c.slice(0, 3) }
  for (const e of document.querySelectorAll('pre span')) {
    const pair = [numbers(getComputedStyle(e).color).slice(0, 3), ground(e)], [a, b] = pair.map(light)
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    if (ratio < 4.5 && !seen.has(`${pair}`)) seen.add(`${pair}`) && found.push(`contrast of code ${ratio.toFixed(2)}: ${e.className} ${e.textContent.slice(0, 20)} ${pair.join(' on ')}`)
  }
  for (const e of document.querySelectorAll('pre')) e.textContent = e.textContent
  for (const e of document.querySelectorAll('mjx-math')) e.replaceChildren()
  const options = {preload: false, resultTypes: ['violations'], ...(only && {runOnly: only})}
  for (const v of (await axe.run(document, options)).violations) if (['serious', 'critical'].includes(v.impact))
    found.push(`axe, ${v.id} (${v.impact}), ${v.nodes.length} times: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`)
  return found
}"""


def visit(context, address: str, axe: str | None = None, only: list[str] | None = None) -> list[str]:
    "All that is wrong with one page in one window: console, requests, layout, formulas, images, headings and, with axe, access for everyone."
    page, found = context.new_page(), []
    home = f"http://{urlsplit(address).netloc}/"
    page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: found.append(f"script: {e}"))
    page.on("request", lambda r: r.url.startswith((home, "data:", "blob:")) or found.append(f"a request to another host: {r.url}"))
    page.on("requestfailed", lambda r: found.append(f"a request failed: {r.url}"))
    page.on("response", lambda r: r.status >= 400 and found.append(f"{r.status}: {r.url}"))
    page.goto(address)
    found += page.evaluate(LOOK)
    if axe:
        page.evaluate(axe)
        found += page.evaluate(AXE_RUN, only)
    page.close()
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAGES)
def test_page(contexts, site, axe, name, mode):
    found = visit(contexts[mode], f"{site}/{name}.html", axe if mode != "phone" else None, ["color-contrast"] if mode == "dark" else None)
    assert not found, "\n".join(found)

"""The built site in a real browser: every page in a wide window, light and dark, and on a phone; its links, its sizes; and each check can fail.

    python docs/build.py && SITE_TESTS=1 pytest tests/test_site.py

Without Chromium or a built site the tests are skipped, or fail where SITE_TESTS=1 asks for them."""
import importlib.util
import json
import math
import os
import shutil
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from links import Page, survey
from prepare import repository, settings

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "site"
PAGES = sorted(p.stem for p in SITE.glob("*.html"))
NOTEBOOKS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
WINDOWS = {"wide": dict(viewport=dict(width=1400, height=900), color_scheme="dark"),  # loaded in the dark, seen in both colours
           "phone": dict(viewport=dict(width=390, height=844), color_scheme="light", has_touch=True)}
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
    "axe-core, as it lies in a package of the dev extra: nothing is fetched."
    found = need(importlib.util.find_spec("axe_playwright_python"), "axe-playwright-python is not installed")
    return (Path(found.origin).parent / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def browser():
    path = need(next(filter(None, map(shutil.which, BROWSERS)), None), "no Chromium or Chrome on the PATH")
    need(importlib.util.find_spec("playwright"), "playwright is not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser):
    "Two windows, kept open: what all pages share is loaded once."
    found = {name: browser.new_context(**window) for name, window in WINDOWS.items()}
    yield found
    for context in found.values(): context.close()


LOOK = """async () => {
  const found = [], say = (what, e) => found.push(what + ': ' + (e?.outerHTML ?? e ?? '').replace(/\\s+/g, ' ').slice(0, 120))
  const all = (s) => [...document.querySelectorAll(s)], wide = document.documentElement.clientWidth
  await window.MathJax?.startup?.promise
  document.head.insertAdjacentHTML('beforeend', '<style>* { animation: none !important; transition: none !important }</style>')
  for (const d of all('details')) d.open = true
  if (document.documentElement.scrollWidth > wide) say('the page scrolls sideways')
  // site.css clips the page: what is too wide would be cut, and no scroll bar would show it
  const boxed = (e) => e && e !== document.body && (/auto|scroll/.test(getComputedStyle(e).overflowX) || boxed(e.parentElement))
  for (const e of all('body *')) if (e.checkVisibility() && e.getBoundingClientRect().right > wide + 1 && !boxed(e.parentElement) && !e.closest('mjx-assistive-mml, .bd-sidebar-secondary')) {
    say('wider than the window', e)
    break
  }
  if (wide >= 1400) for (const e of all('pre')) if (e.checkVisibility() && e.scrollWidth > e.clientWidth + 1) say('a box is cut at its edge', e)
  const typed = document.querySelector('form.bd-search input'), icon = typed?.parentElement.querySelector('svg, i')
  if (icon?.checkVisibility() && typed.getBoundingClientRect().left + parseFloat(getComputedStyle(typed).paddingLeft) < icon.getBoundingClientRect().right)
    say('the magnifier lies on what is typed', icon)
  for (const e of all('.math')) if (!e.querySelector('mjx-container')) say('a formula is not rendered', e)
  for (const e of all('mjx-merror, [data-mjx-error], mjx-container [style*="color: red"]')) say('a formula has an error', e)
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (words.nextNode()) if (/\\$\\$|\\\\\\(|\\\\\\[/.test(words.currentNode.data) && !words.currentNode.parentElement.closest('pre, code, script, style, mjx-container'))
    say('raw maths', words.currentNode.data)
  for (const e of all('img')) {
    if (!e.complete || !e.naturalWidth) say('an image did not load', e)
    if (!e.closest('a, button') && (e.alt.trim().length < 20 || /^Figure: |\\.(png|svg)$/.test(e.alt))) say('an image says nothing to those who do not see it', e)
  }
  for (const e of all('.cell_output img')) if (!e.closest('figure')?.querySelector('figcaption')?.textContent.trim()) say('a figure has no caption', e)
  const levels = all('main h1, main h2, main h3, main h4, main h5, main h6').filter(e => e.checkVisibility())
  if (levels.filter(e => e.tagName == 'H1').length != 1) say('not exactly one title')
  levels.reduce((last, e) => { if (e.tagName[1] - last > 1) say('a level of headings is left out', e); return +e.tagName[1] }, 0)
  return found
}"""
COLOURS = """async (scheme) => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))  // the theme hears of the new colours
  const found = [], seen = new Set(), theme = document.documentElement.dataset.theme
  if (theme && theme != scheme) found.push(`the page does not turn ${scheme}`)
  const light = (c) => c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0)
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number)
  const ground = (e) => { const c = numbers(getComputedStyle(e).backgroundColor); return c[3] !== 0 ? c.slice(0, 3) : e.parentElement ? ground(e.parentElement) : [255, 255, 255] }
  for (const e of document.querySelectorAll('pre span')) {
    const pair = [numbers(getComputedStyle(e).color).slice(0, 3), ground(e)], [a, b] = pair.map(light)
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    if (ratio < 4.5 && !seen.has(`${pair}`)) seen.add(`${pair}`) && found.push(`contrast of code, ${scheme}, ${ratio.toFixed(2)}: ${e.className} ${e.textContent.slice(0, 20)} ${pair.join(' on ')}`)
  }
  return found
}"""
# thousands of coloured words make axe slow: their colours were judged above, so code and drawn formulas become plain for it
PLAIN = """() => {
  for (const e of document.querySelectorAll('pre, code')) e.textContent = e.textContent
  for (const e of document.querySelectorAll('mjx-math')) e.replaceChildren()
}"""
NARROW = ["scrollable-region-focusable", "target-size", "svg-img-alt", "aria-hidden-focus"]
WHOLE_ON_A_PHONE = ("index", "01_softmax_attention", "10a_seeds", "api_restore", "search")  # one of each kind of page
AXE_RUN = """async (only) => (await axe.run(document, {preload: false, resultTypes: ['violations'], ...(only && {runOnly: only})})).violations
  .filter(v => ['serious', 'critical'].includes(v.impact)).map(v => `axe, ${v.id} (${v.impact}), ${v.nodes.length} times: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`)"""


LETTERS = """() => [...document.querySelectorAll('.cell_output img[style], .cell_output svg.stacked')].flatMap((e) => {
  const width = e.getBoundingClientRect().width, need = parseFloat(e.style.getPropertyValue('--readable'))
  return width && width < need - 1 ? [`letters below 10 pixels, ${width} of ${need}: ${e.alt ?? e.ariaLabel}`] : []
})"""
SIDE = "all => all.filter(e => e.checkVisibility()).map(e => 'panels side by side: ' + e.alt)"


def small_letters(page) -> list[str]:
    "Figures whose smallest letters are shown with less than 10 pixels, and panels side by side on a phone."
    found = page.evaluate(LETTERS)
    return found + page.locator("img.side").evaluate_all(SIDE) if page.viewport_size["width"] < 600 else found


def accessible(page, axe: str) -> list[str]:
    """What keeps some readers out, in both colours; all but the contrast is the same in both.

    On a phone in the light only, and on most pages only what the width of a window can change."""
    found, phone = [], page.viewport_size["width"] < 600
    for scheme in ("light",) if phone else ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        found += page.evaluate(COLOURS, scheme)
    page.evaluate(PLAIN)
    page.evaluate(axe)
    whole = not phone or Path(urlsplit(page.url).path).stem in WHOLE_ON_A_PHONE
    found += page.evaluate(AXE_RUN, None if whole else NARROW)
    if phone: return found
    page.emulate_media(color_scheme="dark")
    return found + [f"in the dark: {f}" for f in page.evaluate(AXE_RUN, ["color-contrast"])]


def visit(context, address: str, axe: str | None = None, spoil: str = "") -> list[str]:
    """All that is wrong with one page in one window: console, requests, layout, formulas, images, letters, headings
    and, with axe, access for everyone. `spoil` is a style for tests that have to fail."""
    page, found = context.new_page(), []
    home = f"http://{urlsplit(address).netloc}/"
    page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: found.append(f"script: {e}"))
    page.on("request", lambda r: r.url.startswith((home, "data:", "blob:")) or found.append(f"a request to another host: {r.url}"))
    page.on("requestfailed", lambda r: found.append(f"a request failed: {r.url}"))
    page.on("response", lambda r: r.status >= 400 and found.append(f"{r.status}: {r.url}"))
    page.goto(address)
    if spoil: page.add_style_tag(content=spoil)
    found += page.evaluate(LOOK) + small_letters(page)
    if axe: found += accessible(page, axe)
    page.close()
    return found


# the reference pages are made alike: axe and the phone look at one of them
ALIKE = {name for name in PAGES if name.startswith("api_")} - {"api_restore"}


@pytest.mark.parametrize("name, window", [(n, w) for n in PAGES for w in WINDOWS if n not in ALIKE or w == "wide"])
def test_page(contexts, site, axe, name, window):
    found = visit(contexts[window], f"{site}/{name}.html", None if name in ALIKE else axe)
    assert not found, "\n".join(found)


# each check of a page, and a page that it has to flag: what is put into the body of a good one -> a piece of the sentence
BAD = {
    "too wide": ('<div style="width: 3000px">.</div>', "wider than the window"),
    "too wide and clipped": ('<style>html, body { overflow-x: clip }</style><div style="width: 3000px">.</div>', "wider than the window"),
    "cut": ('<pre style="width: 400px; overflow: auto">' + "x" * 200 + "</pre>", "cut at its edge"),
    "magnifier": ('<form class="bd-search"><i style="position: absolute; width: 20px; height: 20px">o</i><input aria-label="Search" style="padding-left: 2px"></form>',
                  "the magnifier lies on"),
    "console": ("<script>console.error('oh')</script>", "console: oh"),
    "script": ("<script>throw new Error('oh')</script>", "script: oh"),
    "missing file": ('<script src="nowhere.js"></script>', "404: "),
    "another host": ('<script src="http://elsewhere.test/a.js"></script>', "another host: http://elsewhere.test"),
    "raw formula": ('<p class="mathjax_ignore">So $$x$$ is</p>', "raw maths"),
    "formula not rendered": ('<span class="math">x</span>', "not rendered"),
    "wrong formula": (r'<span class="math">\(\frac{1}\)</span>', "a formula has an error"),
    "unknown macro": (r'<span class="math">\(\nosuchmacro\)</span>', "a formula has an error"),
    "missing image": ('<img src="nowhere.png" alt="A picture of nothing at all">', "did not load"),
    "alternative text": ('<img src="_static/favicon.svg" alt="Figure: a chapter of the book">', "says nothing"),
    "caption": ('<div class="cell_output"><figure><img src="_static/favicon.svg" alt="The sign of this book, large" width="60"></figure></div>', "has no caption"),
    "two titles": ("<h1>Again</h1>", "not exactly one title"),
    "level left out": ("<h3>Below nothing</h3>", "a level of headings"),
    "contrast": ('<p style="color: #bbb; background: #fff">pale</p>', "axe, color-contrast"),
    "contrast of code": ('<pre><span style="color: #bbb">pale</span></pre>', "contrast of code"),
    "contrast in the dark": ('<style>@media (prefers-color-scheme: dark) { p { color: #eee } }</style>', "in the dark: axe, color-contrast"),
    "contrast of code in the dark": ('<style>@media (prefers-color-scheme: dark) { pre span { color: #eee !important } }</style>', "contrast of code, dark"),
    "stays light": ("<script>document.documentElement.dataset.theme = 'light'</script>", "does not turn dark"),
    "form": ("<input>", "axe, label"),
}
KEYBOARD = '<div style="overflow-x: auto"><img src="_static/favicon.svg" alt="The sign of this book, wide" width="900" height="99"></div>'
GOOD = r"""<!doctype html><html lang="en"><head><title>Good</title><script defer src="_static/mathjax/tex-chtml.js"></script></head><body><main><h1>Good</h1>
<p>A formula: <span class="math">\(\frac{1}{2}\)</span></p><pre><span style="color: #555">code</span> $$</pre>
<img src="_static/favicon.svg" alt="The sign of this book, large" width="60">%s</main></body></html>"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, site):
    "A site of small pages: one that is good, and a bad one for each check."
    folder = tmp_path_factory.mktemp("made")
    (folder / "_static").symlink_to(SITE / "_static")
    for name, (body, _) in {"good": ("", ""), "keyboard": (KEYBOARD, ""), **BAD}.items(): (folder / f"{name}.html".replace(" ", "-")).write_text(GOOD % body)
    (folder / "favicon.ico").write_bytes(b"")
    with served(folder) as address: yield address


def test_a_good_page_is_good(contexts, made, axe):
    for context in contexts.values(): assert visit(context, f"{made}/good.html", axe) == []


def test_axe_sees_what_only_a_phone_has(contexts, made, axe):
    "A figure that scrolls sideways there and that no key reaches."
    found = visit(contexts["phone"], f"{made}/keyboard.html", axe)
    assert any("scrollable-region-focusable" in f for f in found), found
    assert not any("axe" in f for f in visit(contexts["wide"], f"{made}/keyboard.html", axe))


@pytest.mark.parametrize("name", BAD)
def test_page_checks_can_fail(contexts, made, axe, name):
    found = visit(contexts["wide"], f"{made}/{name}.html".replace(" ", "-"), axe if name.startswith(("contrast", "form", "stays")) else None)
    assert any(BAD[name][1] in f for f in found), found


SPOILT = {"letters below": "img, svg { width: 200px !important }", "side by side": "img.side { display: inline !important }"}


@pytest.mark.parametrize("said", SPOILT)
def test_letters_in_figures_can_fail(contexts, site, said):
    assert any(said in f for f in visit(contexts["phone"], f"{site}/10a_seeds.html", spoil=SPOILT[said]))


def cell(name: str, words: str) -> dict:
    "The first cell of a notebook that has these words."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    return next(c for c in cells if words in "".join(c["source"]))


@contextmanager
def moving(context, address: str, name: str, change=lambda js: js):
    """A page with a figure that has sliders, and what went wrong there: scripts, requests to other hosts.

    `change` spoils interactive.js, for a test that has to fail."""
    page, found = context.new_page(), []
    page.on("pageerror", lambda e: found.append(f"script: {e}"))
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or found.append(f"another host: {r.url}"))
    source = (SITE / "_static" / "interactive.js").read_text()
    page.route("**/interactive.js*", lambda r: r.fulfill(body=change(source), content_type="text/javascript"))
    page.goto(f"{address}/{name}.html")
    page.locator(".interactive input").first.scroll_into_view_if_needed()
    page.locator(".interactive .said > *").wait_for()
    yield page, found
    page.close()


def shown(page, name: str) -> float: return float(page.locator(f".interactive output[name={name}]").inner_text())


MARGINS = [(7.7, 5, 500), (0, 1, 100), (16, 6, 1000), (8, 3, 500), (4.5, 2, 700)]  # m, log10 of T, a


def margin_differences(page) -> list[str]:
    "Shares that the page shows and that are not those of the chapter's own function."
    import torch

    from qkrestore_nb.softmax_attention import log_scale
    chapter, found = {"math": math}, []
    exec("\n".join(cell("01_softmax_attention", "def predicted(")["source"]).split("e = attention_logits")[0], chapter)
    for m, power, a in MARGINS:
        for i, value in enumerate((m, power, a)): page.locator(".interactive input").nth(i).fill(str(value))
        T = 10 ** power
        s = log_scale(torch.tensor(T - 1), a).item()
        right = dict(needed=math.log(T - 1), equal=1 / (1 + (T - 1) * math.exp(-m)),
                     random=chapter["predicted"](T, m), scaled=chapter["predicted"](T, m, s))
        found += [f"{k} at {m}, {T}, {a}: {shown(page, k)}, not {v}" for k, v in right.items()
                  if abs(shown(page, k) - v) > (.006 if k == "needed" else 1e-4)]
    return found


def test_interactive_margin(contexts, site):
    for context in contexts.values():
        with moving(context, site, "01_softmax_attention") as (page, found):
            assert margin_differences(page) == [] == found
            first = page.locator(".interactive input").first
            assert first.evaluate("e => e.labels[0].textContent").startswith("margin m: ")
            first.focus()
            page.keyboard.press("End")  # by the keyboard, too
            assert first.get_attribute("aria-valuetext") == "16.0"


@pytest.mark.parametrize("right, wrong", [("m - 1 / 2", "m - 1"), ("Math.log(T - 1 + a)", "Math.log(T + a) * 1.01"),
                                          ("(T - 1) * Math.exp", "T * Math.exp")])
def test_interactive_margin_can_fail(contexts, site, right, wrong):
    with moving(contexts["wide"], site, "01_softmax_attention", lambda js: js.replace(right, wrong)) as (page, _):
        assert margin_differences(page)


def test_interactive_memory(contexts, site):
    "The number of pairs is the one that a cell of the chapter printed."
    printed = "".join(cell("02_linear_attention", "def remembered(")["outputs"][0]["text"]).strip().split("\n")
    table = [[float(x) for x in line.split()[3:]] for line in printed[1:]]
    with moving(contexts["phone"], site, "02_linear_attention") as (page, found):
        size, life = page.locator(".interactive input").all()
        for i, row in enumerate(table):
            size.fill(str(i))
            for j, n in enumerate(row):
                life.fill(str(j))
                assert shown(page, "remembered") == n
        assert (i, j) == (3, 7) and found == []


def test_interactive_repairs(contexts, site):
    "What is said of a point, by mouse and keyboard, is what the results say."
    from qkrestore_nb.study import accuracy, difference, load, needles
    runs = load(ROOT / "results" / "experiment")
    def words(v, name, length=16384, count="exact"):
        chains = accuracy(runs, v, [("chains", 8)], "exact").mean()
        cost = difference(runs, v, "post", [("chains", 8)], "exact")
        recall = accuracy(runs, v, needles(length), count).mean()
        return f"{name}: recall {recall:.1f}%, chains {chains:.1f}%, chains against SFT {cost}"
    with moving(contexts["wide"], site, "10a_seeds") as (page, found):
        length, count, start = page.locator(".interactive input").all()
        said = page.locator(".interactive [role=status]")
        dots = page.locator(".interactive circle[tabindex]")
        assert said.inner_text().startswith(f"{len(runs[0]['scores'])} variants at this length, {dots.count()} of them")
        start.focus()
        page.keyboard.press("Tab")  # the first point, at the left
        assert said.inner_text() == words("post", "SFT")
        def hover(name):
            box = page.locator(f".interactive circle[aria-label^='{name}: ']").bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            return said.inner_text()
        assert hover("QK-Pro by head, λ = 1") == words("pro head 1", "QK-Pro by head, λ = 1")
        assert hover("LiNeS 0.8") == words("LiNeS 0.8", "LiNeS 0.8") != words("LiNeS 0.5", "LiNeS 0.8")
        start.fill("0")
        assert dots.count() == len(runs[0]["scores"]) and hover("pre-SFT") == words("pre", "pre-SFT")
        length.fill("4"), count.fill("1")
        assert dots.count() == 5 and hover("Q,K") == words("qk", "Q,K", 65536, "lookup")
        assert found == []


SMALL = """() => [...document.querySelectorAll('.interactive svg text')].filter((e) => {
  const box = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect()
  return parseFloat(getComputedStyle(e).fontSize) * all.width / e.ownerSVGElement.clientWidth < 10
    || box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1
}).map((e) => e.textContent)"""
INTERACTIVE = ("01_softmax_attention", "02_linear_attention", "10a_seeds")


@pytest.mark.parametrize("name", INTERACTIVE)
def test_interactive_letters(contexts, site, name):
    "At least 10 pixels on a phone, and none is cut; and the check can fail."
    for context in contexts.values():
        with moving(context, site, name) as (page, _):
            for slider in page.locator(".interactive input").all():
                for end in ("Home", "End"):
                    slider.press(end)
                    assert page.evaluate(SMALL) == []
    with moving(context, site, name, lambda js: js.replace("LETTER = 12", "LETTER = 9")) as (page, _):
        assert page.evaluate(SMALL)


SENTENCE = ".interactive p:has-text('On the course')"


@pytest.mark.parametrize("name", INTERACTIVE)
def test_interactive_without_javascript(browser, contexts, site, name):
    "The figure above the sliders is there, and a sentence says what is missing."
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/{name}.html")
    figures = page.locator("figure:has(figcaption), .interactive")
    kinds = figures.evaluate_all("all => all.map(e => e.className)")
    figure = figures.nth(kinds.index("interactive") - 1)
    assert figure.is_visible() and figure.bounding_box()["width"] > 300 and page.locator(SENTENCE).is_visible()
    context.close()
    with moving(contexts["wide"], site, name) as (page, _): assert page.locator(SENTENCE).count() == 0


def find(context, address: str, *asked: str, box: bool = False) -> dict[str, list[str]]:
    "Words -> the pages that the search finds while a reader types them, on the search page or in the box that Ctrl+K opens."
    page, found = context.new_page(), {}
    page.goto(f"{address}/index.html" if box else f"{address}/search.html")
    if box: page.keyboard.press("Control+k")
    part = "dialog[open]" if box else "main"
    field = page.locator(f"{part} input[type=search]:visible").first
    for words in asked:
        field.fill(""), field.press_sequentially(words, delay=5)
        page.wait_for_function(f"/found|No page/.test(document.querySelector('{part} .search-found p[role=status]')?.textContent ?? '')")
        page.wait_for_timeout(300)  # the last letters' answer
        links = page.locator(f"{part} ol.found > li > a").evaluate_all("links => links.map(a => a.href)")
        found[words] = [urlsplit(a).path[1:] or "index.html" for a in links]
    page.close()
    return found


SEARCHES = {  # what a reader types, and a page that has to stand among the first three
    "qk_restore": "08_restore", "needle": "04_recall", "LoRA": "11c_adapters", "audit": "13b_audit", "RULER": "04a_prose", "undo": "11a_in_place", "gradient range": "07_gradient_range",
    "delta rule": "02_linear_attention", "FSDP": "13a_finetune", "Procrustes": "09_procrustes", "lightning attention": "03a_hypenet", "how do I restore": "17_your_checkpoint", "install": "index",
    "quickstart": "index", "NIAH": "04_recall", "Qwen3-Next": "08a_families", "colab": "10_amnesia", "retrieval head": "07b_drift", "learning rate": "10b_switches", "mergekit": "11d_hub"}


@pytest.fixture(scope="module")
def searched(contexts, site): return find(contexts["wide"], site, *SEARCHES)


@pytest.mark.parametrize("words", SEARCHES)
def test_search(searched, words): assert f"{SEARCHES[words]}.html" in searched[words][:3], searched[words][:5]


def test_search_box_and_nothing_found(contexts, site):
    assert "08_restore.html" in find(contexts["wide"], site, "qk_restore", box=True)["qk_restore"][:3]
    assert list(find(contexts["wide"], site, "\u0133\u0133\u0133").values()) == [[]]


@pytest.fixture(scope="module")
def surveyed(site): return survey(SITE)


def test_links(surveyed):
    assert not surveyed["wrong"], "\n".join(surveyed["wrong"])
    assert surveyed["links"]["inside"] > 30 * len(PAGES)


def test_link_check_can_fail(tmp_path):
    good = ["#here", "b.html", "b.html#there", ".", "https://arxiv.org/abs/2606.11052", "mailto:a@b.org", f"{repository()}/blob/{settings()['branch']}/README.md"]
    bad = ["#nowhere", "c.html", "b.html#here", "../x.html", "https://example.com/x", "http://localhost/", "https://nodot/", "https://a.org/b c", "javascript:0", "mailto:a",
           f"{repository()}/blob/{settings()['branch']}/nowhere.md"]
    (tmp_path / "index.html").write_text('<p id="here">' + "".join(f'<a href="{link}">x</a>' for link in good + bad) + '<img src="gone.png">')
    (tmp_path / "b.html").write_text('<p id="there">')
    found = survey(tmp_path)
    assert [w.split(": ")[1] for w in found["wrong"]] == [*bad, "gone.png"]
    assert found["pages"] == 2 and sum(found["links"].values()) == len(good + bad) + 1


def too_large(found: dict, site_mb: float = 20, page_mb: float = 1.5) -> list[str]:
    "The site as it lies on disk, and each page as its html with the images that it shows: what exceeds the limit."
    large = [f"{n}: {s['with_images'] / 1e6:.2f} MB" for n, s in found["sizes"].items() if s["with_images"] > page_mb * 1e6]
    return large + [f"site: {found['bytes'] / 1e6:.1f} MB"] * (found["bytes"] > site_mb * 1e6)


def test_sizes(surveyed): assert too_large(surveyed) == []


def test_size_check_can_fail(tmp_path):
    (tmp_path / "index.html").write_text('<img src="a.png"><img src="a.png">')
    (tmp_path / "a.png").write_bytes(bytes(1_400_000))
    assert too_large(survey(tmp_path)) == []  # an image that is shown twice is loaded once
    (tmp_path / "a.png").write_bytes(bytes(1_600_000))
    assert too_large(survey(tmp_path), site_mb=1.5) == ["index.html: 1.60 MB", "site: 1.6 MB"]


def without_launch(site: Path, names: list[str] = NOTEBOOKS) -> list[str]:
    "Notebooks that have no page, or whose page does not lead to exactly that notebook in Colab."
    start = f"https://colab.research.google.com/github/{urlsplit(repository()).path[1:]}/blob/{settings()['branch']}/nbs/"
    launches = lambda path: {link for link in Page(path).links if "colab.research" in link} if path.is_file() else None
    return [n for n in names if launches(site / f"{n}.html") != {f"{start}{n}.ipynb"}]


def test_every_notebook_has_its_page_and_launches(surveyed): assert without_launch(SITE) == []


def test_launch_check_can_fail(tmp_path, site):
    names = NOTEBOOKS[:2] + ["08_restore"]
    for name in names: shutil.copy(SITE / f"{name}.html", tmp_path)
    assert without_launch(tmp_path, names) == []
    (tmp_path / "00_core.html").write_text((tmp_path / "01_softmax_attention.html").read_text())
    (tmp_path / "08_restore.html").unlink()
    assert without_launch(tmp_path, names) == ["00_core", "08_restore"]

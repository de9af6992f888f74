"""Checks of the built site, offline: what its pages hold, and how a browser shows them.

The site is the one that COURSE_SITE names, else _build/html. The checks in a browser need a
Chromium: COURSE_CHROMIUM, else one on the PATH. Without one they are skipped, unless
COURSE_REQUIRE_BROWSER=1 asks for a failure instead.

    python tests/test_site.py     # says whether the browser checks can run here
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

pytestmark = pytest.mark.site

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("COURSE_SITE") or ROOT / "_build" / "html").resolve()
PAGES = [
    page.relative_to(SITE).as_posix()
    for folder in ("book", "lessons")
    for page in sorted((SITE / folder).glob("*.html"))
]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, body text

each_page = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(autouse=True)
def _site_is_built():
    if not PAGES:
        reason = f"THE SITE WAS NOT CHECKED: no pages under {SITE}"
        if os.environ.get("COURSE_SITE"):
            pytest.fail(reason)
        pytest.skip(reason)


def test_site_has_pages():
    """Stands alone so that an unbuilt site is one loud skip and not an empty list of tests."""
    assert (SITE / "index.html").is_file()


# --- what the pages hold -------------------------------------------------------------------------


@functools.cache
def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


def article(page: str):
    return parsed(page).select_one("article")


@each_page
def test_nothing_is_loaded_from_the_network(page):
    loads = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
    remote = [
        str(tag)[:150]
        for name, attribute in loads.items()
        for tag in parsed(page).find_all(name)
        if re.match(r"(?:https?:)?//", tag.get(attribute) or "")
    ]
    assert not remote


@each_page
def test_links_within_the_site_resolve(page):
    broken = []
    for link in parsed(page).find_all("a", href=True):
        target = urlsplit(link["href"])
        if target.scheme or target.netloc:
            continue
        path = SITE / page
        if target.path:
            path = (path.parent / unquote(target.path)).resolve()
        if path.is_dir():
            path = path / "index.html"
        if not path.is_file():
            broken.append(link["href"])
        elif target.fragment and path.suffix == ".html":
            document = parsed(path.relative_to(SITE).as_posix())
            if not document.find(id=unquote(target.fragment)):
                broken.append(link["href"])
    assert not broken


@each_page
def test_every_image_says_what_it_shows(page):
    for image in article(page).find_all("img"):
        alt = image.get("alt", "").strip()
        shown = alt or str(image)[:100]
        assert alt, f"no alternative text: {shown}"
        assert not re.search(r"[0-9a-f]{32}|_images/|\.png$|\.svg$", alt), f"a file name: {shown}"
        if image.find_parent(class_="cell_output") or image.find_parent("figure"):
            assert len(alt) > 20, f"alternative text states no finding: {shown}"


@each_page
def test_no_output_holds_log_lines_or_stderr(page):
    assert not article(page).select(".output.stderr"), "a box of stderr"
    log = re.compile(
        r"^\(\w[^)]*\bpid=\d+|ray::|\bERROR\b|\bWARNING\b|\bINFO\b"
        r"|^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d",
        re.MULTILINE,
    )
    found = [
        f"{match.group(0)!r} in: {match.string[max(0, match.start() - 40) : match.end() + 60]!r}"
        for output in article(page).select(".cell_output")
        for match in log.finditer(output.get_text())
    ]
    assert not found, "\n".join(found)


@each_page
def test_no_traceback_outside_cells_that_show_an_error(page):
    for box in article(page).select(".output.traceback"):
        cell = box.find_parent(class_="cell")
        assert cell and "tag_raises-exception" in cell.get("class", []), box.get_text()[:300]


@each_page
def test_no_blank_or_live_output(page):
    views = 'script[type="application/vnd.jupyter.widget-view+json"]'
    assert not article(page).select(views), "a live widget, which needs scripts from the network"
    for output in article(page).select(".cell_output"):
        if not output.find(True):
            continue  # all that it held was removed on purpose, by a tag of the cell
        text = output.get_text().strip()
        assert text or output.select("img, svg, video, table, hr"), "an output that shows nothing"
        widget = re.search(r"\b(?:[HV]Box|Output|HTML|\w+Slider|\w+Progress)\((?:\w+=|\))", text)
        assert not widget, f"a widget's text instead of a picture: {text[:100]!r}"
        assert not re.match(r"<[\w.]+ (?:object )?at 0x[0-9a-f]+>", text), text[:100]


@each_page
def test_no_markup_is_left_unrendered(page):
    copy = BeautifulSoup(str(article(page)), "html.parser")
    for code in copy.select("pre, code, .cell_input"):
        code.decompose()
    text = copy.get_text()
    found = re.findall(r"\{[a-z]+(?::[a-z]+)?\}`?[^\s]{0,30}|:::+|```+|\[[^\]]+\]\([^)]*\)", text)
    assert not found


@each_page
def test_code_is_never_hidden_without_a_way_to_open_it(page):
    for details in article(page).select("details"):
        assert details.find("summary") and details.find("summary").get_text(strip=True)


# --- how a browser shows them --------------------------------------------------------------------


def chromium() -> str | None:
    """Path of the browser that the checks use, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    named = os.environ.get("COURSE_CHROMIUM")
    applications = (
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
    )
    on_path = [path for path in map(shutil.which, names) if path]
    return next((p for p in (named, *on_path, *applications) if p and Path(p).exists()), None)


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        reason = "THE SITE WAS NOT CHECKED IN A BROWSER: no Chromium found (COURSE_CHROMIUM=<path>)"
        if os.environ.get("COURSE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield running
        running.close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    """The site on a loopback address, as a reader of the published site gets it."""
    handler = functools.partial(QuietHandler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Visit:
    """One page in a browser without network, with what went wrong while it loaded."""

    def __init__(self, browser, url: str, width: str):
        w, h = WIDTHS[width]
        self.context = browser.new_context(viewport={"width": w, "height": h})
        self.problems: list[str] = []
        self.context.route("**/*", self._only_here)
        self.tab = self.context.new_page()
        self.tab.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.tab.on(
            "console",
            lambda line: self.problems.append(line.text) if line.type == "error" else None,
        )
        self.tab.on(
            "response",
            lambda r: self.problems.append(f"{r.status} {r.url}") if r.status >= 400 else None,
        )
        self.tab.goto(url)
        self.tab.wait_for_load_state("load")

    def _only_here(self, route):
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob") or address.hostname == "127.0.0.1":
            route.continue_()
        else:
            self.problems.append(f"asked the network for {route.request.url}")
            route.abort()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


IMAGES_THAT_FAILED = """async () => {
    const images = [...document.images];
    images.forEach(image => image.loading = 'eager');
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    return images.filter(i => !i.naturalWidth).map(i => i.outerHTML.slice(0, 150));
}"""

# What makes the page scroll sideways; a thing that scrolls inside its own box is fine.
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    const actual = document.documentElement.scrollWidth;
    if (actual <= width + 1) return [];
    const scrolls = node => node && node !== document.body
        && (getComputedStyle(node).overflowX !== 'visible' || scrolls(node.parentElement));
    const wide = [...document.body.querySelectorAll('*')].filter(node =>
        node.getBoundingClientRect().right > width + 1 && !scrolls(node.parentElement));
    const names = wide.slice(0, 5).map(node => node.outerHTML.slice(0, 150));
    return [`the page is ${actual} px wide`, ...names];
}"""

CUT_IMAGES = """() => [...document.querySelectorAll('article img')]
    .filter(image => image.getBoundingClientRect().right > document.documentElement.clientWidth)
    .map(image => image.outerHTML.slice(0, 150))"""

SHOW_THEME = """theme => {
    document.documentElement.dataset.theme = theme;
    document.querySelectorAll('details').forEach(box => box.open = true);
}"""

# Text whose contrast with what lies behind it is under the limit: WCAG's definition of contrast.
FAINT_TEXT = """least => {
    const numbers = color => (color.match(/[\\d.]+/g) || []).map(Number);
    const over = (top, below) => {
        const alpha = top.length > 3 ? top[3] : 1;
        return [0, 1, 2].map(i => top[i] * alpha + below[i] * (1 - alpha));
    };
    const behind = node => {
        const layers = [];
        for (let at = node; at; at = at.parentElement)
            layers.unshift(numbers(getComputedStyle(at).backgroundColor));
        return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const luminance = rgb => rgb.map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const texts = 'article :is(p, li, td, th, h1, h2, h3, dt, dd, figcaption, summary), ' +
        'article .course-panel, article .course-panel *, article .cell_output pre';
    const found = [];
    for (const node of document.querySelectorAll(texts)) {
        const own = [...node.childNodes].filter(child => child.nodeType === Node.TEXT_NODE);
        const text = own.map(child => child.data).join('').trim();
        if (!text || !node.getClientRects().length) continue;
        const below = behind(node);
        const [a, b] = [over(numbers(getComputedStyle(node).color), below), below].map(luminance);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < least)
            found.push(`${ratio.toFixed(1)} <${node.tagName} class="${node.className}"> ` + text);
    }
    return found;
}"""


@each_page
@pytest.mark.parametrize("width", WIDTHS)
def test_page_loads_cleanly_and_fits(browser, address, page, width):
    with Visit(browser, f"{address}/{page}", width) as visit:
        failed_images = visit.tab.evaluate(IMAGES_THAT_FAILED)
        overflow = visit.tab.evaluate(OVERFLOW)
        cut_images = visit.tab.evaluate(CUT_IMAGES)
    assert not visit.problems
    assert not failed_images
    assert not overflow
    assert not cut_images


@each_page
def test_text_is_readable_in_light_and_dark(browser, address, page):
    with Visit(browser, f"{address}/{page}", "desktop") as visit:
        for theme in ("light", "dark"):
            visit.tab.evaluate(SHOW_THEME, theme)
            visit.tab.wait_for_timeout(400)  # the theme fades from one color to the other
            faint = visit.tab.evaluate(FAINT_TEXT, LEAST_CONTRAST)
            assert not faint, f"in {theme}:\n" + "\n".join(line[:120] for line in faint[:10])


EXPLORERS = [page for page in PAGES if "course-explorer" in (SITE / page).read_text("utf-8")]


@pytest.mark.parametrize("page", EXPLORERS)
def test_sliders_work_from_a_file_and_by_keyboard(browser, page):
    with Visit(browser, (SITE / page).as_uri(), "phone") as visit:
        for box in visit.tab.query_selector_all(".course-explorer"):
            slider, said = box.query_selector("input"), box.query_selector(".said")
            slider.focus()
            slider.press("Home")
            first = said.inner_text()
            slider.press("ArrowRight")
            assert said.inner_text() != first
            assert len(box.query_selector_all("td.chosen")) == 1
        assert not visit.problems


def test_site_opens_as_a_file(browser):
    """`make book` prints a file address, so a page must also work without a server."""
    with Visit(browser, (SITE / "index.html").as_uri(), "desktop") as visit:
        visit.tab.wait_for_selector("article h1")
        assert not visit.problems


def test_every_page_is_reachable_from_the_first(browser, address):
    with Visit(browser, f"{address}/index.html", "desktop") as visit:
        visit.tab.wait_for_selector("article h1")
        hrefs = visit.tab.eval_on_selector_all(
            "nav a[href]", "links => links.map(link => new URL(link.href).pathname)"
        )
    assert {f"/{page}" for page in PAGES} <= set(hrefs)


if __name__ == "__main__":
    if chromium() is None:
        print("BUT: the site was NOT checked in a browser, because no Chromium was found here.")
        sys.exit(1)

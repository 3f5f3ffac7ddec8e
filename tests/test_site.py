"""The site: as `make site` builds it, opened from disk in headless Chromium.
SITE_SHOTS names a directory for screenshots."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from markdown_it import MarkdownIt
from running import missing
from services import ROOT

pytestmark = pytest.mark.slow

SCRIPTS = sorted(path.name for path in ROOT.glob("0?_*.py"))
WIDTHS = (1280, 390)
SEEN = """() => ({
  ids: [...document.querySelectorAll('[id]')].map(element => element.id),
  links: [...document.querySelectorAll('a[href]')].map(link => link.href),
  broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
  counts: Object.fromEntries([
    'h1', 'h2', 'h3', 'h4', 'table', 'tr', 'pre', 'li', 'img', 'blockquote']
    .map(tag => [tag, document.querySelectorAll(`article ${tag}`).length])),
  prose: (() => {
    const article = document.querySelector('article').cloneNode(true)
    article.querySelectorAll('pre, code, svg').forEach(element => element.remove())
    return article.textContent
  })(),
})"""


@dataclass
class Shown:
    """A page as the browser shows it, and what happened besides."""

    path: Path
    seen: dict[str, Any]
    widths: dict[int, int]  # of the window → of the page
    requests: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not importlib.util.find_spec("material"):
        missing("make site installs mkdocs-material")
    directory = tmp_path_factory.mktemp("site") / "a b"  # links must survive a space
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return directory


def watched(context: Any) -> tuple[Any, list[str], list[str]]:
    """A new tab, what it asks for, and what goes wrong in it."""
    tab, requests, errors = context.new_page(), list[str](), list[str]()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    return tab, requests, errors


@pytest.fixture(scope="module")
def pages(site: Path, browser: Any) -> dict[Path, Shown]:
    context, found = browser.new_context(), {}
    for path in sorted(site.rglob("*.html")):
        tab, requests, errors = watched(context)
        tab.goto(path.as_uri())
        widths = {}
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            widths[width] = tab.evaluate("document.documentElement.scrollWidth")
            if directory := os.environ.get("SITE_SHOTS"):
                name = "-".join(path.relative_to(site).parts)
                tab.screenshot(path=Path(directory) / f"{name}-{width}.png")
        found[path] = Shown(path, tab.evaluate(SEEN), widths, list(requests), list(errors))
        tab.close()
    context.close()
    return found


def file_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def test_every_document_and_script_is_a_page(site: Path, pages: dict[Path, Shown]) -> None:
    documents = {path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    expected = {page_of(path) for path in documents} | {f"{name}.html" for name in SCRIPTS}
    assert expected - {str(path.relative_to(site)) for path in pages} == set()


def page_of(document: Path) -> str:
    name = "index" if document.stem == "README" else document.stem
    return str(document.with_name(f"{name}.html"))


def test_nothing_goes_wrong(pages: dict[Path, Shown]) -> None:
    assert [(shown.path.name, shown.errors) for shown in pages.values() if shown.errors] == []
    assert [shown.seen["broken"] for shown in pages.values() if shown.seen["broken"]] == []


def test_nothing_is_asked_of_a_network(site: Path, pages: dict[Path, Shown]) -> None:
    asked = {url for shown in pages.values() for url in shown.requests}
    assert len(asked) > len(pages)
    outside = {url for url in asked if not url.startswith((site.as_uri(), "data:", "about:"))}
    assert outside == set()


def test_no_link_is_dead(pages: dict[Path, Shown]) -> None:
    ids = {path: set(shown.seen["ids"]) for path, shown in pages.items()}
    dead, tried = [], 0
    for path, shown in pages.items():
        for link in shown.seen["links"]:
            url, anchor = urldefrag(link)
            if urlsplit(url).scheme != "file":
                continue
            target, tried = file_of(url), tried + 1
            if not target.is_file() or (anchor and unquote(anchor) not in ids.get(target, ())):
                dead.append((path.name, link))
    assert dead == []
    assert tried > 10 * len(pages)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(pages: dict[Path, Shown], width: int) -> None:
    seen = {shown.path.name: shown.widths[width] for shown in pages.values()}
    assert {name: wide for name, wide in seen.items() if wide > width} == {}


def test_markdown_is_rendered_as_by_the_standard(site: Path, pages: dict[Path, Shown]) -> None:
    """As many headings, tables, blocks and items as CommonMark has; the repository's pages on the
    web follow it, mkdocs does not. And no mark of Markdown is left in the prose."""
    differ = {}
    for document in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]):
        shown = pages[site / page_of(document.relative_to(ROOT))]
        standard = MarkdownIt("commonmark").enable("table").render(document.read_text("utf-8"))
        expected = Counter(re.findall(r"<(\w+)[ >]", standard))
        wrong = {
            tag: (count, expected[tag])
            for tag, count in shown.seen["counts"].items()
            if count != expected[tag]
        }
        left = re.findall(r"```|\]\(|\*\*|\|-|^\s*[-*] |<!--", shown.seen["prose"], re.MULTILINE)
        if wrong or left:
            differ[document.name] = (wrong, left)
    assert differ == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_whole_and_its_guide_beside_it(site: Path, browser: Any, script: str) -> None:
    source = (ROOT / script).read_text("utf-8")
    tab = browser.new_page()
    tab.goto((site / f"{script}.html").as_uri())
    blocks = tab.evaluate(
        "[...document.querySelectorAll('article pre code')].map(code => code.textContent)"
    )
    assert [line.rstrip() for line in "\n".join(blocks).splitlines() if line.strip()] == [
        line for line in source.splitlines() if line.strip()
    ]
    banners = re.findall(r"^# ── (.+?) ─+$", source, re.MULTILINE)
    headings = tab.evaluate(
        "[...document.querySelectorAll('article h2')].map(h => h.firstChild.data)"
    )
    assert headings == banners
    guide = re.search(r"^Guide: (\S+)$", source, re.MULTILINE)
    assert guide
    tab.get_by_role("article").get_by_role("link", name="Guide").click()
    tab.wait_for_url((site / guide[1]).with_suffix(".html").as_uri())
    beside = "nav.md-nav--primary .md-nav__item--nested:has(> .md-nav .md-nav__link--active) a"
    assert site / f"{script}.html" in [
        file_of(link)
        for link in tab.evaluate(f"[...document.querySelectorAll('{beside}')].map(a => a.href)")
    ]
    tab.close()


def test_search_finds_a_chapter(site: Path, browser: Any) -> None:
    guide = urlsplit((site / "docs" / "03-caching.html").as_uri())
    tab, requests, errors = watched(browser)
    tab.goto((site / "index.html").as_uri())
    field = tab.get_by_role("textbox", name="Search")
    field.click()
    field.press_sequentially("stampede")
    found = tab.locator(".md-search-result__link")
    found.first.wait_for()
    links = [urlsplit(link) for link in found.evaluate_all("links => links.map(link => link.href)")]
    chapters = [n for n, link in enumerate(links) if link.path == guide.path and link.fragment]
    assert links[chapters[0]].fragment == "4-stampede"
    found.nth(chapters[0]).click()
    tab.wait_for_url(lambda url: urlsplit(url).path == guide.path)
    assert errors == []
    assert [url for url in requests if not url.startswith((site.as_uri(), "about:"))] == []
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_where_the_reader_wants_it(site: Path, browser: Any, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto((site / "docs/03-caching.html").as_uri())
    light = "getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3)"
    assert (sum(map(float, tab.evaluate(light))) < 3 * 128) is (scheme == "dark")
    tab.get_by_title("Light mode" if scheme == "dark" else "Dark mode").click()
    assert (sum(map(float, tab.evaluate(light))) < 3 * 128) is (scheme == "light")
    context.close()

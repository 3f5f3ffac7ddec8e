"""The page of script 05, of a file that somebody brings, as HTML and as headless Chromium shows it.
REPORT_SHOTS names a directory for screenshots."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import running
from running import SCRIPTS, Main
from services import load_script

ds: Any = load_script("05_realworld_data_science")
SCRIPT = SCRIPTS["05"]
Run = partial(running.Run, SCRIPT.path)
ODD = ("<script>alert(1)</script>", "=cmd()", '"><img src=x onerror=alert(1)>')
NEED_NO_END = {"html", "head", "body", "meta", "link", "br", "p", "li", "tr", "td", "th", "thead",
               "tbody"}  # fmt: skip


def write_orders(path: Path, customers: int, prefixes: tuple[str, ...] = ("",)) -> str:
    """A CSV of the script's own shop; each name begins with one of `prefixes`, and is long."""
    with ds.connected() as db:
        ds.open_shop(db, customers, ds.np.random.default_rng(3))
        number = "substr(customer_id, 2)::INT"
        name = f"(?::VARCHAR[])[{number} % {len(prefixes)} + 1] || customer_id || repeat('!', 99)"
        day = "DATE '1970-01-01' + day::INT AS date"
        select = f"SELECT {name} AS customer_id, {day}, cents / 100 AS amount, item"
        db.execute(f"COPY ({select} FROM transactions) TO '{path}'", [list(prefixes)])
    return str(path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, by a process, of a file with odd names; nothing is configured."""
    home = tmp_path_factory.mktemp("page")
    write_orders(home / "orders.csv", 3_000, ODD)
    with (home / "orders.csv").open("a") as more:
        more.write("x" * 10_000 + ",2025-06-01,12.50,tea 01\n")
    ended = Run(home)("--transactions", "orders.csv", "--report", "out.html")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "out.html" in ended.stdout
    assert sorted(path.name for path in home.iterdir()) == ["orders.csv", "out.html", "tmp"]
    return home / "out.html"


class Document(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # with the element that began before
        self.unended: Counter[str] = Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.unended[tag] += tag not in NEED_NO_END

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.unended[tag] -= tag not in NEED_NO_END

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.elements[-1][0], " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_in(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture(scope="module")
def document(page: Path) -> Document:
    return Document(page.read_text("utf-8"))


# ── The page as a document ──────────────────────────────────────────────────────────


def test_it_is_well_formed_and_stands_alone(page: Path, document: Document) -> None:
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert set(document.unended.values()) == {0}
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)  # noqa: S314
    assert document.all("html")[0]["lang"] == "en"
    assert {"charset": "utf-8"} in document.all("meta")
    assert document.text_in("title") == document.text_in("h1")
    attributes = [pair for _, element in document.elements for pair in element.items()]
    links = {str(value) for name, value in attributes if re.search("src|href|action|poster", name)}
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)|@import", text) == []
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))  # of several pictures in one page


def test_it_opens_with_decisions_and_their_money(document: Document) -> None:
    assert [tag for tag, _ in document.elements if tag in ("h2", "ol", "svg", "table")][1] == "ol"
    headings, decisions = document.text_in("h2"), document.text_in("b")
    assert headings[0] == "Decisions"
    assert len(decisions) == len(document.all("li")) >= 2
    assert all(re.search(r"\d", text) for text in decisions)
    said = " ".join([*headings, *document.text_in("caption")])
    wanted = ("Value", "egment", "Churn", "ffer", "ecommend", "file", "odels")
    assert [word for word in wanted if word not in said] == []


def test_pictures_and_tables_say_what_they_are(document: Document) -> None:
    pictures, tables = document.all("svg"), document.all("table")
    assert {picture["role"] for picture in pictures} == {"img"}
    said = [str(picture["aria-label"]) for picture in pictures]
    assert len(set(said)) == len(said)
    assert [text for text in said if len(text) < 30 or not re.search(r"\d", text)] == []
    assert len(tables) == len(set(document.text_in("caption"))) >= 4
    assert {heading.get("scope") for heading in document.all("th")} <= {"col", "row"}
    assert len(document.all("th")) > 2 * len(tables)


def test_odd_names_are_escaped_and_cut(page: Path, document: Document) -> None:
    assert re.findall("<(?:script|img)", page.read_text("utf-8")) == []
    cells = document.text_in("td", "th")
    shown = ("<script>alert(", "=cmd()c", '"><img src=x')
    assert [name for name in shown if not any(cell.startswith(name) for cell in cells)] == []
    assert [cell for cell in cells if "!!!!!!!!!!!!!!!!!!!!" in cell] == []


def test_no_figure_is_missing(document: Document) -> None:
    words = " ".join(text for tag, text in document.texts if tag != "style")
    assert (
        re.findall(r"\bnan\b|\binf\b|\bNone\b(?! was)|\{|\}|e[+-]\d\d|(?<![\w.])-0(?![\d.])", words)
        == []
    )


# ── The command line ────────────────────────────────────────────────────────────────


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_orders(tmp_path_factory.mktemp("orders") / "orders.csv", 500)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("a,b,c\n1,2024-01-01,3\n", "--columns"),
        ("customer_id,date,amount\n1,03/04/2024,5\n", "%d/%m/%Y.*%m/%d/%Y.*--date-format"),
        ("customer_id,date,amount\n1,2024-01-01,many\n", "line 2.*many"),
        ("customer_id,date,amount\n1,2024-01-01,5\n", "second day"),
        ("\0\1\2" * 99, "--columns"),
    ],
)
def test_a_file_that_cannot_be_analysed(main: Main, text: str | None, words: str) -> None:
    if text is not None:
        (main.home / "orders.csv").write_text(text)
    ended = main("--transactions", "orders.csv", "--offline")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert re.search(words, " ".join(ended.stderr.split())), ended.stderr
    assert len(ended.stderr) < 700
    assert not (main.home / "report.html").exists()


WRONG = {
    "--columns": ["customer_id", "customer=customer_id", "amount=price", "amount=amount*"],
    "--cutoff": ["yesterday", "31.12.2024"],
    "--date-format": ["%Q"],
    "--horizon-weeks": ["0", "-1", "many", "9000000"],
    "--margin": ["0", "-0.1", "30", "nan", "0,3"],
    "--offer-cost": ["-2", "inf"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(o, v) for o, values in WRONG.items() for v in values]
)
def test_an_option_that_makes_no_sense(main: Main, orders: str, option: str, value: str) -> None:
    ended = main("--transactions", orders, "--offline", option, value)
    assert ended.returncode == 2, ended.stdout
    assert option in ended.stderr or value in ended.stderr, ended.stderr
    assert not (main.home / "report.html").exists()


@pytest.mark.parametrize("page", ["no/such/directory/out.html", "."])
def test_a_page_that_cannot_be_written_is_named(main: Main, orders: str, page: str) -> None:
    ended = main("--transactions", orders, "--offline", "--report", page)
    assert ended.returncode == 1
    assert f"'{page}'" in ended.stdout


def test_terms_and_cutoff_are_used(main: Main, orders: str) -> None:
    def money(*args: str) -> float:
        ended = main("--transactions", orders, "--offline", "--only", "report", *args)
        assert (ended.returncode, ended.stderr) == (0, "")
        text = (main.home / "report.html").read_text("utf-8")
        (found,) = re.findall(r"margin of ([\d,.]+)\s+within", text)
        return float(found.replace(",", ""))

    usual = money()
    assert money("--margin", "0.6") == pytest.approx(2 * usual, rel=0.01)
    assert money("--horizon-weeks", "26") > 1.3 * usual
    assert money("--cutoff", "2025-06-30") != usual
    assert "Customers on 2025-06-30" in (main.home / "report.html").read_text("utf-8")


# ── In a browser ────────────────────────────────────────────────────────────────────

CONTRASTS = """() => {  // [element, text, its contrast as WCAG 2 counts it] of all text on the page
  const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const light = (colour) => {
    probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1)
    const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].map(value => value / 255)
      .map(value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b
  }
  const sheet = document.body.appendChild(document.createElement('i'))
  sheet.style.background = 'Canvas'  // of the page's colour scheme
  const paper = light(getComputedStyle(sheet).backgroundColor), found = []
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement
    if (!text || element.closest('style, metadata, defs')) continue
    const style = getComputedStyle(element)
    const ink = light(element instanceof SVGElement ? style.fill : style.color)
    const [low, high] = [ink, paper].sort((a, b) => a - b)
    found.push([element.tagName.toLowerCase(), text, (high + .05) / (low + .05)])
  }
  return found
}"""


def opened(browser: Any, path: Path, width: int, **media: str) -> tuple[Any, list[str]]:
    """The page, and what happened beside its being shown."""
    shown, events = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    shown.emulate_media(**media)
    shown.on("console", lambda message: events.append(message.text))
    shown.on("pageerror", lambda error: events.append(str(error)))
    shown.on("dialog", lambda dialog: events.append(dialog.message))
    shown.on("request", lambda request: events.append(request.url))
    shown.goto(path.as_uri())
    if directory := os.environ.get("REPORT_SHOTS"):
        name = f"{'-'.join(media.values())}-{width}.png"
        shown.screenshot(path=Path(directory) / name, full_page=True)
    return shown, events


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(page: Path, browser: Any, width: int, scheme: str) -> None:
    shown, events = opened(browser, page, width, color_scheme=scheme)
    assert [event for event in events if not event.startswith("data:")] == [page.as_uri()]
    assert re.match(r"Customers on \d{4}-\d\d-\d\d$", shown.title())
    contrasts = shown.evaluate(CONTRASTS)
    assert {"h1", "p", "td", "th", "b", "caption", "text"} <= {tag for tag, _, _ in contrasts}
    assert [one for one in contrasts if one[2] < 4.5] == []
    paper = shown.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert paper == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    heights = "[...document.querySelectorAll('tr')].map(row => row.clientHeight)"
    assert max(shown.evaluate(heights)) < 160  # no word is broken into single letters
    for picture in shown.query_selector_all("svg"):
        box = picture.bounding_box()
        assert box["width"] > 0.8 * min(width, 600)
        assert 100 < box["height"] < box["width"]
        assert shown.get_by_role("img", name=picture.get_attribute("aria-label")).count() == 1


@pytest.mark.slow
def test_on_paper(page: Path, browser: Any, tmp_path: Path) -> None:
    shown, _ = opened(browser, page, 1280, color_scheme="light", media="print")
    assert [one for one in shown.evaluate(CONTRASTS) if one[2] < 4.5] == []
    paper = Path(os.environ.get("REPORT_SHOTS", tmp_path)) / "print.pdf"
    shown.pdf(path=paper, format="A4")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 6

"""docs/INDEX.md and docs/QUICK_REFERENCE.md beside what they list: files, terms, sums, quotes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("0?_*.py"))
INDEX = (ROOT / "docs" / "INDEX.md").read_text(encoding="utf-8")
CARDS = (ROOT / "docs" / "QUICK_REFERENCE.md").read_text(encoding="utf-8")
QUOTE_LINES = 12  # of one card, without those that say that something is left out
FAST_TRACK_MIN = 30
LINK_MIN, EXERCISE_MIN, TASK_MIN = 40, 30, 60  # as the page says
EXERCISE = r"\b0[1-5][a-c]\b"


def section(title: str) -> str:
    """What stands below a heading, to the next that is not below it."""
    rest = INDEX.partition(f"\n{title}\n")[2]
    return re.split(rf"^#{{1,{title.index(' ')}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = re.findall(r"^\| (.+) \|$", text, flags=re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


def minutes(hours: str) -> int:
    whole, _, rest = hours.partition(":")
    return 60 * int(whole) + int(rest)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_map_has_what_belongs_to_a_script(script: Path) -> None:
    number = script.name[:2]
    guide = re.findall(r"^Guide: docs/(\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE)[0]
    bench = next((ROOT / "benchmarks").glob(f"bench_{number}_*.py")).name
    (row,) = (row for row in rows(section("## Map")) if row[0].startswith(f"[{number}]"))
    for target in (f"../{script.name}", guide, f"../tests/{number}", f"../benchmarks/{bench}"):
        assert f"]({target})" in " ".join(row), target


def test_every_exercise_is_listed() -> None:
    listed = re.findall(r"\]\(\.\./exercises/(\S+)\)", section("### The exercises"))
    assert listed == sorted(path.name for path in (ROOT / "exercises").glob("0*.py"))


def test_every_exercise_is_on_a_path_and_on_the_map() -> None:
    listed = {row[0][1:4] for row in rows(section("### The exercises"))}
    assert set(re.findall(EXERCISE, section("## Five paths"))) == listed
    assert {name for row in rows(section("## Map"))[:5] for name in row[4].split(", ")} == listed


PATHS = re.findall(r"^### (.+)$", section("## Five paths"), flags=re.MULTILINE)


@pytest.mark.parametrize("path", PATHS)
def test_hours_of_a_path_are_the_sum_of_its_parts(path: str) -> None:
    text, total = section(f"### {path}"), 0
    for part, hours, *rest in rows(text):
        links, exercises = "".join(rest).count("]("), set(re.findall(EXERCISE, "".join(rest)))
        expected = LINK_MIN * links + EXERCISE_MIN * len(exercises) + TASK_MIN * ("Task" in part)
        assert minutes(hours) == expected, part
        total += expected
    assert minutes(re.findall(r"\*\*(\d+:\d\d) hours\.\*\*", text)[0]) == total


def test_there_are_five_paths() -> None:
    assert len(PATHS) == 5


def test_minutes_of_the_fast_track_are_thirty() -> None:
    text = section("## Thirty minutes for the experienced")
    steps = re.findall(r"^\*\*\d\. .+, (\d+) minutes\.\*\*", text, flags=re.MULTILINE)
    assert sum(map(int, steps)) == FAST_TRACK_MIN


TERMS = [row[0] for row in rows(section("## Glossary"))]


def test_glossary_is_alphabetical() -> None:
    keys = [re.sub(r"[^a-z0-9]", "", term.lower()) for term in TERMS]
    assert keys == sorted(set(keys))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_glossary_has_the_terms_of_a_script(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    glossary = (ast.get_docstring(ast.parse(text)) or "").partition("Glossary:\n")[2]
    used = re.findall(r"^  (\S.*?)  ", glossary.partition("\n\n")[0], flags=re.MULTILINE)
    assert used
    known = {part for term in TERMS for part in term.split(", ")}
    assert {part for term in used for part in re.split("[,;] ", term)} <= known


QUOTED = re.compile(r"```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
EACH_CARD = re.findall(r"^### (.+)\n((?:(?!##).*\n)+)", CARDS, flags=re.MULTILINE)


@pytest.mark.parametrize(("title", "card"), EACH_CARD, ids=[title for title, _ in EACH_CARD])
def test_card_is_whole_and_short(title: str, card: str) -> None:
    quoted = QUOTED.findall(card)
    code = [line for line in "".join(quoted).splitlines() if line.strip() != "# …"]
    assert 0 < len(code) <= QUOTE_LINES
    for quote in quoted:
        ast.parse(quote)  # what is left out leaves Python
    for mark in ("**When** ", "**Not** ", "**Trap.** "):
        assert card.count(mark) == 1, mark
    assert re.search(r"\[Chapter\]\(0[1-5]-\S+\.md#\d+-\S+\)", card), "a link to its chapter"
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    assert f"](#{anchor})" in CARDS.partition("\n## ")[0], "its place in the list above"

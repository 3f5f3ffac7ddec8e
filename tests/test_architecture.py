"""docs/ARCHITECTURE_OVERVIEW.txt: its names are in the code that each diagram is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from services import load_script

ROOT = Path(__file__).resolve().parent.parent
OVERVIEW = ROOT / "docs" / "ARCHITECTURE_OVERVIEW.txt"
WIDTH = 88  # columns
RULE = "═" * WIDTH
# What only code is called: calls, snake_case, _private, UPPER_CASE, CamelCase, x-headers.
NAME = re.compile(
    r"(?<![\w.-])(?:\w+(?=\()|[a-zA-Z]\w*_\w+|_\w+|[A-Z][a-z]+(?:[A-Z][a-z]*)+|x-[a-z-]+)"
    r"|(?<=\.)(?:\w+(?=\()|_\w+|\w+_\w+)"
)
FILE = re.compile(r"\S*\w\.(?:py|yml|md|txt)")


def sections() -> dict[str, str]:
    """Title, with the files it names → its diagram."""
    _, *parts = OVERVIEW.read_text(encoding="utf-8").split(f"{RULE}\n")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def code_of(title: str) -> str:
    names = FILE.findall(title)
    paths = [ROOT / name for name in names]
    paths += sorted(ROOT.glob("0?_*.py")) if "the scripts" in title else []
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def unknown_names(diagram: str, code: str) -> set[str]:
    """Names of the diagram that are no words of the code."""
    words = set(re.findall(r"[\w-]+", code)) | set(re.findall(r"\w+", code))
    return set(NAME.findall(FILE.sub(" ", diagram))) - words


@pytest.mark.parametrize("title", list(sections()), ids=lambda title: title.split("  ")[1].strip())
def test_names_of_a_diagram_are_in_its_code(title: str) -> None:
    diagram = sections()[title]
    assert len(NAME.findall(diagram)) >= 10
    assert unknown_names(diagram, code_of(title)) == set()


@pytest.mark.parametrize(
    "name", ["fetch()", "cache.fetch()", "_fetch", "a_name", "A_NAME", "OldName", "x-a-name"]
)
def test_a_name_that_is_gone_is_found(name: str) -> None:
    assert unknown_names(f"  └── {name} ──> value", "def other(): value") != set()


def test_demos_are_counted() -> None:
    """In the row of the five scripts, and in that of what they do offline."""
    text = OVERVIEW.read_text(encoding="utf-8")
    demos = [str(len(load_script(path.stem).DEMOS)) for path in sorted(ROOT.glob("0?_*.py"))]
    assert re.findall(r"│ (\d+) demos", text) == demos
    assert re.findall(r"│ \d of (\d) demos", text) == demos[2:4]


def test_contents_are_the_titles() -> None:
    listed = re.findall(r"^  (\d)  .+?   +(\S.+)$", OVERVIEW.read_text("utf-8"), flags=re.M)
    titles = [re.findall(r"^(\d)  .+?   +(\S.+)$", title)[0] for title in sections()]
    assert [(n, files.removesuffix(", the scripts")) for n, files in titles] == listed


def test_lines_fit_a_terminal() -> None:
    lines = OVERVIEW.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDTH or line != line.rstrip()] == []

"""The documentation: its quotes equal the code, its links resolve, its commands exist.

    python tests/test_docs.py --update   renews the quotes that elide nothing

A quote is a block of Python below `<!-- from FILE: NAME -->`, where NAME may be dotted. It equals
the source of NAME in FILE, dedented; a line `# …` stands for one or more lines left out.

Output is a block of text in the guide of a script, or in the README below a paragraph that names
"Script 0N". Each line of it occurs in a run of that script, whatever the numbers: on its server
where the paragraph above names that, else offline. A paragraph that names the server's whole
version, such as MongoDB 6.0.5, is of that version only.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running import Recorded

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + GUIDES
SCRIPTS = sorted(ROOT.glob("0?_*.py"))
README = ROOT / "README.md"
README_BYTES = 6 * 1024  # a beginner reads it whole
# As a paragraph names them.
SERVERS = {
    "01": "PostgreSQL", "02": "MongoDB", "03": "Redis", "04": "RabbitMQ", "05": "PostgreSQL",
}  # fmt: skip
ELISION = "# …"
BLOCK = re.compile(
    r"(?P<head>(?:<!-- from (?P<file>\S+): (?P<name>\S+) -->\n)?```python\n)(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
OUTPUT = re.compile(r"((?:.+\n)+)\n?```text\n((?:(?!```).*\n)+)```")  # and the paragraph above


def source_of(file: str, name: str) -> str:
    """The source of a function, class or variable; several assignments to it follow each other.

    Raises LookupError where `file` holds nothing of that name.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    scope: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in scope if part in names_bound(node)]
        if not found:
            raise LookupError(f"{file} has no {name}")
        scope = getattr(found[0], "body", [])
    lines = text.splitlines(keepends=True)
    return textwrap.dedent("".join(line for node in found for line in lines[lines_of(node)]))


def names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def lines_of(node: ast.stmt) -> slice:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return slice(first - 1, node.end_lineno)


def is_quote(code: str, source: str) -> bool:
    pattern = "".join(
        r"(?:.*\n)+?" if line.strip() == ELISION else re.escape(line)
        for line in code.splitlines(keepends=True)
    )
    return re.fullmatch(pattern, source) is not None


def update_quotes() -> None:
    """Write the code anew into every quote that elides nothing."""

    def renewed(block: re.Match[str]) -> str:
        if block["name"] is None or ELISION in block["code"]:
            return block[0]
        return f"{block['head']}{source_of(block['file'], block['name'])}```"

    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        guide.write_text(BLOCK.sub(renewed, text), encoding="utf-8")


def blocks() -> Iterator[object]:
    for guide in GUIDES:
        for number, block in enumerate(BLOCK.finditer(guide.read_text(encoding="utf-8")), 1):
            yield pytest.param(block, id=f"{guide.name}-{number}-{block['name']}")


@pytest.mark.parametrize("block", list(blocks()))
def test_python_in_a_guide_is_quoted_from_the_code(block: re.Match[str]) -> None:
    assert block["name"], f"no line <!-- from FILE: NAME --> above:\n{block['code']}"
    source = source_of(block["file"], block["name"])
    assert is_quote(block["code"], source), f"{block['name']} is now:\n{source}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a\nb\nc\n", True),
        ("a\n# …\nc\n", True),
        ("    # …\nc\n", True),
        ("a\nc\n", False),
        ("a\nb\n", False),  # the end is missing, and nothing says so
        ("a\n# …\nb\nc\n", False),  # nothing is left out
        ("a\nb \nc\n", False),
    ],
)
def test_quote_is_exact(code: str, expected: bool) -> None:
    assert is_quote(code, "a\nb\nc\n") is expected


def mask(line: str) -> str:
    """A line without its numbers, which vary, and without the widths that follow from them."""
    return re.sub(r"[\s─]+", " ", re.sub(r"\d[\d.,]*", "#", line)).strip()


def guide_of(script: Path) -> Path:
    guide = re.search(r"^Guide: (\S+)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert guide, f"{script.name} names no guide"
    return ROOT / guide[1]


def outputs() -> Iterator[object]:
    """(number of a script, the paragraph above, the output) for each block of output."""
    guides = {guide_of(script): script.name[:2] for script in SCRIPTS}
    for page in filter(Path.exists, (README, *guides)):  # a missing guide fails its own test
        for number, block in enumerate(OUTPUT.finditer(page.read_text(encoding="utf-8")), 1):
            introduction, output = block.groups()
            named = re.search(r"Script (0\d)", introduction)
            script = guides.get(page) or (named[1] if named else "none")
            yield pytest.param(script, introduction, output, id=f"{page.name}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "introduction", "output"), list(outputs()))
def test_output_in_a_guide_is_from_a_run(
    script: str, introduction: str, output: str, recorded: Recorded
) -> None:
    server = SERVERS[script]
    printed = recorded(script, server in introduction).ended.stdout.splitlines()
    version = re.search(rf"{server} \d+\.\d+\.\d+", introduction)
    if version and not any(re.match(rf"On {version[0]}\b", line) for line in printed):
        pytest.skip(f"of {version[0]}, and this run was not")
    masked = {mask(line) for line in printed}
    assert [line for line in output.splitlines() if mask(line) not in masked] == []


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_guide_has_a_chapter_for_each_demo(script: Path) -> None:
    module = importlib.import_module(script.stem)
    text = guide_of(script).read_text(encoding="utf-8")
    chapters = dict(re.findall(r"^## (\d+\. .+)\n((?:(?!## ).*\n)+)", text, flags=re.MULTILINE))
    demos = {demo.__doc__.partition(":")[0]: demo.__name__ for demo in module.DEMOS}
    assert list(chapters) == list(demos)
    for title, name in demos.items():
        assert f"`--only {name.removeprefix('demo_')}`" in chapters[title]


def commands() -> Iterator[object]:
    for page in (README, *GUIDES):
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", "").splitlines():
                yield pytest.param(line, id=f"{page.name}: {line.partition('#')[0].strip()}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_name_what_exists(line: str) -> None:
    words = [word.strip("();") for word in shlex.split(line, comments=True)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    if "make" in words:
        for target in words[words.index("make") + 1 :]:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for word in words:
        if re.fullmatch(r"[\w./-]+\.(py|txt|yml|example)", word):
            assert (ROOT / word).exists(), word


def test_readme_lists_every_script_and_says_which_are_missing() -> None:
    text = README.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| .*0\d_\w+\.py", line)]
    listed = {re.findall(r"0\d_\w+\.py", row)[0]: row for row in rows}
    assert {script.name for script in SCRIPTS} <= set(listed)
    for name, row in listed.items():
        assert (ROOT / name).exists() is ("not there yet" not in row), row


def test_readme_is_short() -> None:
    assert README.stat().st_size <= README_BYTES


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit(__doc__)
    update_quotes()

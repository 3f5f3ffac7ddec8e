"""The documents (documents.py says how a block says where it is from): quotes equal the code,
output is what the scripts print, commands run, links resolve."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from documents import (
    BLOCK,
    PAGES,
    README,
    ROOT,
    SCRIPTS,
    Block,
    NotPrinted,
    all_blocks,
    as_printed,
    copy_of_the_module,
    guide_of,
    is_of_another_version,
    is_online,
    is_quote,
    renewed,
    script_of,
    shell,
    source_of,
)
from markdown_it import MarkdownIt
from services import load_script, postgres_engine

import servers

if TYPE_CHECKING:
    from running import Recorded

DOCS = ROOT / "docs"
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README_BYTES = 5_300  # a beginner reads it whole
BLOCKS = all_blocks()


def of(*languages: str, run: bool = True) -> list[Block]:
    return [b for b in BLOCKS if b.language in languages and (b.kind != "not run") is run]


def test_no_block_is_of_a_language_that_nothing_here_checks() -> None:
    assert {b.language for b in BLOCKS} <= {"python", "text", "sh", "powershell", "sql", "json"}
    assert of("json", run=True) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_is_seen(page: Path) -> None:
    """Also one that is indented, or fenced in another way: CommonMark shows it as code."""
    parsed = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    shown = [token.content for token in parsed if token.type in ("fence", "code_block")]
    assert shown == [block.code for block in BLOCKS if block.page == page]


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_in_a_guide_is_quoted_from_the_code(block: Block) -> None:
    assert block.kind == "from", f"no line <!-- from FILE: NAME --> above:\n{block.code}"
    file, _, name = block.said.partition(": ")
    source = source_of(file, name)
    assert is_quote(block.code, source), f"{name} is now:\n{source}"


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


# ── Output ──────────────────────────────────────────────────────────────────────────


PRINTED = ["b 4", "x", "── a 30 ─", "b 4", "x", "b 5", "c", "e 1  2"]


@pytest.mark.parametrize(
    ("shown", "varies", "expected"),
    [
        (["─ a 1", "b 2"], {1, 2}, ["── a 30 ─", "b 4"]),
        (["b 1", "c"], {1}, ["b 5", "c"]),  # the nearer of the two
        (["b 4", "c"], set(), ["b 4", "c"]),
        (["e   1 2"], set(), ["e 1  2"]),  # another width
        (["b 1", "c 7"], None, None),
        (["b 1", "c"], set(), None),
        (["b 1", "e 1 3"], {1}, None),
        (["b 4", "d"], None, None),
        (["c", "b 5"], None, None),  # not in this order
        (["c", "c"], None, None),
    ],
)
def test_output_is_found_but_for_numbers_that_vary(
    shown: list[str], varies: set[int] | None, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(NotPrinted):
            as_printed(shown, PRINTED, varies)
    else:
        assert as_printed(shown, PRINTED, varies) == expected


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in of("text") if b.kind is None], ids=str)
def test_output_in_a_guide_is_from_a_run(block: Block, recorded: Recorded) -> None:
    printed = recorded(script_of(block), is_online(block)).ended.stdout.splitlines()
    if is_of_another_version(block, printed):
        pytest.skip("of another version than this run")
    as_printed(block.code.splitlines(), printed, block.varies)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has, after `make setup`, and files of his own."""
    place = copy_of_the_module(tmp_path_factory.mktemp("clone") / "module")
    (place / ".venv").symlink_to(ROOT / ".venv")
    days = pd.date_range("2023-01-01", "2024-12-30", freq="D")
    rng = np.random.default_rng(1)
    orders = pd.DataFrame({
        "customer_id": rng.integers(1, 500, 5_000), "date": rng.choice(days, 5_000),
        "amount": rng.integers(100, 9_999, 5_000) / 100, "item": rng.choice(list("abcd"), 5_000),
    })  # fmt: skip
    orders.to_csv(place / "orders.csv", index=False)
    orders.to_csv(place / "orders.csv.gz", index=False)
    names = {"customer_id": "CustomerID", "date": "InvoiceDate", "amount": "UnitPrice"}
    retail = orders.rename(columns={**names, "item": "Description"}).assign(Quantity=2)
    retail.to_csv(place / "online_retail.csv", index=False)
    return place


PAGE = """\
The text has 234 of them.

<!-- from config.py: WIDTH -->
```python
WIDTH = 1
```

<!-- from config.py: redact -->
```python
def old():
    # …
```

<!-- output of: it -->
```text
a 234
b 2
c
```
"""


def test_a_page_is_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    lines = {1: ["a 678", "b 3", "c"], 2: ["a 678", "b 4", "c"]}
    text = renewed(page, lambda _, nth: lines[nth])
    said = capsys.readouterr().out
    assert source_of("config.py", "WIDTH") in text
    assert "def old():\n    # …\n" in text
    assert "page.md-2-python: LookupError: redact has other lines now\n" in said
    assert "it -->\n<!-- varies: 2 -->\n```text\na 678\nb 3\nc\n```\n" in text
    assert "page.md-3-text no longer has 234; page.md: The text has 234" in said
    page.write_text(text)
    lines[1] = lines[2] = ["a 678", "b 4"]
    assert renewed(page, lambda _, nth: lines[nth]) == text
    assert "page.md-3-text: NotPrinted: not printed:\nc\n" in capsys.readouterr().out


SHOWN = [block for block in of("text") if block.kind == "output of"]


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({block.said for block in SHOWN}))
def test_output_of_a_command_is_what_it_prints(command: str, clone: Path) -> None:
    printed = shell(command, clone).stdout.splitlines()
    for block in SHOWN:
        if block.said == command:
            as_printed(block.code.splitlines(), printed, block.varies)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links them."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)}


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def chapter(page: Path, anchor: str) -> str:
    """A heading and what stands under it, up to the next one."""
    parts = re.split(r"^(?=##+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = (part for part in parts if slug(part.partition("\n")[0].lstrip("# ")) == anchor)
    return found


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
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


# ── Figures ─────────────────────────────────────────────────────────────────────────

# Where a sentence or a cell that says "(bench" or "(sums" has its figures from.
MEASURED = {"bench": DOCS / "BENCHMARKS.md", "sums": ROOT / "benchmarks" / "records" / "sums.txt"}
NUMBER = re.compile(r"(?<![\w.,])\d[\d.,]*(?<![.,])")
WITH_RANGE = re.compile(r"([\d.,]+×?)(?: speed| time)?\s+\(?([\d.,]+–[\d.,]+)")


def chapters_of(source: str) -> list[str]:
    return re.split(r"^(?=## )", MEASURED[source].read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_of_a_measurement_are_in_its_record(page: Path) -> None:
    text = prose(page)
    records = "".join(part for name in MEASURED for part in chapters_of(name))
    assert set(WITH_RANGE.findall(text)) <= set(WITH_RANGE.findall(records))
    sources = "|".join(MEASURED)
    for said, source in re.findall(rf"((?:(?!\.\s|\n\n)[^|])+?)\(({sources})\b", text):
        numbers = set(NUMBER.findall(said))
        assert any(numbers <= set(NUMBER.findall(part)) for part in chapters_of(source)), said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_a_link_are_in_the_chapter_it_leads_to(page: Path) -> None:
    links = re.findall(r"\[([^\[\]]+)\]\(([\w.-]*\.md)?#([\w-]+)\)", prose(page))
    for text, file, anchor in links:
        said = file + chapter(page.parent / (file or page.name), anchor)
        assert set(NUMBER.findall(text)) <= set(NUMBER.findall(said)), text


# ── Commands ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands_run(block: Block, clone: Path, tmp_path: Path) -> None:
    if "venv .venv" in block.code:  # the reader's own
        clone = copy_of_the_module(tmp_path / "module")
    ended = shell(block.code, clone)
    assert ended.returncode == 0, ended.stdout


def test_commands_for_windows_are_those_that_run_elsewhere() -> None:
    (windows,) = of("powershell")
    translated = windows.code.replace("py -m", "python3 -m", 1).replace("\\", "/")
    translated = translated.replace("Scripts", "bin")
    assert translated in {block.code for block in of("sh") if block.page == windows.page}


@pytest.mark.slow
@pytest.mark.parametrize("block", of("sql"), ids=str)
def test_sql_runs(block: Block, postgres_url: str) -> None:
    with postgres_engine(postgres_url).connect() as connection:
        assert connection.exec_driver_sql(block.code).all()


@pytest.mark.parametrize("block", of("sh", "python", "sql", "json", run=False), ids=str)
def test_what_is_not_run_says_why(block: Block) -> None:
    named = re.findall(r"tests/[\w/]+(?:\.py)?", block.said)
    assert len(block.said.split()) > 2
    assert all((ROOT / name).exists() for name in named), block.said


def commands() -> Iterator[object]:
    for block in of("sh", "powershell") + of("sh", run=False):
        for line in block.code.replace("\\\n", "").replace("\\", "/").splitlines():
            yield pytest.param(line, id=f"{block.page.name}: {line.partition('#')[0].strip()}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_name_what_exists(line: str) -> None:
    words = [word.strip("();") for word in shlex.split(line, comments=True)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    if "make" in words:
        for target in words[words.index("make") + 1 :]:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    if "servers.py" in words and "--" in words:
        options = words[words.index("servers.py") + 2 : words.index("--")]
        assert set(options) <= {"--only", *servers.SERVERS}
    for word in words:
        if re.fullmatch(r"[\w./-]+\.(py|txt|yml|example)", word):
            assert (ROOT / word).exists(), word
        if word == "exercises/check.py":
            assert next((ROOT / "exercises").glob(f"{words[-1]}_*.py"), None), words[-1]
    for at, word in enumerate(words):
        if re.fullmatch(r"0\d_\w+\.py", word):
            demos = {d.__name__.removeprefix("demo_") for d in load_script(word[:-3]).DEMOS}
            named = {after for option, after in pairwise(words[at:]) if option == "--only"}
            assert named <= demos


def test_readme_lists_every_script() -> None:
    listed = re.findall(r"^\| .*?(0\d_\w+\.py)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [script.name for script in SCRIPTS]


def test_readme_is_short() -> None:
    assert README.stat().st_size <= README_BYTES

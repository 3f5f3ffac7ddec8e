"""What the documents quote, show, and tell their readers to run; `make docs` writes it anew.

Run:
  python servers.py run -- python tests/documents.py

A comment above a block of code says where it is from:
  <!-- from FILE: NAME -->     Python: the source of NAME, which may be dotted, in FILE, dedented. A
                               line `# …` stands for one or more lines left out.
  <!-- output of: COMMAND -->  text: lines of what the command prints, in their order
  <!-- not run: REASON -->     a reader runs it, the tests do not

Text without a comment, in the guide of a script or in the README below a paragraph that names
"Script 0N", is from a whole run of that script: on its server where the paragraph above names that,
else offline. A paragraph that names the server's whole version, such as MongoDB 6.0.5, is of that
version only.

A line of output is compared with its numbers, but for those that differ from run to run. Which do,
experience says: `make docs` runs everything twice and notes the lines that differ, in a second
comment, `<!-- varies: 2 5 -->`; of these the numbers may differ. What was once noted stays so.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # where this is run as a script

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = (README, *GUIDES)
SCRIPTS = sorted(ROOT.glob("0?_*.py"))
# As a paragraph names them.
SERVERS = {
    "01": "PostgreSQL", "02": "MongoDB", "03": "Redis", "04": "RabbitMQ", "05": "PostgreSQL",
}  # fmt: skip
ELISION = "# …"
BLOCK = re.compile(
    r"(?:<!-- (?P<kind>from|output of|not run):? (?P<said>.+) -->\n)?"
    r"(?P<note><!-- varies:(?P<varies>[ \d]+) -->\n)?"
    r"```(?P<language>\w*)\n(?P<code>(?:(?!```).*\n)*)```$",
    re.MULTILINE,
)
COMMAND_TIMEOUT_S = 600.0  # pip's downloads among them, on a busy machine


@dataclass(frozen=True)
class Block:
    page: Path
    number: int  # on its page, from 1
    language: str
    code: str
    span: tuple[int, int]  # of the code in the page
    note: tuple[int, int]  # of the comment about what varies; empty where there is none
    varies: frozenset[int]  # numbers of its lines, from 1
    paragraph: str  # the one above
    kind: str | None
    said: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.number}-{self.language}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(BLOCK.finditer(text), 1):
        yield Block(
            page, number, block["language"], block["code"], block.span("code"),
            block.span("note") if block["note"] else (block.start("language") - 3,) * 2,
            frozenset(map(int, (block["varies"] or "").split())),
            text[: block.start()].rstrip("\n").rpartition("\n\n")[2],
            block["kind"], block["said"] or "",
        )  # fmt: skip


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


# ── Quotes ──────────────────────────────────────────────────────────────────────────


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


def quoted(block: Block) -> str:
    """What `block` quotes now; where it elides, itself: who wrote it chose the lines.

    Raises LookupError where there is nothing of that name, or not those lines.
    """
    file, _, name = block.said.partition(": ")
    source = source_of(file, name)
    if ELISION not in block.code:
        return source
    if not is_quote(block.code, source):
        raise LookupError(f"{name} has other lines now")
    return block.code


# ── Output ──────────────────────────────────────────────────────────────────────────


class NotPrinted(AssertionError):
    """Lines of a document that the run does not print, or not in their order."""


def squeezed(line: str) -> str:
    """A line without the widths of columns and rules, which follow from the widest number."""
    return re.sub(r"[\s─]+", " ", line).strip()


def masked(line: str) -> str:
    """A line without its numbers, too."""
    return squeezed(re.sub(r"\d[\d.,]*", "#", line))


def as_printed(
    shown: Sequence[str], printed: Sequence[str], varies: Collection[int] | None = None
) -> list[str]:
    """The lines of `printed` that `shown` holds: in their order, and of the places where they are,
    the one in which they are closest together. Of the lines whose number is in `varies`, of all
    where that is None, numbers may differ.

    Raises NotPrinted.
    """

    def places(number: int, line: str) -> list[int]:
        forms = masked if varies is None or number in varies else squeezed
        return [at for at, other in enumerate(printed) if forms(other) == forms(line)]

    candidates = [places(number, line) for number, line in enumerate(shown, 1)]
    if missing := [line for line, found in zip(shown, candidates, strict=True) if not found]:
        kin = [line for line in printed if masked(line) in map(masked, missing)]
        raise NotPrinted("\n".join(["not printed:", *missing, "but:", *kin]))
    found = []
    for start in candidates[0]:
        place = [start]
        for rest in candidates[1:]:
            place += [at for at in rest if at > place[-1]][:1]
        if len(place) == len(shown):
            found.append(place)
    if not found:
        raise NotPrinted("printed, but not in this order:\n" + "\n".join(shown))
    return [printed[at] for at in min(found, key=lambda place: place[-1] - place[0])]


def guide_of(script: Path) -> Path:
    guide = re.search(r"^Guide: (\S+)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert guide, f"{script.name} names no guide"
    return ROOT / guide[1]


def script_of(block: Block) -> str:
    """The number of the script whose output this is.

    Raises LookupError where nothing says it.
    """
    guides = {guide_of(script): script.name[:2] for script in SCRIPTS}
    named = re.search(r"Script (0\d)", block.paragraph)
    if block.page not in guides and not named:
        raise LookupError(f"nothing says what printed {block}")
    return guides.get(block.page) or (named[1] if named else "")


def is_online(block: Block) -> bool:
    return SERVERS[script_of(block)] in block.paragraph


def is_of_another_version(block: Block, printed: Sequence[str]) -> bool:
    version = re.search(rf"{SERVERS[script_of(block)]} \d+\.\d+\.\d+", block.paragraph)
    return bool(version) and not any(re.match(rf"On {version[0]}\b", line) for line in printed)


# ── Commands ────────────────────────────────────────────────────────────────────────


def copy_of_the_module(place: Path) -> Path:
    """What a clone holds, and no `.env`, in `place`."""
    ignored = shutil.ignore_patterns(
        ".env", ".venv", ".git", ".*_cache", ".hypothesis", ".outcomes", "__pycache__", "site"
    )
    return Path(shutil.copytree(ROOT, place, ignore=ignored, symlinks=True))


def shell(code: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` there up to the first line that fails, with this interpreter first on PATH, no
    server configured, and none that is installed; both its streams are in `stdout`.

    Raises subprocess.TimeoutExpired.
    """
    import config

    kept = {name: value for name, value in os.environ.items() if name not in config.SCHEMES}
    kept["SERVERS_IGNORE_INSTALLED"] = "1"  # the output is then the same everywhere
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.run(
        ["sh", "-euc", code], cwd=place, env=kept, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=COMMAND_TIMEOUT_S,
    )  # fmt: skip


# ── make docs ───────────────────────────────────────────────────────────────────────


def recorder(home: Path) -> Callable[[Block, int], list[str]]:
    """Gives the lines that are printed now, in the nth of its runs, by what a block is from."""
    from running import SCRIPTS as RUNS
    from running import whole_run

    place = copy_of_the_module(home / "module")
    (place / ".venv").symlink_to(ROOT / ".venv")

    @cache
    def command(said: str, nth: int) -> list[str]:
        return shell(said, place).stdout.splitlines()

    @cache
    def run(number: str, online: bool, nth: int) -> list[str]:
        script = RUNS[number]
        urls = [os.environ[service.variable] for service in script.services] if online else []
        whole = whole_run(script, home / f"{number}-{online}-{nth}", *urls)
        return whole.ended.stdout.splitlines()

    def printed(block: Block, nth: int) -> list[str]:
        if block.kind == "output of":
            return command(block.said, nth)
        return run(script_of(block), is_online(block), nth)

    return printed


def renewed(page: Path, printed: Callable[[Block, int], list[str]]) -> str:
    """The text of a page with its quotes and its output as they are now; what cannot be renewed
    is said, and stays."""
    text = page.read_text(encoding="utf-8")
    for block in reversed(list(blocks(page))):
        code, varies = block.code, block.varies
        try:
            if block.kind == "from":
                code = quoted(block)
            elif block.language == "text":
                if block.kind is None and is_of_another_version(block, printed(block, 1)):
                    raise LookupError("of another version than this run")
                lines, again = (as_printed(code.splitlines(), printed(block, n)) for n in (1, 2))
                pairs = enumerate(zip(lines, again, strict=True), 1)
                varies |= {n for n, (one, other) in pairs if squeezed(one) != squeezed(other)}
                code = "\n".join(lines) + "\n"
        except (LookupError, NotPrinted, subprocess.SubprocessError) as error:
            print(f"{block}: {type(error).__name__}: {error}")
        note = f"<!-- varies: {' '.join(map(str, sorted(varies)))} -->\n" if varies else ""
        text = text[: block.span[0]] + code + text[block.span[1] :]
        text = text[: block.note[0]] + note + text[block.note[1] :]
        for number in sorted(numbers(block.code) - numbers(code)):
            say_where_named(number, block)
    return text


def numbers(text: str) -> set[str]:
    """Those long enough to be known again."""
    return {found for found in re.findall(r"\d[\d.,]*\d", text) if len(found) > 2}


def say_where_named(number: str, block: Block) -> None:
    """In the prose of its page, and of all where nothing else will have that number."""
    for page in PAGES if len(number) > 4 else (block.page,):
        for line in BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines():
            if number in numbers(line):
                print(f"{block} no longer has {number}; {page.name}: {line[:150]}")


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        printed = recorder(Path(home))
        for page in PAGES:
            page.write_text(renewed(page, printed), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What mkdocs.yml cannot say: the site has the repository's layout, and its files as pages.

Every page keeps its path (docs/servers.md becomes docs/servers.html), so relative links hold as in
the repository. What a page links to comes along: a script, or another file of text, becomes a page
of its source, cut at the script's banners; a directory becomes a list of its files. A guide, its
script and the script's exercises are neighbours in the navigation.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("0?_*.py"))
START = {"Start": "README.md", "Map": "docs/INDEX.md"}
ACROSS = {
    "Quick reference": "docs/QUICK_REFERENCE.md",
    "Comprehensive guide": "docs/COMPREHENSIVE_GUIDE.md",
    "Architecture": "docs/ARCHITECTURE_OVERVIEW.txt",
    "Servers": "docs/servers.md",
    "Benchmarks": "docs/BENCHMARKS.md",
    "How they are measured": "benchmarks/README.md",
}
BEHIND = {
    "Implementation": "docs/IMPLEMENTATION_SUMMARY.md",
    "Completion": "docs/COMPLETION_REPORT.md",
    "Contributing": "CONTRIBUTING.md",
    "Changelog": "CHANGELOG.md",
    "Licence": "LICENSE",
}
LANGUAGES = {
    ".json": "json", ".py": "python", ".sh": "sh", ".toml": "toml", ".yml": "yaml",
    "Makefile": "make",
}  # fmt: skip
MEDIA = {".gif", ".jpg", ".png", ".svg", ".webp"}
BANNER = re.compile(r"^# ── (.+?) ─+\n", re.MULTILINE)
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
BEFORE_LIST = re.compile(r"^(?![-*] |\d+\. |\s).+\n(?=[-*] |1\. )", re.MULTILINE)
FENCE = "~" * 8  # no source has it
LINK = re.compile(r"\]\(([^)\s#]+)")  # its path; none where it is an anchor alone


class Source(File):
    """A page of what is no Markdown. Links name it as they name the file."""

    def is_documentation_page(self) -> bool:
        return True


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.theme.static_templates.discard("404.html")  # its links begin at the root of a server
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # as GitHub's
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the navigation, and all that they link to, directly or not."""
    config.nav = navigation()
    waiting = list(paths_of(config.nav))
    while waiting:
        uri = waiting.pop()
        if uri in files:
            continue
        files.append(file_of(uri, config))
        waiting += linked_from(uri)
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Search finds the sources that the navigation has, no tests; first of all, documents."""
    for file in files:
        if isinstance(file, Source):
            search = "boost: 0.5" if file.page in nav.pages else "exclude: true"
            file.content_string = f"---\nsearch: {{{search}}}\n---\n{file.content_string}"
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A list may follow its paragraph at once, as in CommonMark; mkdocs wants an empty line."""
    if isinstance(page.file, Source):
        return markdown
    prose_and_code = CODE.split(markdown)
    prose_and_code[::2] = [BEFORE_LIST.sub(r"\g<0>\n", prose) for prose in prose_and_code[::2]]
    return "".join(prose_and_code)


# ── Navigation ──────────────────────────────────────────────────────────────────────


def navigation() -> list[dict[str, object]]:
    """As `nav` of mkdocs.yml; a document that has no place in it follows at the end."""
    behind = BEHIND | {path.stem: f"docs/{path.name}" for path in rest_of_docs()}
    return [
        *existing(START),
        *({spoken(script): beside(script)} for script in SCRIPTS),
        {"Across the scripts": existing(ACROSS)},
        {"Behind them": existing(behind)},
    ]


def beside(script: Path) -> list[dict[str, str]]:
    number = script.name[:2]
    exercises = sorted(ROOT.glob(f"exercises/{number}?_*.py"))
    return existing(
        {f"Guide {number}": guide_of(script.read_text("utf-8")), f"Script {number}": script.name}
        | {f"Exercise {spoken(path)}": f"exercises/{path.name}" for path in exercises}
    )


def spoken(path: Path) -> str:
    return path.stem.replace("_", " ")


def guide_of(source: str) -> str:
    """As the docstring of a script names it; else nothing."""
    named = re.search(r"^Guide: (\S+)$", source, re.MULTILINE)
    return named[1] if named else ""


def rest_of_docs() -> list[Path]:
    guides = [guide_of(script.read_text("utf-8")) for script in SCRIPTS]
    placed = {*START.values(), *ACROSS.values(), *BEHIND.values(), *guides}
    return [path for path in sorted(ROOT.glob("docs/*.md")) if f"docs/{path.name}" not in placed]


def existing(entries: dict[str, str]) -> list[dict[str, str]]:
    return [{title: uri} for title, uri in entries.items() if uri and (ROOT / uri).is_file()]


def paths_of(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        yield from paths_of(list(entries.values()))
    elif isinstance(entries, list):
        for entry in entries:
            yield from paths_of(entry)


# ── Files ───────────────────────────────────────────────────────────────────────────


def file_of(uri: str, config: MkDocsConfig) -> File:
    """Not in the navigation unless that names it, which is no matter for a warning."""
    path = PurePosixPath(uri)
    if path.suffix == ".md" or path.suffix in MEDIA:
        return File(
            uri, str(ROOT), config.site_dir, config.use_directory_urls,
            inclusion=InclusionLevel.NOT_IN_NAV,
        )  # fmt: skip
    text = list_of_files(uri) if (ROOT / uri).is_dir() else source_of(uri)
    file = Source.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
    file.dest_uri = f"{uri.lstrip('.')}.html"  # where a directory and a file have one name
    return file


def linked_from(uri: str) -> list[str]:
    """The files that a page of Markdown links to, and those of a directory. A link to what is not
    there stays a link, of which mkdocs warns."""
    if (ROOT / uri).is_dir():
        return [f"{uri}/{path.name}" for path in files_in(uri)]
    if not uri.endswith(".md"):
        return []
    prose = CODE.sub("", (ROOT / uri).read_text("utf-8"))
    paths = (path for path in LINK.findall(prose) if not re.match(r"\w+:", path))
    uris = (posixpath.normpath(posixpath.join(posixpath.dirname(uri), path)) for path in paths)
    return [uri for uri in uris if not uri.startswith("..") and (ROOT / uri).exists()]


def files_in(uri: str) -> list[Path]:
    inside = sorted((ROOT / uri).iterdir())
    return [path for path in inside if path.is_file() and not path.name.startswith(".")]


def list_of_files(uri: str) -> str:
    directory = posixpath.basename(uri)
    return f"# {uri}\n\n" + "".join(
        f"- [`{path.name}`]({directory}/{path.name})\n" for path in files_in(uri)
    )


def source_of(uri: str) -> str:
    """A file as Markdown: a block of code, or one a banner, the banners being the headings."""
    path, text = PurePosixPath(uri), (ROOT / uri).read_text("utf-8")
    language = LANGUAGES.get(path.suffix or path.name, "text")
    page = [f"# {uri}\n"]
    if guide := guide_of(text):
        page.append(f"[Guide]({posixpath.relpath(guide, posixpath.dirname(uri) or '.')})\n")
    first, title = 0, ""
    for banner in [*BANNER.finditer(text), None]:
        end = banner.start() if banner else len(text)
        page.append(block(title, language, text[first:end], text.count("\n", 0, first) + 1))
        if banner:
            first, title = end, banner[1]
    return "\n".join(page)


def block(title: str, language: str, code: str, line: int) -> str:
    head = f"## {title}\n\n" if title else ""
    return f'{head}{FENCE} {language} linenums="{line}"\n{code.rstrip()}\n{FENCE}\n'

"""What the five scripts share: settings, logging, output, and the runner of their demos.

    raise SystemExit(run_script(__doc__, DEMOS, open_resources, argv))

Importing it does nothing. Only this module and the `demo_*` functions print.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import json
import logging
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress

import urls

logger = logging.getLogger(__name__)

TRACEBACK_HINT = "\n(LOG_LEVEL=DEBUG shows the traceback)"
WIDTH = 88  # columns: fits a split editor and a projector
SCHEMES = {  # variable → the URL schemes that this module's drivers speak
    "DATABASE_URL": ("postgresql+psycopg2",),
    "MONGODB_URI": ("mongodb", "mongodb+srv"),
    "REDIS_URL": ("redis", "rediss", "unix"),
    "RABBITMQ_URL": ("amqp", "amqps"),
}

# ── Settings ────────────────────────────────────────────────────────────────────────


class ConfigError(Exception):
    """A setting, or what a server answered to it, is wrong: the script exits with 2."""


class ServiceUnavailable(Exception):
    """Nothing answers for a service: the script goes on with its offline tier."""

    def __init__(self, service: str, reason: str, url: str | None = None) -> None:
        where = f" at {redact(url)}" if url else ""
        start = "To start one: docker compose up -d --wait, or python servers.py run -- CMD"
        super().__init__(f"{service}{where} is unavailable: {reason}.\n{start}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The environment, checked. A URL that is None was not configured."""

    database_url: str | None = None
    mongodb_uri: str | None = None
    redis_url: str | None = None
    rabbitmq_url: str | None = None
    log_level: str = "WARNING"
    log_format: str = "text"
    connect_timeout_s: float = 2.0  # a server on the same continent answers in 0.5 s


def load_settings(
    environ: Mapping[str, str] | None = None, dotenv_path: str | None = ".env"
) -> Settings:
    """Read `environ` (default: `os.environ`) and, for what it does not set, the file
    `dotenv_path`. A variable set to the empty string counts as not configured.

    Raises ConfigError, which names the variable and never shows its secret.
    """
    file = _read_dotenv(dotenv_path) if dotenv_path else {}
    values = {**file, **(os.environ if environ is None else environ)}
    checked = {name.lower(): _checked_url(name, values.get(name)) for name in SCHEMES}
    level = (values.get("LOG_LEVEL") or Settings.log_level).upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigError(f"LOG_LEVEL: {level!r} is none of DEBUG INFO WARNING ERROR CRITICAL")
    log_format = (values.get("LOG_FORMAT") or Settings.log_format).lower()
    if log_format not in ("text", "json"):
        raise ConfigError(f"LOG_FORMAT: {log_format!r} is neither text nor json")
    timeout = values.get("CONNECT_TIMEOUT_S") or str(Settings.connect_timeout_s)
    if not re.fullmatch(r"\d+(\.\d+)?", timeout) or not 0 < float(timeout) <= 60:
        raise ConfigError(f"CONNECT_TIMEOUT_S: {timeout!r} is no number of seconds up to 60")
    return Settings(
        **checked, log_level=level, log_format=log_format, connect_timeout_s=float(timeout)
    )


def _read_dotenv(path: str) -> dict[str, str | None]:
    try:
        text = Path(path).read_text("utf-8-sig", "replace")  # Windows may put a mark first
    except FileNotFoundError:
        return {}
    for binding in parse_stream(io.StringIO(text)):
        is_utf8 = "\ufffd" not in binding.original.string  # what "replace" puts
        if binding.error or not is_utf8:
            problem = "not NAME=value; is a quote left open?" if is_utf8 else "not UTF-8"
            line = binding.original.line + binding.original.string.rstrip().count("\n")
            raise ConfigError(f"{path}, line {line}: {problem}")
    return dotenv_values(stream=io.StringIO(text))


def _checked_url(variable: str, url: str | None) -> str | None:
    try:
        return urls.checked(url, SCHEMES[variable]) if url else None
    except ValueError as error:
        raise ConfigError(f"{variable}: {error}") from None


def redact(text: str) -> str:
    """`text` with the secrets of its URLs replaced by `***`, also of malformed ones.

    A URL ends at white space, and its password at the last `@`: one that should have been
    percent-encoded may hold `@`, `/` or `?`. Rather too much than part of a secret.
    """
    text = re.sub(r"(?is)(ssl_options=)((\{|%7B).*(\}|%7D)|[^&\s]*)", r"\1***", text)
    text = re.sub(
        r"(?i)((?:password|passwd|pwd)=|session_token:)(?:[^&\s]*(@))?[^&\s]*", r"\1***\2", text
    )
    text = re.sub(r"((?:rediss?|unix)://)[^:\s]*@", r"\1***@", text)  # its colon was forgotten
    return re.sub(r"(?<=//)([^:\s]*):\S*@", r"\1:***@", text)


def require_reachable(service: str, url: str, timeout_s: float) -> None:
    """Raise ServiceUnavailable unless a server of `url` accepts a connection in `timeout_s`."""
    if reason := urls.unreachable(url, timeout_s):
        raise ServiceUnavailable(service, reason, url)


# ── Logging ─────────────────────────────────────────────────────────────────────────

# At DEBUG they write each command in clear, and ten times what the scripts say.
DRIVERS = ("asyncio", "motor", "pika", "psycopg2", "pymongo", "redis", "urllib3")
_STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        time_utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{time_utc}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: v for key, v in vars(record).items() if key not in _STANDARD_FIELDS}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure_logging(settings: Settings) -> None:
    """Send every logger's records to stderr, as text through rich or as JSON lines."""
    handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s", datefmt="%X"))
    if settings.log_format == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for driver in DRIVERS:
        logging.getLogger(driver).setLevel(max(logging.INFO, logging.getLogger().level))


def _last_words(text: str) -> None:
    """On stderr, as JSON where the log is."""
    if isinstance(logging.getLogger().handlers[0].formatter, JsonFormatter):
        logger.critical("%s", text)
    else:
        print(text, file=sys.stderr)


# ── Output ──────────────────────────────────────────────────────────────────────────

console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def fact(label: str, value: object) -> None:
    """One line of evidence; the values are aligned, long ones wrapped."""
    console.print(_wrap(str(value), f"  {label + ':':<26} ", " " * 29))


def _wrap(text: str, first: str, others: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Evidence as one table; numbers (and dashes for none) are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    for i, line in enumerate([list(columns), *lines]):
        cells = [
            cell.rjust(width) if all(re.match(r"[-+~]?\d|-$", row[j]) for row in lines)
            else cell.ljust(width)
            for j, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]  # fmt: skip
        console.print(("  " + "  ".join(cells)).rstrip(), style=None if i else "bold")


def listing(text: str) -> None:
    """Code as evidence: SQL, a plan, a document."""
    for line in text.strip().splitlines():
        console.print(_wrap(line.strip(), "    ", "      "))


def note(text: str) -> None:
    """What this engine lacks, or what was simulated."""
    console.print(f"  note: {text}")


def conclude(text: str) -> None:
    """Close a demo with what its evidence says."""
    console.print(f"→ {text}")


def progress() -> Progress:
    """A progress bar on stderr, for `with`; silent where that is no terminal."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


# ── The demo runner ─────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asked for, and which server (or stand-in) each service has."""

    settings: Settings
    offline: bool
    require_services: bool
    scale: int
    services: dict[str, str] = dataclasses.field(default_factory=dict)

    def url(self, service: str, variable: str) -> str:
        """The configured URL; raises ServiceUnavailable where there is none to use."""
        url: str | None = getattr(self.settings, variable.lower())
        if self.offline or not url:
            reason = "--offline was given" if self.offline else f"{variable} is not set"
            raise ServiceUnavailable(service, reason)
        return url

    def fall_back(self, service: str, error: ServiceUnavailable, stand_in: str) -> None:
        """Say that `service` is missing and what stands in; ConfigError where it is required."""
        if self.require_services:
            raise ConfigError(f"--require-services: {error}") from error
        self.services[service] = stand_in
        console.print(str(error))


def run_script(
    doc: str,
    demos: Sequence[Callable[..., object]],
    open_resources: Callable[[Run], AbstractContextManager[Mapping[str, object]]],
    argv: Sequence[str] | None = None,
    *,
    scale: int = 1,
    scale_unit: str = "times the data",
) -> int:
    """Run the demos that the command line asks for; returns the exit code of DESIGN.md.

    `open_resources(run)` yields a mapping; each demo gets those values that its parameters name.
    """
    by_name = {demo.__name__.removeprefix("demo_"): demo for demo in demos}
    args = _parser(doc, list(by_name), scale, scale_unit).parse_args(argv)
    if args.list:
        for name, demo in by_name.items():
            console.print(f"{name:<16} {_label(demo)[0]}")
        return 0
    chosen = {name: demo for name, demo in by_name.items() if name in (args.only or by_name)}
    console.quiet = args.json
    # SIGTERM cleans up as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    configure_logging(Settings(log_format=os.environ.get("LOG_FORMAT", "").lower()))  # until .env
    try:
        settings = load_settings()
        configure_logging(settings)
        run = Run(settings, args.offline, args.require_services, args.scale)
        started = time.perf_counter()
        with open_resources(run) as resources:
            console.print("On " + ", ".join(run.services.values()))
            results = {name: _run_demo(demo, resources) for name, demo in chosen.items()}
        elapsed_s = time.perf_counter() - started
    except ConfigError as error:
        _last_words(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _last_words("interrupted")
        return 130
    except Exception as error:  # of open_resources: a server that dies while data are loaded
        logger.debug("resources failed", exc_info=True)
        hint = "" if logger.isEnabledFor(logging.DEBUG) else TRACEBACK_HINT
        _last_words(f"error: {_reason(error)}{hint}")
        return 1
    finally:
        console.quiet = False
        signal.signal(signal.SIGTERM, previous)
    failed = [name for name, result in results.items() if "error" in result]
    if args.json:
        report = {"services": run.services, "elapsed_s": round(elapsed_s, 3), "demos": results}
        console.print(json.dumps(report, default=_jsonable, indent=2, ensure_ascii=False))
    else:
        outcome = f"failed: {', '.join(failed)}" if failed else "none failed"
        console.print(f"\nDemos: {len(results)} in {elapsed_s:.1f} s; {outcome}.")
    return 1 if failed else 0


def _parser(doc: str, names: list[str], scale: int, unit: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="list the demos and stop")
    add("--only", action="append", choices=names, metavar="NAME", help="a demo (repeatable)")
    add("--scale", type=_positive, default=scale, metavar="N", help=f"{unit} (default {scale})")
    add("--json", action="store_true", help="print the results as JSON and nothing else")
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument("--offline", action="store_true", help="use no server")
    servers.add_argument(
        "--require-services", action="store_true", help="exit with 2 where a server is missing"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _label(demo: Callable[..., object]) -> tuple[str, str]:
    """The first line of a demo's docstring, and its paragraph that begins with `Prediction:`."""
    paragraphs = (inspect.getdoc(demo) or demo.__name__).split("\n\n")
    prediction = [p for p in paragraphs if p.startswith("Prediction:")]
    return paragraphs[0].rstrip("."), "".join(prediction)


def _run_demo(demo: Callable[..., object], resources: Mapping[str, object]) -> dict[str, object]:
    title, prediction = _label(demo)
    console.print(f"\n── {title} ".ljust(WIDTH + 1, "─"), style="bold")
    if prediction:
        console.print(prediction, style="italic")
    wanted = {name: resources[name] for name in inspect.signature(demo).parameters}
    try:
        return {"result": demo(**wanted)}
    except Exception as error:  # one failing demo must not take the others with it
        logger.debug("%s failed", demo.__name__, exc_info=True)
        hint = "" if logger.isEnabledFor(logging.DEBUG) else TRACEBACK_HINT
        console.print(f"failed: {_reason(error)}{hint}")
        return {"error": _reason(error)}


def _reason(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}")


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return str(value)  # Decimal, datetime, UUID

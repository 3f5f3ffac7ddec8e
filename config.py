"""What the five scripts share: settings, logging, output, and the runner of their demos.

    raise SystemExit(run_script(__doc__, DEMOS, open_resources, argv))

Importing it does nothing. Only this module and the `demo_*` functions print."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from textwrap import fill
from urllib.parse import unquote_plus

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pythonjsonlogger.json import JsonEncoder, JsonFormatter
from rich.console import Console
from rich.progress import Progress

logger = logging.getLogger(__name__)
WIDTH = 88  # columns: fits a split editor and a projector
Arguments = Sequence[str] | None  # of the command line; None for sys.argv's
Addresses = Sequence[tuple[str, int | None]]  # host and port, or path of a Unix socket and None
SCHEMES = {  # variable → the URL schemes that this module's drivers speak
    "DATABASE_URL": ("postgresql+psycopg2",),
    "MONGODB_URI": ("mongodb", "mongodb+srv"),
    "REDIS_URL": ("redis", "rediss", "unix"),
    "RABBITMQ_URL": ("amqp", "amqps"),
}

# ── Settings and URLs ────────────────────────────────────────────────────────────────


class ConfigError(Exception):
    """A setting, or what a server answered to it, is wrong: the script exits with 2."""


class ServiceUnavailable(Exception):
    """Nothing answers for a service: the script goes on with its offline tier."""

    def __init__(self, service: str, reason: str, url: str | None = None) -> None:
        service += f" at {redact(url)}" if url else ""
        start = "docker compose up -d --wait, or .venv/bin/python servers.py run -- CMD"
        super().__init__(f"{service} is unavailable: {reason}.\nTo start one: {start}")


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


def load_settings(environ: Mapping[str, str] | None = None, path: str | None = ".env") -> Settings:
    """Read `environ`, or else `os.environ`, and for what it does not set the file at `path`. An
    empty variable is not configured. A ConfigError names the variable, and shows no secret."""
    given = os.environ if environ is None else environ
    values = {**_read_dotenv(path or os.devnull), **given}
    urls = {name.lower(): _checked_url(name, url) for name in SCHEMES if (url := values.get(name))}
    level = (values.get("LOG_LEVEL") or Settings.log_level).upper()
    form = (values.get("LOG_FORMAT") or Settings.log_format).lower()
    timeout = values.get("CONNECT_TIMEOUT_S") or str(Settings.connect_timeout_s)
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigError(f"LOG_LEVEL: {level!r} is none of DEBUG INFO WARNING ERROR CRITICAL")
    if form not in ("text", "json"):
        raise ConfigError(f"LOG_FORMAT: {form!r} is neither text nor json")
    if not re.fullmatch(r"\d+(\.\d+)?", timeout) or not 0 < float(timeout) <= 60:
        raise ConfigError(f"CONNECT_TIMEOUT_S: {timeout!r} is no number of seconds up to 60")
    return Settings(**urls, log_level=level, log_format=form, connect_timeout_s=float(timeout))


def _read_dotenv(path: str) -> dict[str, str | None]:
    try:
        text = Path(path).read_text("utf-8-sig")  # Windows may put a mark first
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8") from None
    except OSError as error:  # a directory, or somebody else's
        raise ConfigError(f"{path}: {error.strerror}") from None
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or "\0" in binding.original.string:  # UTF-16 without its mark
            line = binding.original.line + binding.original.string.rstrip().count("\n")
            raise ConfigError(f"{path}, line {line}: not NAME=value; is a quote left open?")
    return dotenv_values(stream=io.StringIO(text))


HOST = r"^[\w+]+://(?:[^@/?]*@)?+(?:[^/?]*,)?"  # what is before one; ?+ never gives the login back
PORT = r"0*([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"  # 1 to 65535
# A raw / ? or # in a password ends the host for a parser, and what is before it may look like one.
ENCODED = r"[\w+]+://([^@/?#\s]*@)?([^@/?#\s]*(/[^@?#\s]*)?|/[^?\s]*)(\?([^@]*|\w+=.*))?$"
LIST = "?host=h1:5432&host=h2:5432&target_session_attrs=read-write"
FLAWS = (  # what a driver would not read, or read otherwise; said without a word of the login
    (rf"^(?!{ENCODED})", "is a special character, of its password perhaps, not percent-encoded?"),
    (rf"^(?=postgres){HOST}[^/?]*:[^/?]*,", f"it names several hosts: SQLAlchemy wants {LIST}"),
    (rf"^(?!mongodb:|post){HOST}[^/?]*,", "it names several hosts, and its driver takes one"),
    (rf"{HOST}([^][/?,:]*:[^][/?,]*:|\[[^]]*$)", "an IPv6 address belongs in brackets, as [::1]"),
    (rf"{HOST}(\[.*\])?[^][/?]*:(?!{PORT}([,/?]|$))", "its port is no number from 1 to 65535"),
    (r"^amqps?://[^/?]*/([^/?]*)/", "asks for virtual host '{}'; write %2F for the default one"),
)
# sslrootcert= tlsCAFile= ssl_certfile= …, or 'cafile': in ssl_options
FILE_OPTION = r"(?i)(?:certs?|key|crl|ca_?path|(?:ca|cert|key)file)(?:=|['\"]: *['\"])([^&'\"]+)"


def _checked_url(variable: str, url: str) -> str:  # its options are for its driver to judge
    # SQLAlchemy 2.1 would read both short forms as psycopg 3, which is not installed.
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url.strip())
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES[variable] or not rest:
        raise ConfigError(f"{variable}: expected {'://… or '.join(SCHEMES[variable])}://…")
    for pattern, flaw in FLAWS:
        if found := re.search(pattern, url, re.DOTALL):
            raise ConfigError(f"{variable}: malformed URL; {flaw.format(*found.groups())}")
    for file in re.findall(FILE_OPTION, unquote_plus(url.partition("?")[2])):
        if file != "system" and not os.access(file, os.R_OK):  # to libpq, system is no file
            raise ConfigError(f"{variable}: cannot read {file}, a file that the URL names")
    # libpq's form of a Unix socket, which SQLAlchemy would take for the name of a host.
    url = re.sub(r"(?i)^(postgr.*(?://|@))(%2F[^:/?]*)([^?]*)\??", r"\1\3?host=\2&", url)
    return url.rstrip("&")


def redact(text: str) -> str:
    """`text` with the secrets of its URLs replaced by `***`, rather too much than too little. A URL
    ends at white space, and its password at the last `@`, since it may not be percent-encoded."""
    text = re.sub(r"(?is)(ssl_options=)((\{|%7B).*(\}|%7D)|[^&\s]*)", r"\1***", text)
    text = re.sub(r"(?i)((?:pass\w+|pwd)=|session_token:)(?:[^&\s]*(@))?[^&\s]*", r"\1***\2", text)
    text = re.sub(r"((?:rediss?|unix)://)[^:\s]*@", r"\1***@", text)  # its colon was forgotten
    return re.sub(r"(?<=//)([^:\s]*):\S*@", r"\1:***@", text)


def require_reachable(service: str, url: str, addresses: Addresses, timeout_s: float) -> None:
    """Raise ServiceUnavailable unless one of `addresses`, where the driver will look for the server
    of `url`, accepts a connection within `timeout_s`. Without any, only the driver can know."""
    outcomes: list[str] = []  # reasons; an empty one where somebody is there

    def probe() -> None:
        for host, port in addresses:
            try:
                if port is None:
                    with socket.socket(socket.AF_UNIX) as client:
                        client.connect(host)
                else:
                    socket.create_connection((host, port), timeout_s / len(addresses)).close()
                reason = ""
            except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS can express
                is_there = isinstance(error, PermissionError)  # the driver will say more
                reason = "" if is_there else getattr(error, "strerror", None) or str(error)
            outcomes.append(reason)

    thread = threading.Thread(target=probe, daemon=True)  # resolving a name knows no timeout
    thread.start()
    thread.join(timeout_s)
    if addresses and "" not in outcomes:
        reason = ", ".join(dict.fromkeys(outcomes)) or f"no answer within {timeout_s:g} s"
        raise ServiceUnavailable(service, reason, url)


# ── Logging and output ──────────────────────────────────────────────────────────────

# At DEBUG they write each command in clear, and ten times what the scripts say.
DRIVERS = ("asyncio", "motor", "pika", "psycopg2", "pymongo", "redis", "urllib3")


def configure_logging(settings: Settings) -> None:
    """Send every logger's records to stderr, as text or as JSON lines."""
    form = logging.Formatter("%(asctime)s %(levelname)-8s %(name)s: %(message)s", datefmt="%X")
    if settings.log_format == "json":
        fields = ("levelname", "name", "message")
        names = {"levelname": "level", "name": "logger", "exc_info": "exception"}
        form = JsonFormatter(fields, timestamp="time", rename_fields=names, json_ensure_ascii=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for driver in DRIVERS:
        logging.getLogger(driver).setLevel(max(logging.INFO, logging.getLogger().level))


def _last_words(text: str, exit_code: int) -> int:
    if isinstance(logging.getLogger().handlers[0].formatter, JsonFormatter):  # all of stderr is
        logger.critical("%s", text)
    else:
        print(text, file=sys.stderr)
    return exit_code


console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
_wrap = partial(fill, width=WIDTH)


def fact(label: str, value: object) -> None:
    """One line of evidence; the values are aligned, long ones wrapped."""
    first = f"  {label + ':':26} "
    console.print(_wrap(str(value), initial_indent=first, subsequent_indent=" " * 29))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Evidence as one table; numbers (and dashes for none) are aligned to the right."""
    aligned = []
    for column in zip(columns, *rows, strict=True):
        cells = [str(cell) for cell in column]
        is_numeric = all(re.match(r"[-+~]?\d|-$", cell) for cell in cells[1:])
        width = max(map(len, cells))
        aligned.append([cell.rjust(width) if is_numeric else cell.ljust(width) for cell in cells])
    for i, line in enumerate(zip(*aligned, strict=True)):
        console.print(("  " + "  ".join(line)).rstrip(), style=None if i else "bold")


def listing(text: str) -> None:
    """Code as evidence: SQL, a plan, a document."""
    for line in text.strip().splitlines():
        console.print(_wrap(line.strip(), initial_indent=" " * 4, subsequent_indent=" " * 6))


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
        url: str | None = None if self.offline else getattr(self.settings, variable.lower())
        if not url:
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
    argv: Arguments = None,
    *,
    scale: int = 1,
    scale_unit: str = "times the data",
) -> int:
    """Run the demos that the command line asks for; returns the exit code of DESIGN.md.

    `open_resources(run)` yields a mapping; each demo gets those values that its parameters name.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every encoding has a rule or an arrow
    by_name = {demo.__name__.removeprefix("demo_"): demo for demo in demos}
    args = _parsed(argv, doc, list(by_name), scale, scale_unit)
    if args.list:
        for name, demo in by_name.items():
            console.print(f"{name:<16} {_paragraphs(demo)[0].rstrip('.')}")
        return 0
    chosen = {name: demo for name, demo in by_name.items() if name in (args.only or by_name)}
    console.quiet = args.json
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C
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
        return _last_words(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _last_words("interrupted", 130)
    except Exception as error:  # of open_resources: a server that dies while data are loaded
        return _last_words(f"error: {_failure(error)}", 1)
    finally:
        console.quiet = False
        signal.signal(signal.SIGTERM, previous)
    failed = [name for name, result in results.items() if "error" in result]
    if args.json:
        report = {"services": run.services, "elapsed_s": round(elapsed_s, 3), "demos": results}
        console.print(json.dumps(report, cls=JsonEncoder, indent=2, ensure_ascii=False))
    else:
        outcome = f"failed: {', '.join(failed)}" if failed else "none failed"
        console.print(f"\nDemos: {len(results)} in {elapsed_s:.1f} s; {outcome}.")
    return 1 if failed else 0


def _parsed(argv: Arguments, doc: str, names: list[str], scale: int, unit: str) -> Namespace:
    raw = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="list the demos and stop")
    add("--only", action="append", choices=names, metavar="NAME", help="a demo (repeatable)")
    add("--scale", type=int, default=scale, metavar="N", help=f"{unit} (default {scale})")
    add("--json", action="store_true", help="print the results as JSON and nothing else")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--offline", action="store_true", help="use no server")
    add("--require-services", action="store_true", help="exit with 2 where a server is missing")
    args = parser.parse_args(argv)
    if args.scale < 1:
        parser.error(f"argument --scale: {args.scale} is no whole number above 0")
    return args


def _paragraphs(demo: Callable[..., object]) -> list[str]:
    return (inspect.getdoc(demo) or demo.__name__).split("\n\n")


def _run_demo(demo: Callable[..., object], resources: Mapping[str, object]) -> dict[str, object]:
    title, *others = _paragraphs(demo)
    console.print(f"\n── {title.rstrip('.')} ".ljust(WIDTH + 1, "─"), style="bold")
    for prediction in (text for text in others if text.startswith("Prediction:")):
        console.print(prediction, style="italic")
    wanted = {name: resources[name] for name in inspect.signature(demo).parameters}
    try:
        return {"result": demo(**wanted)}
    except Exception as error:  # one failing demo must not take the others with it
        failure = _failure(error)
        console.print(f"failed: {failure}")
        return {"error": failure}


def _failure(error: Exception) -> str:
    """What went wrong, without secrets; its traceback goes to the log, or else a hint follows."""
    logger.debug("failed", exc_info=error)
    hint = "" if logger.isEnabledFor(logging.DEBUG) else "\n(LOG_LEVEL=DEBUG shows the traceback)"
    return redact(f"{type(error).__name__}: {error}") + hint

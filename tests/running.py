"""The scripts, run as a user runs them: an exit code, two streams, and what is left behind.

`Run` starts a process, `Main` calls `main` in this one: for what ends with the first look at a
server, and takes longer to start than to run. Either gets an empty directory to work in, a TMPDIR
of its own that must be empty afterwards, and an environment in which no server is configured but
those that the test names. `SCRIPTS` says what differs from script to script.

PYTEST_DONT_REWRITE: tests import its helpers before pytest could rewrite its assertions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psutil
import pytest
import sqlalchemy
from services import ROOT, is_required, load_script, mongo_client, postgres_engine, redis_client

import config

END_TIMEOUT_S = 120.0  # a whole run takes 10 to 30 s; four at once on a busy machine, longer
WAIT_S = 60.0  # for what takes a second or two
PATIENT = {"CONNECT_TIMEOUT_S": "6"}  # by which a server on a busy machine is not away
SECRET = "s3cr3t-horse"
# May be wrapped.
START = "To start one: docker compose up -d --wait, or .venv/bin/python servers.py run"
SETTINGS = (*config.SCHEMES, "LOG_LEVEL", "LOG_FORMAT", "CONNECT_TIMEOUT_S")

Ended = subprocess.CompletedProcess[str]


# ── What differs from script to script ──────────────────────────────────────────────


def schemas(url: str) -> set[str]:
    engine = postgres_engine(url)
    query = r"SELECT nspname FROM pg_namespace WHERE nspname LIKE 'module8\_%'"
    with engine.connect() as connection:
        return set(connection.scalars(sqlalchemy.text(query)))


def databases(uri: str) -> set[str]:
    with mongo_client(uri) as client:
        return {name for name in client.list_database_names() if name.startswith("module8_")}


def keys(url: str) -> set[str]:
    with redis_client(url) as client:
        return {key.decode() for key in client.scan_iter(match="module8-*", count=1000)}


def unlisted(_: str) -> set[str]:
    """AMQP cannot list queues; test_04_cli.py asks for each that a run has declared."""
    return set()


@dataclass(frozen=True)
class Service:
    name: str  # as a script says it
    variable: str
    fixture: str  # which gives the server's URL
    url: str  # of a server at {address}
    made: Callable[[str], set[str]]  # what runs have on the server of a URL at present

    def url_at(self, address: str) -> str:
        return self.url.format(address=address)


POSTGRES = Service(
    "PostgreSQL", "DATABASE_URL", "postgres_url",
    f"postgresql+psycopg2://app:{SECRET}@{{address}}/app", schemas,
)  # fmt: skip
MONGO = Service(
    "MongoDB", "MONGODB_URI", "mongo_uri", f"mongodb://app:{SECRET}@{{address}}/", databases
)
REDIS = Service("Redis", "REDIS_URL", "redis_url", f"redis://app:{SECRET}@{{address}}/0", keys)
RABBITMQ = Service(
    "RabbitMQ", "RABBITMQ_URL", "rabbitmq_url", f"amqp://app:{SECRET}@{{address}}/%2F", unlisted
)


@dataclass(frozen=True)
class Script:
    path: Path
    services: tuple[Service, ...]  # as it names those that are missing
    offline: str  # what it runs on instead, as it says it
    quick: tuple[str, str]  # two demos, in reading order
    few: str = "5"  # a small --scale
    patience: str = ""  # options of the first one's URL by which a busy machine is no outage


SCRIPTS = {
    "01": Script(
        ROOT / "01_sqlalchemy_advanced.py", (POSTGRES,), "SQLite ", ("repository", "security")
    ),
    "02": Script(
        ROOT / "02_mongodb_advanced.py", (MONGO,),
        "no MongoDB: what the client can do without one\n", ("validation", "client"),
    ),
    "03": Script(
        ROOT / "03_caching_strategies.py", (REDIS,),
        "no Redis: the in-process tier alone\n", ("ttl", "invalidation"),
        patience="timeout=10&socket_timeout=10&socket_connect_timeout=10",
    ),
    "04": Script(
        ROOT / "04_rabbitmq_messaging.py", (RABBITMQ, MONGO),
        "a broker in memory, SQLite in place of MongoDB\n", ("routing", "poison"),
    ),
    "05": Script(
        ROOT / "05_realworld_data_science.py", (POSTGRES, MONGO, REDIS, RABBITMQ),
        f"DuckDB {version('duckdb')}, no PostgreSQL, no MongoDB, no Redis, no RabbitMQ\n",
        ("dirty", "live"), few="50",
    ),
}  # fmt: skip


# ── In a process ────────────────────────────────────────────────────────────────────


def until(is_so: Callable[[], object], what: str = "it") -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def hears_ctrl_c() -> None:
    """As `preexec_fn`: a shell without job control starts its jobs deaf to Ctrl-C, and they pass
    that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Child:
    """A script in a process and a process group of its own, below `home`.

    With PAUSE_AT among its variables it stops itself when it has printed that text.
    """

    harmless: ClassVar[re.Pattern[str] | None] = None  # on stderr, and not the script's doing

    def __init__(
        self, script: Path, home: Path, args: tuple[str, ...], variables: Mapping[str, str]
    ) -> None:
        self.temporary = home / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self._pause_at = variables.get("PAUSE_AT", "")
        if self._pause_at:
            variables = {"PYTHONPATH": str(ROOT / "tests" / "pausing"), **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(script), *args],
            cwd=home,
            env={**kept, "TMPDIR": str(self.temporary), "PYTHONUTF8": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
            preexec_fn=hears_ctrl_c,
        )
        self._seen = self.stderr = ""  # what was read so far, and all of the other stream

    def until(self, text: str) -> None:
        """Read its output up to the line that holds `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._seen += line
            if text in line:
                return
        pytest.fail(f"ended without {text!r}: {self._seen}{self.ended().stderr}")

    def paused(self) -> None:
        """Wait until it has stopped itself."""
        self.until(self._pause_at)
        process = psutil.Process(self.process.pid)
        until(lambda: process.status() == psutil.STATUS_STOPPED, "the pause")

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ctrl_c(self) -> None:
        """As a terminal sends it: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def children(self) -> list[str]:
        """The command lines of its group, without its own and without what is dead already."""
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.process.pid != process.pid:
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(" ".join(process.cmdline()))
        return found

    def ended(self) -> Ended:
        """Wait for its end; it must leave no process, no temporary file, and show no traceback."""
        try:
            out, err = self.process.communicate(timeout=END_TIMEOUT_S)
        finally:
            self.process.kill()
        self.stderr = err
        until(lambda: self.children() == [], "its processes to end")
        assert list(self.temporary.iterdir()) == []
        shown = self.harmless.sub("", err) if self.harmless else err
        assert "Traceback" not in self._seen + out + shown or "DEBUG" in err, err
        return Ended(self.process.args, self.process.returncode, self._seen + out, shown)


class Run:
    """Run a script below `home`; keyword arguments are environment variables."""

    child: ClassVar[type[Child]] = Child

    def __init__(self, script: Path, home: Path) -> None:
        self.script, self.home = script, home

    def __call__(self, *args: str, **variables: str) -> Ended:
        return self.start(*args, **variables).ended()

    def start(self, *args: str, **variables: str) -> Child:
        return self.child(self.script, self.home, args, variables)


def at_once(*runs: Callable[[], Ended]) -> list[Ended]:
    with ThreadPoolExecutor(min(4, len(runs))) as threads:
        return [future.result() for future in [threads.submit(run) for run in runs]]


@dataclass(frozen=True)
class Whole:
    """A whole run, and what it left on its servers."""

    ended: Ended
    left: set[str]


def whole_run(script: Script, home: Path, *urls: str) -> Whole:
    """On the servers of `urls`, in the order of the script's services, or offline."""
    if not any(urls):
        return Whole(Run(script.path, home)(), set())
    servers = list(zip(script.services, urls, strict=True))

    def made() -> set[str]:
        return {name for service, url in servers for name in service.made(url)}

    before = made()
    variables = {service.variable: url for service, url in servers} | PATIENT
    if script.patience:
        mark = "&" if "?" in urls[0] else "?"
        variables[script.services[0].variable] += f"{mark}{script.patience}"
    ended = Run(script.path, home)(**variables)
    return Whole(ended, made() - before)


Recorded = Callable[[str, bool], Whole]  # number of a script, on its servers?


# ── In this process ─────────────────────────────────────────────────────────────────


@contextmanager
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    known = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    handlers, levels = list(root.handlers), {logger: logger.level for logger in (root, *known)}
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for logger, level in levels.items():
            logger.setLevel(level)


class Main:
    """Call a script's `main` below `home`; keyword arguments are environment variables."""

    def __init__(
        self, script: Path, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.home = home
        self._main = load_script(script.stem).main
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *args: str, **variables: str) -> Ended:
        temporary = self.home / "tmp"
        temporary.mkdir(exist_ok=True)
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch, logging_as_before():
            patch.chdir(self.home)
            patch.setattr(tempfile, "tempdir", str(temporary))
            for name in SETTINGS:
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            try:
                code = self._main(args)
            except SystemExit as stopped:  # by argparse
                code = stopped.code
        out, err = self._capsys.readouterr()
        assert list(temporary.iterdir()) == []
        assert "Traceback" not in out + err or "DEBUG" in err, err
        return Ended(args, code, out, err)


# ── What they say ───────────────────────────────────────────────────────────────────


def demos_of(ended: Ended) -> dict[str, dict[str, object]]:
    """The results on stdout, which must be JSON and nothing else."""
    demos: dict[str, dict[str, object]] = json.loads(ended.stdout)["demos"]
    return demos


def missing(reason: object) -> NoReturn:
    """A server that cannot be had: a failure where REQUIRE_SERVICES=1, else a skip."""
    report = pytest.fail if is_required() else pytest.skip
    report(str(reason))
    raise AssertionError  # either raised


def assert_offline(
    script: Script,
    ended: Ended,
    reason: str,
    shown: str = r"\S+://\w*:\*\*\*@",
    away: Service | None = None,
) -> None:
    """It said what is missing, `away` and all that is not set, why, and how to start it, and went
    on without."""
    away = away or script.services[0]
    assert (ended.returncode, ended.stderr) == (0, "")
    unavailable, offline, _ = ended.stdout.partition(f"\nOn {script.offline}")
    assert offline, ended.stdout
    lines = unavailable.splitlines()
    for service, said, start in zip(script.services, lines[::2], lines[1::2], strict=True):
        why = f"is unavailable: {service.variable} is not set"
        if service is away:
            why = f"at {shown}.* is unavailable: .*{reason}"
        assert re.match(f"{service.name} {why}", said), unavailable
        assert start.startswith(START)
    assert SECRET not in ended.stdout

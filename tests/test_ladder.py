"""The ladder's decisions, each seen from outside: pytest runs as a subprocess with this suite's
conftest.py, a Docker daemon and a servers.py that note who asks them, and an environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from urllib.parse import urlsplit

import pytest
import sqlalchemy
from running import Run, hears_ctrl_c
from services import ROOT, SERVICES, mongo_client, postgres_engine, redis_client

import config

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0  # a run of pytest; 2 s on an idle machine
STEERING = {"SERVICES_FROM", "REQUIRE_SERVICES", "PYTEST_ADDOPTS"}
STEERING |= {f"TEST_{variable}" for variable in config.SCHEMES}
FIXTURES = {
    "postgres": "postgres_url",
    "mongo": "mongo_uri",
    "redis": "redis_url",
    "rabbitmq": "rabbitmq_url",
}
# Nothing listens at port 1 of this machine; the password must not be told.
UNREACHABLE = {
    "DATABASE_URL": "postgresql+psycopg2://app:hunter2@127.0.0.1:1/app",
    "MONGODB_URI": "mongodb://app:hunter2@127.0.0.1:1/?directConnection=true",
    "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
    "RABBITMQ_URL": "amqp://app:hunter2@127.0.0.1:1/%2F",
}
# Stands in for servers.py: has a server only where LOCAL_URL is set, and notes start and stop.
LOCAL_SERVERS = """
import contextlib, os, types

class ServerUnavailable(Exception):
    def __init__(self, service, reason, remedy):
        self.reason, self.remedy = reason, remedy

def note(event):
    with open("local.txt", "a") as events:
        print(event, file=events)

@contextlib.contextmanager
def running(name):
    note(f"asked {name}")
    if "LOCAL_URL" not in os.environ:
        raise ServerUnavailable(name, "no program found", "install one")
    yield {name: types.SimpleNamespace(url=os.environ["LOCAL_URL"])}
    note(f"stopped {name}")
"""
USES_REDIS_TWICE = """
def test_one(redis_url): pass
def test_two(redis_url): pass
"""


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    output: str
    local: list[str]  # what servers.py was asked for, in order

    @property
    def summary(self) -> str:
        return next(line for line in self.output.splitlines() if line.startswith("services: "))


class Daemon(ThreadingUnixStreamServer):
    """A Docker daemon that answers, has no image and reaches no registry."""

    daemon_threads = True
    asked: list[str]  # the paths of the requests


class _Api(BaseHTTPRequestHandler):
    server: Daemon

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if "/version" in self.path:
            self._answer(200, {"ApiVersion": "1.41"})
        elif "/_ping" in self.path:
            self._answer(200, "OK")
        elif "/images/" in self.path:
            self._answer(404, {"message": "No such image"})
        else:
            self._answer(500, {"message": "through http://app:hunter2@proxy: no such host"})

    def _answer(self, status: int, body: object) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: stderr belongs to pytest."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(str(tmp_path / "docker.sock"), _Api) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(TIMEOUT_S)


Pytest = Callable[..., Outcome]


@pytest.fixture
def run_pytest(tmp_path: Path) -> Pytest:
    """Run pytest on a test file's text with `environment`; there is no Docker unless DOCKER_HOST
    says so, and no local server unless LOCAL_URL does."""
    (tmp_path / "servers.py").write_text(LOCAL_SERVERS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(tests: str, *options: str, **environment: str) -> Outcome:
        (tmp_path / "test_given.py").write_text(tests)
        inherited = {key: value for key, value in os.environ.items() if key not in STEERING}
        # -m puts the current directory, and so the servers.py there, before PYTHONPATH.
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
        finished = subprocess.run(
            [*command, "-ra", *options, "test_given.py"],
            cwd=tmp_path,
            env={
                **inherited,
                "DOCKER_HOST": f"unix://{tmp_path}/no.sock",
                "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
                "COLUMNS": "1000",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=TIMEOUT_S,
            check=False,
            preexec_fn=hears_ctrl_c,
        )
        noted = tmp_path / "local.txt"
        local = noted.read_text().splitlines() if noted.exists() else []
        return Outcome(finished.returncode, finished.stdout, local)

    return run


def uses(*names: str) -> str:
    return "".join(f"def test_{name}({FIXTURES[name]}): pass\n" for name in names)


# ── Without a server ────────────────────────────────────────────────────────────────


def test_without_any_server_tests_are_skipped_with_each_rungs_reason(run_pytest: Pytest) -> None:
    outcome = run_pytest(uses(*SERVICES))
    assert outcome.exit_code == 0
    assert "4 skipped" in outcome.output
    for name, service in SERVICES.items():
        reasons = next(line for line in outcome.output.splitlines() if f": {name}: " in line)
        assert f"TEST_{service.variable} is not set | docker: no daemon: " in reasons
        assert "| local: no program found; install one" in reasons
        assert f"{name}=absent (TEST_{service.variable} is not set | docker: " in outcome.summary


def test_required_services_fail_with_the_same_reasons(run_pytest: Pytest) -> None:
    outcome = run_pytest(uses(*SERVICES), REQUIRE_SERVICES="1")
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "4 errors" in outcome.output
    assert outcome.output.count("docker: no daemon: ") >= len(SERVICES)
    assert run_pytest(uses(*SERVICES), REQUIRE_SERVICES="0").exit_code == 0


def test_a_daemon_that_cannot_pull_counts_as_unavailable(
    run_pytest: Pytest, daemon: Daemon, tmp_path: Path
) -> None:
    outcome = run_pytest(uses(*SERVICES), DOCKER_HOST=f"unix://{tmp_path}/docker.sock")
    assert outcome.exit_code == 0
    for name, service in SERVICES.items():
        assert f"{name}=absent (TEST_{service.variable} is not set | docker: " in outcome.summary
        assert f"{service.image.name} cannot be pulled: " in outcome.summary
    assert "hunter2" not in outcome.output
    assert sum("/distribution/" in path for path in daemon.asked) == 1, (
        "one hanging look-up is enough"
    )


# ── With a local one ────────────────────────────────────────────────────────────────


def test_without_docker_a_local_server_serves_all_tests_and_is_stopped(run_pytest: Pytest) -> None:
    outcome = run_pytest(USES_REDIS_TWICE, LOCAL_URL="redis://127.0.0.1:1/0")
    assert "2 passed" in outcome.output
    assert outcome.summary == "services: postgres=unused mongo=unused redis=local rabbitmq=unused"
    assert outcome.local == ["asked redis", "stopped redis"]


def test_no_server_is_started_unless_a_test_asks(run_pytest: Pytest, daemon: Daemon) -> None:
    outcome = run_pytest(
        "def test_arithmetic(): assert 2 + 2 == 4",
        LOCAL_URL="redis://127.0.0.1:1/0",
        DOCKER_HOST=f"unix://{daemon.server_address}",
    )
    assert outcome.exit_code == 0
    assert outcome.local == daemon.asked == []


XDIST = ("-p", "xdist", "-n", "2")


@pytest.mark.parametrize(
    ("signum", "options"),
    [("SIGINT", ()), ("SIGTERM", ()), ("SIGTERM", XDIST)],
    ids=["SIGINT", "SIGTERM", "SIGTERM to a worker"],
)
def test_an_interrupted_run_stops_its_servers(
    run_pytest: Pytest, signum: str, options: tuple[str, ...]
) -> None:
    interrupted = f"""
import os, signal, time
def test_interrupted(redis_url):
    os.kill(os.getpid(), signal.{signum})
    time.sleep({TIMEOUT_S})
"""
    outcome = run_pytest(interrupted, *options, LOCAL_URL="redis://127.0.0.1:1/0")
    assert outcome.exit_code == pytest.ExitCode.INTERRUPTED
    assert outcome.local == ["asked redis", "stopped redis"]


def test_each_worker_starts_a_server_once_and_one_line_tells_of_all(run_pytest: Pytest) -> None:
    tests = "".join(f"def test_{n}(redis_url): pass\n" for n in range(8))
    outcome = run_pytest(tests + uses("mongo"), *XDIST, LOCAL_URL="redis://127.0.0.1:1/0")
    assert "9 passed" in outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith("services: ")]
    assert lines == ["services: postgres=unused mongo=local redis=local rabbitmq=unused"]
    assert sorted(outcome.local) == sorted(
        ["asked redis", "stopped redis"] * 2 + ["asked mongo", "stopped mongo"]
    )


def test_why_a_server_is_missing_is_told_once_for_all_workers(run_pytest: Pytest) -> None:
    outcome = run_pytest(uses("redis", "mongo"), *XDIST)
    assert "2 skipped" in outcome.output
    for name in ("redis", "mongo"):
        assert outcome.summary.count(f"{name}=absent (TEST_") == 1


# ── A source asked for by name ──────────────────────────────────────────────────────


@pytest.mark.parametrize(("services_from", "docker_is_asked"), [("", True), ("local", False)])
def test_services_from_local_asks_no_daemon(
    run_pytest: Pytest, daemon: Daemon, services_from: str, docker_is_asked: bool
) -> None:
    outcome = run_pytest(
        uses("redis"),
        SERVICES_FROM=services_from,
        LOCAL_URL="redis://127.0.0.1:1/0",
        DOCKER_HOST=f"unix://{daemon.server_address}",
    )
    assert "redis=local" in outcome.summary
    assert bool(daemon.asked) == docker_is_asked


@pytest.mark.parametrize("rung", ["docker", "local"])
def test_a_source_asked_for_by_name_and_missing_is_a_failure(run_pytest: Pytest, rung: str) -> None:
    outcome = run_pytest(uses("mongo"), SERVICES_FROM=rung)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert f"mongo=absent ({rung}: " in outcome.summary


def test_services_from_docker_starts_no_local_server(run_pytest: Pytest) -> None:
    outcome = run_pytest(uses("redis"), SERVICES_FROM="docker", LOCAL_URL="redis://127.0.0.1:1/0")
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert outcome.local == []


def test_an_unknown_source_ends_the_run(run_pytest: Pytest) -> None:
    outcome = run_pytest(uses("redis"), SERVICES_FROM="podman")
    assert outcome.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "SERVICES_FROM=podman: expected docker or local" in outcome.output


# ── An explicit server ──────────────────────────────────────────────────────────────


def test_an_explicit_server_that_does_not_answer_is_a_failure_and_no_other_is_tried(
    run_pytest: Pytest, daemon: Daemon
) -> None:
    outcome = run_pytest(
        uses(*SERVICES),
        **{f"TEST_{variable}": url for variable, url in UNREACHABLE.items()},
        LOCAL_URL="redis://127.0.0.1:1/0",
        DOCKER_HOST=f"unix://{daemon.server_address}",
    )
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "4 errors in" in outcome.output
    for name, service in SERVICES.items():
        url = config.redact(UNREACHABLE[service.variable])
        assert f"{name}=absent (TEST_{service.variable}: {url}: " in outcome.summary
    assert "hunter2" not in outcome.output
    assert outcome.local == daemon.asked == []


def test_a_malformed_explicit_url_is_a_failure(run_pytest: Pytest) -> None:
    outcome = run_pytest(
        uses("postgres", "redis", "rabbitmq"),
        TEST_DATABASE_URL="mysql://app:hunter2@127.0.0.1/app",
        TEST_REDIS_URL="127.0.0.1",
        TEST_RABBITMQ_URL="amqp://app:hunter2@127.0.0.1:port/",
        LOCAL_URL="redis://127.0.0.1:1/0",
    )
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "3 errors in" in outcome.output
    assert "hunter2" not in outcome.output
    assert outcome.local == []


def test_an_explicit_server_that_answers_is_used(run_pytest: Pytest, redis_url: str) -> None:
    outcome = run_pytest(uses("redis"), TEST_REDIS_URL=redis_url, SERVICES_FROM="docker")
    assert outcome.exit_code == 0
    assert "redis=explicit" in outcome.summary
    assert outcome.local == []


def test_a_wrong_password_is_a_failure(run_pytest: Pytest, redis_url: str) -> None:
    parts = urlsplit(redis_url)
    assert parts.password
    wrong = redis_url.replace(parts.password, "hunter2")
    outcome = run_pytest(uses("redis"), TEST_REDIS_URL=wrong)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "invalid username-password pair" in outcome.summary
    assert "hunter2" not in outcome.output


# ── The user's data ─────────────────────────────────────────────────────────────────

SEES_NO_SERVER = f"""
import os
import config

def test_environment():
    assert not [v for v in {list(config.SCHEMES)} if os.environ.get(v)]

def test_settings():
    assert config.load_settings() == config.Settings()

def test_ladder(redis_url): pass
"""


def test_no_test_sees_the_users_servers(run_pytest: Pytest, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in UNREACHABLE.items()))
    outcome = run_pytest(SEES_NO_SERVER, **UNREACHABLE)
    assert "2 passed, 1 skipped" in outcome.output


def test_no_script_sees_the_users_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, url in UNREACHABLE.items():
        monkeypatch.setenv(variable, url)
    script = tmp_path / "shows.py"
    script.write_text("import config; print(config.load_settings())")
    shown = Run(script, tmp_path)(PYTHONPATH=str(ROOT))
    assert shown.stdout.strip() == repr(config.Settings()), shown.stderr
    given = Run(script, tmp_path)(PYTHONPATH=str(ROOT), REDIS_URL="redis://given/0")
    assert given.stdout.strip() == repr(config.Settings(redis_url="redis://given/0"))


# ── A namespace of its own for each test ────────────────────────────────────────────

# Each test fails half-way, with a connection left open, and so leaves all cleaning to its fixture.
LEAVES_A_MESS = """
import pytest, redis, sqlalchemy

left_open = []

@pytest.fixture(params=[1, 2])
def note(request):
    def write(name):
        with open("names.txt", "a") as names:
            print(name, file=names)
    return write

def test_postgres(note, postgres_database):
    connection = sqlalchemy.create_engine(postgres_database).connect()
    left_open.append(connection)
    connection.execute(sqlalchemy.text("CREATE TABLE mess (id int)"))
    connection.commit()
    note(connection.scalar(sqlalchemy.text("SELECT current_database()")))
    raise ZeroDivisionError

def test_mongo(note, mongo_database):
    mongo_database.mess.insert_one({})
    note(mongo_database.name)
    raise ZeroDivisionError

def test_redis(note, redis_prefix, redis_url):
    redis.Redis.from_url(redis_url).set(redis_prefix + "mess", 1)
    note(redis_prefix)
    raise ZeroDivisionError
"""


def test_a_failing_test_leaves_nothing_behind(
    run_pytest: Pytest, tmp_path: Path, postgres_url: str, mongo_uri: str, redis_url: str
) -> None:
    outcome = run_pytest(
        LEAVES_A_MESS,
        TEST_DATABASE_URL=postgres_url,
        TEST_MONGODB_URI=mongo_uri,
        TEST_REDIS_URL=redis_url,
    )
    assert outcome.output.count("E       ZeroDivisionError") == 6, outcome.output
    assert "6 failed in" in outcome.output, "and no fixture failed to clean up"
    names = (tmp_path / "names.txt").read_text().split()
    assert len(set(names)) == 6, "each test has a namespace of its own"

    with postgres_engine(postgres_url).connect() as connection:
        databases = connection.scalars(sqlalchemy.text("SELECT datname FROM pg_database"))
        assert not set(names) & set(databases)
    with mongo_client(mongo_uri) as client:
        assert not set(names) & set(client.list_database_names())
    with redis_client(redis_url) as cache:
        assert not [key for name in names for key in cache.scan_iter(match=f"{name}*")]

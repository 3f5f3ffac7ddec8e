"""Script 01 as a user runs it: a process, its exit code, its two streams, and what it leaves.

Every run gets an empty directory to work in, a TMPDIR of its own that must be empty afterwards,
and an environment in which no server is configured but those that the test names.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
import running
import sqlalchemy as sa
from running import SECRET, START, Ended, at_once, demos_of, missing
from services import ROOT, postgres_engine

import servers

SCRIPT = ROOT / "01_sqlalchemy_advanced.py"
DEMOS = (  # in reading order, as the script's guide has them
    "schema", "bulk_load", "repository", "n_plus_one", "toolbox", "analytics", "transactions",
    "large_results", "pool", "migration", "security",
)  # fmt: skip
QUICK = ("--only", "repository", "--scale", "5")  # where any demo will do

# ── Running it ──────────────────────────────────────────────────────────────────────


class Child(running.Child):
    script = SCRIPT


class Run(running.Run):
    child = Child


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def schemas(url: str) -> list[str]:
    engine = postgres_engine(url)
    query = r"SELECT nspname FROM pg_namespace WHERE nspname LIKE 'module8\_%'"
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(query)))


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[servers.Server]:
    """A server to kill, which asks for a password."""
    try:
        with servers.running("postgres") as started:
            yield started["postgres"]
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """DATABASE_URL: empty, which means not configured, or of an empty PostgreSQL database."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    return str(url)


# ── Whole runs ──────────────────────────────────────────────────────────────────────

MEASURED_COLUMNS = re.compile(r"rows/s|time / .*|ms|times faster|(SQL|fetch \+ fold), ms|ratio")
MEASURED_PROSE = re.compile(r"[\d.,]+(?= (?:ms|s|MB|times)\b)")


def without_timings(output: str) -> list[str]:
    """The lines of a run, with what was measured taken out: in tables the cells of
    MEASURED_COLUMNS, elsewhere numbers before ms, s, MB or times.

    And the row of OFFSET: whether PostgreSQL scans the table or the index for it changes when
    autovacuum happens to come by.
    """
    lines, header = [], list[str]()
    for line in output.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if any(map(MEASURED_COLUMNS.fullmatch, cells)):
            header = cells
        elif len(cells) != len(header):
            header = []
        elif cells[0] == "OFFSET":
            cells[1:] = "#"
        else:
            measured = [bool(MEASURED_COLUMNS.fullmatch(column)) for column in header]
            cells = ["#" if m else cell for m, cell in zip(measured, cells, strict=True)]
        lines.append(MEASURED_PROSE.sub("#", "  ".join(cells)))
    return lines


def test_without_timings_keeps_everything_else() -> None:
    table = "  way       rows/s  time / COPY's\n  COPY      96,212            1.0\n→ 3 in 1.5 s"
    assert without_timings(table) == [
        "way  rows/s  time / COPY's",
        "COPY  #  #",
        "→ 3 in # s",
    ]
    assert without_timings("  users, committed:   2") != without_timings("  users, committed:   3")


def test_two_whole_runs_at_once_differ_only_in_timings(tmp_path: Path, database_url: str) -> None:
    first, second = at_once(
        partial(Run(tmp_path / "first"), DATABASE_URL=database_url),
        partial(Run(tmp_path / "second"), DATABASE_URL=database_url),
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert (first.stderr, second.stderr) == ("", "")
    assert without_timings(first.stdout) == without_timings(second.stdout)
    headings = re.findall(r"^── (\d+)\. ", first.stdout, re.MULTILINE)
    assert headings == [str(number) for number in range(1, len(DEMOS) + 1)]
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", first.stdout, re.MULTILINE)
    if database_url:
        assert re.match(r"On PostgreSQL \d+", first.stdout)
        assert schemas(database_url) == []
    else:
        unavailable, _, rest = first.stdout.partition("\nOn SQLite ")
        assert unavailable.startswith("PostgreSQL is unavailable: DATABASE_URL is not set")
        assert START in " ".join(unavailable.split())
        assert re.match(r"\d+\.\d+\.\d+\n", rest)


def test_every_demo_at_small_scales_as_json(tmp_path: Path, database_url: str) -> None:
    scales = ("1", "3", "50")
    for ended in at_once(
        *(
            partial(Run(tmp_path / n), "--scale", n, "--json", DATABASE_URL=database_url)
            for n in scales
        )
    ):
        results = demos_of(ended)
        assert tuple(results) == DEMOS
        assert [result for result in results.values() if not result.get("result")] == []
        assert (ended.returncode, ended.stderr) == (0, "")
        services = json.loads(ended.stdout)["services"]
        assert services["database"].startswith("PostgreSQL" if database_url else "SQLite")
    assert not database_url or schemas(database_url) == []


# ── The command line ────────────────────────────────────────────────────────────────


def test_list_names_every_demo_and_opens_nothing(run: Run) -> None:
    ended = run("--list", DATABASE_URL="postgresql://app:x@127.0.0.1:notaport/app")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert tuple(line.split()[0] for line in ended.stdout.splitlines()) == DEMOS


def test_only_twice_runs_both_in_reading_order(run: Run) -> None:
    ended = run("--only", "security", "--only", "schema", "--scale", "5", "--json")
    assert list(demos_of(ended)) == ["schema", "security"]
    security = demos_of(ended)["security"]["result"]
    assert security == {
        "matches": [20, 0],
        "verified": [True, False],
        "weak_needs_rehash": True,
        "shows_name": {
            "SQLAlchemy's error": True,
            "with hide_parameters": False,
            "InvalidUser": False,
        },
    }


def test_a_wrong_demo_name_lists_the_right_ones(run: Run) -> None:
    ended = run("--only", "transaction")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert all(name in ended.stderr for name in DEMOS)


@pytest.mark.parametrize("args", [("--scale", "0"), ("--offline", "--require-services")])
def test_wrong_usage(run: Run, args: tuple[str, ...]) -> None:
    ended = run(*args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert all(arg in ended.stderr for arg in args)


def test_offline_asks_no_server(run: Run) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        ended = run(
            *QUICK, "--offline", DATABASE_URL=f"postgresql://app:{SECRET}@127.0.0.1:{port}/app"
        )
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ended.returncode == 0
    assert "On SQLite" in ended.stdout
    assert "--offline was given" in ended.stdout
    assert SECRET not in ended.stdout + ended.stderr


def test_twice_in_a_row_in_the_same_database(run: Run, postgres_database: str) -> None:
    for _ in range(2):
        ended = run(*QUICK, "--require-services", DATABASE_URL=postgres_database)
        assert ended.returncode == 0
        assert ended.stdout.startswith("On PostgreSQL")
        assert schemas(postgres_database) == []


def test_a_dotenv_file_in_the_working_directory_is_read(run: Run, postgres_database: str) -> None:
    (run.home / ".env").write_text(f"DATABASE_URL={postgres_database}\n")
    assert run(*QUICK).stdout.startswith("On PostgreSQL")
    assert "On SQLite" in run(*QUICK, DATABASE_URL="").stdout  # the environment comes first


# ── A server that refuses: never silently offline ───────────────────────────────────


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.returncode == 2, ended.stdout
    assert ended.stdout == ""
    assert "DATABASE_URL" in ended.stderr
    for word in words:
        assert word in ended.stderr
    assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    ("argument", "variables"),
    [
        ("--scale=5", {}),
        ("--json", {}),
        ("--require-services", {}),
        ("--scale=5", {"LOG_LEVEL": "DEBUG"}),
        ("--json", {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}),
    ],
)
def test_a_wrong_password(
    run: Run, own_postgres: servers.Server, argument: str, variables: dict[str, str]
) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:{own_postgres.port}/app"
    ended = run(argument, DATABASE_URL=url, **variables)
    assert_refused(ended, "password authentication failed", "app:***@127.0.0.1")


def test_an_unknown_database(run: Run, postgres_database: str) -> None:
    url = sa.make_url(postgres_database).set(database="no_such_database")
    ended = run(DATABASE_URL=url.render_as_string(hide_password=False))
    assert_refused(ended, 'database "no_such_database" does not exist')


def test_a_role_without_the_right_to_create_a_schema(
    run: Run, own_postgres: servers.Server
) -> None:
    with postgres_engine(own_postgres.url).connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE reader LOGIN PASSWORD '{SECRET}'"))
    url = f"postgresql://reader:{SECRET}@127.0.0.1:{own_postgres.port}/app"
    assert_refused(run(*QUICK, DATABASE_URL=url), "permission denied")


MALFORMED = {
    "no port": f"postgresql://app:{SECRET}@127.0.0.1:notaport/app",
    "no such port": f"postgresql://app:{SECRET}@127.0.0.1:99999/app",
    "another database": f"mysql://app:{SECRET}@127.0.0.1/app",
    "@ before": f"postgresql://app:x@{SECRET}@127.0.0.1/app",
    "@ after": f"postgresql://app:{SECRET}@x@127.0.0.1/app",
    "slash": f"postgresql://app:x/{SECRET}@127.0.0.1/app",
    "@ and slash": f"postgresql://app:x@{SECRET}/y@127.0.0.1/app",
    "question mark": f"postgresql://app:x?{SECRET}@127.0.0.1/app",
}


def test_malformed_urls(tmp_path: Path) -> None:
    runs = [partial(Run(tmp_path / name), DATABASE_URL=url) for name, url in MALFORMED.items()]
    for ended in at_once(*runs):
        assert_refused(ended)


def test_a_password_of_special_characters_percent_encoded(
    run: Run, own_postgres: servers.Server
) -> None:
    password = "p@ss/w:rd?#%20 é"
    with postgres_engine(own_postgres.url).connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE special SUPERUSER LOGIN PASSWORD '{password}'"))
    address = f"127.0.0.1:{own_postgres.port}/app"
    ended = run(*QUICK, DATABASE_URL=f"postgresql://special:{quote(password, safe='')}@{address}")
    assert ended.stdout.startswith("On PostgreSQL"), ended.stderr


# ── A server that is not there: the offline tier ────────────────────────────────────


def assert_offline(ended: Ended, reason: str) -> None:
    assert ended.returncode == 0, ended.stderr
    unavailable, on_sqlite, _ = ended.stdout.partition("\nOn SQLite ")
    assert on_sqlite
    assert unavailable.startswith("PostgreSQL at postgresql+psycopg2://app:***@")
    assert re.search(reason, unavailable)
    assert START in " ".join(unavailable.split())
    assert SECRET not in ended.stdout + ended.stderr


@pytest.fixture
def refused_url() -> Iterator[str]:
    """Of a port that is ours and at which nobody listens."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"postgresql://app:{SECRET}@127.0.0.1:{bound.getsockname()[1]}/app"


def test_a_refused_port(run: Run, refused_url: str) -> None:
    assert_offline(run(*QUICK, DATABASE_URL=refused_url), "Connection refused")


def test_a_required_service_that_is_missing(run: Run, refused_url: str) -> None:
    ended = run(*QUICK, "--require-services", DATABASE_URL=refused_url)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--require-services: PostgreSQL at postgresql+psycopg2://app:***@" in ended.stderr
    assert START in " ".join(ended.stderr.split())
    assert SECRET not in ended.stderr
    assert run(*QUICK, "--require-services").returncode == 2


def test_an_unknown_host(run: Run) -> None:
    url = f"postgresql://app:{SECRET}@database.invalid/app"
    assert_offline(run(*QUICK, DATABASE_URL=url), "unavailable: .*(known|resolution|answer)")


def test_a_server_that_accepts_and_never_answers(run: Run) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"postgresql://app:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/app"
        ended = run(*QUICK, DATABASE_URL=url, CONNECT_TIMEOUT_S="0.5")
    assert_offline(ended, "it accepts, and says nothing")


def test_a_server_that_hangs(run: Run, own_postgres: servers.Server) -> None:
    own_postgres.pause()
    try:
        ended = run(*QUICK, DATABASE_URL=own_postgres.url, CONNECT_TIMEOUT_S="0.5")
    finally:
        own_postgres.resume()
    assert_offline(ended, "it accepts, and says nothing")


# ── Interruptions ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(run: Run, database_url: str, signum: signal.Signals) -> None:
    child = run.start("--scale", "50", DATABASE_URL=database_url)
    # Where it waits: Python drops a Ctrl-C that falls into a destructor or a weakref's callback.
    child.until("Pool size: 2")
    assert not database_url or schemas(database_url)
    child.process.send_signal(signum)
    ended = child.ended()
    assert ended.returncode == 130
    assert ended.stderr == "interrupted\n"
    assert "── 11. " not in ended.stdout
    assert not database_url or schemas(database_url) == []


def test_a_server_killed_in_the_middle(run: Run, own_postgres: servers.Server) -> None:
    child = run.start("--scale", "50", DATABASE_URL=own_postgres.url)
    child.until("── 3. ")
    own_postgres.kill()
    try:
        ended = child.ended()
    finally:
        own_postgres.start()
    assert ended.returncode == 1
    failed = ended.stdout.rpartition("failed: ")[2].strip().rstrip(".").split(", ")
    assert failed[-8:] == list(DEMOS[3:])
    assert ended.stdout.count("\nfailed: OperationalError") >= 8
    told = re.findall(r"these may stay behind: (.+?) \((.+?)\)", " ".join(ended.stderr.split()))
    ((names, reason),) = told  # once, not for each schema
    assert re.match(r"connection to server at .* failed: Connection refused", reason)
    left = set(schemas(own_postgres.url))
    assert len(left) >= 3  # of open_resources and the first two demos
    assert left <= set(names.split(", "))
    assert own_postgres.url.split(":")[2].partition("@")[0] not in ended.stdout + ended.stderr
    assert run(*QUICK, DATABASE_URL=own_postgres.url).returncode == 0


# ── Logging and importing ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_json_logs_are_one_object_a_line_and_hold_no_password(
    run: Run, own_postgres: servers.Server, level: str
) -> None:
    ended = run(*QUICK, "--json", DATABASE_URL=own_postgres.url, LOG_FORMAT="json", LOG_LEVEL=level)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["repository"]
    password = sa.make_url(own_postgres.url).password
    assert password
    assert password not in ended.stderr + ended.stdout

"""Script 01 as a user runs it; what it shares with the others is in test_cli.py."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
import running
import sqlalchemy as sa
from running import (
    SCRIPTS,
    SECRET,
    START,
    Ended,
    Main,
    Recorded,
    assert_offline,
    at_once,
    demos_of,
    missing,
    schemas,
    whole_run,
)
from services import postgres_engine

import servers

SCRIPT = SCRIPTS["01"]
Run = partial(running.Run, SCRIPT.path)
DEMOS = (  # in reading order, as the script's guide has them
    "schema", "bulk_load", "repository", "n_plus_one", "toolbox", "analytics", "transactions",
    "large_results", "pool", "migration", "security",
)  # fmt: skip
QUICK = ("--only", "repository", "--scale", "5")  # where any demo will do


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


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


@pytest.mark.slow
@pytest.mark.parametrize("on_server", [False, True], ids=["sqlite", "postgresql"])
def test_a_whole_run(recorded: Recorded, on_server: bool) -> None:
    whole = recorded("01", on_server)
    ended = whole.ended
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    headings = re.findall(r"^── (\d+)\. ", ended.stdout, re.MULTILINE)
    assert headings == [str(number) for number in range(1, len(DEMOS) + 1)]
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", ended.stdout, re.MULTILINE)
    assert whole.left == set()
    if on_server:
        assert re.match(r"On PostgreSQL \d+", ended.stdout)
    else:
        unavailable, _, rest = ended.stdout.partition("\nOn SQLite ")
        assert unavailable.startswith("PostgreSQL is unavailable: DATABASE_URL is not set")
        assert START in " ".join(unavailable.split())
        assert re.match(r"\d+\.\d+\.\d+\n", rest)


@pytest.mark.slow
def test_another_whole_run_differs_only_in_timings(
    recorded: Recorded, tmp_path: Path, database_url: str
) -> None:
    first, second = (
        recorded("01", bool(database_url)).ended,
        whole_run(SCRIPT, tmp_path, database_url),
    )
    assert without_timings(first.stdout) == without_timings(second.ended.stdout)
    assert second.left == set()


@pytest.mark.slow
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
    assert not database_url or schemas(database_url) == set()


def test_twice_in_a_row_in_the_same_database(main: Main, postgres_database: str) -> None:
    for _ in range(2):
        ended = main(*QUICK, "--require-services", DATABASE_URL=postgres_database)
        assert ended.returncode == 0
        assert ended.stdout.startswith("On PostgreSQL")
        assert schemas(postgres_database) == set()


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
    main: Main, own_postgres: servers.Server, argument: str, variables: dict[str, str]
) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:{own_postgres.port}/app"
    ended = main(argument, DATABASE_URL=url, **variables)
    assert_refused(ended, "password authentication failed", "app:***@127.0.0.1")


def test_an_unknown_database(main: Main, postgres_database: str) -> None:
    url = sa.make_url(postgres_database).set(database="no_such_database")
    ended = main(DATABASE_URL=url.render_as_string(hide_password=False))
    assert_refused(ended, 'database "no_such_database" does not exist')


def test_a_role_without_the_right_to_create_a_schema(
    main: Main, own_postgres: servers.Server
) -> None:
    with postgres_engine(own_postgres.url).connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE reader LOGIN PASSWORD '{SECRET}'"))
    url = f"postgresql://reader:{SECRET}@127.0.0.1:{own_postgres.port}/app"
    assert_refused(main(*QUICK, DATABASE_URL=url), "permission denied")


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


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_urls(main: Main, name: str) -> None:
    assert_refused(main(DATABASE_URL=MALFORMED[name]))


def test_a_password_of_special_characters_percent_encoded(
    main: Main, own_postgres: servers.Server
) -> None:
    password = "p@ss/w:rd?#%20 é"
    with postgres_engine(own_postgres.url).connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE special SUPERUSER LOGIN PASSWORD '{password}'"))
    address = f"127.0.0.1:{own_postgres.port}/app"
    ended = main(*QUICK, DATABASE_URL=f"postgresql://special:{quote(password, safe='')}@{address}")
    assert ended.stdout.startswith("On PostgreSQL"), ended.stderr


# ── Interruptions ───────────────────────────────────────────────────────────────────


def test_a_server_that_hangs(main: Main, own_postgres: servers.Server) -> None:
    own_postgres.pause()
    try:
        ended = main(*QUICK, DATABASE_URL=own_postgres.url, CONNECT_TIMEOUT_S="0.5")
    finally:
        own_postgres.resume()
    assert_offline(SCRIPT, ended, "it accepts, and says nothing")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(
    tmp_path: Path, database_url: str, signum: signal.Signals
) -> None:
    # Where it waits: Python drops a Ctrl-C that falls into a destructor or a weakref's callback.
    at = "Pool size: 2"
    child = Run(tmp_path).start("--scale", "50", DATABASE_URL=database_url, PAUSE_AT=at)
    child.paused()
    assert not database_url or schemas(database_url)
    child.process.send_signal(signum)
    child.go_on()
    ended = child.ended()
    assert ended.returncode == 130
    assert ended.stderr == "interrupted\n"
    assert "── 11. " not in ended.stdout
    assert not database_url or schemas(database_url) == set()


@pytest.mark.slow
def test_a_server_killed_in_the_middle(tmp_path: Path, own_postgres: servers.Server) -> None:
    child = Run(tmp_path).start("--scale", "50", DATABASE_URL=own_postgres.url, PAUSE_AT="── 4. ")
    child.paused()
    own_postgres.kill()
    child.go_on()
    try:
        ended = child.ended()
    finally:
        own_postgres.start()
    assert ended.returncode == 1
    assert f"; failed: {', '.join(DEMOS[3:])}." in ended.stdout
    assert ended.stdout.count("\nfailed: OperationalError") == 8
    told = re.findall(r"these may stay behind: (.+?) \((.+?)\)", " ".join(ended.stderr.split()))
    ((names, reason),) = told  # once, not for each schema
    assert re.match(r"connection to server at .* failed: Connection refused", reason)
    left = schemas(own_postgres.url)
    assert len(left) >= 3  # of open_resources and the first two demos
    assert left <= set(names.split(", "))
    assert own_postgres.url.split(":")[2].partition("@")[0] not in ended.stdout + ended.stderr
    assert Run(tmp_path)(*QUICK, DATABASE_URL=own_postgres.url).returncode == 0


# ── Logging and importing ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_json_logs_are_one_object_a_line_and_hold_no_password(
    main: Main, own_postgres: servers.Server, level: str
) -> None:
    ended = main(
        *QUICK, "--json", DATABASE_URL=own_postgres.url, LOG_FORMAT="json", LOG_LEVEL=level
    )
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["repository"]
    password = sa.make_url(own_postgres.url).password
    assert password
    assert password not in ended.stderr + ended.stdout

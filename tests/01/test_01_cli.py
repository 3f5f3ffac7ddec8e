"""Script 01 as a user runs it; what it shares with the others is in test_cli.py."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import running
import sqlalchemy as sa
from running import SCRIPTS, SECRET, Ended, Main, Recorded, demos_of, missing, schemas, whole_run
from services import load_script, postgres_engine

import servers

app: Any = load_script("01_sqlalchemy_advanced")
SCRIPT = SCRIPTS["01"]
Run = partial(running.Run, SCRIPT.path)
DEMOS = (  # in reading order, as the script's guide has them
    "schema", "bulk_load", "repository", "n_plus_one", "analytics", "transactions",
    "job_queue", "large_results", "pool", "transfer", "security",
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

MEASURED_COLUMNS = re.compile(r"rows/s|time / .*|ms|times faster")
MEASURED_PROSE = re.compile(r"[\d.,]+(?= (?:ms|s|MB|times)\b)")


def without_timings(output: str) -> list[str]:
    """The lines of a run, without what was measured."""
    lines, header = [], list[str]()
    for line in output.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if any(map(MEASURED_COLUMNS.fullmatch, cells)):
            header = cells
        elif len(cells) != len(header):
            header = []
        else:
            measured = [bool(MEASURED_COLUMNS.fullmatch(column)) for column in header]
            cells = ["#" if m else cell for m, cell in zip(measured, cells, strict=True)]
        lines.append(MEASURED_PROSE.sub("#", "  ".join(cells)))
    return lines


@pytest.mark.slow
def test_whole_runs_differ_only_in_timings(
    recorded: Recorded, tmp_path: Path, database_url: str
) -> None:
    runs = recorded("01", bool(database_url)), whole_run(SCRIPT, tmp_path, database_url)
    for ended, left in [(whole.ended, whole.left) for whole in runs]:
        assert (ended.returncode, ended.stderr, left) == (0, "", set()), ended.stdout
        assert re.findall(r"^── (\d+)\. ", ended.stdout, re.M) == [str(n) for n in range(1, 12)]
        assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", ended.stdout, re.M)
        offline = r"PostgreSQL is unavailable: DATABASE_URL is not set\.\n(.+\n)+On SQLite 3\."
        assert re.match(r"On PostgreSQL \d+\." if database_url else offline, ended.stdout)
    first, second = (without_timings(whole.ended.stdout) for whole in runs)
    assert first == second
    assert "session.add_all  #  #" in first
    assert "users, committed:  2" in first


@pytest.mark.parametrize("users", ["1", "2", "3"])
def test_every_demo_of_few_users(main: Main, database_url: str, users: str) -> None:
    ended = main("--scale", users, "--json", DATABASE_URL=database_url)
    assert (ended.returncode, ended.stderr) == (0, "")
    results = demos_of(ended)
    assert tuple(results) == DEMOS
    assert [result for result in results.values() if not result.get("result")] == []
    on = json.loads(ended.stdout)["services"]["database"]
    assert on.startswith("PostgreSQL" if database_url else "SQLite")


RETRIED = {"read, then write, retried": ["20.00", 2, "goes first"]}
AFTER_A_KILL = {"after a kill": "OperationalError", "after a kill, pre_ping": "a new connection"}
ON_SQLITE = RETRIED, {"done": 19, "failed": 1}, {"the fourth caller": "TimeoutError"}
ON_POSTGRES = (
    {
        "read, then write": ["10.00", 1, "goes first"],
        "FOR UPDATE": ["20.00", 1, "has to wait (55P03)"],
        "SET credit = credit + 10": ["20.00", 1, "goes first"],
        **RETRIED,
    },
    {"two claims, no lock": 1, "two claims, SKIP LOCKED": 2, "done": 19, "failed": 1},
    {"the fourth caller": "TimeoutError", **AFTER_A_KILL},
)
INDEX = "ix_orders_placed_at_id"


def test_demos_twice_in_a_row_in_the_same_database(main: Main, database_url: str) -> None:
    """What they return; reckoned from the generator, where it depends on that."""
    people = list(app.people(500))  # the default; of fewer, PostgreSQL would read all the orders
    addresses, orders = (sum(len(person[i]) for person in people) for i in (1, 2))
    tables = 10, 50, 500, addresses, orders
    sent = list(accumulate(min(200, n - i) for n in tables for i in range(0, n, 200)))
    undone = next(i for i, rows in enumerate(sent) if rows > sent[-1] / 2)
    moved = {"power cut": sent[undone - 1], "resumed": sent[-1], "source": sent[-1]}
    names = ("transactions", "job_queue", "pool", "transfer", "security", "large_results")
    for _ in range(2):
        options = [word for name in names for word in ("--only", name)]
        ended = main(*options, "--json", DATABASE_URL=database_url)
        found: dict[str, Any] = {name: one["result"] for name, one in demos_of(ended).items()}
        saved, conflict, deposits = found["transactions"].values()
        assert saved == [0 if database_url else 20, 20]
        assert conflict.startswith("StaleDataError: UPDATE statement on table 'users' ")
        found_there = deposits, found["job_queue"], found["pool"]
        assert found_there == (ON_POSTGRES if database_url else ON_SQLITE)
        assert found["transfer"] == {**moved, "next id": 501}
        assert found["security"] == {"pasted into SQL": 20, "bound": 0}
        offset, keyset = found["large_results"].values()
        if database_url:
            read = re.findall(rf"using {INDEX} on orders \(actual rows=(\d+)", f"{offset} {keyset}")
            assert list(map(int, read)) == [(orders * 9 // 10 // 20 + 1) * 20, 20]
            assert schemas(database_url) == set()
        else:
            assert offset == f"SCAN orders USING COVERING INDEX {INDEX}"
            assert keyset == f"SEARCH orders USING COVERING INDEX {INDEX} (placed_at>?)"


def test_a_password_is_stored_by_argon2(main: Main) -> None:
    shown = main("--only", "security", "--offline").stdout
    assert "$argon2id$v=19$m=65536,t=3,p=4…, verified: True\n" in shown  # RFC 9106, section 4
    assert re.search("rehash at the next login: +True", shown)


# ── A server that refuses: never silently offline ───────────────────────────────────


def assert_refused(ended: Ended, *words: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, "")
    assert [word for word in ("DATABASE_URL", *words) if word not in ended.stderr] == []
    assert SECRET not in ended.stderr


@pytest.mark.parametrize("argument", ["--scale=5", "--json", "--require-services"])
@pytest.mark.parametrize("level", ["WARNING", "DEBUG"])
def test_a_wrong_password(
    main: Main, own_postgres: servers.Server, argument: str, level: str
) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:{own_postgres.port}/app"
    ended = main(argument, DATABASE_URL=url, LOG_LEVEL=level)
    assert_refused(ended, "password authentication failed", "app:***@127.0.0.1")


def test_another_refusal(main: Main, own_postgres: servers.Server) -> None:
    """Of a database, and of a schema; it is none to percent-encode an odd password."""
    assert_refused(main(DATABASE_URL=f"{own_postgres.url}x"), 'database "appx" does not exist')
    password = f"p@ss/w:rd?#%20 é{SECRET}"
    with postgres_engine(own_postgres.url).connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE special LOGIN PASSWORD '{password}'"))
        url = f"postgresql://special:{quote(password, safe='')}@127.0.0.1:{own_postgres.port}/app"
        assert_refused(main(*QUICK, DATABASE_URL=url), "permission denied")
        connection.execute(sa.text("ALTER ROLE special SUPERUSER"))
    assert main(*QUICK, DATABASE_URL=url).stdout.startswith("On PostgreSQL")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(
    tmp_path: Path, database_url: str, signum: signal.Signals
) -> None:
    # Where it prints: Python drops a Ctrl-C that falls into a destructor or a weakref's callback.
    at = "the fourth caller:"
    if database_url:
        with postgres_engine(database_url).connect() as connection:
            connection.execute(sa.text("CREATE SCHEMA module8_before"))
    child = Run(tmp_path).start("--scale", "50", DATABASE_URL=database_url, PAUSE_AT=at)
    child.paused()
    assert not database_url or len(schemas(database_url)) > 2
    child.process.send_signal(signum)
    child.go_on()
    ended = child.ended()
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert "── 10. " not in ended.stdout
    assert not database_url or schemas(database_url) == {"module8_before"}


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
    assert ended.stdout.count("\nfailed: OperationalError") == len(DEMOS[3:])
    told = re.findall(r"WARNING +\S+ schema (\w+) may stay behind: connection to ", ended.stderr)
    left = schemas(own_postgres.url)
    assert len(left) >= 3  # of open_resources and the first demos
    assert left <= set(told)
    assert str(sa.make_url(own_postgres.url).password) not in ended.stdout + ended.stderr
    assert Run(tmp_path)(*QUICK, DATABASE_URL=own_postgres.url).returncode == 0


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_json_logs_are_one_object_a_line_and_hold_no_password(
    main: Main, own_postgres: servers.Server, level: str
) -> None:
    options = {"DATABASE_URL": own_postgres.url, "LOG_FORMAT": "json", "LOG_LEVEL": level}
    ended = main(*QUICK, "--json", **options)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["repository"]
    assert str(sa.make_url(own_postgres.url).password) not in ended.stderr + ended.stdout

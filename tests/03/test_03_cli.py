"""Script 03 as a user runs it; what it shares with the others is in test_cli.py."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import running
from running import (
    SCRIPTS,
    SECRET,
    START,
    Ended,
    Main,
    Recorded,
    assert_offline,
    demos_of,
    missing,
    until,
    whole_run,
)
from script03 import admit
from services import redis_client

import config
import servers

SCRIPT = SCRIPTS["03"]
Run = partial(running.Run, SCRIPT.path)
DEMOS = (  # in reading order, as the script's guide has them
    "memoisation", "tiers", "ttl", "stampede", "failing_loader", "invalidation", "outage", "bulk",
    "real_world", "observability",
)  # fmt: skip
QUICK = ("--only", "ttl")  # where any demo will do
OFFLINE = "On no Redis: the in-process tier alone\n"
# ── Running it ──────────────────────────────────────────────────────────────────────


# Python drops what is raised in a destructor, also a Ctrl-C that happens to fall into one, and the
# script cannot know of it. Its user would press again; these tests run it again.
LOST = re.compile(
    r"Exception ignored in: <function .*\.__del__ at \w+>\n"
    r"Traceback \(most recent call last\):\n(?:  .*\n)+\nKeyboardInterrupt: ?\n"
)


class Interrupted(running.Child):
    harmless = LOST


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def own() -> Iterator[servers.Redis]:
    """A Redis that asks for a password, and that may be killed."""
    try:
        with servers.running("redis") as started:
            made = started["redis"]
            assert isinstance(made, servers.Redis)
            yield made
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture
def root(own: servers.Redis) -> Iterator[redis.Redis]:
    """A bare client of an empty server that is well."""
    own.start()
    with redis_client(own.url) as client:
        client.flushall()
        yield client
        own.start()


# ── Whole runs ──────────────────────────────────────────────────────────────────────


def sections(output: str) -> dict[str, str]:
    """Each demo's lines, by its name."""
    _, *parts = re.split(r"^── \d+\. ", output, flags=re.MULTILINE)
    return dict(zip(DEMOS, parts, strict=True))


def shape(output: str) -> list[str]:
    """The lines of a demo whose numbers are measured: what else it says. Rows in the order of what
    was measured are sorted here."""
    output = re.sub(r"\n {29}(?=\S)", " ", output)
    output = re.sub(r"^  note: ≥.*\n", "", output, flags=re.MULTILINE)  # where it was slow
    output = re.sub(r"(≥ )?(?<!\w)[\d][\d.,]*(e[+-]\d+)?%?(?!\w)", "#", output)
    lines = [re.sub(r"[\s─]+", " ", line).strip() for line in output.splitlines()]
    return sorted(lines)


def test_shape_keeps_everything_else() -> None:
    one = "  n   naive ms\n  35  ≥ 1.5e+03  1,234\n  note: ≥: stopped\n  kept: 3 of L1\n"
    other = "  n   naive ms\n  35  987  12\n  kept: 41 of L1\n"
    assert shape(one) == shape(other) == ["# # #", "kept: # of L1", "n naive ms"]
    assert shape(one) != shape(one.replace("L1", "L2"))


EXACT = ("ttl", "failing_loader")  # nothing in them is measured


def assert_same_but_for_measurements(first: str, second: str) -> None:
    one, other = sections(first), sections(second)
    for name in DEMOS[:-1]:  # the last one holds the summary, and buckets of times
        if name in EXACT:
            assert one[name] == other[name], name
        else:
            assert shape(one[name]) == shape(other[name]), name


OPENED = re.compile(r"(\d\d:\d\d:\d\d +)?WARNING\s+\w+: breaker opened after \d+ failures\s*")


def stderr_of(ended: Ended) -> str:
    """Without what a breaker says, whose opening is the point of demo 7."""
    return OPENED.sub("", ended.stderr).strip()


@pytest.mark.slow
@pytest.mark.parametrize("on_server", [False, True], ids=["offline", "online"])
def test_a_whole_run(recorded: Recorded, on_server: bool) -> None:
    whole = recorded("03", on_server)
    ended = whole.ended
    assert (ended.returncode, stderr_of(ended)) == (0, ""), ended.stdout
    headings = re.findall(r"^── (\d+)\. ", ended.stdout, re.MULTILINE)
    assert headings == [str(number) for number in range(1, len(DEMOS) + 1)]
    assert re.search(r"^Demos: 10 in [\d.]+ s; none failed\.$", ended.stdout, re.MULTILINE)
    assert max(map(len, ended.stdout.splitlines())) <= max(config.WIDTH, len(START) + 10)
    assert whole.left == set()


@pytest.mark.slow
def test_a_whole_run_on_redis(recorded: Recorded, redis_url: str) -> None:
    output = recorded("03", True).ended.stdout
    with redis_client(redis_url) as client:
        about = client.info("server")
    valkey = about.get("valkey_version")
    name = f"Valkey {valkey}" if valkey else f"Redis {about['redis_version']}"
    assert output.startswith(f"On {name}\n")
    assert re.search(r"[\d,]+ calls short-circuited, 0 user errors", output)


@pytest.mark.slow
def test_a_whole_run_without_redis_names_every_gap(recorded: Recorded) -> None:
    output = recorded("03", False).ended.stdout
    unavailable, _, _ = output.partition(OFFLINE)
    assert unavailable.startswith("Redis is unavailable: REDIS_URL is not set.\n")
    assert START in " ".join(unavailable.split())
    gaps = [n for n, text in sections(output).items() if re.search(r"\n  note: no Redis", text)]
    assert gaps == ["tiers", "stampede", "invalidation", "outage", "bulk", "real_world"]


@pytest.mark.slow
def test_another_whole_run_without_redis_differs_only_in_measurements(
    recorded: Recorded, tmp_path: Path
) -> None:
    second = whole_run(SCRIPT, tmp_path).ended
    assert_same_but_for_measurements(recorded("03", False).ended.stdout, second.stdout)


@pytest.mark.slow
def test_two_whole_runs_on_redis_differ_only_in_measurements(
    tmp_path: Path, own: servers.Redis, root: redis.Redis
) -> None:
    """On a server that counts what it is asked, and holds a key of somebody else's."""
    granted = admit(root, "app", SECRET)
    root.set("foreign", "untouched")
    root.config_resetstat()
    url = f"redis://app:{SECRET}@127.0.0.1:{own.port}/0"
    first, second = (whole_run(SCRIPT, tmp_path / name, url).ended for name in ("1", "2"))
    assert_same_but_for_measurements(first.stdout, second.stdout)
    assert root.keys() == [b"foreign"]
    assert SECRET not in first.stdout + first.stderr
    sent = root.info("commandstats")
    assert sent["cmdstat_keys"]["calls"] == 1  # ours, just now
    assert not {"cmdstat_flushall", "cmdstat_flushdb"} & set(sent)
    # The rights in the guide are enough, and each is used. Redis 6.2 counts no subcommands.
    assert root.execute_command("ACL", "LOG") == []
    used = {name.removeprefix("cmdstat_") for name in sent}
    assert {right for right in granted if not {right, right.partition("|")[0]} & used} == set()


@pytest.mark.parametrize("args", [(), ("--offline",)], ids=["online", "offline"])
def test_json_is_all_of_stdout(
    main: Main, root: redis.Redis, own: servers.Redis, args: Any
) -> None:
    only = [word for name in ("bulk", "tiers", "failing_loader") for word in ("--only", name)]
    url = f"{own.url}?{SCRIPT.patience}"
    ended = main(*only, *args, "--scale", "500", "--json", REDIS_URL=url)
    assert (ended.returncode, ended.stderr) == (0, "")
    results = demos_of(ended)
    assert list(results) == ["tiers", "failing_loader", "bulk"]
    assert [name for name, result in results.items() if not result.get("result")] == []
    tiers = results["tiers"]["result"]
    assert isinstance(tiers, dict)
    assert (tiers["requests"], tiers["wrong"]) == (500, 0)
    services = json.loads(ended.stdout)["services"]["redis"]
    assert services.startswith("no Redis" if args else ("Redis ", "Valkey "))
    assert root.dbsize() == 0


# ── A server that is not there: the in-process tier ─────────────────────────────────


@pytest.fixture
def refused() -> Iterator[str]:
    """host:port of a port that is ours and at which nobody listens."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_refused_port_of_tls(main: Main, refused: str) -> None:
    ended = main(*QUICK, REDIS_URL=f"rediss://app:{SECRET}@{refused}/0")
    assert_offline(SCRIPT, ended, "Connection refused", r"rediss://app:\*\*\*@")


def test_a_server_that_hangs(main: Main, own: servers.Redis, root: redis.Redis) -> None:
    assert root.ping()
    own.pause()
    try:
        ended = main(*QUICK, REDIS_URL=own.url, CONNECT_TIMEOUT_S="0.5")
    finally:
        own.resume()
    assert_offline(SCRIPT, ended, "(timed out|no answer|Timeout)", r"redis://:\*\*\*@")
    assert own.password not in ended.stdout


def test_a_unix_socket_that_is_missing_or_dead(main: Main) -> None:
    path = main.home / "dead"
    url = f"unix://{path}"
    assert_offline(SCRIPT, main(*QUICK, REDIS_URL=url), "No such file", url)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert_offline(SCRIPT, main(*QUICK, REDIS_URL=url), "Connection refused", url)


# ── A server that refuses: never silently offline ───────────────────────────────────


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stdout == ""
    assert "REDIS_URL" in ended.stderr
    for word in words:
        assert re.search(word, ended.stderr), ended.stderr
    assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    ("argument", "variables"),
    [
        ("--scale=5", {}),
        ("--require-services", {}),
        ("--json", {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}),
    ],
)
def test_a_wrong_password(
    main: Main, own: servers.Redis, root: redis.Redis, argument: str, variables: dict[str, str]
) -> None:
    url = f"redis://default:{SECRET}@127.0.0.1:{own.port}/0"
    ended = main(argument, REDIS_URL=url, **variables)
    assert_refused(ended, "WRONGPASS|invalid", r"default:\*\*\*@127\.0\.0\.1")


def test_no_password_where_one_is_asked_for(
    main: Main, own: servers.Redis, root: redis.Redis
) -> None:
    assert_refused(main(*QUICK, REDIS_URL=f"redis://127.0.0.1:{own.port}/0"), "authenticated")


def test_a_database_that_does_not_exist(main: Main, own: servers.Redis, root: redis.Redis) -> None:
    ended = main(*QUICK, REDIS_URL=own.url.removesuffix("/0") + "/99")
    assert_refused(ended, "out of range|Invalid [Dd]atabase")
    assert own.password not in ended.stderr


RIGHTS = {
    "reads": "~* &* +@read +@connection +info",
    "writes elsewhere": "~app:* &* +@all",
    "nothing": "",
}


@pytest.mark.parametrize("rights", RIGHTS.values(), ids=RIGHTS.keys())
def test_a_user_who_may_not_write(
    main: Main, own: servers.Redis, root: redis.Redis, rights: str
) -> None:
    root.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{SECRET}", *rights.split())
    ended = main(*QUICK, REDIS_URL=f"redis://app:{SECRET}@127.0.0.1:{own.port}/0")
    assert_refused(ended, r"app:\*\*\*@", "permission|NOPERM")
    assert root.dbsize() == 0


def test_a_replica_that_is_read_only(main: Main, own: servers.Redis, root: redis.Redis) -> None:
    root.replicaof("127.0.0.1", 1)
    try:
        ended = main(*QUICK, REDIS_URL=own.url)
    finally:
        root.replicaof("NO", "ONE")
    assert_refused(ended, "read.only")


def test_a_server_out_of_memory(main: Main, own: servers.Redis, root: redis.Redis) -> None:
    root.config_set("maxmemory", "1")
    try:
        ended = main(*QUICK, REDIS_URL=own.url)
    finally:
        root.config_set("maxmemory", "0")
    assert_refused(ended, "memory")


def test_a_client_that_wants_tls_of_a_plain_server(
    main: Main, own: servers.Redis, root: redis.Redis
) -> None:
    ended = main(*QUICK, REDIS_URL=f"rediss://app:{SECRET}@127.0.0.1:{own.port}/0")
    assert_refused(ended, r"app:\*\*\*@127\.0\.0\.1", "SSL|TLS|ssl")


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """host:port of a server that answers whatever it reads with `reply`, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with closing(connection):
                    if connection.recv(1000):
                        connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


REPLIES = {
    "TLS": b"\x15\x03\x03\x00\x02\x02\x46",  # the alert protocol_version of RFC 8446
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_a_server_that_is_no_plain_redis(main: Main, reply: bytes) -> None:
    with answering(reply) as address:
        ended = main(*QUICK, REDIS_URL=f"redis://app:{SECRET}@{address}/0")
    assert_refused(ended, r"app:\*\*\*@127\.0\.0\.1")


MALFORMED = {
    "no port": f"redis://app:{SECRET}@127.0.0.1:notaport/0",
    "no such port": f"redis://app:{SECRET}@127.0.0.1:99999/0",
    "nothing": "redis://",
    "another service": f"postgresql://app:{SECRET}@127.0.0.1/app",
    "@ before": f"redis://app:x@{SECRET}@127.0.0.1/0",
    "slash": f"redis://app:x/{SECRET}@127.0.0.1/0",
    "question mark": f"redis://app:x?{SECRET}@127.0.0.1/0",
    "no number": "redis://app:{password}@{address}/0?socket_timeout=soon",
    "typo": "redis://:{password}@{address}/0?sokcet_timeout=1",
    "no database": "redis://:{password}@{address}/app",
    "decoded": "redis://:{password}@{address}/0?decode_responses=true",
    "no protocol": "redis://:{password}@{address}/0?protocol=9",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_urls(main: Main, own: servers.Redis, root: redis.Redis, name: str) -> None:
    url = MALFORMED[name].format(address=f"127.0.0.1:{own.port}", password=own.password)
    ended = main(*QUICK, "--only", "tiers", REDIS_URL=url)
    assert_refused(ended)
    assert own.password not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_password_of_special_characters_percent_encoded(
    main: Main, own: servers.Redis, root: redis.Redis
) -> None:
    password = "p@ss/w:rd?#%20 é"
    root.execute_command("ACL", "SETUSER", "special", "on", f">{password}", "~*", "&*", "+@all")
    url = f"redis://special:{quote(password, safe='')}@127.0.0.1:{own.port}/0"
    assert main(*QUICK, REDIS_URL=url).stdout.startswith(("On Redis ", "On Valkey ")), url


def test_json_logs_are_one_object_a_line_and_hold_no_password(
    main: Main, own: servers.Redis, root: redis.Redis
) -> None:
    variables = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG"}
    ended = main("--only", "failing_loader", "--json", REDIS_URL=own.url, **variables)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["failing_loader"]
    assert own.password not in ended.stderr + ended.stdout


# ── Redis dies, or the user has seen enough ─────────────────────────────────────────

LONG = ("tiers", "stampede", "invalidation", "bulk", "real_world", "observability")


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 4, 6, 9, 10])
def test_redis_killed_in_the_middle(
    tmp_path: Path, own: servers.Redis, root: redis.Redis, at: int
) -> None:
    """Right after the heading of demo `at` (1: when it says which Redis it has)."""
    only = [word for name in LONG for word in ("--only", name)]
    child = Run(tmp_path).start(*only, REDIS_URL=own.url)
    child.until("On " if at == 1 else f"── {at}. ")
    own.kill()
    ended = child.ended()
    assert ended.returncode in (0, 1)
    outcome = re.search(r"^Demos: 6 in [\d.]+ s; (none failed|failed: .*)\.$", ended.stdout, re.M)
    assert outcome, ended.stdout
    assert (outcome[1] == "none failed") is (ended.returncode == 0)
    assert own.password not in ended.stdout + ended.stderr


def has_loaders(child: running.Child) -> bool:
    """The four processes of demo 4 (and what multiprocessing adds) are there."""
    return len(child.children()) >= 4


def has_server(child: running.Child) -> bool:
    return any(re.search("(redis|valkey)-server", command) for command in child.children())


MOMENTS: dict[str, tuple[str, Callable[[running.Child], object]]] = {
    "memoisation": ("── 1. ", lambda _child: True),
    "tiers": ("── 2. ", lambda _child: True),
    "stampede": ("── 4. ", lambda _child: True),
    "stampede of processes": ("── 4. ", has_loaders),
    "outage": ("── 7. ", has_server),
    "real_world": ("── 9. ", lambda _child: True),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, own: servers.Redis, root: redis.Redis, moment: str
) -> None:
    heading, is_there = MOMENTS[moment]
    for _ in range(3):
        only = ("--only", moment.partition(" ")[0])
        child = Interrupted(
            SCRIPT.path, tmp_path, only, {"REDIS_URL": f"{own.url}?{SCRIPT.patience}"}
        )
        child.until(heading)
        until(lambda child=child: is_there(child))
        child.ctrl_c()
        ended = child.ended()
        assert root.dbsize() == 0
        if not LOST.search(child.stderr):
            break
    assert (ended.returncode, stderr_of(ended)) == (130, "interrupted")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.2, 1.6])
def test_a_sigterm_is_as_good_as_a_ctrl_c(
    tmp_path: Path, own: servers.Redis, root: redis.Redis, seconds: float
) -> None:
    """At some moment of the outage: stopped, killed, restarting; the rule holds at each."""
    child = Interrupted(SCRIPT.path, tmp_path, ("--only", "outage"), {"REDIS_URL": own.url})
    child.until("── 7. ")
    until(lambda: has_server(child))
    time.sleep(seconds)
    child.process.terminate()
    ended = child.ended()
    assert ended.returncode == 130
    assert root.dbsize() == 0

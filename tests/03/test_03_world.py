"""Script 03: writes behind, sessions, rate limits, a leaderboard, rows of features.

The models are plain Python: a list of moments, a fraction of tokens, `sorted`. Limiters take their
milliseconds from a clock that is moved by hand, as whole numbers, and where eight clients ask at
once, from the server.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import subprocess
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any

import orjson
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import until
from script03 import TIMEOUT_S, WAIT_S, SourceDown
from services import ROOT, load_script

app: Any = load_script("03_caching_strategies")

on_the_server = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ── Write-behind ────────────────────────────────────────────────────────────────────


class Source:
    """Takes batches; while it is held it takes none, and it refuses its first `failures`."""

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[dict[str, Any]] = []
        self.stored: dict[str, Any] = {}
        self.calls, self._failures = 0, failures
        self.entered, self.released = threading.Event(), threading.Event()
        self.released.set()

    def __call__(self, batch: dict[str, Any]) -> None:
        self.calls += 1
        self.entered.set()
        assert self.released.wait(WAIT_S)
        if self.calls <= self._failures:
            raise SourceDown
        self.batches.append(dict(batch))
        self.stored |= batch


Open = Callable[..., Any]


@pytest.fixture
def behind() -> Iterator[Open]:
    """`behind(source)`: a WriteBehind that waits for nothing, closed at the end."""
    made: list[tuple[Source, Any]] = []

    def open_(source: Source, **options: Any) -> Any:
        writer = app.WriteBehind(source, **{"retry_s": 0.001, "linger_s": 0.001, **options})
        made.append((source, writer))
        return writer

    yield open_
    for source, writer in made:
        source.released.set()
        writer.close()


def hold(source: Source, writer: Any) -> None:
    """Let the source be busy with a write of its own."""
    source.released.clear()
    source.entered.clear()
    writer.put("held", 0)
    assert source.entered.wait(WAIT_S)


def test_close_writes_what_waits_in_batches(behind: Open) -> None:
    source = Source()
    writer = behind(source, batch=10)
    hold(source, writer)
    for i in range(95):
        writer.put(f"k{i}", i)
    source.released.set()
    writer.close()
    assert source.stored == {"held": 0} | {f"k{i}": i for i in range(95)}
    assert [len(batch) for batch in source.batches] == [1, *[10] * 9, 5]
    assert (writer.written, writer.batches, writer.failed) == (96, 11, {})


def test_of_several_writes_to_a_key_the_last_one_counts(behind: Open) -> None:
    source = Source()
    writer = behind(source, batch=100)
    hold(source, writer)
    for i in range(50):
        writer.put(f"k{i % 3}", i)
    source.released.set()
    writer.close()
    assert source.batches == [{"held": 0}, {"k0": 48, "k1": 49, "k2": 47}]


def test_a_full_backlog_refuses_and_loses_nothing_that_it_took(behind: Open) -> None:
    source = Source()
    writer = behind(source, max_queued=5)
    hold(source, writer)
    for i in range(5):
        writer.put(f"k{i}", i)
    with pytest.raises(app.BacklogFull):
        writer.put("one more", 1, timeout_s=0.01)
    source.released.set()
    writer.close()
    assert source.stored == {"held": 0} | {f"k{i}": i for i in range(5)}


def test_a_batch_is_tried_again_until_it_is_written(behind: Open) -> None:
    source = Source(failures=2)
    writer = behind(source)
    writer.put("key", 1)
    writer.close()
    assert (source.calls, source.stored, writer.failed) == (3, {"key": 1}, {})
    assert (writer.written, writer.batches) == (1, 1)


def test_what_fails_in_every_attempt_is_kept_for_its_owner(behind: Open) -> None:
    source = Source(failures=4)
    writer = behind(source, batch=1, attempts=4)
    writer.put("bad", 1)
    writer.put("good", 2)
    writer.close()
    assert (writer.failed, source.stored, source.calls) == ({"bad": 1}, {"good": 2}, 5)


def test_after_too_many_failures_no_more_is_taken(behind: Open) -> None:
    source = Source(failures=10**9)
    writer = behind(source, max_queued=3, attempts=1, batch=1)
    for i in range(3):
        writer.put(f"k{i}", i)
    until(lambda: len(writer.failed) == 3)
    with pytest.raises(app.BacklogFull):
        writer.put("one more", 1)


def test_what_is_put_after_close_is_refused_and_not_lost_in_silence(behind: Open) -> None:
    writer = behind(Source())
    writer.close()
    writer.close()
    with pytest.raises(app.CacheError):
        writer.put("late", 1, timeout_s=0.01)


def test_writes_from_many_threads_all_arrive(behind: Open) -> None:
    source = Source()
    writer = behind(source, max_queued=10, batch=7)
    answers = app.in_threads(
        8, lambda t: [writer.put(f"{t}-{i}", i, timeout_s=WAIT_S) for i in range(100)]
    )
    writer.close()
    assert not any(isinstance(answer, Exception) for answer in answers)
    assert source.stored == {f"{t}-{i}": i for t in range(8) for i in range(100)}
    assert all(len(batch) <= 7 for batch in source.batches)


AT_EXIT = """
import importlib
app = importlib.import_module("03_caching_strategies")
writer = app.WriteBehind(lambda batch: print(sorted(batch.items()), flush=True), linger_s=0.2)
for i in range(3):
    writer.put(f"k{i}", i)
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_an_exit_writes_what_waits(end: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AT_EXIT + end],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (code, "[('k0', 0), ('k1', 1), ('k2', 2)]\n")


# ── Sessions ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def name(redis_prefix: str) -> str:
    return f"{redis_prefix}it"


def test_a_session_slides_and_is_known_by_its_token_alone(client: redis.Redis, name: str) -> None:
    sessions = app.Sessions(client, name, idle_s=100.0)
    user = {"id": 7, "name": "Ada", "roles": ["admin"]}
    token, another = sessions.create(user), sessions.create({"id": 8})
    assert (sessions.get(token), sessions.get(another)) == (user, {"id": 8})
    key = f"{name}:{hashlib.sha256(token.encode()).hexdigest()}"
    assert 0 < client.pttl(key) <= 100_000
    client.pexpire(key, 5_000)  # as after 95 s
    assert sessions.get(token) == user
    assert client.pttl(key) > 5_000  # begun anew
    for forged in ("", token[:-1], key, hashlib.sha256(token.encode()).hexdigest(), "*"):
        assert sessions.get(forged) is None
    stored = b"".join([*client.scan_iter(f"{name}*"), client.get(key)])
    assert token.encode() not in stored
    assert (sessions.end(token), sessions.get(token), sessions.end(token)) == (True, None, False)
    assert sessions.get(another) == {"id": 8}


def test_a_session_ends_at_its_maximal_age_however_it_is_used(
    client: redis.Redis, name: str
) -> None:
    clock = app.ManualClock()
    sessions = app.Sessions(client, name, idle_s=100.0, max_age_s=1_000.0, wall_clock=clock)
    token = sessions.create({"id": 7})
    for _ in range(10):
        assert sessions.get(token) == {"id": 7}
        clock.advance(99.9)
    clock.advance(0.9)
    assert sessions.get(token) == {"id": 7}
    clock.advance(0.1)
    assert sessions.get(token) is None
    assert list(client.scan_iter(f"{name}*")) == []


def test_tokens_cannot_be_guessed(client: redis.Redis, name: str) -> None:
    sessions = app.Sessions(client, name)
    tokens = {sessions.create({"id": 7}) for _ in range(50)}
    assert len(tokens) == 50
    assert min(map(len, tokens)) >= 43  # 256 bits in base64


def test_a_session_store_that_is_away_lets_nobody_in() -> None:
    with app.connect("redis://127.0.0.1:1/0") as nowhere:
        sessions = app.Sessions(nowhere, "test")
        for call in (lambda: sessions.create({}), lambda: sessions.get("token")):
            with pytest.raises(redis.ConnectionError):
                call()


# ── Rate limits ─────────────────────────────────────────────────────────────────────


class Milliseconds:
    """A clock in seconds, moved by whole milliseconds."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> float:
        return self.now / 1000


@pytest.fixture
def limited(redis_url: str) -> Iterator[list[redis.Redis]]:
    """Eight clients."""
    made = [app.connect(redis_url, TIMEOUT_S) for _ in range(8)]
    yield made
    for one in made:
        one.close()


def ask_at_once(ask: Callable[[int], bool]) -> int:
    answers = app.in_threads(8, lambda i: [ask(i) for _ in range(40)])
    return sum(map(sum, answers))


def test_eight_clients_get_exactly_the_capacity(limited: list[redis.Redis], name: str) -> None:
    buckets = [app.TokenBucket(one, rate_per_s=0.001, capacity=50) for one in limited]
    assert ask_at_once(lambda i: buckets[i].take(name).is_allowed) == 50
    assert limited[0].pttl(name) > 0


def test_eight_clients_get_exactly_the_window(limited: list[redis.Redis], name: str) -> None:
    windows = [app.SlidingWindow(one, 50, window_s=300.0) for one in limited]
    assert ask_at_once(lambda i: windows[i].take(name).is_allowed) == 50
    assert 0 < limited[0].pttl(name) <= 300_000
    assert limited[0].zcard(name) == 50  # what was refused is not remembered


def test_names_are_limited_apart(client: redis.Redis, name: str) -> None:
    window, bucket = app.SlidingWindow(client, 1, 60), app.TokenBucket(client, 0.001, 1)
    for limiter, kind in ((window, "w"), (bucket, "b")):
        taken = [limiter.take(f"{name}:{kind}:{who}").is_allowed for who in "aab"]
        assert taken == [True, False, True]


MOVES = st.lists(st.integers(0, 700), min_size=1, max_size=30)  # ms before each call


@on_the_server
@given(
    limit=st.integers(1, 4),
    window=st.integers(1, 20),
    moves=st.lists(st.integers(0, 14), min_size=1, max_size=30),
    unit_ms=st.sampled_from([1, 7, 50]),  # coarse, so that moments fall on the edge of a window
)
def test_a_window_is_never_exceeded_and_never_idle(
    client: redis.Redis,
    redis_prefix: str,
    limit: int,
    window: int,
    moves: list[int],
    unit_ms: int,
) -> None:
    """Against the list of all allowed moments: a moment counts for less than a whole window."""
    window_ms = window * unit_ms
    key, clock = f"{redis_prefix}{secrets.token_hex(8)}", Milliseconds()
    limiter = app.SlidingWindow(client, limit, window_ms / 1000, clock)
    allowed: deque[int] = deque()
    for move in moves:
        clock.now += move * unit_ms
        client.persist(key)  # it expires by the server's clock, which is not this one
        while allowed and allowed[0] <= clock.now - window_ms:
            allowed.popleft()
        wait_ms = allowed[0] + window_ms - clock.now if len(allowed) >= limit else 0
        assert limiter.take(key) == (wait_ms == 0, wait_ms / 1000)
        if not wait_ms:
            allowed.append(clock.now)


@on_the_server
@given(
    rate=st.sampled_from([0.5, 1.0, 3.0, 7.0, 10.0, 64.0, 333.0]),
    capacity=st.integers(1, 9),
    moves=MOVES,
    data=st.data(),
)
def test_a_bucket_refills_at_its_rate(
    client: redis.Redis,
    redis_prefix: str,
    rate: float,
    capacity: int,
    moves: list[int],
    data: st.DataObject,
) -> None:
    """Against exact fractions; where they say that it is a tie, either answer will do."""
    key, clock = f"{redis_prefix}{secrets.token_hex(8)}", Milliseconds()
    bucket = app.TokenBucket(client, rate, capacity, clock)
    tokens, per_ms = Fraction(capacity), Fraction(rate) / 1000
    for move in moves:
        clock.now += move
        client.persist(key)
        tokens = min(Fraction(capacity), tokens + move * per_ms)
        cost = data.draw(st.integers(1, capacity))
        decision = bucket.take(key, cost)
        if abs(tokens - cost) > Fraction(1, 10**9):
            assert decision.is_allowed is (tokens >= cost)
        if decision.is_allowed:
            assert decision.retry_after_s == 0
            tokens -= cost
        else:
            exact_ms = (cost - tokens) / per_ms
            assert abs(decision.retry_after_s * 1000 - math.ceil(exact_ms)) <= 1


@on_the_server
@given(
    rate=st.sampled_from([0.5, 1.0, 3.0, 7.0, 10.0, 64.0, 333.0]),
    capacity=st.integers(1, 9),
    moves=MOVES,
)
def test_retry_after_is_the_first_millisecond_at_which_it_is_allowed(
    client: redis.Redis, redis_prefix: str, rate: float, capacity: int, moves: list[int]
) -> None:
    key, clock = f"{redis_prefix}{secrets.token_hex(8)}", Milliseconds()
    bucket = app.TokenBucket(client, rate, capacity, clock)
    for move in moves:
        clock.now += move
        client.persist(key)
        decision = bucket.take(key, capacity)
        if decision.is_allowed:
            continue
        wait_ms = round(decision.retry_after_s * 1000)
        assert wait_ms >= 1
        clock.now += wait_ms - 1
        assert not bucket.take(key, capacity).is_allowed
        clock.now += 1
        assert bucket.take(key, capacity).is_allowed, (decision, capacity, rate)


def test_a_clock_that_goes_back_gives_no_tokens_twice(client: redis.Redis, name: str) -> None:
    clock = Milliseconds()
    bucket = app.TokenBucket(client, 1.0, 2, clock)
    assert [bucket.take(name).is_allowed for _ in range(3)] == [True, True, False]
    clock.now -= 60_000
    assert not bucket.take(name).is_allowed
    clock.now += 60_000
    assert not bucket.take(name).is_allowed


@pytest.mark.parametrize("cost", [0, -1, 5.1, float("nan"), float("inf")])
def test_a_cost_that_no_bucket_holds_is_refused(
    client: redis.Redis, name: str, cost: float
) -> None:
    with pytest.raises(ValueError, match="cost"):
        app.TokenBucket(client, 1.0, 5).take(name, cost)
    assert client.exists(name) == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_a_window_that_lets_nobody_in_is_a_value_error(
    client: redis.Redis, name: str, limit: int
) -> None:
    with pytest.raises(ValueError, match="limit"):
        app.SlidingWindow(client, limit, 60).take(name)


def test_a_limiter_that_cannot_reach_redis_leaves_the_choice_to_its_caller() -> None:
    with app.connect("redis://127.0.0.1:1/0") as nowhere:
        for limiter in (app.TokenBucket(nowhere, 1, 1), app.SlidingWindow(nowhere, 1, 1)):
            with pytest.raises(redis.ConnectionError):
                limiter.take("test")


# ── Leaderboard ─────────────────────────────────────────────────────────────────────

PLAYERS = st.text(st.characters(codec="utf-8"), max_size=3)
POINTS = st.integers(-5, 5)


@on_the_server
@given(adds=st.lists(st.tuples(PLAYERS, POINTS), max_size=25), count=st.integers(1, 30))
def test_a_leaderboard_is_a_sorted_list(
    client: redis.Redis, redis_prefix: str, adds: list[tuple[str, int]], count: int
) -> None:
    board = app.Leaderboard(client, f"{redis_prefix}{secrets.token_hex(8)}")
    total: dict[str, int] = {}
    for player, points in adds:
        total[player] = total.get(player, 0) + points
        assert board.add(player, points) == total[player]
    ranking = sorted(total.items(), key=lambda at: (at[1], at[0].encode()), reverse=True)
    assert board.top(count) == ranking[:count]
    for i, (player, _points) in enumerate(ranking):
        assert board.rank(player) == i + 1
        assert board.around(player, 2) == ranking[max(0, i - 2) : i + 3]
        assert board.around(player, 0) == [ranking[i]]
    assert (board.rank("nobody of that name"), board.around("nobody of that name", 2)) == (None, [])


@pytest.mark.parametrize("count", [0, -1])
def test_the_first_none_of_a_leaderboard_are_none(
    client: redis.Redis, name: str, count: int
) -> None:
    board = app.Leaderboard(client, name)
    board.add("a", 1)
    board.add("b", 2)
    with suppress(ValueError):  # would do, too
        assert board.top(count) == []


# ── Rows of features ────────────────────────────────────────────────────────────────

ROWS = st.dictionaries(
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=8), st.integers(-(2**53), 2**53) | st.text(max_size=40)),
    max_size=5,
)


@on_the_server
@given(rows=ROWS, threshold=st.integers(0, 200))
def test_rows_come_back_as_they_were(
    client: redis.Redis, redis_prefix: str, rows: dict[str, dict[str, Any]], threshold: int
) -> None:
    name = f"{redis_prefix}{secrets.token_hex(8)}"
    features = app.FeatureRows(client, name, threshold=threshold)
    size = features.put(rows)
    assert features.get([*rows, "missing!"]) == {**rows, "missing!": None}
    raws = {entity: client.get(f"{name}:{entity}") for entity in rows}
    assert size == sum(map(len, raws.values()))
    for entity, raw in raws.items():
        plain = orjson.dumps(rows[entity])
        packed = len(plain) >= threshold
        assert (zlib.decompress(raw[1:]) if packed else raw[1:]) == plain
        assert client.pttl(f"{name}:{entity}") > 0


def test_many_repeated_features_take_fewer_bytes(client: redis.Redis, name: str) -> None:
    rows = {"a": {f"spent in week {week}": 0 for week in range(200)}}
    plain = app.FeatureRows(client, f"{name}:plain", threshold=10**6)
    packed = app.FeatureRows(client, f"{name}:packed")
    assert packed.put(rows) < plain.put(rows) / 4
    assert packed.get(["a"]) == plain.get(["a"]) == rows


BOMB = b"z" + zlib.compress(b'{"a": "' + b"0" * 20_000_000 + b'"}')
BROKEN = {
    "empty": b"",
    "foreign": b"foreign",
    "no JSON": b"j{",
    "not UTF-8": b"j\xff\xfe",
    "no zlib": b"z123",
    "cut": (b"z" + zlib.compress(orjson.dumps({"a": "x" * 5_000})))[:-10],
    "bomb": BOMB,
    "deep": b"j" + b"[" * 100_000,
    "pickle": b"\x80\x04N.",
    "a list": b"j[1]",
    "a number": b"z" + zlib.compress(b"1"),
}


def test_a_row_that_is_none_of_ours_is_missing(client: redis.Redis, name: str) -> None:
    features = app.FeatureRows(client, name)
    features.put({"good": {"a": 1}})
    for entity, raw in BROKEN.items():
        client.set(f"{name}:{entity}", raw, px=60_000)
    client.rpush(f"{name}:of another type", "x")
    found = features.get(["good", "of another type", *BROKEN])
    assert found == {"good": {"a": 1}, "of another type": None, **dict.fromkeys(BROKEN)}


def test_a_bomb_is_unpacked_to_its_limit_alone(
    client: redis.Redis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is what zlib is told, so that no more is ever in memory."""
    unpacked: list[int] = []

    class Zlib:
        error, compress = zlib.error, staticmethod(zlib.compress)

        class decompressobj:  # noqa: N801
            def decompress(self, raw: bytes, limit: int) -> bytes:
                text = zlib.decompressobj().decompress(raw, limit)
                unpacked.append(len(text))
                return text

    monkeypatch.setattr(app, "zlib", Zlib)
    client.set(f"{name}:bomb", BOMB, px=60_000)
    assert app.FeatureRows(client, name).get(["bomb"]) == {"bomb": None}
    assert unpacked == [app.MAX_ROW_BYTES]


def test_a_row_that_could_not_be_read_back_is_refused(client: redis.Redis, name: str) -> None:
    features = app.FeatureRows(client, name)
    row = {"a": "x" * 2 * app.MAX_ROW_BYTES}
    with suppress(ValueError, app.CacheError):
        features.put({"big": row})
        assert features.get(["big"])["big"] is not None


def test_no_rows(client: redis.Redis, name: str) -> None:
    features = app.FeatureRows(client, name)
    assert (features.put({}), features.get([])) == (0, {})

"""Script 03 on Redis: pools, leases, other processes, and a Redis killed, stopped, full, refusing.

What a cache left is read by another cache, or by a bare client; what it sent is counted by the
server, which is these tests' own. Time limits only end a test that hangs: nothing is measured.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import redis
from running import until
from script03 import TIMEOUT_S, WAIT_S, Source, app, finished, start
from services import ROOT

PATIENT = f"?timeout={TIMEOUT_S}&socket_timeout={TIMEOUT_S}&socket_connect_timeout={TIMEOUT_S}"
IMPATIENT_S = 0.5  # of a client whose server is stopped
PLAIN = app.Policy(jitter=0.0, beta=0.0, l1_ttl_s=0.0, stale_if_error_s=0.0, lease_s=60.0)
COPYING = replace(PLAIN, l1_ttl_s=60.0)  # reads in this process are answered here
Make = Callable[..., Any]
Caplog = pytest.LogCaptureFixture


@pytest.fixture
def make(own: Any, root: redis.Redis) -> Iterator[Make]:
    """`make(policy)`: a cache with a client of its own, as another process would have it."""
    with ExitStack() as stack:

        def made(policy: Any = PLAIN, client: Any = None, timeout_s: float = TIMEOUT_S,
                 **options: Any) -> Any:  # fmt: skip
            client = client or stack.enter_context(app.connect(own.url, timeout_s))
            return app.TieredCache("test:x", client, policy, **options)

        yield made


def put(cache: Any, *keys: str, value: object = "old", tags: Sequence[str] = ()) -> None:
    for key in keys:
        assert cache.get_or_load(key, lambda: value, tags=tags) == value


def has_copy(cache: Any, *keys: str) -> bool:
    return any(cache.l1.stale(cache.name(key)) for key in keys)


class Away(app.CircuitBreaker):  # type: ignore[misc]
    """Redis is away from one cache and from no other, by a clock that is moved by hand."""

    def __init__(self) -> None:
        self.clock = app.ManualClock()
        super().__init__(3, 1.0, self.clock)

    def begin(self) -> None:
        _ = [self.failure() for _ in range(3)]
        assert not self.allow()

    def end(self) -> None:
        self.clock.now += 1


# ── Connections ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["socket_timeout", "socket_connect_timeout", "timeout"])
def test_every_wait_is_bounded_and_a_call_is_one_attempt(name: str) -> None:
    pool = app.connect("redis://127.0.0.1:1/0").connection_pool
    assert pool.connection_kwargs.get(name, pool.timeout) == 0.25
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?max_connections=1"
        with app.connect(url, 0.05) as client:
            held = name == "timeout" and client.connection_pool.get_connection
            error = start(held or client.get, *[] if held else ["key"]).exception(WAIT_S)
            assert isinstance(error, redis.ConnectionError | redis.TimeoutError)
        silent.setblocking(False)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()


@pytest.mark.parametrize("kind", [redis.ConnectionPool, redis.BlockingConnectionPool])
def test_a_pool_that_is_exhausted_is_no_failure_of_redis(own: Any, make: Make, kind: Any) -> None:
    waits = {} if kind is redis.ConnectionPool else {"timeout": 0.01}
    pool = kind.from_url(own.url, max_connections=4, **waits)
    cache = make(client=redis.Redis.from_pool(pool))
    held = [pool.get_connection() for _ in range(4)]
    assert app.in_threads(64, lambda i: cache.get_or_load(f"k{i}", lambda: i)) == list(range(64))
    assert cache.stats()["redis_errors"] >= 64
    for one in held:
        pool.release(one)
    answers = app.in_threads(64, lambda i: cache.get_or_load(f"l{i}", lambda: i))
    assert answers == list(range(64))
    assert (cache.breaker.allow(), cache.stats()["breaker_opened"]) == (True, 0)
    put(cache, "after")
    assert make().get_many(["after"]) == {"after": "old"}


UNFIT: dict[str, tuple[Any, type[Exception], str]] = {
    "cluster": (object.__new__(redis.RedisCluster), TypeError, r"redis\.cluster"),
    "asyncio": (redis.asyncio.Redis(), TypeError, r"redis\.asyncio"),
    "decoding": (redis.Redis(decode_responses=True), ValueError, "decode_responses"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("kind", ["TieredCache", "Listener", "Sessions", "TokenBucket"])
def test_a_client_that_will_not_do_is_refused_by_name(name: str, kind: str) -> None:
    client, error, words = UNFIT[name]
    others = {"Listener": (app.TieredCache("x"), client), "TokenBucket": (client, 1, 1)}
    arguments = ("x", client) if kind == "TieredCache" else others.get(kind, (client, "x"))
    with pytest.raises(error, match=words):
        getattr(app, kind)(*arguments)


# ── The lease between processes ─────────────────────────────────────────────────────

ANOTHER_PROCESS = """
import importlib, sys
app = importlib.import_module("03_caching_strategies")
client = app.connect(sys.argv[1], float(sys.argv[2]))
cache = app.TieredCache("test:x", client, app.Policy(lease_s=60.0))
"""


@contextmanager
def another_process(url: str, work: str) -> Iterator[Any]:
    """Python that does `work` with a `cache` of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", ANOTHER_PROCESS + work, url, str(TIMEOUT_S)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def calls(root: redis.Redis) -> dict[str, int]:
    """What the server has been asked, scripts' commands included."""
    stats = root.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(about["calls"]) for name, about in stats.items()}


def test_four_processes_load_once_and_who_waits_only_reads(own: Any, root: redis.Redis) -> None:
    """Writes are what the server's own table of commands says they are."""
    writing = {name for name, about in root.command().items() if "write" in about["flags"]}
    answers, loads, *_ = app.stampede_of_processes(app.Workspace(own.url + PATIENT, root, "Redis"))
    writes = {name: count for name, count in calls(root).items() if name in writing}
    assert (answers, loads) == (1_000, 1)
    assert 2 <= sum(writes.values()) <= 10, writes
    assert len(root.keys()) == 1  # the value, and no lease


def test_who_waits_takes_over_from_a_process_that_is_killed(
    own: Any, root: redis.Redis, make: Make
) -> None:
    cache, was_alive = make(replace(PLAIN, load_timeout_s=60.0)), []
    lease, held = cache.name("key") + ":lease", "print('x', flush=True) or sys.stdin.read()"
    with another_process(own.url, f"cache.get_or_load('key', lambda: {held})") as holder:
        assert holder.stdout.readline() == "x\n"
        answer = start(cache.get_or_load, "key", lambda: was_alive.append(holder.poll()) or "mine")
        until(lambda: calls(root).get("exists", 0) > 3)
        holder.kill()
        holder.wait()
        assert 30_000 < root.pttl(lease) <= 60_000
        root.pexpire(lease, 1)  # rather than wait a minute
        assert finished([answer]) == ["mine"]
    assert was_alive == [-9]
    assert make().get_many(["key"]) == {"key": "mine"}
    assert root.exists(lease) == 0


@pytest.mark.parametrize("how", ["ends", "is taken over", "is invalidated"])
def test_a_fill_whose_lease_is_gone_is_refused(root: redis.Redis, make: Make, how: str) -> None:
    slow, other, source = make(COPYING), make(COPYING), Source("old", held=True)
    answer = start(slow.get_or_load, "key", source)
    until(lambda: source.loads)
    if how == "is invalidated":
        assert other.invalidate("key") is True
    else:
        assert root.delete(slow.name("key") + ":lease") == 1  # as the server does at its end
    if how == "is taken over":
        put(other, "key", value="new")
    source.release()
    assert finished([answer]) == ["old"]  # what its own loader said
    assert (slow.stats()["fills_refused"], has_copy(slow, "key")) == (1, False)
    assert make().get_many(["key"]) == ({"key": "new"} if how == "is taken over" else {})


# ── Copies in other processes ───────────────────────────────────────────────────────


@pytest.fixture
def heard(make: Make) -> Iterator[Any]:
    """A cache with a listener, and copies of a, b, a long key, and one with tags."""
    cache = make(COPYING)
    with closing(app.Listener(cache, cache.client)) as listener:
        assert listener.ready.wait(WAIT_S)
        put(cache, "a", "b", "k" * 10_000)
        put(cache, "tagged", tags=["tag", "more"])
        yield cache


def test_what_another_process_invalidates_is_dropped_here(own: Any, make: Make, heard: Any) -> None:
    work, keys = "cache.invalidate('a', 'k' * 10_000, tags=['tag'])", ["a", "k" * 10_000, "tagged"]
    assert [has_copy(heard, key) for key in keys] == [True] * 3
    with another_process(own.url, work) as process:
        assert process.wait(WAIT_S) == 0
    until(lambda: not has_copy(heard, *keys))
    assert has_copy(heard, "b")
    assert make().get_many([*keys, "b"]) == {"b": "old"}


def test_a_listener_that_is_cut_off_connects_again_and_drops_all(
    root: redis.Redis, make: Make, heard: Any
) -> None:
    assert root.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    until(lambda: not has_copy(heard, "a", "b", "tagged"))  # though nobody invalidated them
    put(heard, "a", "b")
    make().invalidate("a")
    until(lambda: not has_copy(heard, "a"))
    assert has_copy(heard, "b")


def test_a_listener_waits_for_a_redis_that_is_not_there_yet(own: Any, make: Make) -> None:
    cache = make(COPYING)
    own.kill()
    with closing(app.Listener(cache, cache.client)) as listener:
        put(cache, "key")
        assert (has_copy(cache, "key"), listener.ready.is_set()) == (True, False)
        own.start()
        assert listener.ready.wait(WAIT_S)
        assert not has_copy(cache, "key")  # dropped before it is said to listen


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_foreign_message_does_no_harm(root: redis.Redis, make: Make, heard: Any) -> None:
    for junk in (b"", b"*", b"\xff\xfe", b"k" * 10_000, heard.name("nobody's").encode()):
        assert root.publish(heard.namespace, junk) == 1
    make().invalidate("a")
    until(lambda: not has_copy(heard, "a"))
    assert (has_copy(heard, "b"), has_copy(heard, "tagged")) == (True, True)


def test_a_user_without_rights_on_channels(
    own: Any, root: redis.Redis, make: Make, caplog: Caplog
) -> None:
    """The default of Redis 7: his invalidation is done, but the other processes are not told."""
    rights = ["reset", "on", ">secret", "~*", "resetchannels", "+@all"]
    root.execute_command("ACL", "SETUSER", "mute", *rights)
    client = app.connect(f"redis://mute:secret@127.0.0.1:{own.port}/0", TIMEOUT_S)
    cache, other, source = make(client=client), make(), Source("new")
    put(other, "a", "b", tags=["tag"])
    for loads, invalidated in ((2, {"tags": ["tag"]}), (4, {"keys": ["a", "b"]})):
        assert cache.invalidate(*invalidated.get("keys", ()), tags=invalidated.get("tags", ()))
        assert other.get_many(["a", "b"]) == {}
        answers = [cache.get_or_load(key, source, tags=["tag"]) for key in "ab" * 20]
        assert (answers, source.loads) == (["new"] * 40, loads)
    (warning,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "permission" in warning.getMessage()
    with closing(app.Listener(deaf := make(client=client), client)) as listener:
        until(lambda: deaf.stats()["untold"] > 1)
        assert not listener.ready.is_set()
    assert caplog.text.count("permission") == 2  # said once more, by another cache
    client.close()


# ── Redis is away ───────────────────────────────────────────────────────────────────

each_outage = pytest.mark.parametrize("how", ["killed", "stopped"])


@each_outage
def test_three_failures_open_the_breaker_and_a_probe_closes_it(
    make: Make, trouble: Any, how: str
) -> None:
    away = Away()
    cache, impatient = make(breaker=away), make(timeout_s=IMPATIENT_S).client
    put(cache, "before")
    until(lambda: app.failure(impatient.ping) is None)
    patient, cache.client = cache.client, impatient
    with trouble(how):
        put(cache, *(f"k{i}" for i in range(20)))
        names, stats = "redis_errors breaker_opened short_circuited loads".split(), cache.stats()
        assert [stats[name] for name in names] == [3, 1, 17, 21]
        away.end()
        put(cache, "probe", "after the probe")
        assert (cache.stats()["redis_errors"], cache.breaker.allow()) == (4, False)
    cache.client = patient
    put(cache, "early")  # the breaker asks nobody yet
    assert make().get_many(["early"]) == {}
    until(lambda: away.end() or put(cache, "late") or cache.breaker.allow())
    assert make().get_many(["late"]) == {"late": "old"}
    assert cache.stats()["breaker_opened"] == 1


@each_outage
def test_under_load_no_caller_sees_an_outage(make: Make, trouble: Any, how: str) -> None:
    breaker, answers, is_ending = app.CircuitBreaker(3, 0.1), list[bool](), list[bool]()
    cache = make(replace(PLAIN, ttl_s=0.2), timeout_s=IMPATIENT_S, breaker=breaker)

    def read(i: int) -> None:
        while not is_ending:
            answers.append(cache.get_or_load(f"k{i % 4}", lambda: i % 4) == i % 4)

    def more(counted: str) -> None:
        before, goal = cache.stats()[counted], len(answers) + 200
        until(lambda: cache.stats()[counted] > before and len(answers) > goal, counted)

    reading = [start(read, i) for i in range(8)]
    try:
        more("l2_hits")
        with trouble(how):
            more("short_circuited")
        more("l2_hits")
    finally:
        is_ending.append(True)
    assert finished(reading) == [None] * 8
    assert all(answers)


FIRST_CALLS: dict[str, Callable[[Any], object]] = {
    "get_or_load": lambda cache: cache.get_or_load("other", lambda: 1),
    "tags": lambda cache: cache.get_or_load("other", lambda: 1, tags=["tag"]),
    "get_many": lambda cache: cache.get_many(["other", "another"]),
    "load_many": lambda cache: cache.get_many(["other"], lambda keys: dict.fromkeys(keys, 1)),
    "itself": lambda cache: cache.get_or_load("old 0", lambda: "new"),
    "invalidate": lambda cache: cache.invalidate("other"),
}


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_what_redis_missed_is_made_up_for_before_the_first_call(make: Make, first: str) -> None:
    away, other, old = Away(), make(), [f"old {i}" for i in range(250)]
    cache = make(breaker=away)
    other.get_many([*old, "kept"], lambda keys: dict.fromkeys(keys, "old"))
    put(other, "tagged", tags=["gone"])
    away.begin()
    assert (cache.invalidate(*old), cache.invalidate(tags=["gone"])) == (False, False)
    assert len(other.get_many([*old, "tagged"])) == 251  # for others, until Redis answers us
    away.end()
    FIRST_CALLS[first](cache)
    found = {"old 0": "new"} if first == "itself" else {}
    assert other.get_many([*old, "tagged", "kept"]) == {**found, "kept": "old"}
    assert cache.breaker.allow()


def test_the_replay_outlives_a_second_outage(own: Any, make: Make) -> None:
    """In which Redis is killed in earnest, just when the replay begins."""
    away, other = Away(), make()
    cache = make(breaker=away)
    away.begin()
    assert cache.invalidate("key") is False
    away.end()
    own.kill()
    put(cache, "key", value="source")
    own.start()
    until(lambda: put(other, "key") or other.get_many(["key"]))
    until(lambda: away.end() or put(cache, "other") or cache.breaker.allow())
    assert other.get_many(["key"]) == {}


class Watched(redis.Redis):
    """Calls `after` once, when a pipeline has its answers and its owner has not."""

    after: Callable[[], object] | None = None

    def pipeline(self, *args: Any, **kwargs: Any) -> Any:
        pipe: Any = super().pipeline(*args, **kwargs)
        execute = pipe.execute

        def watched(*args: Any, **kwargs: Any) -> Any:
            replies, work, self.after = execute(*args, **kwargs), self.after, None
            _ = work and work()
            return replies

        pipe.execute = watched
        return pipe


def lose() -> None:
    raise redis.ConnectionError


@pytest.mark.parametrize("answered", [0, 1, 2], ids=["lease", "tags", "fill"])
def test_an_answer_that_is_lost_leaves_no_lease(
    own: Any, root: redis.Redis, make: Make, answered: int
) -> None:
    steps = [*[lambda: setattr(client, "after", steps.pop(0))] * answered, lose]
    with Watched.from_url(own.url) as client:
        cache, client.after = make(client=client), steps.pop(0)
        put(cache, "key", tags=["tag"])
        put(cache, "other")
    assert (steps, cache.stats()["redis_errors"]) == ([], 1)
    assert not root.keys("*:lease")


def test_while_one_caller_makes_up_for_what_redis_missed_the_others_wait(
    own: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REDIS_TIMEOUT_S", TIMEOUT_S)  # the others' patience
    keys = [str(i) for i in range(24)]
    with Watched.from_url(own.url) as client:
        cache, client.after = make(client=client), lose  # so its lease is to be dropped
        put(cache, "key")
        app.in_threads(len(keys), lambda i: put(cache, keys[i]))
    assert make().get_many(keys) == dict.fromkeys(keys, "old")


def test_an_invalidation_made_while_one_of_its_key_is_replayed_is_not_lost(
    own: Any, make: Make
) -> None:
    away, other = Away(), make()
    with Watched.from_url(own.url) as client:
        cache = make(client=client, breaker=away)
        away.begin()
        assert cache.invalidate("key", "another") is False
        away.end()
        again: list[object] = []
        client.after = lambda: put(other, "key", "another") or again.append(cache.invalidate("key"))
        put(cache, "first")
        assert again == [False]  # kept, it says
        put(cache, "second")
    assert other.get_many(["key", "another"]) == {"another": "old"}


def test_more_invalidations_than_are_kept_are_an_error(make: Make) -> None:
    away, other = Away(), make()
    cache = make(COPYING, breaker=away)
    put(cache, "0", "9999", "one more")
    away.begin()
    for i in range(20):  # loads in an outage leave room for invalidations
        keys = [f"{i}:{j}" for j in range(1_000)]
        assert cache.get_many(keys, lambda keys: dict.fromkeys(keys, 1)) == dict.fromkeys(keys, 1)
    assert cache.invalidate(*map(str, range(10_000))) is False
    with pytest.raises(app.InvalidationLost):
        cache.invalidate("one more")
    assert not has_copy(cache, "0", "9999", "one more")
    assert cache.invalidate("0", "77") is False  # they wait already
    away.end()
    put(cache, "other")
    assert other.get_many(["0", "9999", "one more"]) == {"one more": "old"}


# ── Redis refuses ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_redis_that_takes_no_writes_costs_nobody_an_error(
    make: Make, trouble: Any, how: str, caplog: Caplog
) -> None:
    cache, other, many = make(COPYING), make(), dict.fromkeys("mn", "old")
    put(other, "there", "there too", "gone")
    with trouble(how):
        assert cache.get_or_load("there", lambda: "again") == "old"
        for _ in range(2):
            put(cache, "key")
            put(cache, "tagged", tags=["a", "b"])
            assert cache.get_many(many, lambda keys: many) == many
        assert cache.stats()["loads"] == 3  # then kept in this process
        assert cache.get_or_load("there too", lambda: "again") == "old"  # reads go on
        assert cache.invalidate("gone") is (how == "full")
        put(cache, *"12345")
    assert cache.stats()["redis_errors"] >= 4
    assert (cache.breaker.allow(), cache.stats()["breaker_opened"]) == (True, 0)  # it answers
    assert len([one for one in caplog.records if one.levelno >= logging.WARNING]) == 1
    put(cache, "next")
    assert other.get_many(["gone", "next", "key"]) == {"next": "old"}


@pytest.mark.parametrize("forgets", [False, True])
def test_all_that_a_cache_leaves_expires_and_no_script_is_missed(
    root: redis.Redis, make: Make, forgets: bool
) -> None:
    cache, leased = make(replace(PLAIN, stale_if_error_s=30.0)), list[int]()

    def load() -> str:
        leased.extend(map(root.pttl, root.keys("*:lease")))
        return "old"

    steps: list[Callable[[], object]] = [
        lambda: cache.get_or_load("long", load, ttl_s=3600, tags=["tag"]),
        lambda: put(cache, "tagged", tags=["tag", "other"]),
        lambda: cache.get_or_load("none", lambda: None, ttl_s=3600),
        lambda: cache.get_many(["m", "n"], lambda keys: dict.fromkeys(keys, 3)),
        lambda: cache.invalidate("m"),
        lambda: cache.invalidate(tags=["other"]),
        lambda: app.failure(lambda: cache.get_or_load("fails", lambda: 1 // 0)),
    ]
    for step in steps:
        _ = root.script_flush() if forgets else None
        step()
    names, stats = "redis_errors loads load_errors fills_refused".split(), cache.stats()
    assert [stats[name] for name in names] == [0, 4, 1, 0]
    found = cache.get_many(["long", "tagged", "none", "m", "n", "fails"])
    assert found == {"long": "old", "none": None, "n": 3}
    assert (len(leased), 0 < leased[0] <= 60_000) == (1, True)
    left = {name.decode(): root.pttl(name) for name in root.scan_iter()}
    lives = [left.pop(cache.name(name)) for name in ("long", "none")]
    assert 1000 * 3_600 < lives[0] <= 1000 * 3_630 < left[cache.name("tag", "tag")]
    assert lives[1] <= 1000 * (PLAIN.negative_ttl_s + 30)
    assert all(life_ms > 0 and not name.endswith(":lease") for name, life_ms in left.items())


# ── Sessions ────────────────────────────────────────────────────────────────────────


def session_key(token: str) -> str:
    return f"test:s:{hashlib.sha256(token.encode()).hexdigest()}"


def test_a_session_slides_and_its_token_is_nowhere(root: redis.Redis) -> None:
    sessions, user = app.Sessions(root, "test:s", idle_s=100.0), {"id": 7, "roles": ["admin"]}
    token, another = sessions.create(user), sessions.create({"id": 8})
    key = session_key(token)
    assert (sessions.get(token), sessions.get(another)) == (user, {"id": 8})
    assert min(len(token), len(another)) >= 43  # 256 bits in base64
    root.pexpire(key, 5_000)  # as after 95 s
    assert sessions.get(token) == user
    assert 5_000 < root.pttl(key) <= 100_000  # begun anew
    for forged in ("", token[:-1], key, key.removeprefix("test:s:"), "*"):
        assert sessions.get(forged) is None
    assert token.encode() not in b"".join([*root.scan_iter(), root.get(key)])
    sessions.end(token)
    assert (sessions.get(token), sessions.get(another)) == (None, {"id": 8})


@pytest.mark.parametrize("raw", [b"", b"foreign", b"\x80\x04N.", b"{", b"1", b'"x"', b"[1]"])
def test_foreign_bytes_let_nobody_in(root: redis.Redis, raw: bytes) -> None:
    root.set(session_key("token"), raw)
    assert app.Sessions(root, "test:s").get("token") is None


def test_stores_that_are_away_say_so() -> None:
    with app.connect("redis://127.0.0.1:1/0") as nowhere:
        sessions, bucket = app.Sessions(nowhere, "test"), app.TokenBucket(nowhere, 1, 1)
        for call in (sessions.get, sessions.end, bucket.wait_s, lambda _: sessions.create({})):
            with pytest.raises(redis.ConnectionError):
                call("test")


# ── A token bucket ──────────────────────────────────────────────────────────────────


def at_ms(root: redis.Redis) -> float:
    """When the bucket was last touched, by the server's clock."""
    return float(root.hget("bucket", "at") or "nan")


def touched(root: redis.Redis, seconds: float) -> None:
    """As if the last touch had been `seconds` earlier."""
    root.hset("bucket", "at", repr(at_ms(root) - 1000 * seconds))


def test_eight_clients_get_exactly_the_capacity(own: Any, root: redis.Redis) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(app.connect(own.url, TIMEOUT_S)) for _ in range(8)]
        buckets = [app.TokenBucket(client, rate_per_s=0.001, capacity=50) for client in clients]
        waits = app.in_threads(8, lambda i: [buckets[i].wait_s("bucket") for _ in range(40)])
    assert [wait for part in waits for wait in part].count(0) == 50
    assert 50_000_000 < root.pttl("bucket") <= 50_001_000


def test_a_bucket_refills_at_its_rate_up_to_its_capacity(root: redis.Redis) -> None:
    bucket = app.TokenBucket(root, rate_per_s=0.01, capacity=5)
    assert [bucket.wait_s("bucket") for _ in range(5)] == [0] * 5
    for seconds, more in ((100, 1), (350, 3), (10_000, 5)):
        assert bucket.wait_s("bucket") > 0
        touched(root, seconds)
        waits = [bucket.wait_s("bucket") for _ in range(more + 1)]
        assert (waits[:-1], waits[-1] > 0) == ([0] * more, True)
    assert app.TokenBucket(root, 0.01, 5).wait_s("another") == 0


@pytest.mark.parametrize("rate", [0.0003, 0.007, 0.01])
def test_retry_after_is_true_to_the_millisecond(root: redis.Redis, rate: float) -> None:
    """However often one asks, it names the same moment, which exact fractions give."""
    bucket = app.TokenBucket(root, rate, capacity=1)
    assert bucket.wait_s("bucket") == 0
    allowed_at_ms = Fraction(at_ms(root)) + 1000 / Fraction(rate)
    for _ in range(5):
        wait_s = bucket.wait_s("bucket")
        named_ms = Fraction(at_ms(root)) + round(1000 * wait_s)
        assert -Fraction(1, 10) < named_ms - allowed_at_ms < Fraction(11, 10)
    touched(root, wait_s)
    assert bucket.wait_s("bucket") == 0


def test_a_clock_that_was_set_back_an_hour(root: redis.Redis) -> None:
    bucket = app.TokenBucket(root, rate_per_s=0.05, capacity=2)
    assert (bucket.wait_s("bucket"), bucket.wait_s("bucket")) == (0, 0)
    touched(root, -3600)
    assert 0 < bucket.wait_s("bucket") <= 40  # what a full one takes, and no more
    touched(root, 20)  # it refills from now on, not in an hour
    assert (bucket.wait_s("bucket"), bucket.wait_s("bucket") > 0) == (0, True)


@pytest.mark.parametrize("name", ["rate_per_s", "capacity"])
@pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf")])
def test_a_bucket_that_lets_nobody_in_or_everybody_is_refused(
    root: redis.Redis, name: str, number: float
) -> None:
    with pytest.raises(ValueError, match=name):
        app.TokenBucket(root, **{"rate_per_s": 1.0, "capacity": 1, name: number})

"""Script 05 beside its services: profiles through Redis, events through RabbitMQ, and each server
killed while the script runs. What is killed or frozen here are servers of this file's own."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pika
import pytest
import redis
import running
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker
from pymongo.collection import Collection
from running import (
    PATIENT,
    SCRIPTS,
    SECRET,
    WAIT_S,
    Main,
    Recorded,
    Run,
    at_once,
    demos_of,
    missing,
    until,
)
from services import ROOT, load_script, mongo_client, postgres_engine, redis_client

import config
import servers

ds: Any = load_script("05_realworld_data_science")
SCRIPT = SCRIPTS["05"]
TODAY = date(2026, 1, 31)
NOBODY = "127.0.0.1:1"  # where nobody listens
FILES_QUEUE = "module8-customers"  # of events about a file's customers


@pytest.fixture(scope="module")
def module_own() -> Iterator[dict[str, Any]]:
    try:
        with servers.running(*servers.SERVERS) as started:
            yield started
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)


@pytest.fixture
def own(module_own: dict[str, Any]) -> dict[str, Any]:
    """The four servers, to kill; they run."""
    for server in module_own.values():
        server.start()
    return module_own


def urls(own: dict[str, Any]) -> dict[str, str]:
    return {server.variable: server.url for server in own.values()} | PATIENT


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


def killing(patch: pytest.MonkeyPatch, owner: object, name: str, nth: int, server: Any) -> None:
    """Kill `server` at the `nth` call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == nth:
            server.kill()
        return original(*args, **options)

    patch.setattr(owner, name, call)


# ── Profiles ────────────────────────────────────────────────────────────────────────


class Purchases(dict[str, int]):
    """What a profile is made of: a number a customer."""

    def compute(self, customer_id: str) -> dict[str, int]:
        return {"purchases": self.get(customer_id, 0)}


class Counting(redis.Redis):
    asked = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        return super().execute_command(*args, **options)


@pytest.mark.parametrize("name", ["7", "", "a:b*", "Zoë\n", "x" * 10_000])
def test_a_profile_is_computed_once_until_its_customer_buys(
    redis_url: str, redis_prefix: str, name: str
) -> None:
    purchases = Purchases()
    with redis_client(redis_url) as client:
        here, there = (ds.ProfileService(client, redis_prefix, purchases.compute) for _ in "12")
        assert [one.get(name) for one in (here, here, there)] == [{"purchases": 0}] * 3
        assert (here.computed, there.computed) == (1, 0)
        (key,) = client.scan_iter(f"{redis_prefix}*")
        assert 0 < client.ttl(key) <= ds.PROFILE_TTL_S
        purchases[name] = 1
        assert here.get(name) == {"purchases": 0}  # nobody has told the cache
        here.forget(name)
        assert [one.get(name) for one in (there, here)] == [{"purchases": 1}] * 2
        assert (here.computed, there.computed) == (1, 1)


@pytest.mark.parametrize("client", [None, redis_client(f"redis://{NOBODY}")], ids=["unset", "away"])
def test_without_redis_each_profile_is_computed(client: Any) -> None:
    purchases = Purchases()
    service = ds.ProfileService(client, "test", purchases.compute)
    for n in range(3):
        purchases["7"] = n
        assert service.get("7") == {"purchases": n}
        service.forget("7")
    assert service.computed == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_redis_lost_in_the_middle_and_back(
    how: str, own: dict[str, Any], redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or frozen: then a question ends with its timeout, and the next are not asked."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(ds, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    purchases, server = Purchases(), own["redis"]
    # Waited for once, by who asks the frozen one; shorter, a busy machine would be an outage.
    patience = {"socket_timeout": 5.0, "retry": ds.Retry(ds.NoBackoff(), 0)}
    with Counting.from_url(server.url, **patience) as client:
        service = ds.ProfileService(client, redis_prefix, purchases.compute)
        assert [service.get("7") for _ in range(2)] == [{"purchases": 0}] * 2
        getattr(server, how)()
        asked, purchases["7"] = client.asked, 1
        try:
            assert [service.get("7") for _ in range(50)] == [{"purchases": 1}] * 50
        finally:
            server.resume()
        assert (service.computed, client.asked - asked) == (51, 1)
        server.start()
        clock.now_s += ds.REDIS_PAUSE_S
        service.forget("7")
        assert [service.get("7") for _ in range(2)] == [{"purchases": 1}] * 2
        assert service.computed == 52


# ── Events ──────────────────────────────────────────────────────────────────────────


def at_stake(numbers: range) -> dict[str, float]:
    return {f"customer {n}": n / 4 for n in numbers}


def bodies(numbers: range) -> list[dict[str, Any]]:
    """What a consumer is to see."""
    same, customers = {"kind": "at-risk", "day": TODAY.isoformat()}, at_stake(numbers).items()
    return [{**same, "customer_id": name, "at_stake": money} for name, money in customers]


class Work(NamedTuple):
    spool: Path
    queue: str
    url: str | None

    @contextmanager
    def publisher(self, numbers: range) -> Iterator[Any]:
        """With events for customers of these numbers."""
        broker = pika.URLParameters(self.url) if self.url else None
        with closing(ds.InsightPublisher(self.spool, self.queue, broker)) as made:
            made.add(TODAY, at_stake(numbers))
            yield made

    def taken(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The ids of all in the queue, which is then gone, and what they say, each once, sorted."""
        ids, said = [], dict[str, dict[str, Any]]()
        with closing(pika.BlockingConnection(pika.URLParameters(self.url))) as connection:
            channel = connection.channel()
            while (found := channel.basic_get(self.queue, auto_ack=True))[0]:
                _, about, body = found
                assert about.delivery_mode == 2
                ids.append(about.message_id)
                assert said.setdefault(about.message_id, json.loads(body)) == json.loads(body)
            channel.queue_delete(self.queue)
        return ids, sorted(said.values(), key=lambda one: int(one["customer_id"].split()[1]))


@pytest.fixture
def work(tmp_path: Path, rabbitmq_prefix: str, rabbitmq_url: str) -> Work:
    return Work(tmp_path / "spool", f"{rabbitmq_prefix}at-risk", rabbitmq_url)


def test_an_event_is_confirmed_once(work: Work) -> None:
    with work.publisher(range(40)) as first:
        first.add(TODAY, at_stake(range(30, 50)))  # 10 of them again
        assert len(first.waiting()) == 50
        assert (first.publish(), first.publish(), first.waiting()) == (50, 0, [])
    with work.publisher(range(50)) as second:  # as the next run
        second.add(TODAY, {"customer 0": 99.0})
        assert (second.waiting(), second.publish()) == ([], 0)
        second.add(date(2026, 2, 1), at_stake(range(3)))
        assert len(second.waiting()) == 3
    ids, said = work.taken()
    assert (len(ids), said) == (50, bodies(range(50)))


@pytest.mark.parametrize("url", [None, f"amqp://{NOBODY}/"], ids=["unset", "away"])
def test_events_wait_until_there_is_a_broker(work: Work, url: str | None) -> None:
    with work._replace(url=url).publisher(range(7)) as without:
        assert (without.publish(), len(without.waiting())) == (0, 7)
    with work.publisher(range(5, 9)) as later:
        assert (later.publish(), later.waiting()) == (9, [])
    assert work.taken()[1] == bodies(range(9))


def test_a_queue_of_another_kind_confirms_nothing_and_why_is_said(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(pika.BlockingConnection(pika.URLParameters(work.url))) as connection:
        connection.channel().queue_declare(work.queue, durable=True)
    with work.publisher(range(3)) as made:
        assert (made.publish(), len(made.waiting())) == (0, 3)
    (warned,) = (one for one in caplog.records if one.name == ds.__name__)
    assert warned.levelname == "WARNING"
    assert "PRECONDITION_FAILED" in warned.getMessage()
    assert work.taken() == ([], [])


def test_a_queue_that_is_gone_confirms_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with work.publisher(range(3)) as made:
        with monkeypatch.context() as patch:
            patch.setattr(BlockingChannel, "queue_declare", lambda *_, **__: None)
            assert (made.publish(), len(made.waiting())) == (0, 3)
        assert (made.publish(), made.waiting()) == (3, [])
    assert work.taken()[1] == bodies(range(3))


def test_two_publishers_of_one_spool_at_once(work: Work) -> None:
    together = threading.Barrier(2, timeout=WAIT_S)

    def publish(_: int) -> int:
        with work.publisher(range(100)) as made:
            together.wait()
            return int(made.publish())

    with ThreadPoolExecutor(2) as threads:
        sent = list(threads.map(publish, range(2)))
    with work.publisher(range(100)) as made:
        sent.append(made.publish())  # what either lost its connection over
        assert made.waiting() == []
    ids, said = work.taken()
    assert len(ids) >= sum(sent) >= 100
    assert said == bodies(range(100))


def is_registered(broker: Any, queue: str) -> bool:
    """RabbitMQ writes it a second later; killed before, it forgets the queue."""
    names = (broker.home / "data").rglob("names.dets")
    return any(queue.encode() in path.read_bytes() for path in names)


@pytest.mark.slow
def test_rabbitmq_killed_while_events_go_out(
    tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = own["rabbitmq"]
    work = Work(tmp_path / "spool", "test.killed", broker.url)
    with work.publisher(range(1)) as made:
        assert made.publish() == 1  # declares the queue
        until(lambda: is_registered(broker, work.queue), "the queue to be registered")
        made.add(TODAY, at_stake(range(300)))
        with monkeypatch.context() as patch:
            killing(patch, BlockingChannel, "basic_publish", 100, broker)
            confirmed = made.publish()
        assert 0 < confirmed < 299
        assert (len(made.waiting()), made.publish()) == (299 - confirmed, 0)  # it is down
        broker.start()
        until(lambda: made.publish() >= 0 and made.waiting() == [], "all to be confirmed")
    assert work.taken()[1] == bodies(range(300))


def publish_and_die(work: Work, nth: int) -> None:
    """SIGKILL at the `nth` message."""
    suicide = SimpleNamespace(kill=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patch, work.publisher(range(50)) as made:
        killing(patch, BlockingChannel, "basic_publish", nth, suicide)
        made.publish()


@pytest.mark.slow
def test_a_publisher_that_is_killed_leaves_its_events_to_the_next(work: Work) -> None:
    spawn = multiprocessing.get_context("spawn")
    for nth in (1, 30):
        process = spawn.Process(target=publish_and_die, args=(work, nth))
        process.start()
        process.join(WAIT_S)
        assert process.exitcode == -signal.SIGKILL
    with work.publisher(range(50)) as made:
        assert (made.publish() > 0, made.waiting()) == (True, [])
    assert work.taken()[1] == bodies(range(50))


# ── The script: refused, or its servers killed while it runs ────────────────────────


@pytest.mark.parametrize("service", SCRIPT.services, ids=lambda service: service.name)
def test_a_wrong_password(
    service: running.Service, main: Main, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(service.fixture)
    wrong = re.sub(r":[^:@]*@", f":{SECRET}@", url)
    ended = main("--only", "dirty", **PATIENT, **{service.variable: wrong})
    assert ended.returncode == 2
    assert re.match(rf"error: {service.variable}: \S+://\w*:\*\*\*@", ended.stderr)
    assert re.search("(?i)auth|password|ACCESS_REFUSED", ended.stderr.partition("@")[2])
    assert SECRET not in ended.stdout + ended.stderr


ARGS = ("--scale", "2000", "--json")
OF_SERVICES = {"rfm", "live", "report"}  # whose results say what the services did
Figures = tuple[object, str]


def figures(home: Path, ended: running.Ended) -> Figures:
    """What no service may change: the other demos' results, and the page to the letter."""
    assert ended.returncode == 0, ended.stderr
    results = {name: one["result"] for name, one in demos_of(ended).items()}
    assert results.keys() > OF_SERVICES
    others = {name: result for name, result in results.items() if name not in OF_SERVICES}
    return others, (home / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    home = tmp_path_factory.mktemp("undisturbed")
    return figures(home, Run(SCRIPT.path, home)(*ARGS, "--offline"))


KILLED_AT: dict[str, tuple[object, str, int]] = {
    "postgres": (ds, "rfm_postgresql", 1),
    "mongo": (Collection, "aggregate", 1),
    "redis": (ds.Shop, "profile", 60),
    "rabbitmq": (BlockingChannel, "basic_publish", 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED_AT)
def test_no_figure_changes_where_a_server_is_killed(
    name: str,
    main: Main,
    own: dict[str, Any],
    undisturbed: Figures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        killing(patch, *KILLED_AT[name], own[name])
        ended = main(*ARGS, **urls(own))
    assert not own[name].is_running
    assert figures(main.home, ended) == undisturbed
    results: Any = {name: one["result"] for name, one in demos_of(ended).items()}
    lost = {"postgres": {"PostgreSQL"}, "mongo": {"MongoDB"}}.get(name, set())
    assert {"PostgreSQL", "MongoDB"} - results["rfm"].keys() == lost
    assert set(results["rfm"].values()) == {True}
    live = results["live"]
    assert live["stale"] == 0
    waited, sent = live["waiting_in_an_outage"], live["sent_after_it"]
    assert waited > 20
    assert (sent < waited) if name == "rabbitmq" else (sent == waited)


@pytest.mark.slow
def test_all_four_killed_as_a_user_runs_it(
    tmp_path: Path, own: dict[str, Any], undisturbed: Figures
) -> None:
    child = Run(SCRIPT.path, tmp_path).start(*ARGS[:2], PAUSE_AT="── 1. ", **urls(own))
    child.paused()
    for server in own.values():
        server.kill()
    child.go_on()
    ended = child.ended()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "; none failed.\n" in ended.stdout
    assert ended.stdout.count(" was lost on the way") == 2
    assert (tmp_path / "report.html").read_text("utf-8") == undisturbed[1]


# ── Whole runs, and what they leave ─────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("on_servers", [False, True], ids=["offline", "online"])
def test_a_whole_run(recorded: Recorded, on_servers: bool) -> None:
    whole = recorded("05", on_servers)
    output = whole.ended.stdout
    assert (whole.ended.returncode, whole.ended.stderr) == (0, ""), output
    assert re.search(r"^Demos: 8 in [\d.]+ s; none failed\.$", output, re.MULTILINE)
    assert max(map(len, output.partition("\n── 1. ")[2].splitlines())) <= config.WIDTH
    assert whole.left == set()
    engines = re.findall(r"^  (\w+): +[\d,]+ customers, (.*)", output, re.MULTILINE)
    assert {same for _, same in engines} <= {"the same"}
    needed = {"PostgreSQL", "MongoDB"} if on_servers else set[str]()
    assert {name for name, _ in engines} - {"Spark"} == needed
    assert (f"\nOn {SCRIPT.offline}" in output) is not on_servers


@pytest.mark.slow
def test_two_runs_at_once_agree_and_leave_a_page_each(tmp_path: Path, own: dict[str, Any]) -> None:
    homes = [tmp_path / name for name in ("1", "2")]
    ended = at_once(*(functools.partial(Run(SCRIPT.path, h), *ARGS, **urls(own)) for h in homes))
    assert [(one.returncode, one.stderr) for one in ended] == [(0, "")] * 2
    assert demos_of(ended[0]) == demos_of(ended[1])
    pages = [(home / "report.html").read_bytes() for home in homes]
    assert pages[0] == pages[1]
    left = [sorted(path.name for path in home.iterdir()) for home in homes]
    assert left == [["report.html", "tmp"]] * 2


def test_the_rights_that_the_guide_names_suffice(main: Main, own: dict[str, Any]) -> None:
    guide = (ROOT / "docs" / "05-data-science.md").read_text("utf-8").replace("\\\n", "")
    (granted,) = re.findall(r"^psql -c '(.+)'$", guide, re.MULTILINE)
    (rights,) = re.findall(r"^redis-cli ACL SETUSER module8 on '>PASSWORD' (.+)$", guide, re.M)
    (role,) = re.findall(r"^```json\n(.+?)^```$", guide, re.MULTILINE | re.DOTALL)
    with postgres_engine(own["postgres"].url).begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE module8 LOGIN PASSWORD '{SECRET}'")
        connection.exec_driver_sql("REVOKE ALL ON DATABASE app FROM PUBLIC")
        connection.exec_driver_sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        connection.exec_driver_sql(granted)
    with mongo_client(own["mongo"].url) as client:
        client.admin.command(json.loads(role))
        client.admin.command("createUser", "module8", pwd=SECRET, roles=["module8"])
    with redis_client(own["redis"].url) as client:
        client.execute_command(
            "ACL", "SETUSER", "module8", "on", f">{SECRET}", *shlex.split(rights)
        )
    restricted = {
        name: re.sub("//[^@]*@", f"//module8:{SECRET}@", url)
        for name, url in urls(own).items() if name != "RABBITMQ_URL"
    }  # fmt: skip
    before = running.databases(own["mongo"].url)  # left by runs whose MongoDB was killed
    ended = main("--only", "rfm", "--only", "live", "--scale", "500", **{**urls(own), **restricted})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "was lost on the way" not in ended.stdout
    assert {"PostgreSQL", "MongoDB"} <= set(re.findall(r"^  (\w+): .*the same", ended.stdout, re.M))
    assert running.databases(own["mongo"].url) == before
    with redis_client(own["redis"].url) as client:
        refused = {entry["object"] for entry in client.acl_log()}
    assert {name for name in refused if not name.startswith("client|")} == set()  # its own name


def test_the_queue_of_a_run_is_deleted(
    main: Main, rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues, declare = list[str](), BlockingChannel.queue_declare
    noted = lambda self, queue, **kw: queues.append(queue) or declare(self, queue, **kw)  # noqa: E731
    monkeypatch.setattr(BlockingChannel, "queue_declare", noted)
    ended = main("--only", "live", "--scale", "500", RABBITMQ_URL=rabbitmq_url, **PATIENT)
    assert (ended.returncode, len(set(queues))) == (0, 1)
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq_url))) as connection:
        channel = connection.channel()
        with pytest.raises(ChannelClosedByBroker, match="404"):
            declare(channel, queues[0], passive=True)


# ── With a file: what waits on disk goes out with the next run ──────────────────────


@pytest.fixture
def args(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "orders.csv"
    with ds.connected() as db:
        ds.open_shop(db, 800, ds.np.random.default_rng(2))
        select = "SELECT customer_id, DATE '1970-01-01' + day::INT AS date, cents / 100 AS amount"
        db.execute(f"COPY ({select} FROM transactions) TO '{path}'")
    return "--transactions", str(path), "--only", "report"


def test_events_of_an_outage_go_out_with_the_next_run(
    main: Main, args: tuple[str, ...], rabbitmq_url: str
) -> None:
    spool = main.home / "at-risk.spool"
    assert main(*args).returncode == 0
    assert not spool.exists()  # nobody has asked for events
    assert main(*args, RABBITMQ_URL=f"amqp://{NOBODY}/").returncode == 0
    with closing(sqlite3.connect(spool)) as found:
        ((waiting,),) = found.execute("SELECT count(*) FROM events WHERE NOT confirmed")
    assert waiting > 20
    sent, again = (main(*args, "--json", RABBITMQ_URL=rabbitmq_url, **PATIENT) for _ in "12")
    counts: list[Any] = [demos_of(one)["report"]["result"] for one in (sent, again)]
    assert [(c["events_confirmed"], c["events_waiting"]) for c in counts] == [(waiting, 0), (0, 0)]
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq_url))) as connection:
        left = connection.channel().queue_delete(FILES_QUEUE)
    assert left.method.message_count == waiting


@pytest.mark.parametrize("content", [b"", b"no database " * 100], ids=["directory", "garbage"])
def test_a_spool_that_cannot_be_one(
    content: bytes, main: Main, args: tuple[str, ...], rabbitmq_url: str
) -> None:
    spool = main.home / "at-risk.spool"
    spool.write_bytes(content) if content else spool.mkdir()
    ended = main(*args, RABBITMQ_URL=rabbitmq_url)
    assert ended.returncode == 1
    assert re.search(r"failed: \w+Error: .*database", ended.stdout)
    assert spool.is_dir() or spool.read_bytes() == content

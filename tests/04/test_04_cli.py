"""Script 04 as a user runs it; what it shares with the others is in test_cli.py, test_urls.py and
test_tls.py."""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pika
import psutil
import pytest
import running
from pika.adapters import blocking_connection
from pika.exceptions import ChannelClosedByBroker
from running import SCRIPTS, SECRET, START, Ended, Main, Recorded, at_once, demos_of, until
from script04 import mq

import config

SCRIPT = SCRIPTS["04"]
Run = partial(running.Run, SCRIPT.path)
DEMOS = (  # in reading order, as the script's guide has them
    "routing", "confirms", "consumers", "retry", "poison", "head_of_line", "pipeline", "outbox",
    "crash",
)  # fmt: skip
LACKING = ["confirms", "consumers", "retry", "head_of_line", "crash"]  # something, without RabbitMQ


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


# ── Whole runs ──────────────────────────────────────────────────────────────────────


def sections(output: str) -> dict[str, str]:
    """Each demo's lines, by its name."""
    _, *parts = re.split(r"^── \d+\. ", output, flags=re.MULTILINE)
    return dict(zip(DEMOS, parts, strict=True))


def facts(section: str) -> dict[str, int]:
    found = re.findall(r"^  ([^:\n]+): +([\d,]+)$", section, re.MULTILINE)
    return {label: int(value.replace(",", "")) for label, value in found}


def rows(section: str) -> dict[str, list[float]]:
    """The numbers of a table's rows, by what is before them."""
    found = re.findall(r"^  (\D*?) *((?:(?: +|(?<=^  ))[\d.,]+)+)$", section, re.MULTILINE)
    return {name: [float(n.replace(",", "")) for n in of_it.split()] for name, of_it in found}


ROUTED = """  jobs/mail               mail
  jobs/print              none: returned
  events/user.created     mail, audit
  events/order.paid       audit, orders
  events/order.paid.late  audit
  notices/x               mail, audit
"""
POISON = {"delivered to the limit": 4, "mended and replayed": 2, "dead letters left": 0}
PIPELINE = {
    "published": 10_100, "users stored": 9_900, "effects on them": 9_900,
    "repeated without effect": 100, "failed at first": 500, "dead letters": 100,
}  # fmt: skip
OUTBOX = {
    "committed": 36, "rolled back": 4, "arrived": 37, "twice": 1, "lost": 0, "overtaken": 0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("on_servers", [False, True], ids=["offline", "online"])
def test_a_whole_run(recorded: Recorded, on_servers: bool) -> None:
    whole = recorded("04", on_servers)
    ended = whole.ended
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert re.search(r"^Demos: 9 in [\d.]+ s; none failed\.$", ended.stdout, re.MULTILINE)
    assert max(map(len, ended.stdout.splitlines())) <= max(config.WIDTH, len(START) + 10)
    assert whole.left == set()
    demos = sections(ended.stdout)
    needed = [name for name in DEMOS if "  note: needs RabbitMQ: " in demos[name]]
    assert needed == ([] if on_servers else LACKING)
    assert ROUTED in demos["routing"]
    assert {name: facts(demos[name]) for name in ("poison", "pipeline", "outbox")} == {
        "poison": POISON, "pipeline": PIPELINE, "outbox": OUTBOX,
    }  # fmt: skip
    waited = re.findall(r"([\d.]+) s", re.findall(r"waited: .*", demos["retry"])[0])
    pairs = zip(map(float, waited), (0.1, 0.2, 0.4), strict=True)
    assert all(waited_s >= planned_s for waited_s, planned_s in pairs)
    assert "→ handled at attempt 4, " in demos["retry"]


@pytest.mark.slow
def test_what_a_whole_run_on_servers_counts(recorded: Recorded) -> None:
    output = recorded("04", True).ended.stdout
    assert re.match(r"On RabbitMQ \d+\.\d+\.\d+\S*, MongoDB \d+\.\d+\.\d+\n", output), output
    demos = sections(output)
    for way, heard in {"confirms": "no error", "confirms and mandatory": "UnroutableError"}.items():
        assert re.search(f"^  {way}: +{heard}$", demos["confirms"], re.MULTILINE)
    rates = rows(demos["consumers"])
    assert {name: len(of_kind) for name, of_kind in rates.items()} == {
        "WorkerPoolConsumer": 4, "BatchConsumer": 4, "AsyncConsumer": 4,
    }  # fmt: skip
    assert min(map(min, rates.values())) > 0
    came = re.findall(r": +came after ([\d.]+) s and ([\d.]+) s", demos["head_of_line"])
    (blocked, _), (short, long) = [(float(first), float(second)) for first, second in came]
    assert short < 1.5 <= min(blocked, long)
    crash = facts(demos["crash"])
    assert (crash["confirmed"], crash["users stored"], crash["dead letters"]) == (4_000, 3_960, 40)
    assert crash["lost"] == 0


# ── Runs beside and after each other, and what they leave ───────────────────────────


def assert_gone(url: str, topologies: list[Any]) -> None:
    """No queue and no exchange of them exists."""
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        for one in topologies:
            names = [("queue", name) for name in one.queues()]
            names += [("exchange", one.name(name)) for name in (*one.exchanges, "dead-letters")]
            for kind, name in names:
                channel = connection.channel()
                with pytest.raises(ChannelClosedByBroker) as caught:
                    getattr(channel, f"{kind}_declare")(name, passive=True)
                assert caught.value.reply_code == 404


@pytest.mark.slow
def test_twice_in_a_row_leaves_nothing(
    main: Main, rabbitmq_url: str, mongo_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: list[Any] = []
    declare = mq.Topology.declare

    def noted(topology: Any, channel: Any) -> None:
        declared.append(topology)
        declare(topology, channel)

    monkeypatch.setattr(mq.Topology, "declare", noted)
    before = running.databases(mongo_uri)
    chosen = only("routing", "poison", "head_of_line", "pipeline", "outbox")
    results = []
    for _ in range(2):
        ended = main(
            *chosen, "--scale", "300", "--json", RABBITMQ_URL=rabbitmq_url, MONGODB_URI=mongo_uri
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        results.append({k: v for k, v in demos_of(ended).items() if k != "head_of_line"})
    assert results[0] == results[1]
    counts: Any = results[0]["pipeline"]["result"]
    assert (counts["published"], counts["users_stored"], counts["dead_letters"]) == (303, 297, 3)
    assert len({one.prefix.partition(".")[0] for one in declared}) == 2
    assert len(declared) == 10
    assert_gone(rabbitmq_url, declared)
    assert running.databases(mongo_uri) == before


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path, rabbitmq_url: str, mongo_uri: str) -> None:
    chosen = (*only("routing", "poison", "pipeline", "outbox"), "--scale", "1000", "--json")
    variables = {"RABBITMQ_URL": rabbitmq_url, "MONGODB_URI": mongo_uri}
    runs = [partial(Run(tmp_path / name), *chosen, **variables) for name in ("1", "2")]
    first, second = at_once(*runs)
    assert (first.returncode, first.stderr, second.returncode, second.stderr) == (0, "", 0, "")
    assert demos_of(first) == demos_of(second)
    assert demos_of(first)["pipeline"]["result"] == {
        "published": 1_010, "users_stored": 990, "effects_on_them": 990,
        "repeated_without_effect": 10, "failed_at_first": 50, "dead_letters": 10,
    }  # fmt: skip


def hears_ctrl_c(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (ignored,) = re.findall(r"^SigIgn:\s+(\w+)$", status, re.MULTILINE)
    return not int(ignored, 16) & 1 << signal.SIGINT - 1


def test_where_no_broker_can_be_started_demo_9_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mq, "KILLABLE", "")  # ends without a URL
    assert mq.demo_crash(mq.RabbitMQ("amqp://127.0.0.1:1/"), "unused.", tmp_path) is None
    assert "note: RabbitMQ to kill is unavailable: servers.py has none" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["pipeline", "outbox", "crash"])
def test_ctrl_c_in_the_middle(demo: str, tmp_path: Path, rabbitmq_url: str, mongo_uri: str) -> None:
    """No demo follows; the broker and the consumer of its own go with it."""
    before = running.databases(mongo_uri)
    child = Run(tmp_path).start(
        *only(demo, "routing"), RABBITMQ_URL=rabbitmq_url, MONGODB_URI=mongo_uri
    )
    child.until(f"── {DEMOS.index(demo) + 1}. ")
    process = psutil.Process(child.process.pid)
    if demo == "crash":  # its broker runs, and its consumer
        until(lambda: "spawn_main" in str(child.children()), "the consumer")
        until(lambda: hears_ctrl_c(process.pid), "the end of its start, which ignores Ctrl-C")
    below = process.children(recursive=True)
    child.ctrl_c()
    ended = child.ended()
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert psutil.wait_procs(below, running.WAIT_S)[1] == []
    assert running.databases(mongo_uri) == before


@pytest.mark.slow
def test_ctrl_c_in_demo_9_leaves_no_consumer_and_its_producer_says_nothing_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = []

    def interrupted(broker: Any, _: object) -> None:
        left.append(mq.WindowedProducer(broker, lambda *_: None))
        raise KeyboardInterrupt

    monkeypatch.setattr(mq, "publish_all", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            mq.crash("left.", tmp_path)
        for consumer in multiprocessing.active_children():
            consumer.join(running.WAIT_S)
            assert consumer.exitcode == -signal.SIGKILL
        missed = left[0]._failures
        until(lambda: left[0]._failures > missed + 1, "it to miss the broker again")
    finally:
        mq.logger.setLevel(logging.NOTSET)
        left[0].close(0)
    assert [one for one in caplog.records if one.name == mq.logger.name] == []


def test_ctrl_c_while_queues_are_declared_leaves_none(
    rabbitmq_url: str, rabbitmq_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared, declare = list[Any](), mq.Topology.declare

    def interrupted(topology: Any, channel: Any) -> None:
        declared.append(topology)
        declare(topology, channel)
        raise KeyboardInterrupt

    monkeypatch.setattr(mq.Topology, "declare", interrupted)
    with pytest.raises(KeyboardInterrupt), mq.declared(mq.RabbitMQ(rabbitmq_url), rabbitmq_prefix):
        pass
    assert_gone(rabbitmq_url, declared)


def test_ctrl_c_within_pika_stays_ctrl_c(
    rabbitmq_url: str, rabbitmq_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its close() fails for a channel that was being opened."""

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(blocking_connection, "BlockingChannel", interrupted)
    with pytest.raises(KeyboardInterrupt), mq.declared(mq.RabbitMQ(rabbitmq_url), rabbitmq_prefix):
        pass


def test_ctrl_c_while_a_consumer_is_started_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, submit = threading.Event(), ThreadPoolExecutor.submit

    class Endless:
        stop = stopped.set

        def run(self) -> None:
            stopped.wait(running.WAIT_S)

    def interrupted(*args: Any) -> None:
        submit(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt), mq.consuming(Endless()):
        pass
    assert stopped.is_set()


# ── Refused, or away ────────────────────────────────────────────────────────────────


def assert_refused(ended: Ended, variable: str, words: str, *secrets: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.startswith(f"error: {variable}: ")
    assert re.search(words, ended.stderr), ended.stderr
    assert [secret for secret in (SECRET, *secrets) if secret in ended.stderr] == []


@pytest.mark.parametrize("args", [(), ("--require-services",), ("--json",)])
def test_a_wrong_password(main: Main, rabbitmq_url: str, args: tuple[str, ...]) -> None:
    url = re.sub(r":[^:@]*@", f":{SECRET}@", rabbitmq_url)
    ended = main(*only("routing"), *args, RABBITMQ_URL=url)
    assert_refused(ended, "RABBITMQ_URL", r"amqp://\w+:\*\*\*@.*ACCESS_REFUSED")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("/nosuch", "vhost nosuch not found"),
        ("/%2F?heartbeat=70000", "65535"),
        ("/%2F?heartbeat=soon", "heartbeat"),
        ("/%2F?nothing=1", "nothing"),
        ("/%2F?ssl_options={", "closed"),
        ("/%2F?tcp_options={'TCP_KEEPIDLE':'x'}", "TypeError|bytes-like"),
    ],
)
def test_a_host_or_an_option_that_does_not_exist(
    main: Main, rabbitmq_url: str, end: str, words: str
) -> None:
    base, _, _ = rabbitmq_url.rpartition("/")
    (password,) = re.findall(r":([^:@]*)@", base)
    ended = main(*only("routing"), RABBITMQ_URL=f"{base}{end}")
    assert_refused(ended, "RABBITMQ_URL", words, password)


@pytest.mark.parametrize(("login", "words"), [("", "ACCESS_REFUSED"), ("app@", "app@")])
def test_a_login_that_is_incomplete(main: Main, rabbitmq_url: str, login: str, words: str) -> None:
    url = re.sub(r"//.*@", f"//{login}", rabbitmq_url)
    assert_refused(main(*only("routing"), RABBITMQ_URL=url), "RABBITMQ_URL", words)


def test_a_wrong_password_of_mongodb(main: Main, rabbitmq_url: str, mongo_uri: str) -> None:
    uri = re.sub(r":[^:@]*@", f":{SECRET}@", mongo_uri)
    ended = main(*only("routing"), RABBITMQ_URL=rabbitmq_url, MONGODB_URI=uri)
    assert_refused(ended, "MONGODB_URI", r"mongodb://\w+:\*\*\*@.*Authentication failed")


def test_without_mongodb_users_are_stored_in_sqlite(main: Main, rabbitmq_url: str) -> None:
    away = f"mongodb://app:{SECRET}@127.0.0.1:1/"
    ended = main(*only("pipeline"), "--scale", "200", RABBITMQ_URL=rabbitmq_url, MONGODB_URI=away)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.match(
        r"MongoDB at mongodb://app:\*\*\*@127\.0\.0\.1:1/ is unavailable: Connection refused\.\n"
        r".*\nOn RabbitMQ [\d.]+, SQLite in place of MongoDB\n",
        ended.stdout,
    ), ended.stdout
    counts = facts(ended.stdout)
    assert (counts["published"], counts["users stored"], counts["dead letters"]) == (202, 198, 2)
    required = main(
        *only("pipeline"), "--require-services", RABBITMQ_URL=rabbitmq_url, MONGODB_URI=away
    )
    assert (required.returncode, required.stdout) == (2, "")
    assert "--require-services: MongoDB at mongodb://app:***@127.0.0.1:1/" in required.stderr

"""Script 02 as a user runs it; what it shares with the others is in test_cli.py, test_urls.py and
test_tls.py. What its demos return is computed here, or in folds02.py, in plain Python."""

from __future__ import annotations

import json
import re
import signal
import socketserver
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import bson
import pytest
from folds02 import FOLDS, fold_daily_revenue, fold_down_sampled, same
from running import PATIENT, SCRIPTS, SECRET, Ended, Main, Recorded, databases, demos_of
from script02 import Run, started
from services import load_script, mongo_client

import config
import servers

app: Any = load_script("02_mongodb_advanced")

SCRIPT, CUSTOMERS = SCRIPTS["02"], 500
QUICK = ("--only", "validation", "--scale", "5")  # where any demo will do


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


# ── What the demos return ──


def rows(collection: str) -> Any:
    made = {"customers": app.customers, "orders": app.orders}
    return made[collection](CUSTOMERS) if collection in made else app.page_loads()


def as_json(value: object) -> Any:
    return json.loads(json.dumps(value, cls=config.JsonEncoder))


def design(result: Any) -> None:
    sizes = [
        len(bson.encode({"_id": name, "events": [{"page": "/product", "ms": 123.4}] * count}))
        for name, count in (("all", 1_000), ("newest", 20))
    ]
    assert result == {"round_trips": {"embedded": 1, "referenced": 3}, "array_bytes": sizes}


def validation(result: Any) -> None:
    refused = {
        "no address": "addresses: minItems 1", "signed up as text": "signed_up: bsonType date",
        "e-mail in capitals": "email: pattern ^[^@A-Z]+@[^@A-Z]+$",
        "half an address": "addresses[0]: lacks city",
    }  # fmt: skip
    updates = {"moderate": True, "strict": False}
    others = {"violations": 1, "updates": updates}
    assert result == {"refused": refused, **others}


def aggregation(result: Any) -> None:
    for question, fold in FOLDS.items():
        assert same(result["answers"].pop(question), as_json(fold(rows))), question
    assert result == {"answers": {}, "view": [len(fold_daily_revenue(rows)), 1]}


def indexes(result: Any) -> None:
    events, esr = list(app.events()), result["esr"]
    wanted = {
        "partial": sum(e["status"] == "failed" and e["at"] >= app.MID_YEAR for e in events),
        "unique": 1, "TTL": 1_440, "text": sum(e["title"].endswith("word500") for e in events),
    }  # fmt: skip
    for kind, (before, after) in result["cases"].items():
        assert after["returned"] == wanted.get(kind, after["returned"]) > 0
        assert after["index"] is not None
        assert "COLLSCAN" not in after["stages"]
        assert after["docs"] <= 1.5 * after["returned"] + 1
        found = before and [before["stages"], before["docs"], before["returned"]]
        refused = kind in ("text", "2dsphere")  # without their index
        assert found == (None if refused else [["COLLSCAN"], len(events), after["returned"]]), kind
    best, customer = esr.pop("E-S-R"), sum(event["customer"] == 7 for event in events)
    assert ("SORT" in best["stages"], best["index"]) == (False, "equality_sort_range")
    assert best["returned"] == 20 <= best["keys"] <= 60
    assert all("SORT" in plan["stages"] for plan in esr.values())
    assert [plan["docs"] for plan in esr.values()] == [len(events), customer, 20]


def time_series(result: Any) -> None:
    assert 0 < 2 * result["kib_on_disk"]["series"] < result["kib_on_disk"]["plain"]
    assert 0 < 3 * result["buckets"][0] < result["buckets"][1]
    assert same(result["rows"], as_json(fold_down_sampled(rows, 6)))


def bulk(result: Any) -> None:
    trips = result["round_trips"]
    assert (trips["insert_one, a loop"], trips["BulkManager.load"]) == (500, 10)
    refused = [
        (121, "ms: minimum 0"), (121, "ms: bsonType double"),
        (None, "not BSON: tags is set, InvalidDocument"),
        (11000, "taken: _id, by another document"),
    ]  # fmt: skip
    rejected = [(one["index"], one["code"], one["reason"]) for one in result["report"]["rejected"]]
    assert rejected == [(500 + 1_000 * n, *refused[n % 4]) for n in range(10)]
    report = result["report"] | {"stored": 9_990, "already_there": 0, "unlisted": 0}
    assert (result["report"], result["count"]) == (report, 9_990)
    assert result["again"] == report | {"stored": 0, "already_there": 9_990}


def transactions(result: Any) -> None:
    assert result["totals"] == ["10000.00", "9900.00", "10000.00"]  # one of two updates was lost
    assert (result["transfers"], result["attempts"] >= 200) == (200, True)
    assert (result["snapshots"][0] > 0, result["snapshots"][1]) == (True, 0)
    assert result["repeated"] is True


def change_streams(result: Any) -> None:
    assert result == {
        "written": 60, "handled": [20, 40], "events": 60, "equal": True, "came_again": True,
    }  # fmt: skip


def async_(result: Any) -> None:
    # The aggregation demo, which ran before, has moved one order to another country.
    spent = sum((one["total"] for one in rows("orders") if one["status"] == "paid"), Decimal(0))
    assert result.pop("per_second").keys() == {"PyMongo asyncio", "Motor"}
    assert result == {"same_answers": True, "spent": [str(spent)] * 2}


def client(result: Any) -> None:
    (customer,) = app.customers(1)
    assert result["bytes"] == len(bson.encode(customer, codec_options=app.CODEC))
    reasons = {one["index"]: one["reason"].split(",")[0] for one in result["rejected"]}
    assert reasons == {10: "not BSON: tags is set", 11: "not BSON: n is int", 12: "16"}
    assert (result["error"], result["seconds"] > 0.4) == ("ServerSelectionTimeoutError", True)


CHECKS: dict[str, Callable[[Any], None]] = {
    check.__name__.rstrip("_"): check
    for check in (design, validation, aggregation, indexes, time_series, bulk, transactions,
                  change_streams, async_, client)
}  # fmt: skip

# ── Whole runs ──


@pytest.fixture(scope="module")
def runs(mongo_uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """Two whole runs on one server, one after the other, beside the data of others."""
    run, args = Run(tmp_path_factory.mktemp("run")), ("--json", "--scale", str(CUSTOMERS))
    others = [{"_id": n} for n in range(10)]
    with mongo_client(mongo_uri) as server:
        server["test_shop"].orders.insert_many(others)
        before = databases(mongo_uri)
        both = [run(*args, MONGODB_URI=mongo_uri) for _ in range(2)]
        assert databases(mongo_uri) <= before
        assert list(server["test_shop"].orders.find()) == others
        server.drop_database("test_shop")
    return both


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_what_a_demo_returns_on_a_server(runs: list[Ended], name: str) -> None:
    for ended in runs:
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
        demos = demos_of(ended)
        assert list(demos) == list(CHECKS)
        CHECKS[name](demos[name]["result"])


@pytest.mark.slow
def test_a_whole_run_as_text(recorded: Recorded, mongo_uri: str) -> None:
    whole = recorded("02", True)
    assert (whole.ended.returncode, whole.ended.stderr, whole.left) == (0, "", set())
    with mongo_client(mongo_uri) as client:
        version = client.server_info()["version"]
    assert re.match(rf"On MongoDB {version}, replica set \w+\n", whole.ended.stdout)
    numbers = re.findall(r"^── (\d+)\. ", whole.ended.stdout, re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, 11))
    assert re.search(r"^Demos: 10 in [\d.]+ s; none failed\.$", whole.ended.stdout, re.MULTILINE)


def test_offline_each_demo_says_that_it_is_not_shown_but_the_last(main: Main) -> None:
    ended = main("--offline")
    assert (ended.returncode, ended.stderr) == (0, "")
    _, *shown = re.split(r"^── \d+\. ", ended.stdout, flags=re.MULTILINE)
    assert ["note: no MongoDB: not shown" in one for one in shown] == [True] * 9 + [False]
    demos = demos_of(main("--offline", "--json"))
    assert [name for name, demo in demos.items() if demo["result"] is not None] == ["client"]
    client(demos["client"]["result"])


@pytest.mark.parametrize("scale", ["1", "5"])
def test_the_smallest_scales(main: Main, mongo_uri: str, scale: str) -> None:
    before, scaled = databases(mongo_uri), ("design", "aggregation", "async")
    only = [word for name in scaled for word in ("--only", name)]
    ended = main("--json", "--scale", scale, *only, MONGODB_URI=mongo_uri, **PATIENT)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert tuple(demos_of(ended)) == scaled
    assert demos_of(ended)["async"]["result"]["same_answers"] is True
    assert databases(mongo_uri) == before


IN_THE_MIDDLE = {
    "indexes": "── 4. ", "bulk": "documents/s", "transactions": "two naive",
    "change_streams": "stopped:", "async": "the same function",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THE_MIDDLE)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(
    tmp_path: Path, mongo_uri: str, name: str, signum: signal.Signals
) -> None:
    before = databases(mongo_uri)
    variables = {"MONGODB_URI": mongo_uri, "PAUSE_AT": IN_THE_MIDDLE[name]}
    child = Run(tmp_path).start("--only", name, "--scale", "5", **variables)
    child.paused()
    assert databases(mongo_uri) - before
    child.process.send_signal(signum)
    child.go_on()
    ended = child.ended()
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n"), ended.stdout
    assert databases(mongo_uri) <= before


# ── Servers that refuse: never silently offline ──


class Bare(servers.Mongo):
    """A mongod without a replica set and without users."""

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _command(self) -> list[str]:
        command = super()._command()
        for option in ("--replSet", "--keyFile", "--oplogSize"):
            del command[command.index(option) : command.index(option) + 2]
        return command

    def _make_user(self) -> None:
        self._has_user = True


@pytest.fixture(scope="module")
def own_mongo() -> Iterator[Any]:
    """A replica set that asks for a password."""
    with started(servers.Mongo) as server:
        yield server


def assert_refused(ended: Ended, *words: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "MONGODB_URI" in ended.stderr
    for word in words:
        assert re.search(word, ended.stderr), ended.stderr
    assert SECRET not in ended.stderr


def user(server: servers.Mongo, name: str, *roles: str) -> str:
    """The URI of a new user whose password is SECRET."""
    granted = [{"role": role, "db": "admin"} for role in roles]
    with mongo_client(server.url) as client:
        client.admin.command("createUser", name, pwd=SECRET, roles=granted)
    return f"mongodb://{name}:{SECRET}@127.0.0.1:{server.port}/?replicaSet=rs0&authSource=admin"


@pytest.mark.parametrize("option", ["--json", "--require-services"])
def test_a_wrong_password(main: Main, own_mongo: servers.Mongo, option: str) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{own_mongo.port}/?replicaSet=rs0&authSource=admin"
    for log in ({}, {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}):
        ended = main(option, MONGODB_URI=uri, **log, **PATIENT)
        assert_refused(ended, "Authentication failed", r"app:\*\*\*@127\.0\.0\.1")


@pytest.mark.parametrize(("rest", "word"), [
    ("127.0.0.1:{port}/?replicaSet=rs0", "authentication"),
    (f"app:{SECRET}@127.0.0.1:{{port}}/?tls=true", "SSL|tls"),
    (f"app:{SECRET}@127.0.0.1:{{port}}/?replicaSet=other", "replicaSet"),
    (f"app:{SECRET}@127.0.0.1:notaport/", ""),
    (f"app:x@{SECRET}@127.0.0.1/", ""),
    (f"app:{SECRET}@127.0.0.1/?tsl=true", "tsl"),
])  # fmt: skip
def test_a_uri_that_does_not_fit(
    main: Main, own_mongo: servers.Mongo, rest: str, word: str
) -> None:
    uri = f"mongodb://{rest.format(port=own_mongo.port)}"
    assert_refused(main(*QUICK, MONGODB_URI=uri, **PATIENT), word)


def test_a_port_of_another_service(main: Main) -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        ended = main(*QUICK, MONGODB_URI=f"mongodb://app:{SECRET}@{address}/")
        server.shutdown()
    assert_refused(ended, r"app:\*\*\*@127", "accepts connections and refuses")


@pytest.mark.parametrize("roles", [[], ["readAnyDatabase"]], ids=len)
def test_a_user_who_may_not_write(main: Main, own_mongo: servers.Mongo, roles: list[str]) -> None:
    uri = user(own_mongo, f"user{len(roles)}", *roles)
    assert_refused(main(*QUICK, MONGODB_URI=uri, **PATIENT), "may not write", r"user\d:\*\*\*@")
    assert databases(own_mongo.url) == set()


@pytest.mark.slow
def test_a_standalone_server(main: Main) -> None:
    with started(Bare) as standalone:
        ended = main("--scale", "5", MONGODB_URI=standalone.url)
        assert databases(standalone.url) == set()
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert re.match(r"On MongoDB [\d.]+, a standalone server\n", ended.stdout)
    _, *shown = re.split(r"^── \d+\. ", ended.stdout, flags=re.MULTILINE)
    assert [n for n, one in enumerate(shown, 1) if "not shown" in one] == [7, 8]

"""Script 02: its data, money in BSON, the client's options, connecting, and what stays behind."""

from __future__ import annotations

import logging
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import bson
import pymongo
import pytest
from bson.decimal128 import Decimal128
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pymongo.errors import OperationFailure
from running import SECRET
from script02 import PROBE_TIMEOUT_S, Document, open_workspace, started
from services import load_script, mongo_client

import servers
from config import ConfigError, ServiceUnavailable

app: Any = load_script("02_mongodb_advanced")

SILENCE_S = 1.0  # for who never answers


# ── The data ────────────────────────────────────────────────────────────────────────


def generated(name: str, count: int = 300) -> list[Document]:
    return list(app.page_loads(count) if name == "page_loads" else getattr(app, name)(count))


def test_an_order_adds_up_comes_after_its_customer_and_copies_name_and_country() -> None:
    people = {person["_id"]: person for person in generated("customers")}
    placed = generated("orders")
    assert list(people) == list(range(1, 301))
    assert [order["_id"] for order in placed] == list(range(1, len(placed) + 1))
    joined = [person["signed_up"] for person in people.values()]
    assert joined == sorted(joined)
    for order in placed:
        customer = people[order["customer"]["_id"]]
        assert order["customer"] == {"_id": customer["_id"], "name": customer["name"]}
        assert order["country"] == customer["addresses"][0]["country"]
        assert customer["signed_up"] <= order["placed_at"] <= datetime(2025, 12, 31, tzinfo=UTC)
        cents = sum(int(line["price"] * 100) * line["quantity"] for line in order["lines"])
        assert order["total"] * 100 == cents > 0
    status = Counter(order["status"] for order in placed)
    assert status.keys() == {"paid", "refunded"}
    assert 0.03 < status["refunded"] / len(placed) < 0.07


NAMES = "customers orders page_loads".split()


# ── Money ───────────────────────────────────────────────────────────────────────────


@settings(deadline=None, database=None)
@given(
    sign=st.integers(0, 1),
    digits=st.lists(st.integers(0, 9), min_size=1, max_size=34),
    exponent=st.integers(-6176, 6111),
)
@example(sign=0, digits=[1, 0, 0, 0], exponent=-2)  # 10.00 keeps its cents
def test_decimals_of_34_digits_come_back_digit_for_digit(
    sign: int, digits: list[int], exponent: int
) -> None:
    value = Decimal((sign, tuple(digits), exponent))
    encoded = bson.encode({"v": value}, codec_options=app.CODEC)
    assert bson.decode(encoded)["v"] == Decimal128(str(value))
    back = bson.decode(encoded, codec_options=app.CODEC)["v"]
    assert isinstance(back, Decimal)
    assert str(back) == str(value)


# ── The client's options ────────────────────────────────────────────────────────────

OWN: dict[str, tuple[Callable[[Any], object], object]] = {
    "maxpoolsize=7": (lambda o: o.pool_options.max_pool_size, 7),
    "RETRYWRITES=false": (lambda o: o.retry_writes, False),
    "w=1": (lambda o: o.write_concern.document, {"w": 1}),
    "timeoutMS=1234": (lambda o: o.timeout, 1.234),
    "serverSelectionTimeoutMS=99": (lambda o: o.server_selection_timeout, 0.099),
}


def read(uri: str, timeout_s: float = 3) -> Any:
    """The options as the driver reads them."""
    with pymongo.MongoClient[Document](
        uri, connect=False, **app.client_options(uri, timeout_s)
    ) as client:
        return client.options


@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("form", ["?{}", "?tls=false&{}", "?tls=false;{}", "?{};tls=false"])
def test_an_option_in_the_uri_wins_whatever_its_case_and_separator(own: str, form: str) -> None:
    of, value = OWN[own]
    assert of(read(f"mongodb://u:p#w@localhost/{form.format(own)}")) == value
    assert of(read("mongodb://localhost/?tls=false")) != value


def test_without_options_each_operation_is_bounded_and_durable() -> None:
    options = read("mongodb://localhost/")
    assert (options.timeout, options.server_selection_timeout) == (3, 3)
    assert options.pool_options.connect_timeout == 3
    assert read("mongodb://localhost/", 20).pool_options.connect_timeout == 5
    assert options.write_concern.document == {"w": "majority"}
    assert options.retry_writes
    assert options.pool_options.server_api.version == "1"
    assert options.codec_options.tz_aware


# ── Connecting ──────────────────────────────────────────────────────────────────────


class Alone(servers.Mongo):
    """A standalone server that asks for a password."""

    url_form = "mongodb://app:{password}@127.0.0.1:{port}/?authSource=admin"

    def _command(self) -> list[str]:
        command = super()._command()
        for option in ("--replSet", "--keyFile"):
            at = command.index(option)
            del command[at : at + 2]
        return [*command, "--auth"]


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    with started(Alone) as server:
        yield server


@pytest.fixture
def hosts(alone: Any) -> Iterator[dict[str, str]]:
    """Two addresses at which no server is, and that of one without TLS."""
    with socket.socket() as refusing, socket.create_server(("127.0.0.1", 0)) as silent:
        refusing.bind(("127.0.0.1", 0))
        nobody = {"refusing": refusing, "silent": silent}
        found = {name: f"127.0.0.1:{one.getsockname()[1]}" for name, one in nobody.items()}
        yield {**found, "alone": f"127.0.0.1:{alone.port}"}


def error_of(uri: str, kind: type[Exception], timeout_s: float) -> str:
    with pytest.raises(kind) as caught:
        app.connect(uri, timeout_s, app.CommandLog())
    assert SECRET not in str(caught.value)
    return " ".join(str(caught.value).split())


ABSENT = {
    "mongodb://app:{secret}@{refusing}/": "Connection refused",
    "mongodb://app:{secret}@{silent}/": "",
    "mongodb://app:{secret}@{refusing},{silent}/?replicaSet=rs0": "",
    "mongodb://app:{secret}@{refusing},127.0.0.2:1/": "refused.*refused",
    "mongodb+srv://app:{secret}@no-such-cluster.invalid/": "",
}


REFUSED = {
    "mongodb://app:{secret}@{alone}/?authSource=admin": r"app:\*\*\*@.* refuses: Authentication",
    "mongodb://{alone}/": "refuses: .*authentication",
    "mongodb://app:{secret}@{alone}/?tls=true": "refuses this client: SSL handshake.* Do tls",
    "mongodb://app:{secret}@{alone}/?replicaSet=other": "replicaSet",
    "mongodb://app:{secret}@{alone},{refusing}/?tls=true": "refuses this client: .*SSL",
    "mongodb://app:{secret}@127.0.0.1:99999/": "Port",
    "mongodb://app:{secret}@127.0.0.1:27017,127.0.0.1:x/": "Port",
    "mongodb://app:x@{secret}@127.0.0.1/": "",
    "mongodb://app:%zz{secret}@127.0.0.1/": "",
    "mongodb://app:x?{secret}@127.0.0.1/": "",
    "mongodb://app:{secret}@127.0.0.1/?tsl=true": "tsl",
    "mongodb+srv://app:{secret}@no-such-cluster.invalid/?tsl=true": "tsl",
    "mongodb://app:{secret}@127.0.0.1/?tls=true&ssl=false": "",
    "mongodb://app:{secret}@127.0.0.1/?tls=true&tlsCAFile=/no/such/file": "/no/such/file",
    "mongodb://app:{secret}@127.0.0.1,127.0.0.2/?directConnection=true": "directConnection",
    "mongodb+srv://app:{secret}@no-such-cluster.invalid:27017/": "port",
}


@pytest.mark.parametrize("uri", [*ABSENT, *REFUSED])
def test_only_who_does_not_answer_is_unavailable(uri: str, hosts: dict[str, str]) -> None:
    """The others are errors of configuration, which do not go on without a server."""
    kind, words = ServiceUnavailable if uri in ABSENT else ConfigError, {**ABSENT, **REFUSED}[uri]
    timeout_s = PROBE_TIMEOUT_S if words else SILENCE_S
    said = error_of(uri.format(secret=SECRET, **hosts), kind, timeout_s)
    assert kind is ServiceUnavailable or "MONGODB_URI" in said
    assert re.search(words, said), said


def test_a_standalone_server_has_no_oplog_and_says_so(alone: Any) -> None:
    with open_workspace(app, alone.url) as workspace:
        assert not workspace.has_oplog
        version = workspace.client.server_info()["version"]
        assert str(workspace) == f"MongoDB {version}, a standalone server"
        assert alone.password not in repr(workspace)


# ── The workspace ───────────────────────────────────────────────────────────────────


def test_the_client_uses_api_version_1_and_waits_for_a_majority(workspace: Any) -> None:
    database = workspace.database()
    database.command("ping")  # a connection that has logged in
    with workspace.log.record() as commands:
        database.things.insert_one({"price": Decimal("3.50")})
        assert database.things.find_one({}, {"_id": 0}) == {"price": Decimal("3.50")}
    insert, find = commands
    assert (insert.command_name, find.command_name) == ("insert", "find")
    assert insert.command["writeConcern"] == {"w": "majority", "j": True}
    assert insert.command["apiVersion"] == find.command["apiVersion"] == "1"
    assert 0 < find.command["maxTimeMS"] <= 20_000  # the operation's deadline


def test_closing_drops_its_own_databases_alone(workspace: Any, mongo_uri: str) -> None:
    with open_workspace(app, mongo_uri) as neighbour, mongo_client(mongo_uri) as other:
        made = [one.database() for one in (workspace, workspace, neighbour)]
        for database in made:
            database.things.insert_one({})
        before = set(other.list_database_names())
        workspace.close()
        assert before - set(other.list_database_names()) == {made[0].name, made[1].name}
        assert made[2].name in other.list_database_names()
    with pytest.raises(pymongo.errors.InvalidOperation):
        made[0].things.find_one()


def test_a_database_that_cannot_be_dropped_is_named_in_a_warning(
    workspace: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [workspace.database().name for _ in range(2)]

    def refuse(_name: str) -> None:
        raise OperationFailure("not you", 13)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(workspace.client, "drop_database", refuse)
        workspace.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert all(name in caplog.text for name in names)

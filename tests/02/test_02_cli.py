"""Script 02 as a user runs it; what it shares with the others is in test_cli.py.

Servers that refuse are real ones: without a replica set, with TLS, with users that may not write.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from running import (
    SCRIPTS,
    SECRET,
    START,
    Ended,
    Main,
    Recorded,
    assert_offline,
    databases,
    demos_of,
    whole_run,
)
from script02 import started
from services import mongo_client

import servers

SCRIPT = SCRIPTS["02"]
DEMOS = (  # in reading order, as the script's guide has them
    "design", "validation", "aggregation", "indexes", "geospatial", "time_series", "bulk",
    "transactions", "change_streams", "async", "features",
)  # fmt: skip
QUICK = ("--only", "validation", "--scale", "5")  # where any demo will do
ON_SERVER, OFFLINE = "On MongoDB ", "On no MongoDB: what the client can do without one\n"


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Main:
    return Main(SCRIPT.path, tmp_path, capsys, monkeypatch)


# ── Servers of these tests' own ─────────────────────────────────────────────────────


class Bare(servers.Mongo):
    """A mongod without a replica set and without users."""

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _command(self) -> list[str]:
        data = self.home / "data"
        data.mkdir(exist_ok=True)
        return [
            str(self.installation.binary), "--dbpath", str(data), "--bind_ip", "127.0.0.1",
            "--port", str(self.port), "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25",
        ]  # fmt: skip

    def _make_user(self) -> None:
        self._has_user = True


class Encrypted(Bare):
    """A mongod that speaks TLS alone, with a certificate that only `ca_file` vouches for."""

    @property
    def ca_file(self) -> Path:
        return self.home / "certificate.pem"

    @property
    def url(self) -> str:
        return f"{super().url}?tls=true&tlsCAFile={quote(str(self.ca_file), safe='')}"

    def _command(self) -> list[str]:
        home = self.home
        key, both = home / "key.pem", home / "both.pem"
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                "-keyout", str(key), "-out", str(self.ca_file),
            ],
            capture_output=True, check=True, timeout=30,
        )  # fmt: skip
        both.write_text(key.read_text() + self.ca_file.read_text())
        return [
            *super()._command(),
            "--tlsMode",
            "requireTLS",
            "--tlsCertificateKeyFile",
            str(both),
        ]


@pytest.fixture(scope="module")
def own_mongo() -> Iterator[Any]:
    """A replica set that asks for a password."""
    with started(servers.Mongo) as server:
        yield server


@pytest.fixture(scope="module")
def standalone() -> Iterator[Any]:
    with started(Bare) as server:
        yield server


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Any]:
    with started(Encrypted) as server:
        yield server


def make_user(server: servers.Mongo, name: str, *roles: object) -> str:
    """The URI of a new user whose password is SECRET."""
    with mongo_client(server.url) as client:
        client.admin.command("createUser", name, pwd=SECRET, roles=list(roles))
    return f"mongodb://{name}:{SECRET}@127.0.0.1:{server.port}/?replicaSet=rs0&authSource=admin"


# ── Whole runs ──────────────────────────────────────────────────────────────────────

MEASURED_COLUMNS = re.compile(
    r"ms|fold, ms|ratio|KiB on disk|KiB of indexes|documents/s|times faster|look-ups/s"
    r"|ms each, of \d+ at once"
)
MEASURED_PROSE = re.compile(
    r"[\d.,]+(?= (?:ms|s|attempts|snapshots|times less)\b|/s\b)|(?<=meanwhile: )\d+(?= MiB)"
)


def without_timings(output: str) -> list[str]:
    """The lines of a run, wrapped ones joined, with what was measured taken out: in tables the
    cells of MEASURED_COLUMNS, and the row of rates by size of the batch; elsewhere numbers before
    ms, s, /s, attempts, snapshots and `times less`, and how much had to be written until the
    oplog was cut."""
    output = re.sub(r"\n {29}(?=\S)", " ", output)
    output = re.sub(r"(documents/s in batches of:.*\n.*\n).*", r"\1#", output)
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
        lines.append(MEASURED_PROSE.sub("#", re.sub(r":\s+", ": ", "  ".join(cells))))
    return lines


def test_without_timings_keeps_everything_else() -> None:
    output = (
        "  way       rows   ms  agree\n  fold         7   96   True\n  total:  3\n"
        "  documents/s in batches of:\n   10  100\n  5,1  6,2\n  loop:       7 in 394 attempts, 3\n"
        f"{' ' * 29}wrapped\n  written meanwhile:  104 MiB\n→ 9 MiB in 1.5 s"
    )
    assert without_timings(output) == [
        "way  rows  ms  agree",
        "fold  7  #  True",
        "total: 3",
        "documents/s in batches of:",
        "10  100",
        "#",
        "loop: 7 in # attempts, 3 wrapped",
        "written meanwhile: # MiB",
        "→ 9 MiB in # s",
    ]


def headings(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"^── (\d+)\. ", output, re.MULTILINE)]


def sections(output: str) -> dict[str, str]:
    """Each demo's lines, by its name."""
    _, *parts = re.split(r"^── \d+\. ", output, flags=re.MULTILINE)
    return dict(zip(DEMOS, parts, strict=True))


@pytest.mark.slow
def test_a_whole_run(recorded: Recorded, mongo_uri: str) -> None:
    whole = recorded("02", True)
    ended = whole.ended
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert headings(ended.stdout) == list(range(1, len(DEMOS) + 1))
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", ended.stdout, re.MULTILINE)
    assert whole.left == set()
    with mongo_client(mongo_uri) as client:
        version = client.server_info()["version"]
        name = client.admin.command("hello")["setName"]
    assert ended.stdout.startswith(f"{ON_SERVER}{version}, replica set {name}\n")
    features = sections(ended.stdout)["features"]
    lacks = tuple(map(int, version.split(".")[:2])) < (7, 0)  # the release notes of 7.0 and 8.0
    assert ("skipped: $percentile:      needs 7.0\n" in features) is lacks
    assert ("skipped: compound wildcard index: needs 7.0\n" in features) is lacks
    assert re.search(r"skipped: \$search: +needs Atlas\n", features)


@pytest.mark.slow
@pytest.mark.parametrize("on_server", [False, True], ids=["offline", "online"])
def test_another_whole_run_differs_only_in_timings(
    recorded: Recorded, tmp_path: Path, mongo_uri: str, on_server: bool
) -> None:
    first = recorded("02", on_server).ended.stdout
    second = whole_run(SCRIPT, tmp_path, mongo_uri if on_server else "")
    assert without_timings(first) == without_timings(second.ended.stdout)
    assert second.left == set()


AT_THE_SMALLEST_SCALE: dict[str, Callable[[Any], bool]] = {
    "validation": lambda result: result["codes"] == [121],
    # One document in a thousand is bad.
    "bulk": lambda result: (
        (result["count"], len(result["report"]["rejected"])) == (10_000 - 10, 10)
    ),
    "transactions": lambda result: result["totals"] == ["10000.00", "10000.00", 0],
    "change_streams": lambda result: result["handled"] == [20, 40],
    "async": lambda result: result["same_answers"] is True,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_each_demo_alone_at_the_smallest_scale(main: Main, mongo_uri: str, name: str) -> None:
    before = databases(mongo_uri)
    ended = main("--only", name, "--scale", "1", "--json", MONGODB_URI=mongo_uri)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    ((shown, demo),) = demos_of(ended).items()
    assert shown == name
    assert AT_THE_SMALLEST_SCALE.get(name, bool)(demo["result"])
    assert json.loads(ended.stdout)["services"]["mongodb"].startswith("MongoDB ")
    assert databases(mongo_uri) == before


# ── Without a server ────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_nothing_configured(recorded: Recorded) -> None:
    ended = recorded("02", False).ended
    assert (ended.returncode, ended.stderr) == (0, "")
    unavailable, _, _ = ended.stdout.partition(OFFLINE)
    assert unavailable.startswith("MongoDB is unavailable: MONGODB_URI is not set.\n")
    assert START in " ".join(unavailable.split())
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", ended.stdout, re.MULTILINE)


@pytest.mark.slow
def test_offline_every_answer_is_labelled_and_every_gap_is_named(recorded: Recorded) -> None:
    shown = sections(recorded("02", False).ended.stdout)
    assert [name for name, text in shown.items() if "\n  note: " not in text] == []
    for name, answers in {"aggregation": 8, "geospatial": 5, "time_series": 3}.items():
        assert len(re.findall(r"^ +computed in Python", shown[name], re.MULTILINE)) >= answers, name
    assert "simulated" in shown["transactions"]
    # What only a server can say.
    evidence = "\n".join(re.sub(r"Prediction: .*|  note: .*", "", text) for text in shown.values())
    for words in ("agree ", "round trips", "COLLSCAN", "IXSCAN", "look-ups/s", "documents/s"):
        assert words not in evidence, words


@pytest.mark.parametrize("name", DEMOS)
def test_each_demo_alone_offline_as_json(main: Main, name: str) -> None:
    ended = main("--only", name, "--scale", "1", "--json", "--offline")
    assert (ended.returncode, ended.stderr) == (0, "")
    ((shown, result),) = demos_of(ended).items()
    assert (shown, list(result)) == (name, ["result"])
    services = json.loads(ended.stdout)["services"]
    assert services == {"mongodb": OFFLINE.removeprefix("On ").strip()}


# ── A server that refuses: never silently offline ───────────────────────────────────


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.returncode == 2, ended.stdout
    assert ended.stdout == ""
    assert "MONGODB_URI" in ended.stderr
    for word in words:
        assert re.search(word, ended.stderr), ended.stderr
    assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    ("argument", "variables"),
    [
        ("--scale=5", {}),
        ("--require-services", {}),
        ("--scale=5", {"LOG_LEVEL": "DEBUG"}),
        ("--json", {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}),
    ],
)
def test_a_wrong_password(
    main: Main, own_mongo: servers.Mongo, argument: str, variables: dict[str, str]
) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{own_mongo.port}/?replicaSet=rs0&authSource=admin"
    ended = main(argument, MONGODB_URI=uri, **variables)
    assert_refused(ended, "Authentication failed", r"app:\*\*\*@127\.0\.0\.1")


def test_no_password_where_one_is_asked_for(main: Main, own_mongo: servers.Mongo) -> None:
    uri = f"mongodb://127.0.0.1:{own_mongo.port}/?replicaSet=rs0"
    assert_refused(main(*QUICK, MONGODB_URI=uri), "authentication")


@pytest.mark.parametrize(
    "roles",
    [
        pytest.param([{"role": "readAnyDatabase", "db": "admin"}], id="reads"),
        pytest.param([{"role": "readWrite", "db": "app"}], id="writes elsewhere"),
        pytest.param([], id="nothing"),
    ],
)
def test_a_user_who_may_not_write(
    main: Main, own_mongo: servers.Mongo, roles: list[object], request: pytest.FixtureRequest
) -> None:
    name = "".join(filter(str.isalpha, request.node.callspec.id))
    ended = main(*QUICK, MONGODB_URI=make_user(own_mongo, name, *roles))
    assert_refused(ended, "may not write", rf"{name}:\*\*\*@")
    assert databases(own_mongo.url) == set()


GUIDE_ROLES = ("readWriteAnyDatabase", "dbAdminAnyDatabase", "clusterMonitor", "hostManager")


def on_admin(*roles: str) -> list[object]:
    return [{"role": role, "db": "admin"} for role in roles]


@pytest.mark.slow
def test_the_roles_of_the_guide_suffice(main: Main, own_mongo: servers.Mongo) -> None:
    """As docs/servers.md lists them."""
    uri = make_user(own_mongo, "guide", *on_admin(*GUIDE_ROLES))
    demanding = ("validation", "indexes", "time_series", "change_streams")
    only = [word for name in demanding for word in ("--only", name)]
    ended = main("--scale", "5", *only, MONGODB_URI=uri)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "Unauthorized" not in ended.stdout
    assert re.search(r"token too old: .*\(code 286\)", re.sub(r"\s+", " ", ended.stdout))
    assert databases(own_mongo.url) == set()


def test_databases_that_may_not_be_dropped_are_named(main: Main, own_mongo: servers.Mongo) -> None:
    uri = make_user(own_mongo, "writer", *on_admin("readWriteAnyDatabase"))
    ended = main("--scale", "5", "--only", "design", MONGODB_URI=uri)
    left = databases(own_mongo.url)
    with mongo_client(own_mongo.url) as client:
        for name in left:
            client.drop_database(name)
    assert ended.returncode == 0, ended.stdout
    assert "these databases may stay behind" in " ".join(ended.stderr.split())
    assert set(re.findall(r"module8_\w+", ended.stderr)) >= left
    assert SECRET not in ended.stdout + ended.stderr


def test_a_plain_client_of_a_server_that_wants_tls(main: Main, encrypted: Any) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{encrypted.port}/"
    assert_refused(main(*QUICK, MONGODB_URI=uri), r"app:\*\*\*@127\.0\.0\.1", "tls")


def test_a_client_that_wants_tls_of_a_plain_server(main: Main, own_mongo: servers.Mongo) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{own_mongo.port}/?tls=true"
    assert_refused(main(*QUICK, MONGODB_URI=uri), r"app:\*\*\*@127\.0\.0\.1", "SSL|tls")


def test_a_certificate_that_nobody_vouches_for(main: Main, encrypted: Any) -> None:
    uri = f"mongodb://127.0.0.1:{encrypted.port}/?tls=true"
    assert_refused(main(*QUICK, MONGODB_URI=uri), "certificate verify failed")


def test_tls_on_both_sides(main: Main, encrypted: Any) -> None:
    ended = main(*QUICK, MONGODB_URI=encrypted.url)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(ON_SERVER)


def test_a_replica_set_of_another_name(main: Main, own_mongo: servers.Mongo) -> None:
    uri = own_mongo.url.replace("replicaSet=rs0", "replicaSet=other")
    ended = main(*QUICK, MONGODB_URI=uri)
    assert_refused(ended, "replicaSet")
    assert own_mongo.password not in ended.stderr


MALFORMED = {
    "no port": f"mongodb://app:{SECRET}@127.0.0.1:notaport/",
    "no such port": f"mongodb://app:{SECRET}@127.0.0.1:99999/",
    "second port": f"mongodb://app:{SECRET}@127.0.0.1:27017,127.0.0.1:x/",
    "no host": f"mongodb://app:{SECRET}@/",
    "nothing": "mongodb://",
    "another database": f"postgresql://app:{SECRET}@127.0.0.1/app",
    "@ before": f"mongodb://app:x@{SECRET}@127.0.0.1/",
    "@ after": f"mongodb://app:{SECRET}@x@127.0.0.1/",
    "slash": f"mongodb://app:x/{SECRET}@127.0.0.1/",
    "colon": f"mongodb://app:x:{SECRET}@127.0.0.1/",
    "percent": f"mongodb://app:%zz{SECRET}@127.0.0.1/",
    "question mark": f"mongodb://app:x?{SECRET}@127.0.0.1/",
    "typo": f"mongodb://app:{SECRET}@127.0.0.1/?tsl=true",
    "typo, srv": f"mongodb+srv://app:{SECRET}@no-such-cluster.invalid/?tsl=true",
    "tls both ways": f"mongodb://app:{SECRET}@127.0.0.1/?tls=true&ssl=false",
    "tls maybe": f"mongodb://app:{SECRET}@127.0.0.1/?tls=maybe",
    "CA missing": f"mongodb://app:{SECRET}@127.0.0.1/?tls=true&tlsCAFile=/no/such/file",
    "no number": f"mongodb://app:{SECRET}@127.0.0.1/?maxPoolSize=many",
    "no timeout": f"mongodb://app:{SECRET}@127.0.0.1/?serverSelectionTimeoutMS=soon",
    "no mechanism": f"mongodb://app:{SECRET}@127.0.0.1/?authMechanism=NONE",
    "no preference": f"mongodb://app:{SECRET}@127.0.0.1/?readPreference=nearby",
    "no concern": f"mongodb://app:{SECRET}@127.0.0.1/?w=-1",
    "direct to two": f"mongodb://app:{SECRET}@127.0.0.1,127.0.0.2/?directConnection=true",
    "port, srv": f"mongodb+srv://app:{SECRET}@no-such-cluster.invalid:27017/",
    "two hosts, srv": f"mongodb+srv://app:{SECRET}@one.example.invalid,two.example.invalid/",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_uris(main: Main, name: str) -> None:
    ended = main(*QUICK, MONGODB_URI=MALFORMED[name])
    assert_refused(ended, *{"typo": ["tsl"], "CA missing": ["/no/such/file"]}.get(name, []))
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_password_of_special_characters_percent_encoded(
    main: Main, own_mongo: servers.Mongo
) -> None:
    password = "p@ss/w:rd?#%20 é"
    with mongo_client(own_mongo.url) as client:
        client.admin.command("createUser", "special", pwd=password, roles=["root"])
    address = f"127.0.0.1:{own_mongo.port}/?replicaSet=rs0&authSource=admin"
    ended = main(*QUICK, MONGODB_URI=f"mongodb://special:{quote(password, safe='')}@{address}")
    assert ended.stdout.startswith(ON_SERVER), ended.stderr


def test_json_logs_are_one_object_a_line_and_hold_no_password(
    main: Main, own_mongo: servers.Mongo
) -> None:
    variables = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG"}
    ended = main(*QUICK, "--json", MONGODB_URI=own_mongo.url, **variables)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["validation"]
    assert own_mongo.password not in ended.stderr + ended.stdout


# ── A server that is not there: the offline tier ────────────────────────────────────


# The driver's first look at the server, and the wait for it, end at the same moment.
SILENT = "(timed out|no answer)"


def test_a_replica_set_of_which_no_member_is_there(main: Main) -> None:
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        hosts = f"127.0.0.1:{bound.getsockname()[1]},127.0.0.2:1"
        uri = f"{SCRIPT.services[0].url_at(hosts)}?replicaSet=rs0"
        ended = main(*QUICK, MONGODB_URI=uri)
    assert_offline(SCRIPT, ended, "Connection refused.*Connection refused")


def test_a_wrong_atlas_host(main: Main) -> None:
    ended = main(*QUICK, MONGODB_URI=f"mongodb+srv://user:{SECRET}@no-such-cluster.invalid/")
    assert_offline(SCRIPT, ended, "", r"mongodb\+srv://user:\*\*\*@")


def test_a_server_that_hangs(main: Main, own_mongo: servers.Mongo) -> None:
    own_mongo.pause()
    try:
        ended = main(*QUICK, MONGODB_URI=own_mongo.url, CONNECT_TIMEOUT_S="0.5")
    finally:
        own_mongo.resume()
    assert_offline(SCRIPT, ended, SILENT)
    assert own_mongo.password not in ended.stdout


# ── A server that has less ──────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_server_without_a_replica_set(main: Main, standalone: Any) -> None:
    ended = main("--scale", "5", MONGODB_URI=standalone.url)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert re.match(r"On MongoDB [\d.]+, a standalone server\n", ended.stdout)
    shown = sections(ended.stdout)
    for name in ("transactions", "change_streams"):
        assert re.search(r"\n  note: .*replica set.*not shown", shown[name]), shown[name]
    assert "9,990 counted" in shown["bulk"]
    assert databases(standalone.url) == set()

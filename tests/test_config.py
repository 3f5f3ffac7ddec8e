"""config.py: settings and their errors, secrets, reachability, logging, output, the runner.

No server is needed, and no setting of the developer's is read: each test gives its environment.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from running import logging_as_before

import config
from config import ConfigError, Run, ServiceUnavailable, Settings, load_settings, redact

ROOT = Path(__file__).parent.parent
SETTING_NAMES = (*config.SCHEMES, "LOG_LEVEL", "LOG_FORMAT", "CONNECT_TIMEOUT_S")
property_test = hypothesis_settings(deadline=None)  # no assertion on time: the machine may be busy
DEADLINE_S = 30.0  # for what takes milliseconds; reached only where a test fails


@pytest.fixture(autouse=True)
def _nothing_of_the_developers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable, no .env, and the handlers of the root logger as they were."""
    monkeypatch.chdir(tmp_path)
    for name in SETTING_NAMES:
        monkeypatch.delenv(name, raising=False)
    with logging_as_before():
        yield


# ── Settings ────────────────────────────────────────────────────────────────────────

URLS = {
    "DATABASE_URL": "postgresql+psycopg2://u:p@h:5432/db",
    "MONGODB_URI": "mongodb://u:p@h1:27017,h2:27017/?replicaSet=rs0",
    "REDIS_URL": "rediss://:p@h:6379/0",
    "RABBITMQ_URL": "amqp://u:p@h:5672/%2F",
}


def test_nothing_set_gives_the_defaults() -> None:
    assert load_settings({}, None) == Settings()
    assert load_settings({}, "no-such-file") == Settings()


def test_every_variable_is_read() -> None:
    environ = URLS | {"LOG_LEVEL": "debug", "LOG_FORMAT": "JSON", "CONNECT_TIMEOUT_S": "0.25"}
    assert load_settings(environ, None) == Settings(
        database_url=URLS["DATABASE_URL"],
        mongodb_uri=URLS["MONGODB_URI"],
        redis_url=URLS["REDIS_URL"],
        rabbitmq_url=URLS["RABBITMQ_URL"],
        log_level="DEBUG",
        log_format="json",
        connect_timeout_s=0.25,
    )


def test_environ_wins_over_the_file_and_the_empty_string_means_not_configured() -> None:
    Path("settings.env").write_text(
        "REDIS_URL=redis://file/0\nRABBITMQ_URL=amqp://file/\nDATABASE_URL=\nLOG_LEVEL=\nMONGODB_URI\n"
    )
    settings = load_settings({"REDIS_URL": "redis://environ/0", "RABBITMQ_URL": ""}, "settings.env")
    assert settings.redis_url == "redis://environ/0"
    assert settings.rabbitmq_url is None
    assert settings.database_url is None
    assert settings.mongodb_uri is None
    assert settings.log_level == Settings.log_level


def test_by_default_the_process_and_dotenv_in_the_working_directory_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("REDIS_URL=redis://file/0\nLOG_LEVEL=INFO\n")
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    settings = load_settings()
    assert (settings.redis_url, settings.log_level) == ("redis://file/0", "ERROR")


def test_the_example_file_configures_every_service() -> None:
    settings = load_settings({}, str(ROOT / ".env.example"))
    urls = (settings.database_url, settings.mongodb_uri, settings.redis_url, settings.rabbitmq_url)
    for url in urls:
        assert url is not None
        assert "@127.0.0.1:" in url
        assert "$" not in url


BAD_FILES = {
    "an open quote": (b"A=1\nREDIS_URL='redis://h/0\nB=2\n", 2, "is a quote left open?"),
    "no =": (b"A=1\n\nthis is no setting\n", 3, "not NAME=value"),
    "Latin-1": ("A=1\n# für Redis\nREDIS_URL=redis://h/0\n".encode("latin-1"), 2, "not UTF-8"),
    "UTF-16": ("REDIS_URL=redis://h/0\n".encode("utf-16"), 1, "not UTF-8"),
    "UTF-16, no mark": ("REDIS_URL=redis://h/0\n".encode("utf-16-le"), 1, "not NAME=value"),
}


@pytest.mark.parametrize(("content", "line", "problem"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_dotenv_file_that_cannot_be_read_is_refused_by_line(
    content: bytes, line: int, problem: str
) -> None:
    Path("settings.env").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings({}, "settings.env")
    assert str(caught.value).startswith(f"settings.env, line {line}: ")
    assert problem in str(caught.value)
    assert "redis:" not in str(caught.value)


def test_a_dotenv_file_of_windows_and_of_several_lines_is_read() -> None:
    text = "\ufeffREDIS_URL=redis://h/0\r\n# ü\r\nOTHER='one\r\ntwo'\r\nLOG_LEVEL=INFO\r\n"
    Path("settings.env").write_text(text, encoding="utf-8", newline="")
    settings = load_settings({}, "settings.env")
    assert (settings.redis_url, settings.log_level) == ("redis://h/0", "INFO")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_each_form_of_a_postgresql_url_names_the_driver(scheme: str) -> None:
    settings = load_settings({"DATABASE_URL": f"{scheme}://u:p@h/postgres://"}, None)
    assert settings.database_url == "postgresql+psycopg2://u:p@h/postgres://"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql+psycopg://u@h/db"),
        ("DATABASE_URL", "mysql://u@h/db"),
        ("DATABASE_URL", "sqlite:///file.db"),
        ("DATABASE_URL", "h:5432/db"),
        ("DATABASE_URL", "postgresql://"),
        ("DATABASE_URL", "postgresql://u:p@h:54x32/db"),
        ("DATABASE_URL", "postgresql://u:p@h:65536/db"),
        ("DATABASE_URL", "postgresql://u:p@[::1/db"),
        ("MONGODB_URI", "http://h:27017"),
        ("MONGODB_URI", "mongodb://u:p@[::1/"),
        ("REDIS_URL", "localhost"),
        ("REDIS_URL", "redis://h:port/0"),
        ("RABBITMQ_URL", "http://h:15672"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("CONNECT_TIMEOUT_S", "soon"),
        ("CONNECT_TIMEOUT_S", "0"),
        ("CONNECT_TIMEOUT_S", "-1"),
        ("CONNECT_TIMEOUT_S", "61"),
        ("CONNECT_TIMEOUT_S", "nan"),
        ("CONNECT_TIMEOUT_S", "inf"),
        ("CONNECT_TIMEOUT_S", "1e1"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(URLS | {name: value}, None)
    assert str(caught.value).startswith(f"{name}: ")
    others = {*SETTING_NAMES} - {name}
    assert not any(other in str(caught.value) for other in others)


# ── Secrets ─────────────────────────────────────────────────────────────────────────

MARKS = ("S3CR3T-A", "S3CR3T-B", "S3CR3T-C")  # a leak of any part of a secret shows one
special = st.text(st.sampled_from("@/?#%:&=+[]\\'\" \t\n\r$*üλ💥"), max_size=4)
junk = special | st.text(max_size=4)
secrets_raw = st.builds(lambda x, y: f"{MARKS[0]}{x}{MARKS[1]}{y}{MARKS[2]}", junk, junk)
# load_settings refuses white space in a URL; in a message, it is where a URL ends.
unspaced = secrets_raw.filter(lambda secret: not re.search(r"\s", secret))
users = st.sampled_from(["", "app", "app%20user", "app@tenant", "a/b", "ünï"])
query_names = st.sampled_from(["password", "sslpassword", "tlsCertificateKeyFilePassword", "PWD"])


def leaks(text: str) -> bool:
    return any(mark in text for mark in MARKS)


@property_test
@given(secrets_raw, st.sampled_from(["", "app", "%40pp"]))
@example("S3CR3T-A@:/?#", "app")
def test_redact_changes_nothing_but_the_password_of_a_well_formed_url(
    secret: str, user: str
) -> None:
    url = "amqp://{}:{}@h.example:5672/%2F?heartbeat=30"
    assert redact(url.format(user, quote(secret, safe=""))) == url.format(user, "***")


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:6379/0",
        "mongodb://h1:27017,h2:27017/?replicaSet=rs0",
        "postgresql://u@h/db?a=b",
        "unix:///run/redis.sock?db=1",
        "postgresql://h:5432/db: refused by admin@example.org",
        "write to admin@example.org",
    ],
)
def test_redact_leaves_what_holds_no_password_as_it_is(url: str) -> None:
    assert redact(url) == url


def test_redact_leaves_what_follows_the_url_as_it_is() -> None:
    text = "amqp://u:p@h:5672/ was refused by admin@example.org (ask ops@example.org)"
    assert redact(text) == text.replace("u:p@", "u:***@")


@property_test
@given(st.sampled_from(["redis", "rediss", "unix"]), unspaced)
def test_redact_masks_a_password_whose_colon_was_forgotten(scheme: str, secret: str) -> None:
    encoded = quote(secret, safe="")
    assert redact(f"{scheme}://{encoded}@h:6379/0 refuses") == f"{scheme}://***@h:6379/0 refuses"
    raw = secret.replace(":", "")  # else it has a user
    assert not leaks(redact(f"{scheme}://{raw}@h:6379/0"))


@property_test
@given(unspaced, st.sampled_from(["'", '"']), st.booleans(), st.sampled_from(["", "+", "%20", " "]))
def test_redact_masks_the_password_in_ssl_options(
    secret: str, mark: str, is_encoded: bool, space: str
) -> None:
    if is_encoded:
        options = quote(f"{{{mark}password{mark}:{space}{mark}{secret}{mark}}}", safe="")
    else:
        options = f"{{{mark}certfile{mark}:{space}{mark}c{mark}, {mark}password{mark}:{space}"
        options += f"{mark}{secret}{mark}}}"
    text = redact(f"amqps://u:p@h/%2F?heartbeat=5&ssl_options={options}&x=1 refuses")
    assert text == "amqps://u:***@h/%2F?heartbeat=5&ssl_options=***&x=1 refuses"


@property_test
@given(users, unspaced)
@example("app", "S3CR3T-A@S3CR3T-B/?#%:S3CR3T-C")
@example("app", "S3CR3T-A&pwd=S3CR3T-B@S3CR3T-C")
def test_redact_masks_a_password_that_should_have_been_encoded(user: str, secret: str) -> None:
    text = redact(f"cannot connect to postgresql://{user}:{secret}@h:5432/db?x=y: refused")
    assert not leaks(text)
    assert ":***@" in text


@property_test
@given(query_names, st.text("ab@/?#%:", max_size=4), st.sampled_from(["", "u:p@"]))
def test_redact_masks_a_password_in_the_query(name: str, part: str, userinfo: str) -> None:
    secret = part.join(MARKS)
    text = redact(f"postgresql://{userinfo}h:5432/db?sslmode=require&{name}={secret}")
    assert not leaks(text)


def test_redact_keeps_the_other_query_parameters() -> None:
    assert redact("redis://h/0?password=p%26q&db=1&x=2") == "redis://h/0?password=***&db=1&x=2"


@property_test
@given(
    st.sampled_from(sorted(config.SCHEMES)),
    st.sampled_from(
        [
            "{scheme}://{user}:{secret}@h:1/db",
            "{scheme}://{user}:{secret}@h:port/db",
            "{scheme}://{user}:{secret}@[::1/db",
            "{scheme}://{user}:{secret}",  # the host was forgotten
            "{scheme}:/{user}:{secret}@h/db",
            "{scheme}//{user}:{secret}@h/db",
            "{user}:{secret}@h/db",  # the scheme was forgotten
            "http://{user}:{secret}@h/db",
            "http://h/db?password={secret}",
            "{secret}",
        ]
    ),
    users,
    secrets_raw,
)
def test_no_config_error_shows_any_part_of_a_secret(
    name: str, form: str, user: str, secret: str
) -> None:
    url = form.format(scheme=config.SCHEMES[name][0], user=user, secret=secret)
    shown = f"{name}: accepted"
    try:
        load_settings({name: url}, None)
    except ConfigError as error:
        shown = str(error) + "".join(traceback.format_exception(error))  # and what is behind it
    assert shown.startswith(f"{name}: ")
    assert not leaks(shown)


@property_test
@given(users, unspaced)
def test_service_unavailable_masks_the_secret(user: str, secret: str) -> None:
    assert not leaks(str(ServiceUnavailable("Redis", "refused", f"redis://{user}:{secret}@h/0")))


# ── Reachability ────────────────────────────────────────────────────────────────────


def test_service_unavailable_says_which_where_why_and_how_to_start_one() -> None:
    text = str(ServiceUnavailable("Redis", "Connection refused", "redis://:pw@h:6379/0"))
    assert text.startswith("Redis at redis://:***@h:6379/0 is unavailable: Connection refused.\n")
    assert "docker compose up -d --wait" in text
    assert ".venv/bin/python servers.py run -- " in text
    assert str(ServiceUnavailable("Redis", "not set")).startswith("Redis is unavailable: not set.")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as bound:  # and not listening: no other process can take the port
        bound.bind(("127.0.0.1", 0))
        yield port_of(bound)


def port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def unreachable_reason(timeout_s: float, *addresses: tuple[str, int | None]) -> str:
    """What `require_reachable` says, without the parts that the test above asserts."""
    with pytest.raises(ServiceUnavailable) as caught:
        config.require_reachable("Redis", "redis://h", addresses, timeout_s)
    found = re.fullmatch(
        r"Redis at redis://h is unavailable: (.+)\.\nTo start one: .+", str(caught.value)
    )
    assert found
    return found[1]


def assert_reachable(*addresses: tuple[str, int | None]) -> None:
    config.require_reachable("Redis", "redis://h", addresses, DEADLINE_S)


def test_a_listening_port_is_reachable(listener: socket.socket) -> None:
    assert_reachable(("127.0.0.1", port_of(listener)))


def test_one_listening_host_of_several_is_enough(listener: socket.socket, free_port: int) -> None:
    assert_reachable(("127.0.0.1", free_port), ("127.0.0.1", port_of(listener)))


def test_several_hosts_that_all_refuse_are_said_once(free_port: int) -> None:
    refusing = ("127.0.0.1", free_port)
    assert unreachable_reason(DEADLINE_S, refusing, refusing) == "Connection refused"


def test_a_unix_socket_is_probed_as_one(tmp_path: Path) -> None:
    address = (f"{tmp_path}/socket", None)
    assert unreachable_reason(DEADLINE_S, address) == "No such file or directory"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/socket")
        assert unreachable_reason(DEADLINE_S, address) == "Connection refused"
        server.listen()
        assert_reachable(address)


def test_a_socket_that_is_not_for_us_is_left_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(socket.socket):  # no mode keeps root out
        def connect(self, _: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Closed)
    assert_reachable((f"{tmp_path}/socket", None))


def test_without_an_address_the_driver_decides() -> None:
    assert_reachable()


def test_a_refused_port_is_said_at_once(free_port: int) -> None:
    # Had it waited for the timeout, that would be the reason.
    assert unreachable_reason(DEADLINE_S, ("127.0.0.1", free_port)) == "Connection refused"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse where the queue is full")
def test_a_server_that_never_accepts_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        waiting = [socket.socket() for _ in range(4)]  # more than the queue of one
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        try:
            reason = unreachable_reason(0.1, ("127.0.0.1", port_of(server)))
        finally:
            for client in waiting:
                client.close()
    assert reason in ("timed out", "no answer within 0.1 s")


def test_a_resolver_that_never_answers_is_given_up_after_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()

    def resolve(*_: object, **__: object) -> list[Any]:
        over.wait(DEADLINE_S)
        raise socket.gaierror(socket.EAI_AGAIN, "the resolver was waited for")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        assert unreachable_reason(0.05, ("h", 1)) == "no answer within 0.05 s"
    finally:
        over.set()


def test_an_unknown_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert unreachable_reason(DEADLINE_S, ("no-such-host", 1)) == "Name or service not known"


@pytest.mark.parametrize("host", ["a" * 64, "a..example"])
def test_a_host_that_no_resolver_accepts_is_unavailable_too(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "label" in unreachable_reason(DEADLINE_S, (host, 1))
    assert capsys.readouterr().err == ""  # no traceback of a thread


# ── Logging ─────────────────────────────────────────────────────────────────────────


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_log_is_one_object_a_line_with_its_extra_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.configure_logging(Settings(log_format="json", log_level="INFO"))
    log = logging.getLogger("shop.orders")
    log.debug("below the level")
    log.info(
        "paid %s\nin %d parts: ü", "order 7", 2, extra={"order_id": 7, "total": Decimal("9.5")}
    )
    log.error("second")
    captured = capsys.readouterr()
    first, second = json_lines(captured.err)
    assert captured.out == ""
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == UTC.utcoffset(None)
    assert first == {
        "level": "INFO",
        "logger": "shop.orders",
        "message": "paid order 7\nin 2 parts: ü",
        "order_id": 7,
        "total": "9.5",
    }
    assert second.keys() == {"time", "level", "logger", "message"}
    assert second["level"] == "ERROR"


def test_json_log_holds_the_exception(capsys: pytest.CaptureFixture[str]) -> None:
    config.configure_logging(Settings(log_format="json"))
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        logging.getLogger("shop").exception("failed")
    (entry,) = json_lines(capsys.readouterr().err)
    assert entry["message"] == "failed"
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ZeroDivisionError: integer division or modulo by zero")


def test_json_log_gives_the_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    config.configure_logging(Settings(log_format="json"))
    record = logging.makeLogRecord({"created": 86_399.042, "levelno": logging.ERROR})
    logging.getLogger().handle(record)
    (entry,) = json_lines(capsys.readouterr().err)
    assert entry["time"] == "1970-01-01T23:59:59.042000+00:00"


def test_text_log_goes_to_stderr_with_level_logger_and_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.configure_logging(Settings(log_level="WARNING"))
    log = logging.getLogger("shop")
    log.info("below the level")
    log.warning("stock of %s is low", "[bold]tea")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "WARNING" in captured.err
    assert "shop: stock of [bold]tea is low" in captured.err
    assert "below" not in captured.err


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in ("text", "json"):
        config.configure_logging(Settings(log_format=log_format))
    logging.getLogger("shop").warning("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("driver", ["pymongo.command", "pika.connection", "asyncio", "urllib3"])
def test_drivers_keep_what_they_debug_to_themselves(
    driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.configure_logging(Settings(log_format="json", log_level="DEBUG"))
    logging.getLogger(driver).debug("the command in clear")
    logging.getLogger(driver).info("connected")
    logging.getLogger("shop").debug("ours")
    assert [line["message"] for line in json_lines(capsys.readouterr().err)] == [
        "connected",
        "ours",
    ]


def test_drivers_are_no_louder_than_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    config.configure_logging(Settings(log_level="ERROR"))
    logging.getLogger("pymongo.command").warning("slow")
    assert capsys.readouterr().err == ""


# ── Output ──────────────────────────────────────────────────────────────────────────


def test_values_of_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    config.fact("queries", 4)
    config.fact("time of the slowest run", "[red]1.2 ms :x:")
    first, second = capsys.readouterr().out.splitlines()
    assert first.index("4") == second.index("[red]1.2 ms :x:")  # markup and emoji stay text


def test_a_table_aligns_numbers_to_the_right_and_text_to_the_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.table(
        ("way", "rows/s", "ratio", "Δ"),
        [
            ("Core", "1,250", "3.2×", -1),
            ("ORM insert()", 90, "~12×", "+2"),
            ("none", "-", "-", "-"),
        ],
    )
    assert capsys.readouterr().out.splitlines() == [
        "  way           rows/s  ratio   Δ",
        "  Core           1,250   3.2×  -1",
        "  ORM insert()      90   ~12×  +2",
        "  none               -      -   -",
    ]


def test_one_word_in_a_column_makes_it_text(capsys: pytest.CaptureFixture[str]) -> None:
    config.table(("n",), [("10",), ("many",)])
    assert capsys.readouterr().out.splitlines() == ["  n", "  10", "  many"]


def test_a_table_without_rows_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    config.table(("way", "rows"), [])
    assert capsys.readouterr().out == "  way  rows\n"


def test_a_ragged_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        config.table(("a", "b"), [(1, 2), (3,)])


def test_a_long_value_is_wrapped_below_itself(capsys: pytest.CaptureFixture[str]) -> None:
    value = " ".join(["word"] * 40)
    config.fact("words", value)
    first, *others = capsys.readouterr().out.splitlines()
    column = first.index("word ")
    assert len(others) > 1
    assert all(len(line) <= config.WIDTH for line in (first, *others))
    assert all(line[:column].isspace() and line[column] == "w" for line in others)
    assert " ".join(line[column:] for line in (first, *others)) == value


def test_a_listing_is_indented_and_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    config.listing("\nSELECT 1\n  FROM t\n")
    assert capsys.readouterr().out == "    SELECT 1\n    FROM t\n"


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT " + ", ".join(f"column_{i}" for i in range(40))
    config.note(sql)
    config.conclude(sql)
    assert capsys.readouterr().out == f"  note: {sql}\n→ {sql}\n"


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with config.progress() as bar:
        bar.advance(bar.add_task("loading", total=2), 2)
    assert capsys.readouterr() == ("", "")


# ── The runner ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Line:
    product: str
    price: Decimal


@dataclass(frozen=True)
class Invoice:
    at: datetime
    lines: tuple[Line, ...]


def demo_invoice(currency: str) -> Invoice:
    """Two lines on an invoice.

    Prediction: the total has two decimals.

    Not when there is no customer.
    """
    config.fact("currency", currency)
    config.table(("n",), [(1,)])
    config.note("simulated")
    config.conclude("0.30 and not 0.30000000000000004")
    lines = (Line("tea ü", Decimal("0.10")), Line("milk", Decimal("0.20")))
    return Invoice(datetime(2026, 1, 31, 12, tzinfo=UTC), lines)


def demo_broken(log: list[str]) -> None:
    """One that fails."""
    log.append("broken")
    raise RuntimeError("no route to postgresql://app:hunter2@h/db")


def demo_sum(log: list[str], numbers: list[int]) -> int:
    """A sum."""
    log.append("sum")
    return sum(numbers)


class Script:
    """A script of three demos, and what became of its resources."""

    def __init__(self, demos: tuple[Callable[..., object], ...]) -> None:
        self.demos = demos
        self.log: list[str] = []
        self.run: Run | None = None
        self.fail_on_open: BaseException | None = None

    @contextmanager
    def open_resources(self, run: Run) -> Iterator[Mapping[str, object]]:
        self.run = run
        self.log.append("open")
        try:
            if self.fail_on_open:
                raise self.fail_on_open
            run.services["Redis"] = "in-process"
            yield {"currency": "EUR", "log": self.log, "numbers": [1, 2, 3], "unused": object()}
        finally:
            self.log.append("closed")

    def main(self, *argv: str, scale: int = 1) -> int:
        return config.run_script("A script.", self.demos, self.open_resources, argv, scale=scale)


@pytest.fixture
def script() -> Script:
    return Script((demo_invoice, demo_sum))


@pytest.fixture
def failing() -> Script:
    return Script((demo_broken, demo_sum))


def test_the_demos_run_in_order_with_what_their_parameters_name(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert script.main() == 0
    assert script.log == ["open", "sum", "closed"]
    assert signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    banners = [line for line in out.splitlines() if line.startswith("── ")]
    assert [line.rstrip(" ─") for line in banners] == ["── Two lines on an invoice", "── A sum"]
    assert {len(line) for line in banners} == {config.WIDTH}
    assert "\nPrediction: the total has two decimals.\n" in out
    assert "Not when" not in out
    assert out.startswith("On in-process\n")
    assert re.search(r"\nDemos: 2 in \d+\.\d s; none failed\.\n$", out)


def test_list_names_each_demo_and_opens_nothing(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["invoice", "Two lines on an invoice"],
        ["sum", "A sum"],
    ]
    assert script.log == []


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--only", "sum"], ["sum"]),
        (["--only", "sum", "--only", "invoice"], ["invoice", "sum"]),  # in reading order
        (["--only", "sum", "--only=sum"], ["sum"]),
    ],
)
def test_only_chooses_demos(
    script: Script, argv: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main("--json", *argv) == 0
    assert list(json.loads(capsys.readouterr().out)["demos"]) == names


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "smu"], ["smu", "invoice", "sum"]),
        (["--offline", "--require-services"], ["not allowed with"]),
        (["--scale", "0"], ["--scale", " 0 is no whole number above 0"]),
        (["--scale", "-3"], ["--scale", " -3 is no whole number above 0"]),
        (["--scale", "1.5"], ["--scale", "invalid int value: '1.5'"]),
        (["--scale", "many"], ["--scale", "invalid int value: 'many'"]),
        (["--scale", ""], ["--scale", "invalid int value: ''"]),
        (["--onl", "sum"], ["--onl"]),  # no abbreviations: a later option must not change them
        (["surplus"], ["surplus"]),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_is_right(
    script: Script, argv: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(*argv)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(part in message for part in said)
    assert script.log == []


def test_the_command_line_reaches_open_resources(script: Script) -> None:
    script.main("--offline", "--scale", "7")
    assert script.run
    assert (script.run.offline, script.run.require_services, script.run.scale) == (True, False, 7)
    script.main("--require-services", scale=500)
    assert (script.run.offline, script.run.require_services, script.run.scale) == (False, True, 500)


def test_json_is_all_that_is_printed_and_holds_the_results(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main("--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report.keys() == {"services", "elapsed_s", "demos"}
    assert report["services"] == {"Redis": "in-process"}
    assert isinstance(report["elapsed_s"], float)
    assert report["demos"]["sum"] == {"result": 6}
    invoice = report["demos"]["invoice"]["result"]
    assert datetime.fromisoformat(invoice["at"]) == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert invoice["lines"] == [
        {"product": "tea ü", "price": "0.10"},
        {"product": "milk", "price": "0.20"},
    ]


def test_after_json_the_helpers_print_again(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main("--json")
    capsys.readouterr()
    config.note("here")
    assert capsys.readouterr().out == "  note: here\n"


def test_a_failing_demo_does_not_take_the_others_with_it(
    failing: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing.main() == 1
    assert failing.log == ["open", "broken", "sum", "closed"]
    captured = capsys.readouterr()
    assert "failed: RuntimeError: no route to postgresql://app:***@h/db\n" in captured.out
    assert re.search(r"\nDemos: 2 in \d+\.\d s; failed: broken\.\n$", captured.out)
    assert "hunter2" not in captured.out + captured.err


def test_a_failure_is_in_the_json_too(failing: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing.main("--json") == 1
    demos = json.loads(capsys.readouterr().out)["demos"]
    assert demos["sum"] == {"result": 6}
    assert demos["broken"].keys() == {"error"}
    reason = "RuntimeError: no route to postgresql://app:***@h/db"
    assert demos["broken"]["error"].splitlines()[0] == reason


def test_a_bad_setting_exits_with_2_before_anything_opens(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@h:port/0")
    assert script.main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: REDIS_URL: ")
    assert "hunter2" not in captured.err
    assert captured.out == ""
    assert script.log == []


def test_a_server_that_refuses_exits_with_2(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.fail_on_open = ConfigError("REDIS_URL: wrong password")
    assert script.main("--json") == 2
    assert capsys.readouterr() == ("", "error: REDIS_URL: wrong password\n")
    assert script.log == ["open", "closed"]
    config.note("the console is heard again")
    assert "heard" in capsys.readouterr().out


def test_resources_that_fail_to_open_exit_with_1_and_the_reason_masked(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.fail_on_open = OSError("redis://:hunter2@h/0 went away")
    assert script.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: OSError: redis://:***@h/0 went away\n")
    assert "hunter2" not in captured.err
    assert script.log == ["open", "closed"]


def test_the_hint_at_the_traceback_is_given_where_it_is_true(
    failing: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "(LOG_LEVEL=DEBUG shows the traceback)"
    for level, is_hinted in (("WARNING", True), ("DEBUG", False)):
        monkeypatch.setenv("LOG_LEVEL", level)
        failing.fail_on_open = None
        assert failing.main() == 1
        captured = capsys.readouterr()
        assert (hint in captured.out) is is_hinted
        assert ("Traceback" in captured.err) is not is_hinted
        failing.fail_on_open = OSError("gone")
        assert failing.main() == 1
        captured = capsys.readouterr()
        assert (hint in captured.err) is is_hinted
        assert ("Traceback" in captured.err) is not is_hinted


ENDS = {
    "a setting": (
        {"REDIS_URL": "redis://:hunter2@h:port/0"},
        None,
        "error: REDIS_URL: malformed URL; its port is no",
    ),
    "a refusal": ({}, ConfigError("REDIS_URL: wrong password"), "error: REDIS_URL: wrong password"),
    "a failure": ({}, OSError("gone"), "error: OSError: gone\n(LOG_LEVEL=DEBUG"),
    "Ctrl-C": ({}, KeyboardInterrupt(), "interrupted"),
}


@pytest.mark.parametrize(("environ", "failure", "said"), ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("level", ["CRITICAL", "INFO"])
def test_with_json_logs_the_last_words_are_json_too(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    failure: BaseException | None,
    said: str,
    level: str,
) -> None:
    for name, value in {**environ, "LOG_FORMAT": "JSON", "LOG_LEVEL": level}.items():
        monkeypatch.setenv(name, value)
    script.fail_on_open = failure
    assert script.main() in (1, 2, 130)
    (entry,) = json_lines(capsys.readouterr().err)
    assert entry["message"].startswith(said)


def test_json_logs_may_be_asked_for_in_dotenv(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".env").write_text("LOG_FORMAT=json\n")
    script.fail_on_open = ConfigError("REDIS_URL: wrong password")
    assert script.main() == 2
    (entry,) = json_lines(capsys.readouterr().err)
    assert entry["message"] == "error: REDIS_URL: wrong password"


def test_run_url_gives_the_url_or_says_why_there_is_none() -> None:
    settings = Settings(redis_url="redis://h/0")
    online, offline = (Run(settings, off, False, 1) for off in (False, True))
    assert online.url("Redis", "REDIS_URL") == "redis://h/0"
    with pytest.raises(ServiceUnavailable, match=r"^RabbitMQ is .*: RABBITMQ_URL is not set\."):
        online.url("RabbitMQ", "RABBITMQ_URL")
    with pytest.raises(ServiceUnavailable, match="--offline was given"):
        offline.url("Redis", "REDIS_URL")


def test_falling_back_is_said_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(Settings(), False, False, 1)
    run.fall_back("Redis", ServiceUnavailable("Redis", "refused"), "in-process cache")
    assert run.services == {"Redis": "in-process cache"}
    assert capsys.readouterr().out.startswith("Redis is unavailable: refused.\nTo start one: ")


def test_there_is_no_falling_back_where_services_are_required() -> None:
    run = Run(Settings(), False, True, 1)
    with pytest.raises(ConfigError, match="--require-services: Redis is unavailable: refused"):
        run.fall_back("Redis", ServiceUnavailable("Redis", "refused"), "in-process cache")
    assert run.services == {}


# ── As a user runs it ───────────────────────────────────────────────────────────────

TINY = '''
"""A tiny script."""
import time
from contextlib import contextmanager
from pathlib import Path
from config import fact, run_script

@contextmanager
def open_resources(run):
    try:
        yield {}
    finally:
        Path("closed").touch()

def demo_lines():
    """Many lines."""
    for i in range(1_000):
        fact("line", i)
    return "x" * 100_000

def demo_wait():
    """Waits to be stopped."""
    Path("waiting").touch()
    time.sleep(60)

raise SystemExit(run_script(__doc__, (demo_lines, demo_wait), open_resources))
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the tiny script in the test's directory, in an environment of its own."""
    (tmp_path / "tiny.py").write_text(TINY)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def start(
        *args: str, stdout: int = subprocess.PIPE, encoding: str = "utf-8"
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "tiny.py", *args],
            cwd=tmp_path,
            env={**environ, "PYTHONIOENCODING": encoding},
            encoding=encoding,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            # A shell starts background jobs with SIGINT ignored, and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    return start


def test_what_an_encoding_does_not_have_is_replaced(
    tiny: Callable[..., subprocess.Popen[str]],
) -> None:
    """As on Windows, where output goes to a file in the code page of the machine."""
    out, err = tiny("--only", "lines", encoding="cp1252").communicate(timeout=30)
    assert "?? Many lines ??" in out
    assert "line: " in out
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("args", [[], ["--json"]])
def test_a_signal_closes_the_resources_and_exits_with_130(
    tiny: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    number: signal.Signals,
    args: list[str],
) -> None:
    with tiny("--only", "wait", *args) as process:
        deadline = time.monotonic() + DEADLINE_S
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert (tmp_path / "closed").exists()


@pytest.mark.parametrize("args", [["--only", "lines"], ["--only", "lines", "--json"], ["--list"]])
def test_a_reader_that_went_away_gives_no_traceback(
    tiny: Callable[..., subprocess.Popen[str]], tmp_path: Path, args: list[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with tiny(*args, stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert err == ""
    assert (tmp_path / "closed").exists() == ("--list" not in args)


def test_head_gets_the_first_line(tiny: Callable[..., subprocess.Popen[str]]) -> None:
    with tiny("--only", "lines", "--json") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "{\n"
        process.stdout.close()
        assert process.stderr.read() == ""

"""What a server's URL says, as its driver reads it: config.py checks and probes by this.

The driver's own parser decides. It is imported where its URL is configured, and not before.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote_plus

Address = tuple[str, int | None]  # a host and its port, or the path of a Unix socket and None

ENCODE = "is a special character in its password not percent-encoded?"
FILE_OPTION = re.compile(  # sslrootcert= tlsCAFile= ssl_certfile= …, or 'cafile': in ssl_options
    r"(?:cert|certs|key|cafile|certfile|keyfile)(?:=|['\"]: *['\"])([^&'\"]+)", re.IGNORECASE
)


def checked(url: str, schemes: Sequence[str]) -> str:
    """`url` in the form that its driver reads.

    Raises ValueError where the driver could not read it, or would read something else. The words
    are ours, because a parser's may quote the password.
    """
    # SQLAlchemy 2.1 would read both short forms as psycopg 3, which is not installed.
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)
    scheme, _, rest = url.partition("://")
    if scheme not in schemes or not rest:
        raise ValueError("expected " + " or ".join(f"{name}://…" for name in schemes))
    # A raw / ? or # in a password ends the host for a parser, and what is before it may look so.
    if not re.fullmatch(r"([^@/?#\s]*@)?[^@?\s]*(\?[^@]*)?", rest):
        raise ValueError(f"malformed URL; {ENCODE}")
    before_query, _, query = rest.partition("?")
    for path in FILE_OPTION.findall(unquote_plus(query)):
        if path != "system" and not os.access(path, os.R_OK):  # of libpq: no file
            raise ValueError(f"cannot read {path}, a file that the URL names")
    # libpq's form of a Unix socket, which SQLAlchemy would take for a host name.
    socket_form = re.fullmatch(r"(.*(?://|@))(%2F[^:/?]*)([^?]*)\??(.*)", url, re.IGNORECASE)
    if socket_form and scheme.startswith("postgresql"):
        before, directory, after, options = socket_form.groups()
        url = f"{before}{after}?host={directory}&{options}".rstrip("&")
    try:
        for host, port in [] if scheme == "mongodb+srv" else addresses(url):  # srv: hosts from DNS
            if re.search(r"[,\[\]]", host) or (port is not None and not 0 < port < 65536):
                raise ValueError
    except OSError as error:  # pika's, of a file that is no certificate
        raise ValueError(f"a file that the URL names: {error}") from None
    except Exception:  # of four parsers, each with classes of its own
        authority = re.split("[/?#]", rest)[0]
        raise ValueError(f"malformed URL; {_problem(scheme, authority)}") from None
    if scheme.startswith("amqp") and before_query.count("/") > 1:  # pika drops what is behind it
        vhost = before_query.split("/")[1]
        raise ValueError(f"asks for the virtual host {vhost!r}; write %2F for the default one, /")
    return url


def _problem(scheme: str, authority: str) -> str:
    """What keeps the driver from reading the URL, without a word of it."""
    user, _, hosts = authority.rpartition("@")
    if "," in hosts and scheme.startswith("postgresql"):
        form = "?host=h1:5432&host=h2:5432&target_session_attrs=read-write"
        return f"it names several hosts: SQLAlchemy wants {form}"
    if "," in hosts and scheme != "mongodb":
        return "it names several hosts, and its driver takes one"
    for host in hosts.split(","):
        _, colon, port = re.sub(r"^\[.*\]", "", host).partition(":")
        if ":" in port:
            return "an IPv6 address belongs in brackets, as in [::1]:6379"
        if colon and not (port.isdecimal() and 0 < int(port) < 65536):
            return "its port is no number from 1 to 65535"
    if scheme.startswith("amqp") and user and ":" not in user:
        return "it has a user and no password"
    option = "is an option after the ? wrong?"
    return f"{ENCODE} Or {option}" if user else option


def addresses(url: str) -> list[Address]:
    """Where its driver will look for a server; none where libpq decides by itself: without a host
    it takes PGHOST or its default socket.

    Raises what the driver's parser raises.
    """
    scheme = url.partition(":")[0]
    if scheme.startswith("postgresql"):
        return _libpq_addresses(url)
    if scheme.startswith("mongodb"):
        from pymongo.uri_parser import parse_uri

        nodes: list[Address] = parse_uri(url, validate=False)["nodelist"]  # options: MongoClient's
        return nodes
    if scheme.startswith("amqp"):
        from pika import URLParameters

        parameters = URLParameters(url)
        return [(parameters.host, parameters.port)]
    import redis.connection

    parse: Callable[[str], dict[str, Any]] = redis.connection.parse_url
    options = parse(url)
    if scheme == "unix":
        return [(options["path"], None)]
    return [(options.get("host", "localhost"), int(options.get("port", 6379)))]


def _libpq_addresses(url: str) -> list[Address]:
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    _, options = parsed.get_dialect()().create_connect_args(parsed)
    hosts = str(options.get("hostaddr") or options.get("host") or "").split(",")
    ports = str(options.get("port", os.environ.get("PGPORT", "5432"))).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    return [
        (f"{host}/.s.PGSQL.{port or 5432}", None) if host[0] == "/" else (host, int(port or 5432))
        for host, port in zip(hosts, ports, strict=True)
        if host
    ]


def unreachable(url: str, timeout_s: float) -> str:
    """Why no server of `url` accepts a connection within `timeout_s`; empty where one does."""
    candidates = addresses(url)
    outcomes: list[str] = []

    def attempt(host: str, port: int | None) -> None:
        try:
            _connect(host, port, timeout_s)
            outcomes.append("")
        except PermissionError:  # at a socket: somebody is there, and the driver will say more
            outcomes.append("")
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that DNS cannot express
            outcomes.append(getattr(error, "strerror", None) or str(error))

    # In threads, because resolving a host name knows no timeout.
    threads = [threading.Thread(target=attempt, args=each, daemon=True) for each in candidates]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if "" in outcomes or not candidates:
        return ""
    return ", ".join(dict.fromkeys(outcomes)) or f"no answer within {timeout_s:g} s"


def _connect(host: str, port: int | None, timeout_s: float) -> None:
    if port is not None:
        socket.create_connection((host, port), timeout_s).close()
        return
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout_s)
        client.connect(host)

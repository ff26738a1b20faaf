"""The address of Redis, read from a URL.

    redis://[user:password@]host[:port][/db]                             one server
    unix://[user:password@]/path/to/redis.sock[?db=N]                    one server on this machine
    redis+sentinel://[user:password@]host[:port][,host...]/service[/db]  the master that Sentinel names
    redis+cluster://[user:password@]host[:port][,host...]                a cluster, asked first at these hosts

`rediss` in place of `redis` means TLS. Parsing connects to nothing; a mistake is a ConfigError that names `redis.url`,
the value with its password masked, and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvstore.errors import ConfigError

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")

Address = tuple[str, int]


class ServerKind(Enum):
    """How a page's server is found."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """A parsed URL.

    nodes:   (host, port) of the server, the sentinels or the first cluster nodes; empty for a unix socket.
    path:    of the unix socket, else "".
    service: the name Sentinel knows the master by, else "".
    tls:     options of redis-py's SSLConnection, None without TLS.
    masked:  the URL as it may be shown.
    """

    kind: ServerKind
    masked: str
    nodes: tuple[Address, ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: Mapping[str, str | bool] | None = None


def parse_redis_url(url: str) -> RedisTarget:
    """Read `url`. Raises ConfigError for anything that is not one of the forms above."""
    return _Reader(url).target()


def mask_url(url: str) -> str:
    """`url` with every password replaced by ***, also where it stands in a wrong place."""
    url = re.sub(r"([?&]\w*password=)[^&]*", r"\1***", url)
    start = re.match(r"\w[\w+.-]*:/{1,2}", url)
    scheme = start[0] if start else ""
    # Up to the last @, since a password with an @ or / in it is a likely mistake and must not be shown either.
    userinfo, at, hosts = url[len(scheme) :].rpartition("@")
    if not at:
        return url
    username, colon, _ = userinfo.partition(":")
    # A name alone may well be a password whose colon was forgotten.
    return f"{scheme}{username + colon if colon else ''}***@{hosts}"


class _Reader:
    """One URL on its way to a RedisTarget; holds what every message needs."""

    def __init__(self, url: str) -> None:
        if not isinstance(url, str):
            raise ConfigError(f"redis.url is {url!r}; it must be text such as redis://127.0.0.1:6379/0")
        self.url = url
        self.masked = mask_url(url)

    def target(self) -> RedisTarget:
        if self.url != self.url.strip() or any(c.isspace() for c in self.url):
            self.fail("has white space in it; remove it or write it as %20")
        split = self.split()
        scheme, _, variant = split.scheme.partition("+")
        tls = scheme == "rediss"
        options = self.options(split, tls, variant)
        username, password, hosts = self.credentials(split)
        found = RedisTarget(
            ServerKind.SINGLE,
            self.masked,
            username=username,
            password=password,
            tls=_tls_arguments(options) if tls else None,
        )
        path = unquote(split.path)
        if scheme == "unix":
            if hosts or not path.strip("/"):
                self.fail("needs three slashes and the path of a socket: unix:///run/redis/redis.sock")
            return replace(found, path=path, db=self.db(options.get("db", "0")))
        found = replace(found, nodes=self.nodes(hosts, SENTINEL_PORT if variant == "sentinel" else REDIS_PORT))
        steps = [step for step in path.split("/") if step]
        if variant == "cluster":
            if steps or "db" in options:
                self.fail("names a database; a cluster has only database 0, so leave it out")
            return replace(found, kind=ServerKind.CLUSTER)
        if variant == "sentinel":
            if not steps:
                self.fail(f"does not name the service; write {split.scheme}://host:26379/mymaster/0")
            return replace(
                found,
                kind=ServerKind.SENTINEL,
                service=steps[0],
                db=self.path_db(steps[1:], options),
                sentinel_username=options.get("sentinel_username"),
                sentinel_password=options.get("sentinel_password"),
            )
        if len(found.nodes) > 1:
            self.fail(f"names {len(found.nodes)} hosts; use redis+cluster:// or redis+sentinel:// for more than one")
        return replace(found, db=self.path_db(steps, options))

    # -- pieces, in the order in which they are first needed

    def fail(self, reason: str) -> NoReturn:
        # `from None`: the ValueError of a library could carry the password.
        raise ConfigError(f"redis.url is {self.masked!r}; it {reason}") from None

    def split(self) -> SplitResult:
        if "://" not in self.url:
            self.fail("has no scheme; write for example redis://127.0.0.1:6379/0")
        try:
            split = urlsplit(self.url)
        except ValueError:
            self.fail("cannot be read; write for example redis://127.0.0.1:6379/0")
        if split.scheme not in SCHEMES:
            close = get_close_matches(split.scheme, SCHEMES, n=1)
            hint = f"did you mean {close[0]}://?" if close else "use one of " + ", ".join(s + "://" for s in SCHEMES)
            self.fail(f"has the unknown scheme {split.scheme!r}; {hint}")
        if split.fragment:
            self.fail("has a # in it; write it as %23 where it belongs to a password")
        if "@" in split.path and "@" not in split.netloc and split.scheme != "unix":
            self.fail("has a / in its password; write it as %2F")
        return split

    def options(self, split: SplitResult, tls: bool, variant: str) -> dict[str, str]:
        allowed = ["db", *(TLS_OPTIONS if tls else ()), *(SENTINEL_OPTIONS if variant == "sentinel" else ())]
        options: dict[str, str] = {}
        for name, value in parse_qsl(split.query, keep_blank_values=True):
            if name in TLS_OPTIONS and not tls:
                self.fail(f"has the option {name}, which needs TLS; write rediss in place of redis")
            if name not in allowed:
                close = get_close_matches(name, allowed, n=1)
                hint = f"did you mean {close[0]}?" if close else "known here: " + ", ".join(allowed)
                self.fail(f"has the unknown option {name!r}; {hint}")
            options[name] = value
        if options.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
            self.fail(f"has ssl_cert_reqs={options['ssl_cert_reqs']}; it must be none, optional or required")
        if options.get("ssl_check_hostname", "true") not in ("true", "false"):
            self.fail(f"has ssl_check_hostname={options['ssl_check_hostname']}; it must be true or false")
        return options

    def credentials(self, split: SplitResult) -> tuple[str | None, str | None, str]:
        userinfo, at, hosts = split.netloc.rpartition("@")
        if not at:
            return None, None, hosts
        username, colon, password = userinfo.partition(":")
        if not colon:
            self.fail("has a user name but no password; write user:password@, :password@, or user:@ for none")
        return unquote(username) or None, unquote(password) or None, hosts

    def nodes(self, hosts: str, default_port: int) -> tuple[Address, ...]:
        if not hosts:
            self.fail("names no host; write for example redis://127.0.0.1:6379/0")
        return tuple(self.node(text, default_port) for text in hosts.split(","))

    def node(self, text: str, default_port: int) -> Address:
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(?::(.*))?", text)
        if match is None:
            self.fail(f"has the host {text!r}; write host:port, and an IPv6 address in brackets: [::1]:6379")
        host, port = match[1].strip("[]"), match[2]
        if port is None:
            return host, default_port
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            self.fail(f"has the port {port!r}; it must be a number from 1 to 65535")
        return host, int(port)

    def path_db(self, steps: list[str], options: Mapping[str, str]) -> int:
        if len(steps) > 1 or (steps and "db" in options):
            self.fail("has more than a database number after the host; write redis://host:6379/0")
        return self.db(steps[0] if steps else options.get("db", "0"))

    def db(self, text: str) -> int:
        if not text.isascii() or not text.isdigit():
            self.fail(f"has the database {text!r}; it must be a number such as 0")
        return int(text)


def _tls_arguments(options: Mapping[str, str]) -> dict[str, str | bool]:
    """The arguments of redis-py's SSLConnection; what is not given keeps its strict default there."""
    arguments: dict[str, str | bool] = {name: value for name, value in options.items() if name in TLS_OPTIONS}
    if "ssl_check_hostname" in arguments:
        arguments["ssl_check_hostname"] = arguments["ssl_check_hostname"] == "true"
    return arguments

"""The properties of Redis servers, for the start of a daemon and for operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from statistics import median
from uuid import uuid4

from kvstore.errors import TierUnavailable
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.node import Node
from kvstore.tiers.redis.parser import Reply
from kvstore.tiers.redis.refusal import checked
from kvstore.tiers.redis.route import make_route
from kvstore.tiers.redis.url import parse_redis_url

SECTIONS = (b"server", b"clients", b"memory", b"persistence", b"stats", b"replication")
SETTINGS = (b"save", b"appendonly", b"maxmemory-clients", b"client-output-buffer-limit")
PAGE_TRIES = 7
PAGE_LIFE_MS = 5000  # of a page that is written to be read; it is deleted before


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """One server. "" and None for what the account may not ask, or the server does not say.

    where:               host:port, or the path of a socket.
    product:             "redis" or "valkey"; version is the product's own.
    role:                "master" or "slave".
    policy:              maxmemory-policy.
    maxmemory_bytes:     0 for no limit. used_bytes: of it. system_bytes: memory of its machine.
    allocator:           such as "jemalloc-5.3.0", "libc".
    evicted_keys:        since its start.
    replicas:            that hang on it. backlog_bytes: what one may miss and still catch up.
    snapshots:           the setting `save`, "" for never. appends: the setting `appendonly`.
    max_clients_memory:  the setting `maxmemory-clients`; "0" for no limit.
    normal_output_limit: bytes that may wait for one client; 0 for no limit.
    """

    where: str = ""
    product: str = ""
    version: str = ""
    role: str = ""
    policy: str = ""
    maxmemory_bytes: int | None = None
    used_bytes: int | None = None
    system_bytes: int | None = None
    allocator: str = ""
    evicted_keys: int | None = None
    replicas: int | None = None
    backlog_bytes: int | None = None
    snapshots: str | None = None
    appends: bool | None = None
    max_clients_memory: str | None = None
    normal_output_limit: int | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers; () if unknown."""
        parts = self.version.split(".")
        return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()

    @property
    def is_valkey(self) -> bool:
        """True for Valkey."""
        return self.product == "valkey"

    @property
    def evicts(self) -> bool | None:
        """Whether it makes room by itself when it is full; None if it does not say."""
        return None if not self.policy else self.policy != "noeviction"


@dataclass(frozen=True, slots=True)
class PageTimes:
    """How long one page takes, in seconds: the median of some, one at a time on one connection."""

    page_bytes: int
    write_s: float
    read_s: float


def ask_servers(url: str, *, timeout_s: float) -> list[ServerInfo]:
    """Ask the server of a URL, of a cluster all that hold keys. Blocks.

    Raises TierUnavailable with the reason (no answer, a password that is refused), ConfigError for the URL.
    """
    deadline = time.monotonic() + timeout_s
    found: list[ServerInfo] = []
    for node in _nodes(url, deadline, timeout_s):
        with node.lease(deadline, repeatable=True) as wire:
            found.append(_read(node.where, wire))
    return found


def time_pages(url: str, page_bytes: int, *, prefix: str, timeout_s: float) -> PageTimes:
    """Write and read pages of bytes that do not compress, and delete them. Of a cluster, at the first node.

    Raises TierUnavailable, or TierRefused for a server that takes none (too little memory, no permission).
    """
    deadline = time.monotonic() + timeout_s
    scrap = _Scrap(page_bytes)
    name = f"{prefix}check:{uuid4().hex}".encode()
    value = bytes(bytearray(range(256)) * (page_bytes // 256 + 1))[:page_bytes]
    writes: list[float] = []
    reads: list[float] = []
    with closing(make_route(parse_redis_url(url), connections=1, connect_timeout_s=timeout_s)) as route:
        split = route.split([name], deadline)
        if not split:
            raise TierUnavailable("no server has slots")
        with split[0][0].lease(deadline) as wire:
            for _ in range(PAGE_TRIES):
                started = time.perf_counter()
                [stored] = wire.ask([(b"SET", name, value, b"PX", PAGE_LIFE_MS)])
                writes.append(time.perf_counter() - started)
                checked(stored, wire.where, wire.account)
                scrap.num_read = 0
                started = time.perf_counter()
                wire.send([b"*2\r\n$4\r\nMGET\r\n$%d\r\n%b\r\n" % (len(name), name)], replies=1)
                checked(wire.reply_into(scrap, 1), wire.where, wire.account)
                reads.append(time.perf_counter() - started)
            wire.ask([(b"UNLINK", name)])
    return PageTimes(page_bytes, median(writes), median(reads))


class _Scrap:
    """A place for a page that nobody wants."""

    def __init__(self, num_bytes: int) -> None:
        self.num_read = 0
        self._view = memoryview(bytearray(num_bytes))

    def window(self, num_bytes: int) -> memoryview:
        return self._view[self.num_read : self.num_read + num_bytes]

    def advance(self, num_bytes: int) -> None:
        self.num_read += num_bytes


def _nodes(url: str, deadline: float, timeout_s: float) -> Iterator[Node]:
    with closing(make_route(parse_redis_url(url), connections=1, connect_timeout_s=timeout_s)) as route:
        nodes = route.nodes(deadline)
        if not nodes:
            raise TierUnavailable("no server has slots")
        yield from nodes


def _read(where: str, wire: RedisConnection) -> ServerInfo:
    replies = wire.ask(
        [*((b"INFO", section) for section in SECTIONS), *((b"CONFIG", b"GET", name) for name in SETTINGS)]
    )
    told = _fields(replies[: len(SECTIONS)])
    settings = _settings(replies[len(SECTIONS) :])
    product = told.get("server_name", "redis" if "redis_version" in told else "")
    limits = settings.get("client-output-buffer-limit", "").split()
    values = {
        "where": where,
        "product": product,
        "version": told.get(f"{product}_version", told.get("redis_version", "")),
        "role": told.get("role", ""),
        "policy": told.get("maxmemory_policy", ""),
        "maxmemory_bytes": _number(told.get("maxmemory")),
        "used_bytes": _number(told.get("used_memory")),
        "system_bytes": _number(told.get("total_system_memory")),
        "allocator": told.get("mem_allocator", ""),
        "evicted_keys": _number(told.get("evicted_keys")),
        "replicas": _number(told.get("connected_slaves")),
        "backlog_bytes": _number(told.get("repl_backlog_size")),
        "snapshots": settings.get("save"),
        "appends": None if "appendonly" not in settings else settings["appendonly"] == "yes",
        "max_clients_memory": settings.get("maxmemory-clients"),
        "normal_output_limit": _number(limits[1]) if limits[:1] == ["normal"] and len(limits) > 1 else None,
    }
    assert set(values) == {field.name for field in fields(ServerInfo)}
    return ServerInfo(**values)  # type: ignore[arg-type]


def _fields(replies: list[Reply]) -> dict[str, str]:
    """The lines of INFO as a dict; a section that is refused is left out."""
    found: dict[str, str] = {}
    for reply in replies:
        if isinstance(reply, (bytes, bytearray, memoryview)):
            lines = bytes(reply).decode("utf-8", "replace").splitlines()
            found |= dict(line.split(":", 1) for line in lines if ":" in line)
    return found


def _settings(replies: list[Reply]) -> dict[str, str]:
    """The answers of CONFIG GET as a dict; what is refused or unknown is left out."""
    found: dict[str, str] = {}
    for reply in replies:
        if isinstance(reply, list):
            words = [bytes(word).decode("utf-8", "replace") for word in reply if isinstance(word, bytes)]
            found |= dict(zip(words[::2], words[1::2], strict=False))
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None

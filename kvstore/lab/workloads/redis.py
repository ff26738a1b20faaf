"""SET and GET of pages in a Redis tier, and its lookups, over a bare socket to the same server.

The bare socket sends and receives values of the same size, straight out of and into a slot, with no client library, no
page header and no checksum. CPU seconds are the client's; the server has its own. What was written is deleted again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.peers import RedisPy
from kvstore.page import PageMeta, page_key
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.host import HostSlab
from kvstore.tiers.redis.tier import RedisTier
from kvstore.tiers.redis.url import RedisTarget, ServerKind, parse_redis_url
from kvstore.units import KiB, MiB

PAGE_SIZES = (256 * KiB, 2 * MiB)
TOTAL_BYTES = 64 * MiB
QUICK_BYTES = 8 * MiB
CONNECTIONS = 3
LOOKUP_KEYS = 256
TIMEOUT_S = 60.0
TTL_S = 600.0  # for what an interrupted run leaves behind


def run(argument: str, quick: bool, peer: bool = False) -> list[Table]:
    """Measure pages of 256 KiB and 2 MiB on the server at the URL `argument`; "local" starts a private one.

    peer: redis-py as it comes, too.

    Raises ConfigError, TierUnavailable, or RedisNotInstalled.
    """
    if argument == "local":
        with LocalRedis() as server:
            return run(server.url, quick, peer)
    target = parse_redis_url(argument)
    if target.kind is not ServerKind.SINGLE or target.tls is not None:
        raise ConfigError(f"bench redis: {target.masked} has no bare socket to compare with; give redis:// or unix://")
    tables = []
    for page_bytes in PAGE_SIZES:
        num_pages = (QUICK_BYTES if quick else TOTAL_BYTES) // page_bytes
        tables += _measure(argument, target, page_bytes, num_pages, quick, peer)
    return tables


class BareSocket:
    """The least a client of Redis can do: commands out of, and values into, memory that is there already."""

    def __init__(self, target: RedisTarget) -> None:
        """Connect and log in. Raises TierUnavailable if the server does not answer, ConfigError if it refuses."""
        try:
            if target.path:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(TIMEOUT_S)
                self._socket.connect(target.path)
            else:
                self._socket = socket.create_connection(target.nodes[0], timeout=TIMEOUT_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise TierUnavailable(f"bench redis: {target.masked} cannot be reached: {error}") from error
        self._rest = bytearray()
        if target.password is not None:
            self._ask(b"AUTH", *([target.username.encode()] if target.username else []), target.password.encode())
        if target.db:
            self._ask(b"SELECT", str(target.db).encode())

    def set(self, key: bytes, value: memoryview) -> None:
        """SET one value, from where it lies."""
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
        parts = [memoryview(head), value, memoryview(b"\r\n")]
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]
        self._line()

    def get_into(self, key: bytes, out: memoryview) -> None:
        """GET one value into `out`, which has its length."""
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        if int(self._line()[1:]) != len(out):
            raise RuntimeError("bench redis: the server lost a page; it is full, or somebody flushed it")
        early = min(len(self._rest), len(out))
        out[:early] = self._rest[:early]
        del self._rest[:early]
        while early < len(out):
            early += self._receive(self._socket.recv_into(out[early:]))
        while len(self._rest) < 2:
            self._fill()
        del self._rest[:2]

    def exists(self, keys: Sequence[bytes]) -> int:
        """How many of `keys` are there, in one round trip of one command each."""
        self._socket.sendall(b"".join(b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        return sum(int(self._line()[1:]) for _ in keys)

    def delete(self, keys: Sequence[bytes]) -> None:
        """DEL all keys."""
        self._ask(b"DEL", *keys)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _ask(self, *words: bytes) -> bytes:
        self._socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words))
        return self._line()

    def _line(self) -> bytes:
        while (end := self._rest.find(b"\r\n")) < 0:
            self._fill()
        line = bytes(self._rest[:end])
        del self._rest[: end + 2]
        if line.startswith(b"-"):
            raise ConfigError(f"bench redis: the server refuses: {line[1:].decode(errors='replace')}")
        return line

    def _fill(self) -> None:
        chunk = self._socket.recv(4096)
        self._receive(len(chunk))
        self._rest += chunk

    def _receive(self, num_bytes: int) -> int:
        if not num_bytes:
            raise TierUnavailable("bench redis: the server closed the connection")
        return num_bytes


def _measure(url: str, target: RedisTarget, page_bytes: int, num_pages: int, quick: bool, peer: bool) -> list[Table]:
    prefix = f"kvstore-bench-{os.getpid()}:"
    keys = [page_key(os.urandom(32)) for _ in range(num_pages)]
    raw_keys = [prefix.encode() + b"raw:" + key for key in keys]
    absent = [page_key(os.urandom(32)) for _ in range(LOOKUP_KEYS)]
    metas = [PageMeta(page_bytes)] * num_pages
    every = range(num_pages)
    peer_keys = [prefix.encode() + b"peer:" + key for key in keys]
    with (
        closing(HostSlab(num_pages, page_bytes)) as slab,
        closing(BareSocket(target)) as bare,
        closing(RedisTier(url, prefix=prefix, slot_bytes=page_bytes, ttl_s=TTL_S, connections=CONNECTIONS)) as tier,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        slab.buffer[:] = np.random.default_rng(1).integers(0, 256, slab.buffer.size, dtype=np.uint8)
        views = [slab.view(i) for i in every]
        plain = RedisPy(url, peer_keys, views) if peer else None

        def write(pages: Sequence[int]) -> None:
            columns = ([keys[i] for i in pages], [views[i] for i in pages], [metas[i] for i in pages])
            _expect(tier.write_from(*columns, timeout_s=TIMEOUT_S))

        def read(pages: Sequence[int]) -> None:
            columns = ([keys[i] for i in pages], [views[i] for i in pages], [metas[i] for i in pages])
            _expect(tier.read_into(*columns, timeout_s=TIMEOUT_S))

        def raw_write() -> None:
            for key, view in zip(raw_keys, views, strict=True):
                bare.set(key, view)

        def raw_read() -> None:
            for key, view in zip(raw_keys, views, strict=True):
                bare.get_into(key, view)

        def forget() -> None:
            tier.delete(keys, timeout_s=TIMEOUT_S)

        def cases(raw: Callable[[], None], ours: Callable[[Sequence[int]], None], verb: str) -> list[Case]:
            prepare = forget if ours is write else None
            num_bytes = num_pages * page_bytes
            parts = [every[i::CONNECTIONS] for i in range(CONNECTIONS)]
            theirs = plain and (plain.write if ours is write else plain.read)
            return [
                Case(f"bare socket, {verb}", raw, num_bytes),
                Case("redis tier, 1 connection", lambda: ours(every), num_bytes, prepare),
                Case(f"redis tier, {CONNECTIONS} connections", lambda: list(pool.map(ours, parts)), num_bytes, prepare),
                *([Case("peer: redis-py", lambda: theirs(every), num_bytes)] if theirs else []),
            ]

        what = f"{num_pages} pages of {page_bytes // KiB} KiB"
        lookups = [
            Case("bare socket, EXISTS for each, one round trip", lambda: bare.exists(absent), LOOKUP_KEYS),
            Case("redis tier, contains", lambda: tier.contains(absent, timeout_s=TIMEOUT_S), LOOKUP_KEYS),
        ]
        try:
            return [
                measure(f"write {what}", "bytes", cases(raw_write, write, "SET"), quick=quick),
                measure(f"read {what}", "bytes", cases(raw_read, read, "GET"), quick=quick),
                measure(f"look up {LOOKUP_KEYS} keys", "keys", lookups, quick=quick),
            ]
        finally:
            forget()
            bare.delete(raw_keys)
            if plain is not None:
                plain.close()


def _expect(answers: Sequence[bool]) -> None:
    if not all(answers):
        raise RuntimeError(f"bench redis: {answers.count(False)} of {len(answers)} pages were refused")

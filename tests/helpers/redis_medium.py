"""Pages on servers, past the tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.page import PageKey
from kvstore.testing.redis_server import LocalRedis


class Medium:
    """The servers that hold keys, and what is on them. url: where the tier finds them."""

    def __init__(self, servers: Sequence[LocalRedis], url: str) -> None:
        self.server = servers[0]
        self.url = url
        self._clients: list[Any] = [server.client() for server in servers]
        for client in self._clients:
            client.ping()  # connects now, so that the connection is the fixture's and not a test's

    @property
    def client(self) -> Any:
        """Of the first server."""
        return self._clients[0]

    def names(self, key: PageKey) -> list[bytes]:
        """The keys of a page's parts, head first."""
        found = [name for client in self._clients for name in client.keys("*") if key in name]
        return sorted(found, key=lambda name: (len(name), name))

    def length(self, name: bytes) -> int:
        return int(self._holder(name).strlen(name))

    def flip(self, name: bytes, byte: int, bit: int) -> None:
        holder = self._holder(name)
        (old,) = holder.getrange(name, byte, byte)
        holder.setrange(name, byte, bytes([old ^ 1 << bit]))

    def pass_time(self, seconds: float) -> None:
        for client in self._clients:
            for name in client.keys("*"):
                left = client.pttl(name)
                if left >= 0:
                    client.pexpire(name, max(0, left - int(seconds * 1000)))

    def flush(self) -> None:
        for client in self._clients:
            client.flushall()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _holder(self, name: bytes) -> Any:
        return next(client for client in self._clients if name in client.keys("*"))

"""The properties of a Redis server, for the start of a daemon and for operators."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

from kvstore.errors import TierUnavailable
from kvstore.tiers.redis.route import make_route
from kvstore.tiers.redis.url import parse_redis_url

EVICTS = (
    "allkeys-lru",
    "allkeys-lfu",
    "allkeys-random",
    "volatile-lru",
    "volatile-lfu",
    "volatile-random",
    "volatile-ttl",
)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """One server. "" and None for what the account may not ask. maxmemory_bytes: 0 for no limit."""

    version: str = ""
    policy: str = ""
    maxmemory_bytes: int | None = None

    @property
    def evicts(self) -> bool | None:
        """Whether it makes room by itself when it is full; None if it does not say."""
        return None if not self.policy else self.policy in EVICTS


def ask_server(url: str, *, timeout_s: float) -> ServerInfo:
    """Ask the server of a URL, of a cluster the first node that answers. Blocks.

    Raises TierUnavailable with the reason (no answer, a password that is refused), ConfigError for the URL.
    """
    deadline = time.monotonic() + timeout_s
    with closing(make_route(parse_redis_url(url), connections=1, connect_timeout_s=timeout_s)) as route:
        for node in route.nodes(deadline):
            with node.lease(deadline, repeatable=True) as wire:
                replies = wire.ask([(b"INFO", b"server"), (b"INFO", b"memory")])
            fields: dict[str, str] = {}
            for reply in replies:
                if isinstance(reply, (bytes, bytearray, memoryview)):
                    lines = bytes(reply).decode("utf-8", "replace").splitlines()
                    fields |= dict(line.split(":", 1) for line in lines if ":" in line)
            size = fields.get("maxmemory", "")
            return ServerInfo(
                fields.get("redis_version", ""),
                fields.get("maxmemory_policy", ""),
                int(size) if size.isdigit() else None,
            )
    raise TierUnavailable("no server has slots")

"""Eviction policies by name, for configuration and for the replay of traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eviction.lru import Lru
from eviction.outlook import Outlook
from eviction.policy import EvictionPolicy
from eviction.s3fifo import S3Fifo
from eviction.sieve import Sieve
from eviction.ttl import Ttl

PolicyFactory = Callable[[], EvictionPolicy[Any]]

POLICIES: dict[str, PolicyFactory] = {"lru": Lru, "outlook": Outlook, "s3fifo": S3Fifo, "sieve": Sieve}


def register_policy(name: str, factory: PolicyFactory) -> None:
    """Make a policy known under `name`; `factory` returns a new, empty one each time.

    Raises ValueError if the name is taken by another.
    """
    if POLICIES.setdefault(name, factory) is not factory:
        raise ValueError(f"eviction policy {name!r} is registered already; choose another name")


def make_policy(name: str, ttl_s: float | None = None) -> Ttl[Any]:
    """Return a new policy with deadlines on top: `ttl_s` seconds after the last use, None or 0 for never.

    Deadlines are there even without `ttl_s`, because a key may bring its own (`Hint.ttl_s`). Raises ValueError for an
    unknown name or a negative ttl.
    """
    factory = POLICIES.get(name)
    if factory is None:
        raise ValueError(f"eviction policy is {name!r}; it must be one of {', '.join(sorted(POLICIES))}")
    return Ttl(factory(), ttl_s, name)

"""How many files the process may have open, and what they are kept for.

A daemon that runs out of descriptors can let nobody in, not even the engines it is there for. So the limit is raised as
far as the system allows at the start, strangers get a part of it, and a few descriptors are kept in hand: the socket
that engines come by lets one go when it finds none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from dataclasses import dataclass

OUT_OF_THEM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
OWN = 128  # of the process itself: tiers, index, slab, logs, libraries
MOST = 1 << 20
MOST_HTTP = 4096
FEW = 512  # with fewer in all, the start says so


@dataclass(frozen=True, slots=True)
class Budget:
    """How many connections of each kind there may be.

    http:    over TCP, whoever they are from.
    silent:  on the unix socket that have not said yet what they are.
    """

    limit: int
    http: int
    silent: int


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """How many files the process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)


def budget(files: int) -> Budget:
    """The share of `files` for connections: a quarter is for HTTP over TCP, the rest is kept."""
    part = max(4, (files - OWN) // 4)
    return Budget(files, min(part, MOST_HTTP), min(max(part // 4, 4), 256))


class Spare:
    """Descriptors kept in hand."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._files: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Take in hand again what was let go, as far as there are any."""
        with contextlib.suppress(OSError):
            while len(self._files) < self._count:
                self._files.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def let_go(self) -> bool:
        """Give one up for something that matters more; False if none is left."""
        if not self._files:
            return False
        os.close(self._files.pop())
        return True

    def close(self) -> None:
        """Give all up, and take none again. Idempotent."""
        self._count = 0
        while self.let_go():
            pass

"""One server and the connections to it.

A Node keeps its idle wires; a wire that was left in the middle of a reply, or whose server has hung up, is never among
them. Nothing connects before it is used. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvstore.errors import TierUnavailable
from kvstore.forks import in_child
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.hedge import IDLE_S, Hedge


class Node:
    """One server and the wires to it, at most `connections` at a time; one more while a silent one is replaced."""

    def __init__(
        self, where: str, connect: Callable[[float], RedisConnection], connections: int, *, idle_max_s: float = 0.0
    ) -> None:
        """`connect(deadline)` returns an open wire. idle_max_s: as for `make_route`."""
        self.where = where
        self._idle_max_s = idle_max_s
        self._connect = connect
        self._connections = connections
        self._closed = False
        self._idle: list[tuple[RedisConnection, float]] = []  # with the time since when; the youngest last
        self._begin()
        in_child(self, Node._begin_anew)

    @contextmanager
    def lease(self, deadline: float, *, repeatable: bool = False) -> Iterator[RedisConnection]:
        """A wire for one call. Raises TierUnavailable if none is free or can be made before `deadline`.

        repeatable: what is asked first may be asked twice, where an idle connection turns out to be dead.
        """
        if not self._permits.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierUnavailable(f"redis {self.where}: all {self._connections} connections are busy")
        try:
            wire = self._take(deadline, repeatable)
            try:
                yield wire
            finally:
                self._give_back(wire)
        finally:
            self._permits.release()

    def drop_idle(self) -> None:
        """Close the wires nobody uses; the next lease makes a new one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire, _ in idle:
            wire.close()

    def close(self) -> None:
        """Close idle wires now, leased ones when they are given back."""
        with self._lock:
            self._closed = True
        self.drop_idle()

    def _begin(self) -> None:
        self._permits = threading.BoundedSemaphore(self._connections)
        self._lock = threading.Lock()
        self._idle = []

    def _begin_anew(self) -> None:
        """In a forked child: both processes hold the same sockets, and would read each other's replies."""
        inherited = self._idle
        self._begin()
        for wire, _ in inherited:
            wire.close()  # redis-py closes only our copy of the socket: the parent's connection lives on

    def _take(self, deadline: float, repeatable: bool) -> RedisConnection:
        while True:
            with self._lock:
                if self._closed:
                    raise TierUnavailable(f"redis {self.where}: closed")
                wire, since = self._idle.pop() if self._idle else (None, 0.0)
            if wire is None:
                return self._connect(deadline)
            idle_s = time.monotonic() - since
            is_young = not self._idle_max_s or idle_s <= self._idle_max_s
            hedge = Hedge(self._connect, self.drop_idle, is_doubtful=idle_s >= IDLE_S) if repeatable else None
            if is_young and wire.resume(deadline, hedge):
                return wire
            wire.close()

    def _give_back(self, wire: RedisConnection) -> None:
        with self._lock:
            if wire.is_reusable and not self._closed:
                self._idle.append((wire, time.monotonic()))
                return
        wire.close()

"""Which server holds a key, and the connections to it.

    single      one node
    sentinel    one node, whose address the sentinels are asked for whenever a connection is made
    cluster     a node per master, found by the slot of the key; the table is fetched on first use and after `forget`

Nothing connects before it is used. A Node keeps its idle wires; a wire that was left in the middle of a reply, or whose
server has hung up, is never among them. Any thread.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot
from redis.exceptions import ResponseError
from redis.retry import Retry

from kvstore.errors import TierUnavailable
from kvstore.tiers.redis_url import Address, Kind, RedisTarget
from kvstore.tiers.redis_wire import PageParser, Reply, Wire

_Answer = TypeVar("_Answer")


class Route(Protocol):
    """Finds the node of a key."""

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        """Group the indexes of `keys` by node. May ask a server; raises TierUnavailable."""

    def nodes(self, deadline: float) -> list[Node]:
        """All nodes that hold keys."""

    def forget(self) -> None:
        """Drop idle connections and what is known about who holds what: something has changed or broken."""

    def close(self) -> None:
        """Close every connection, idle now or given back later. Idempotent."""


def make_route(target: RedisTarget, *, connections: int, connect_timeout_s: float) -> Route:
    """The route of `target`: at most `connections` to each server at a time."""
    if target.kind is Kind.CLUSTER:
        return ClusterRoute(target, connections=connections, connect_timeout_s=connect_timeout_s)
    if target.kind is Kind.SENTINEL:
        master = _Sentinels(target, connect_timeout_s)
        where = f"{target.service} behind {_text(target.nodes[0])}"
        return SingleRoute(Node(where, master.connect, connections))
    dialer = _Dialer(target, connect_timeout_s)
    address = target.nodes[0] if target.nodes else (target.path, 0)
    return SingleRoute(Node(_text(address), lambda deadline: dialer.dial(address, deadline), connections))


class Node:
    """One server and the wires to it, at most `connections` at a time."""

    def __init__(self, where: str, connect: Callable[[float], Wire], connections: int) -> None:
        """`connect(deadline)` returns an open wire."""
        self.where = where
        self._connect = connect
        self._connections = connections
        self._closed = False
        self._idle: list[Wire] = []
        self._begin()

    @contextmanager
    def lease(self, deadline: float) -> Iterator[Wire]:
        """A wire for one call. Raises TierUnavailable if none is free or can be made before `deadline`."""
        if self._pid != os.getpid():
            # After a fork both processes hold the same sockets and would read each other's replies.
            inherited = self._idle
            self._begin()
            for wire in inherited:
                wire.close()  # redis-py closes only our copy of the socket: the parent's connection lives on
        if not self._permits.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierUnavailable(f"redis {self.where}: all {self._connections} connections are busy")
        try:
            wire = self._take(deadline)
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
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """Close idle wires now, leased ones when they are given back."""
        with self._lock:
            self._closed = True
        self.drop_idle()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._permits = threading.BoundedSemaphore(self._connections)
        self._lock = threading.Lock()
        self._idle = []

    def _take(self, deadline: float) -> Wire:
        while True:
            with self._lock:
                if self._closed:
                    raise TierUnavailable(f"redis {self.where}: closed")
                wire = self._idle.pop() if self._idle else None
            if wire is None:
                return self._connect(deadline)
            if wire.resume(deadline):
                return wire
            wire.close()

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            if wire.is_reusable and not self._closed:
                self._idle.append(wire)
                return
        wire.close()


class SingleRoute:
    """All keys on one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        return [(self._node, list(range(len(keys))))]

    def nodes(self, deadline: float) -> list[Node]:
        return [self._node]

    def forget(self) -> None:
        self._node.drop_idle()

    def close(self) -> None:
        self._node.close()


class ClusterRoute:
    """Each key on the master that has its slot."""

    def __init__(self, target: RedisTarget, *, connections: int, connect_timeout_s: float) -> None:
        self._seeds = target.nodes
        self._dialer = _Dialer(target, connect_timeout_s)
        self._connections = connections
        self._lock = threading.Lock()
        self._nodes: dict[Address, Node] = {}
        self._ranges: list[tuple[int, int, Address]] = []  # first slot, last slot, master; sorted
        self._closed = False

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        ranges = self._slot_ranges(deadline)
        starts = [first for first, _, _ in ranges]
        groups: dict[Address, list[int]] = {}
        for index, key in enumerate(keys):
            slot = key_slot(key)
            place = bisect_right(starts, slot) - 1
            if place < 0 or ranges[place][1] < slot:
                raise TierUnavailable(f"redis cluster: no node has slot {slot}")
            groups.setdefault(ranges[place][2], []).append(index)
        return [(self._node(address), indexes) for address, indexes in groups.items()]

    def nodes(self, deadline: float) -> list[Node]:
        return [self._node(address) for address in dict.fromkeys(a for _, _, a in self._slot_ranges(deadline))]

    def forget(self) -> None:
        with self._lock:
            self._ranges = []
            nodes = list(self._nodes.values())
        for node in nodes:
            node.drop_idle()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def _slot_ranges(self, deadline: float) -> list[tuple[int, int, Address]]:
        with self._lock:
            if self._ranges:
                return self._ranges
            addresses = list(dict.fromkeys([*self._seeds, *self._nodes]))
        # Outside the lock: two threads may both ask, which costs one more round trip and never a wait on a dead server.
        ranges = _first_answer(addresses, deadline, self._ask_slots, "no cluster node answers")
        with self._lock:
            self._ranges = ranges
        return ranges

    def _ask_slots(self, address: Address, deadline: float) -> list[tuple[int, int, Address]]:
        with self._node(address).lease(deadline) as wire:
            (reply,) = wire.ask([(b"CLUSTER", b"SLOTS")])
        if isinstance(reply, ResponseError):
            raise TierUnavailable(f"redis {_text(address)}: {reply}; use redis:// for a server that is not a cluster")
        try:
            # A node that does not know its own name leaves it empty: it is the one we asked.
            ranges = [
                (int(first), int(last), (master[0].decode() or address[0], int(master[1])))
                for first, last, master, *_ in reply
            ]
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TierUnavailable(f"redis {_text(address)}: its table of slots cannot be read: {error}") from error
        if not ranges:
            raise TierUnavailable(f"redis {_text(address)}: the cluster has no slots assigned")
        return sorted(ranges)

    def _node(self, address: Address) -> Node:
        with self._lock:
            if self._closed:
                raise TierUnavailable("redis cluster: closed")
            if address not in self._nodes:
                self._nodes[address] = Node(
                    _text(address), lambda deadline: self._dialer.dial(address, deadline), self._connections
                )
            return self._nodes[address]


class _Dialer:
    """Makes wires with the credentials and TLS options of a target."""

    def __init__(self, target: RedisTarget, connect_timeout_s: float) -> None:
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._common: dict[str, Any] = {
            "db": target.db,
            "username": target.username,
            "password": target.password,
        }

    def dial(self, address: Address, deadline: float, **changes: Any) -> Wire:
        """Return an open wire to `address`; `changes` replace arguments of the connection."""
        arguments: dict[str, Any] = {**self._common, **changes}
        if self._target.path:
            kind: type[Any] = UnixDomainSocketConnection
            arguments["path"] = self._target.path
        else:
            kind = Connection if self._target.tls is None else SSLConnection
            arguments["host"], arguments["port"] = address
            arguments.update(self._target.tls or {})

        def connect(parser: PageParser) -> Any:
            return kind(
                protocol=2,
                retry=Retry(NoBackoff(), 0),  # one try: the lane's breaker decides when to try again
                driver_info=None,  # saves two round trips per connection
                parser_class=lambda socket_read_size: parser,
                **arguments,
            )

        wire = Wire(_text(address), connect)
        wire.open(deadline, connect_timeout_s=self._connect_timeout_s)
        return wire


class _Sentinels:
    """Asks sentinels for the master, then connects to it."""

    def __init__(self, target: RedisTarget, connect_timeout_s: float) -> None:
        self._target = target
        self._dialer = _Dialer(target, connect_timeout_s)

    def connect(self, deadline: float) -> Wire:
        """Return an open wire to the present master."""
        master = _first_answer(self._target.nodes, deadline, self._ask_master, "no sentinel answers")
        return self._dialer.dial(master, deadline)

    def _ask_master(self, address: Address, deadline: float) -> Address:
        target = self._target
        wire = self._dialer.dial(
            address, deadline, db=0, username=target.sentinel_username, password=target.sentinel_password
        )
        try:
            reply: Reply = wire.ask([(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", target.service.encode())])[0]
        finally:
            wire.close()
        if not isinstance(reply, list):
            failure = reply or f"knows no master named {target.service!r}"
            raise TierUnavailable(f"redis sentinel {_text(address)}: {failure}")
        try:
            host, port = reply
            return host.decode(), int(port)
        except (TypeError, ValueError, AttributeError) as error:
            raise TierUnavailable(f"redis sentinel {_text(address)}: its answer cannot be read: {error}") from error


def _first_answer(
    addresses: Sequence[Address], deadline: float, ask: Callable[[Address, float], _Answer], failure: str
) -> _Answer:
    """Ask one address after the other, each with its share of the time that is left."""
    errors: list[str] = []
    for index, address in enumerate(addresses):
        now = time.monotonic()
        try:
            return ask(address, now + (deadline - now) / (len(addresses) - index))
        except TierUnavailable as error:
            errors.append(str(error))
    raise TierUnavailable(f"{failure}: " + "; ".join(errors))


def _text(address: Address) -> str:
    host, port = address
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

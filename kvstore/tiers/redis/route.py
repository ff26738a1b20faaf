"""Which server holds a key, and the connections to it.

    single      one node
    sentinel    one node, whose address the sentinels are asked for whenever a connection is made
    cluster     a node per master, found by the slot of the key; the table is fetched on first use and after `forget`

Nothing connects before it is used. Any thread.
"""

from __future__ import annotations

import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot
from redis.exceptions import ResponseError
from redis.retry import Retry

from kvstore.errors import TierUnavailable
from kvstore.forks import in_child
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.node import Node
from kvstore.tiers.redis.parser import PageParser, Reply
from kvstore.tiers.redis.refusal import Account, is_denied, words
from kvstore.tiers.redis.slots import SlotRange, place, read_shards, read_slots
from kvstore.tiers.redis.url import Address, RedisTarget, ServerKind

_Answer = TypeVar("_Answer")

# A connection that is idle keeps its place in the tables of NAT and load balancers (they forget after 4 to 6 minutes),
# and one whose other end is gone is found dead within a minute, used or not. Options that a system lacks are left out.
KEEPALIVE: dict[int, int] = {
    getattr(socket, name): value
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 60_000),  # milliseconds; bounds what was sent and is not acknowledged
    )
    if hasattr(socket, name)
}


class ServerRoute(Protocol):
    """Finds the node of a key."""

    names: frozenset[str]  # of the nodes that hold keys, by what was last known

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        """Group the indexes of `keys` by node; those that no node has are in none. May ask; raises TierUnavailable."""

    def nodes(self, deadline: float) -> list[Node]:
        """All nodes that hold keys."""

    def moved(self, address: Address, node: Node) -> None:
        """`node` said that a slot has moved to `address`: `relearn`, and ask there first."""

    def relearn(self) -> None:
        """Drop what is known about who holds what. Connections stay: their nodes are as they were."""

    def forget(self) -> None:
        """`relearn`, and drop idle connections: something has broken."""

    def close(self) -> None:
        """Close every connection, idle now or given back later. Idempotent."""


def make_route(
    target: RedisTarget,
    *,
    connections: int,
    connect_timeout_s: float,
    idle_max_s: float = 0.0,
    acl_pattern: str = "*",
) -> ServerRoute:
    """The route of `target`: at most `connections` to each server at a time.

    idle_max_s: a connection that was idle for longer is not used again; 0 means any may be.
    acl_pattern: matches all our keys, for what to tell an operator whose account lacks a permission.
    """
    dialer = _Dialer(target, connect_timeout_s, acl_pattern)
    if target.kind is ServerKind.CLUSTER:
        return ClusterRoute(target, dialer, connections=connections, idle_max_s=idle_max_s)
    if target.kind is ServerKind.SENTINEL:
        master = _Sentinels(target, dialer)
        where = f"{target.service} behind {text_of(target.nodes[0])}"
        return SingleRoute(Node(where, master.connect, connections, idle_max_s=idle_max_s))
    address = target.nodes[0] if target.nodes else (target.path, 0)
    return SingleRoute(
        Node(text_of(address), lambda deadline: dialer.dial(address, deadline), connections, idle_max_s=idle_max_s)
    )


class SingleRoute:
    """All keys on one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.names = frozenset({node.where})

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        return [(self._node, list(range(len(keys))))]

    def nodes(self, deadline: float) -> list[Node]:
        return [self._node]

    def moved(self, address: Address, node: Node) -> None:
        host = text_of(address)
        raise TierUnavailable(f"redis {node.where}: it is a node of a cluster ({host}); use redis+cluster://")

    def relearn(self) -> None:
        pass

    def forget(self) -> None:
        self._node.drop_idle()

    def close(self) -> None:
        self._node.close()


class ClusterRoute:
    """Each key on the master that has its slot."""

    def __init__(self, target: RedisTarget, dialer: _Dialer, *, connections: int, idle_max_s: float) -> None:
        self._seeds = target.nodes
        self._is_tls = target.tls is not None
        self._dialer = dialer
        self._connections = connections
        self._idle_max_s = idle_max_s
        self._knows_best: Address | None = None  # told of by a redirection
        self._told_by: Address | None = None  # the last table
        self._masters: tuple[Address, ...] = ()  # by the last table
        self._by_name: dict[str, Address] = {}  # of the nodes, for redirections
        self._lock = threading.Lock()
        self._nodes: dict[Address, Node] = {}
        self._ranges: list[SlotRange] = []  # sorted
        self._closed = False
        self.names: frozenset[str] = frozenset()
        in_child(self, ClusterRoute._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it

    def split(self, keys: Sequence[bytes], deadline: float) -> list[tuple[Node, list[int]]]:
        ranges = self._slot_ranges(deadline)
        starts = [first for first, _, _ in ranges]
        groups: dict[Address, list[int]] = {}
        for index, key in enumerate(keys):
            slot = key_slot(key)
            place = bisect_right(starts, slot) - 1
            if place >= 0 and slot <= ranges[place][1]:
                groups.setdefault(ranges[place][2], []).append(index)
        return [(self._node(address), indexes) for address, indexes in groups.items()]

    def nodes(self, deadline: float) -> list[Node]:
        return [self._node(address) for address in dict.fromkeys(a for _, _, a in self._slot_ranges(deadline))]

    def moved(self, address: Address, node: Node) -> None:
        asked = self._by_name.get(node.where, self._seeds[0])
        self.relearn()
        with self._lock:
            # The node that was asked may be slow to learn of the change; the one that has the slot knows it.
            self._knows_best = place(address[0], address[1], asked)

    def relearn(self) -> None:
        with self._lock:
            self._ranges = []

    def forget(self) -> None:
        self.relearn()
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.drop_idle()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def _slot_ranges(self, deadline: float) -> list[SlotRange]:
        with self._lock:
            if self._ranges:
                return self._ranges
            first = [self._knows_best] if self._knows_best is not None else []
            addresses = list(dict.fromkeys([*first, *self._seeds, *self._masters, *self._nodes]))
            # Last the one whose table did not hold: cut off from the others, it would tell the same for ever.
            addresses.sort(key=lambda address: address == self._told_by)
            self._knows_best = None
        # Outside the lock: two threads may both ask, which costs one more round trip and never a wait on a dead server.
        told_by, ranges = _first_answer(addresses, deadline, self._ask_slots, "no cluster node answers")
        with self._lock:
            self._told_by, self._ranges = told_by, ranges
            self._masters = tuple(dict.fromkeys(address for _, _, address in ranges))
            self.names = frozenset(text_of(address) for address in self._masters)
        return ranges

    def _ask_slots(self, address: Address, deadline: float) -> tuple[Address, list[SlotRange]]:
        with self._node(address).lease(deadline, repeatable=True) as wire:
            (reply,) = wire.ask([(b"CLUSTER", b"SLOTS")])
            if is_denied(reply):  # an ACL may allow one of the two
                (reply,) = wire.ask([(b"CLUSTER", b"SHARDS")])
        where = f"redis {text_of(address)}"
        if isinstance(reply, ResponseError):
            hint = "; use redis:// for a server that is not a cluster" if "support disabled" in str(reply) else ""
            raise TierUnavailable(f"{where}: {words(reply, wire.account)}{hint}")
        try:
            is_slots = not reply or isinstance(reply[0][0], int)
            ranges = read_slots(reply, address) if is_slots else read_shards(reply, address, is_tls=self._is_tls)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TierUnavailable(f"{where}: its table of slots cannot be read: {error}") from error
        if not ranges:
            raise TierUnavailable(f"{where}: the cluster has no slots assigned")
        return address, ranges

    def _node(self, address: Address) -> Node:
        with self._lock:
            if self._closed:
                raise TierUnavailable("redis cluster: closed")
            if address not in self._nodes:
                self._nodes[address] = Node(
                    text_of(address),
                    lambda deadline: self._dialer.dial(address, deadline),
                    self._connections,
                    idle_max_s=self._idle_max_s,
                )
                self._by_name[text_of(address)] = address
            return self._nodes[address]


class _Dialer:
    """Makes wires with the credentials and TLS options of a target."""

    def __init__(self, target: RedisTarget, connect_timeout_s: float, acl_pattern: str) -> None:
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        extra = (
            *(("cluster|slots",) if target.kind is ServerKind.CLUSTER else ()),
            *(("select",) if target.db else ()),
        )
        self._account = Account(target.username or "default", acl_pattern, extra)
        self._common: dict[str, Any] = {
            "db": target.db,
            "username": target.username,
            "password": target.password,
        }

    def dial(self, address: Address, deadline: float, **changes: Any) -> RedisConnection:
        """Return an open wire to `address`; `changes` replace arguments of the connection."""
        arguments: dict[str, Any] = {**self._common, **changes}
        if self._target.path:
            kind: type[Any] = UnixDomainSocketConnection
            arguments["path"] = self._target.path
        else:
            kind = Connection if self._target.tls is None else SSLConnection
            arguments["host"], arguments["port"] = address
            arguments["socket_keepalive"], arguments["socket_keepalive_options"] = True, KEEPALIVE
            arguments.update(self._target.tls or {})

        def connect(parser: PageParser) -> Any:
            return kind(
                protocol=2,
                retry=Retry(NoBackoff(), 0),  # one try: the lane's breaker decides when to try again
                driver_info=None,  # saves two round trips per connection
                parser_class=lambda socket_read_size: parser,
                **arguments,
            )

        wire = RedisConnection(text_of(address), connect, self._account)
        wire.open(deadline, connect_timeout_s=self._connect_timeout_s)
        return wire


class _Sentinels:
    """Asks sentinels for the master, then connects to it."""

    def __init__(self, target: RedisTarget, dialer: _Dialer) -> None:
        self._target = target
        self._dialer = dialer

    def connect(self, deadline: float) -> RedisConnection:
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
            raise TierUnavailable(f"redis sentinel {text_of(address)}: {failure}")
        try:
            host, port = reply
            return host.decode(), int(port)
        except (TypeError, ValueError, AttributeError) as error:
            raise TierUnavailable(f"redis sentinel {text_of(address)}: its answer cannot be read: {error}") from error


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


def text_of(address: Address) -> str:
    """host:port as a URL has it."""
    host, port = address
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

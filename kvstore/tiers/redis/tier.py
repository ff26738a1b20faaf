"""Pages in Redis, shared by replicas and machines.

What a page looks like there is told in `redis_value`, how it is cut in `redis_parts`. The server evicts by itself
(`maxmemory-policy`) and by TTL, so a page may be gone at any time, and so may one of its parts: a read finds out,
and takes away what is left.

    contains   EXISTS for each page, in one round trip: as fast as one script, and allowed everywhere
    read       MGET of a page's parts, received straight into the slot; the checksum of one page overlaps the next
    write      EXISTS for the whole batch, so that only what is missing is sent; then SET, or a transaction of SETs
    touch      PEXPIRE with a deadline, TOUCH without; in one round trip

Every call ends within its `timeout_s`, whatever the server does. Called from the threads of one lane, each call on its
own connection, one page outstanding on each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from redis.exceptions import OutOfMemoryError, ResponseError

from kvstore.codecs.coder import PageCoder
from kvstore.direction import Direction
from kvstore.errors import ConfigError, CorruptPage, TierUnavailable
from kvstore.forks import in_child
from kvstore.page import HEADER_BYTES, PageKey, PageMeta
from kvstore.tiers.base import StoredPage, TierCounters
from kvstore.tiers.redis.calls import NodeCalls
from kvstore.tiers.redis.claims import RedisClaims
from kvstore.tiers.redis.connection import RedisConnection, command
from kvstore.tiers.redis.full import FullServers
from kvstore.tiers.redis.parser import Reply
from kvstore.tiers.redis.parts import MAX_PARTS, max_parts, part_sizes
from kvstore.tiers.redis.probe import RedisProbe
from kvstore.tiers.redis.refusal import BUSY, checked, code_of, is_denied, is_moving
from kvstore.tiers.redis.route import make_route
from kvstore.tiers.redis.url import ServerKind, parse_redis_url
from kvstore.tiers.redis.value import KeyNames, PageSink, Verdict, encode_page, judge, set_page

SCAN_KEYS = 1000  # looked at in one step of a sweep: a millisecond of the server's time
PROBE_NAMES = 1024  # enough for one on each of some hundred nodes
TOKENS_BYTES = 0xFFFF  # the header counts a block's tokens in 16 bits

_COUNTED = {
    Verdict.GONE: "lost_pages",
    Verdict.TORN: "lost_pages",
    Verdict.CORRUPT: "corrupt_pages",
    Verdict.COLLISION: "collisions",
}


class RedisTier:
    """A tier on a Redis server, a master behind Sentinel, or a cluster.

    counters: `lost_pages` counts pages asked for that had been evicted or had expired, whole or in part. `extra` has
    oom_replies (pages refused for want of memory), refused (calls, or nodes in one, that were answered with an error),
    timeouts and failures (calls that ended in TierUnavailable) and redirects (the cluster had moved a slot).
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "kv",
        slot_bytes: int,
        ttl_s: float,
        connections: int = 3,
        connect_timeout_s: float = 0.5,
        idle_max_s: float = 180.0,
        acl_pattern: str | None = None,
        coder: PageCoder | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Connects to nothing: a server that is not there is TierUnavailable when it is called.

        prefix:      text before every key; lets one server serve others too.
        slot_bytes:  the largest page.
        ttl_s:       longest time a page lives after it was written or given a new deadline; 0 means for ever.
        connections: most connections to one server; one per lane thread is enough.
        idle_max_s:  a connection that was idle for longer is not used again; 0 means any may be.
        acl_pattern: matches all keys of this product, for what to tell an operator; None means those of the prefix.
        coder:       what pages are stored in, and read from; None stores them as they are.

        Raises ConfigError.
        """
        target = parse_redis_url(url)
        _check("redis.prefix", prefix, prefix.isascii() and not set(prefix) & set("{}"), "ASCII without braces")
        _check("redis.ttl_s", ttl_s, ttl_s >= 0, "positive, or 0 for never")
        _check("redis.connections", connections, connections >= 1, "at least 1")
        _check("redis.connect_timeout_s", connect_timeout_s, connect_timeout_s > 0, "positive")
        _check("redis.idle_max_s", idle_max_s, idle_max_s >= 0, "positive, or 0 for no limit")
        self._max_parts = max_parts(HEADER_BYTES + TOKENS_BYTES + slot_bytes)
        _check("slot_bytes", slot_bytes, slot_bytes > 0 and self._max_parts <= MAX_PARTS, "from 1 to about 500 MiB")
        # Two parts come in one reply, of one moment, since one is small; a large value is never asked for with another.
        self._at_once = 2 if self._max_parts == 2 else 1
        self._count_lock = threading.Lock()
        self.url = target.masked
        self.counters = TierCounters(
            extra={"oom_replies": 0, "refused": 0, "timeouts": 0, "failures": 0, "redirects": 0}
        )
        self._ttl_s = ttl_s
        self._coder = coder or PageCoder()
        self._coder.count_in(self.counters.extra)
        self._now = now
        self._names = KeyNames(prefix.encode(), tagged=target.kind is ServerKind.CLUSTER)
        self._route = make_route(
            target,
            connections=connections,
            connect_timeout_s=connect_timeout_s,
            idle_max_s=idle_max_s,
            acl_pattern=acl_pattern or f"{prefix}*",
        )
        self._full = FullServers()
        self._calls = NodeCalls(self._route, self._count)
        self._claims = RedisClaims(self._calls.on_each_node, is_cluster=target.kind is ServerKind.CLUSTER)
        self._probe = RedisProbe(self._calls, self._claims, self._names_on_each_node, in_parts=self._max_parts > 1)
        in_child(self, RedisTier._begin_anew)

    def _begin_anew(self) -> None:
        self._count_lock = threading.Lock()  # in a forked child: another thread of the parent may have held it

    @property
    def capacity_pages(self) -> int | None:
        """None: the server evicts by itself."""
        return None

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """Which pages have their head there. One that has lost another part to eviction is found out when read."""
        heads = [self._names.head(key) for key in keys]
        present = [False] * len(keys)

        def ask(wire: RedisConnection, indexes: list[int]) -> None:
            replies = wire.ask_each(b"EXISTS", [heads[i] for i in indexes])
            for i, reply in zip(indexes, replies, strict=True):
                present[i] = (reply if type(reply) is int else _checked(reply, wire)) == 1  # a call less per key

        self._calls.on_each_node(heads, timeout_s, ask)
        return present

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """Fill `views[i]` with the page of `keys[i]`; see Tier. What is corrupt or torn is deleted if unchanged."""
        heads = [self._names.head(key) for key in keys]
        ok = [False] * len(keys)

        def read(wire: RedisConnection, indexes: list[int]) -> None:
            spoiled: list[tuple[bytes, bytes]] = []
            self._ask_head(wire, heads[indexes[0]])
            for place, i in enumerate(indexes):
                sink = PageSink(views[i])
                lengths = self._receive(wire, heads[i], sink)
                # Asked for before the last page is verified: the server sends while we compute the checksum.
                if place + 1 < len(indexes):
                    self._ask_head(wire, heads[indexes[place + 1]])
                verdict = judge(keys[i], metas[i], sink, lengths, self._coder)
                ok[i] = verdict is Verdict.GOOD
                self._count(_COUNTED.get(verdict))
                if verdict in (Verdict.CORRUPT, Verdict.TORN):
                    # Without its head the other parts were received where the head belongs.
                    spoiled.append((heads[i], b"" if lengths[0] is None else sink.seen))
            with suppress(TierUnavailable):  # the pages that were read are none the worse
                for head, seen in spoiled:
                    self._drop_unchanged(wire, head, seen)

        self._calls.on_each_node(heads, timeout_s, read)
        return ok

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        """Store what is not there yet; see Tier. False for pages already past their deadline, and once memory is full.

        Of two writers of a page at the same moment either may win, whole.
        """
        deadline = time.monotonic() + timeout_s
        if evict:
            self.delete(evict, timeout_s=timeout_s)
        heads = [self._names.head(key) for key in keys]
        ok = [False] * len(keys)
        now = self._now()

        def write(wire: RedisConnection, indexes: list[int]) -> None:
            replies = wire.ask_each(b"EXISTS", [heads[i] for i in indexes])
            for i, reply in zip(indexes, replies, strict=True):
                # An account that may only write stores all the same: SET leaves alone what is there.
                ok[i] = reply == 1 if type(reply) is int or is_denied(reply) else _checked(reply, wire) == 1
            missing = [i for i in indexes if not ok[i] and self._ttl_ms(metas[i].expires_at, now) != 0]
            encoded = (self._encode(keys[i], heads[i], views[i], metas[i], now) for i in missing)
            upcoming = next(encoded, None)
            for i in missing:
                assert upcoming is not None
                buffers, num_replies = upcoming
                wire.send(buffers, replies=num_replies)
                upcoming = next(encoded, None)  # the server takes one page in while we compute the next checksum
                stored = self._is_stored(wire.replies(num_replies), wire)
                if stored is None:
                    return  # out of memory: the rest would only be sent to be refused
                ok[i] = stored

        self._calls.on_each_node(heads, deadline - time.monotonic(), write)
        return ok

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """Refresh recency and deadline; False where the page is gone.

        With `expires_at` a page lives until then, but not longer than the tier's TTL from now. Without, its deadline
        stays what it is.
        """
        heads = [self._names.head(key) for key in keys]
        present = [False] * len(keys)
        ttl_ms = self._ttl_ms(expires_at, self._now())
        verb, ending = (b"PEXPIRE", (ttl_ms or 0,)) if expires_at else (b"TOUCH", ())

        def refresh(wire: RedisConnection, indexes: list[int]) -> None:
            names = [name for i in indexes for name in self._names.parts(heads[i], self._max_parts)]
            replies = wire.ask([(verb, name, *ending) for name in names])
            for i, reply in zip(indexes, replies[:: self._max_parts], strict=True):
                present[i] = (reply if type(reply) is int else _checked(reply, wire)) == 1 and ttl_ms != 0

        self._calls.on_each_node(heads, timeout_s, refresh)
        return present

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """Forget pages. The server frees a string in its main thread, by UNLINK as by DEL."""
        heads = [self._names.head(key) for key in keys]

        def forget(wire: RedisConnection, indexes: list[int]) -> None:
            for reply in wire.ask([(b"UNLINK", *self._names.parts(heads[i], self._max_parts)) for i in indexes]):
                _checked(reply, wire)

        self._calls.on_each_node(heads, timeout_s, forget, all_nodes=True)

    def claim(self, keys: Sequence[PageKey], *, token: bytes, lease_s: float, timeout_s: float) -> list[bool]:
        """Claim pages for `token`, or renew that; see Claimable."""
        return self._claims.take([self._names.head(key) for key in keys], token, lease_s, timeout_s)

    def unclaim(self, keys: Sequence[PageKey], *, token: bytes, timeout_s: float) -> None:
        """End those claims that are `token`'s."""
        self._claims.give_back([self._names.head(key) for key in keys], token, timeout_s)

    def scan(self) -> Iterator[StoredPage]:
        """Yield nothing: walking a shared server would cost it more than it brings."""
        return iter(())

    def sweep(self, *, timeout_s: float) -> int:
        """Delete everything under the prefix, whoever wrote it; returns how many keys. Raises TierUnavailable.

        Walks all keys of the server, in small steps: what is written meanwhile may stay or go. Ends with an error where
        the time runs out; what was deleted is deleted.
        """
        deadline = time.monotonic() + timeout_s
        num_deleted = 0
        for node in self._route.nodes(deadline):
            with node.lease(deadline, repeatable=True) as wire:
                cursor = b"0"
                while True:
                    scan = (b"SCAN", cursor, b"MATCH", self._names.pattern, b"COUNT", SCAN_KEYS)
                    cursor, names = _checked(wire.ask([scan])[0], wire)
                    # One command each: in a cluster the keys of one may not lie in several slots.
                    for reply in wire.ask([(b"UNLINK", name) for name in names]) if names else ():
                        num_deleted += _checked(reply, wire) == 1
                    if cursor == b"0":
                        break
        return num_deleted

    def name_of(self, what: bytes) -> bytes:
        """The name of something that is kept beside the pages, for `ask`."""
        return self._names.prefix + what

    def ask(
        self, name: bytes, commands: Sequence[Sequence[bytes | int]], *, timeout_s: float, repeatable: bool = True
    ) -> list[Reply]:
        """Run commands about the key `name` on the node that has it.

        repeatable: they may be run twice, where an idle connection turns out to be dead. Raises TierRefused if one of
        them is answered with an error.
        """
        replies: list[Reply] = []

        def run(wire: RedisConnection, indexes: list[int]) -> None:
            replies[:] = [_checked(reply, wire) for reply in wire.ask(commands)]

        self._calls.on_each_node([name], timeout_s, run, repeatable=repeatable)
        return replies

    def ping(self, *, timeout_s: float) -> None:
        """Return if a server answers, else raise TierUnavailable."""
        self._calls.on_a_node(timeout_s, _ping)

    def probe(self, way: Direction, *, timeout_s: float) -> None:
        """Do what this direction does, on every node, with a key beside the pages that expires within a second."""
        self._probe.test(way, timeout_s)

    def close(self) -> None:
        """Close all connections. Idempotent; calls after it raise TierUnavailable."""
        self._route.close()

    # -- private

    def _names_on_each_node(self, timeout_s: float) -> list[bytes]:
        """One name per node that has slots, beside the pages."""
        names = [self._names.beside(b"probe", number) for number in range(PROBE_NAMES)]
        return [names[indexes[0]] for _, indexes in self._route.split(names, time.monotonic() + timeout_s)]

    def _ask_head(self, wire: RedisConnection, head: bytes) -> None:
        wire.send([command(b"MGET", *self._names.parts(head, self._at_once))], replies=1)

    def _receive(self, wire: RedisConnection, head: bytes, sink: PageSink) -> list[int | None]:
        """Take the reply to `_ask_head` and fetch the other parts of a page that has many, one by one."""
        lengths = _lengths(wire.reply_into(sink, self._at_once), wire)
        if self._at_once == 1 and lengths[0] is not None:
            try:
                count = min(len(sink.sizes()), self._max_parts)
            except CorruptPage:
                return lengths
            for name in self._names.parts(head, count)[1:]:
                wire.send([command(b"MGET", name)], replies=1)
                lengths += _lengths(wire.reply_into(sink, 1), wire)
        return lengths

    def _drop_unchanged(self, wire: RedisConnection, head: bytes, seen: bytes) -> None:
        """Delete a page whose head still starts with `seen`: another writer may have stored a good one meanwhile."""
        names = self._names.parts(head, self._max_parts)
        replies = wire.ask([(b"WATCH", names[0]), (b"GETRANGE", names[0], 0, HEADER_BYTES - 1)])
        if replies[1] == seen:
            wire.ask([(b"MULTI",), (b"UNLINK", *names), (b"EXEC",)])
        else:
            wire.ask([(b"UNWATCH",)])

    def _encode(
        self, key: PageKey, head: bytes, view: memoryview, meta: PageMeta, now: float
    ) -> tuple[list[bytes | memoryview], int]:
        """The command to send for a page, and how many replies it will have."""
        pieces = encode_page(key, meta, view[: meta.num_bytes], self._coder, created_at=now)
        sizes = part_sizes(sum(len(piece) for piece in pieces))
        return set_page(self._names.parts(head, len(sizes)), sizes, pieces, self._ttl_ms(meta.expires_at, now))

    def _is_stored(self, replies: Sequence[Reply], wire: RedisConnection) -> bool | None:
        """True if the page is there now, None if the server is out of memory."""
        flat = [*replies[:-1], *(replies[-1] if isinstance(replies[-1], list) else replies[-1:])]
        full = next((reply for reply in flat if isinstance(reply, OutOfMemoryError)), None)
        if full is not None:
            self._count("oom_replies")
            self._full.refused(wire.where, str(full))
            return None
        if any(is_moving(reply) for reply in flat):
            return False
        for reply in flat:
            _checked(reply, wire)
        self._full.stored(wire.where)
        return True  # SET NX answers nothing where another writer was first: the page is there

    def _ttl_ms(self, expires_at: float, now: float) -> int | None:
        """Until `expires_at` or for the tier's TTL, whichever ends sooner; None where there is neither, 0 if past."""
        left = [self._ttl_s] if self._ttl_s else []
        left += [expires_at - now] if expires_at else []
        return max(0, int(min(left) * 1000)) if left else None

    def _count(self, what: str | None) -> None:
        if what is None:
            return
        with self._count_lock:
            if what in self.counters.extra:
                self.counters.extra[what] += 1
            else:
                setattr(self.counters, what, getattr(self.counters, what) + 1)


def _check(field: str, value: object, is_right: bool, right: str) -> None:
    if not is_right:
        raise ConfigError(f"{field} is {value!r}; it must be {right}")


def _ping(wire: RedisConnection) -> None:
    (reply,) = wire.ask([(b"PING",)])
    # An account without +ping is answered too; it is the directions that tell what it may do.
    if isinstance(reply, ResponseError) and code_of(reply) in BUSY:
        raise wire.unavailable(reply)


def _checked(reply: Reply, wire: RedisConnection) -> Reply:
    """Pass a reply on; raise what concerns more than one key."""
    return checked(reply, wire.where, wire.account)


def _lengths(reply: list[int | None] | ResponseError, wire: RedisConnection) -> list[int | None]:
    lengths = _checked(reply, wire)
    return lengths if isinstance(lengths, list) else [None]

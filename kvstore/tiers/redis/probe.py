"""The question to a server that tells whether it would do one kind of call, without a page.

A ping is answered by a replica, by a server that cannot save, and for an account that may do nothing else. So a
direction is tested by the commands it lives by, on a key beside the pages that expires within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redis.exceptions import OutOfMemoryError

from kvstore.direction import Direction
from kvstore.tiers.redis.calls import NodeCalls
from kvstore.tiers.redis.claims import RedisClaims
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.refusal import checked

PROBE_S = 1.0
TOKEN = b"probe"


class RedisProbe:
    """Tests directions on every node that has pages. Any thread.

    names_on_each_node: names_on_each_node(timeout_s) gives one key for each node.
    in_parts:           pages may be stored in a transaction.
    """

    def __init__(
        self,
        calls: NodeCalls,
        claims: RedisClaims,
        names_on_each_node: Callable[[float], Sequence[bytes]],
        *,
        in_parts: bool,
    ) -> None:
        self._calls = calls
        self._claims = claims
        self._names_on_each_node = names_on_each_node
        self._in_parts = in_parts

    def test(self, way: Direction, timeout_s: float) -> None:
        """Return if every node does it. Raises TierRefused or TierUnavailable. Too little memory is no refusal."""
        names = self._names_on_each_node(timeout_s)
        if way is Direction.CLAIM:
            self._claims.take(names, TOKEN, PROBE_S, timeout_s)
            return

        def ask(wire: RedisConnection, indexes: list[int]) -> None:
            for reply in wire.ask(self._commands(way, names[indexes[0]])):
                if isinstance(reply, OutOfMemoryError):
                    return
                checked(reply, wire.where, wire.account)

        self._calls.on_each_node(names, timeout_s, ask, all_nodes=True)

    def _commands(self, way: Direction, name: bytes) -> list[tuple[bytes | int, ...]]:
        lifetime_ms = int(PROBE_S * 1000)
        if way is Direction.READ:
            return [(b"EXISTS", name), (b"MGET", name)]
        if way is Direction.TOUCH:
            return [(b"PEXPIRE", name, lifetime_ms), (b"TOUCH", name)]
        if way is Direction.DELETE:
            return [(b"UNLINK", name)]
        store = (b"SET", name, b"", b"PX", lifetime_ms, b"NX")
        return [store, (b"MULTI",), store, (b"EXEC",)] if self._in_parts else [store]

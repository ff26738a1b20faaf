"""The interface of an eviction policy: an order over keys, holding no data.

The planner owns one policy per bounded tier. A pinned page is simply not in its policy, so no policy knows about pins.
Paths are handed over *tail first*: a leaf then looks older than its parent, and plain recency evicts leaves before what
they hang on. Not thread-safe; called under the store's lock. Time is passed in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Hint(NamedTuple):
    """The caller's knowledge of a key, which an order cannot guess.

    priority: higher stays longer; all keys of a lower priority leave first.
    ttl_s:    time to live, overriding the policy's own; None keeps the policy's.
    hits:     uses since the key was stored; lets a frequency-aware policy keep what it learned while the key was
              pinned.
    left_s:   seconds until the deadline of a key that has lived before; from its next use on it has its ttl again.
              None: the key begins to live now.
    """

    priority: int = 0
    ttl_s: float | None = None
    hits: int = 0
    left_s: float | None = None


NO_HINT = Hint()


class EvictionPolicy(Protocol[K]):
    """Ranks keys by how little their loss would cost. All operations are O(1) per key."""

    def add(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Take keys in, in this order: the last one is the most recent. A known key is touched."""

    def touch(self, keys: Iterable[K], now: float) -> None:
        """Note a use of keys, in this order. Unknown keys are ignored."""

    def demote(self, keys: Iterable[K]) -> None:
        """Make keys the next victims, the first of them first. Unknown keys are ignored."""

    def discard(self, keys: Iterable[K]) -> None:
        """Forget keys. Unknown keys are ignored."""

    def victims(self, n: int) -> list[K]:
        """Return up to `n` keys in the order in which they should leave.

        Changes no membership: the caller discards the keys that really left. Amortised O(n).
        """

    def expired(self, now: float, limit: int | None = None) -> list[K]:
        """Return keys past their deadline, at most `limit`; empty for a policy without deadlines. O(answer).

        `now` may have gone back since the last call: a wall clock can be set.
        """

    def overdue(self, keys: Iterable[K], now: float, limit: int | None = None) -> list[K]:
        """Return those of `keys` that are past their deadline, the first `limit` of them. Unknown keys are not."""

    def members(self) -> list[K]:
        """Return every key, roughly the next to leave first; also after an exception in the middle of a call."""

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys, in this order, as if added `now`; deadlines that are known stay.

        Puts right what an exception in the middle of another call has left. O(n log n).
        """

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

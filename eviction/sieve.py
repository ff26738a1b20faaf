"""SIEVE: one queue, one bit, one hand. Resists scans; keeps what is used again and again.

Zhang et al., "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches", NSDI 2024. A use
sets a bit and moves nothing; a key that is held keeps its place too, and the hand passes it as a used one. The hand
goes from the oldest key to the newest: a set bit is cleared and the key stays in its place, a clear one condemns it;
past the newest key it starts again at the oldest.

Unlike recency, this order may name a block before one that continues it: the evicting side has to cope with that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from itertools import islice, repeat

from eviction.in_place import InPlace
from eviction.policy import K
from eviction.ranked import Ranked, all_new
from radix.ordered import OrderedMap


class SieveOrder(InPlace[K]):
    """The queue, kept as two: what the hand has passed and what lies ahead of it. No pointer can then go stale.

        oldest [ passed ] hand [ ahead ] newest          condemned: the hand took them out; they leave next

    A condemned key stays a member until it is discarded, or comes back behind the hand if it is used before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: OrderedMap[K, bool] = OrderedMap()  # value: used since the hand passed
        self._ahead: OrderedMap[K, bool] = OrderedMap()

    def add(self, keys: list[K], hits: int) -> None:
        """Put new keys at the newest end, their bit set if they were used before."""
        if all_new(keys, self._ahead, self._passed, self._condemned):
            self._ahead.update(dict.fromkeys(keys, hits > 0))
            return
        self._held.difference_update(keys)
        for key in keys:
            if key in self:
                self.touch([key])
            else:
                self._ahead[key] = hits > 0

    def touch(self, keys: list[K]) -> None:
        """Set the bit of known keys."""
        for queue in (self._ahead, self._passed):
            queue.update(dict.fromkeys(filter(queue.__contains__, keys), True))
        if self._condemned:
            self._pardon(keys)

    def discard(self, keys: list[K]) -> None:
        """Forget keys."""
        for queue in (self._ahead, self._passed, self._condemned):
            deque(map(queue.pop, keys, repeat(None)), maxlen=0)
        self._held.difference_update(keys)
        self._wrap()

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Nothing here outlives a key."""

    def victims(self, n: int) -> list[K]:
        """Move the hand until `n` keys are condemned.

        Amortised O(n) as long as most are not held: every step ahead clears a bit, condemns, or passes a held key.
        """
        n = min(n, len(self))
        while len(self._condemned) < n:
            key, used = self._ahead.popitem(last=False)
            if key in self._held:
                self._passed[key] = used  # a key in use is a used one; its bit is for what was before
            else:
                (self._passed if used else self._condemned)[key] = False
            self._wrap()
        return list(islice(self._condemned, max(n, 0)))

    def members(self) -> list[K]:
        """Return every key."""
        keys = [*self._condemned, *self._ahead, *self._passed]
        return [key for key in keys if key not in self._held] if self._held else keys

    def is_empty(self) -> bool:
        """True if it has no key, not even a held one."""
        return not (self._ahead or self._passed or self._condemned)

    def __len__(self) -> int:
        return len(self._ahead) + len(self._passed) + len(self._condemned) - len(self._held)

    def __contains__(self, key: object) -> bool:
        known = key in self._ahead or key in self._passed or key in self._condemned
        return known and key not in self._held

    def _in_queues(self, keys: list[K]) -> Iterable[K]:
        return (key for key in keys if key in self._ahead or key in self._passed)

    def _pardon(self, keys: list[K]) -> None:
        for key in filter(self._condemned.__contains__, keys):
            del self._condemned[key]
            self._passed[key] = False  # as if the hand had met the bit set, and cleared it
            self._wrap()

    def _wrap(self) -> None:
        # At once, not when the hand moves next: what is added meanwhile is newer than all, and must be met last.
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead


class Sieve(Ranked[K]):
    """Evict what was not used since the hand came by, lower priorities first."""

    def __init__(self) -> None:
        super().__init__(SieveOrder)

"""S3-FIFO: a small queue on trial, a main queue, and a memory of what failed the trial. Resists scans.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. A key used once and never again passes
through the small queue without disturbing the main one. Two things differ here: the size of the cache is what the
policy holds, since a policy is not told a capacity; and a key that is new but comes with hits has proved itself and
enters the main queue. A use in this store is a hold: a held key keeps its place, and one that comes to the end of its
queue goes to the young end of main, as a used one would. The ghost knows keys by name, and drops a name by age only:
pages of one block share it.

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

SMALL_SHARE = 0.1  # of all keys, on trial; the paper's value
MOST_USES = 3  # two bits of uses, as in the paper: more would let old glory live long
USED_AGAIN = (1, 2, 3, 3)  # the count after a use, by the count before


class S3FifoOrder(InPlace[K]):
    """Three queues, oldest first.

    new --> [ small ] --used twice--> [ main ] <-- used keys go round, a use poorer each time
                |                        |
                +------> condemned <-----+        next to leave; used before that, they go to main
                             |
                          [ ghost ]               keys only, of what left small; added again, they go to main
    """

    def __init__(self) -> None:
        super().__init__()  # _condemned has for a value: came from small
        self._small: OrderedMap[K, int] = OrderedMap()  # value: uses since it was added, at most MOST_USES
        self._main: OrderedMap[K, int] = OrderedMap()
        self._name_of: Callable[[K], Hashable] = _itself
        self._ghost: OrderedMap[Hashable, None] = OrderedMap()
        self._most_keys = 0  # held at one time: the capacity, as far as can be seen from here; bounds the ghost

    def add(self, keys: list[K], hits: int) -> None:
        """Put new keys on trial; those with hits, or thrown out lately, into main."""
        if all_new(keys, self._small, self._main, self._condemned):
            self._add_new(keys, hits)
            return
        self._held.difference_update(keys)
        for key in keys:
            if key in self:
                self.touch([key])
            else:
                self._add_new([key], hits)

    def touch(self, keys: list[K]) -> None:
        """Count a use of known keys; a key given several times counts once."""
        for queue in (self._small, self._main):
            queue.update({key: USED_AGAIN[queue[key]] for key in keys if key in queue})
        if self._condemned:
            self._pardon(keys)

    def discard(self, keys: list[K]) -> None:
        """Forget keys; of condemned ones from the small queue the name is kept for a while."""
        for queue in (self._small, self._main):
            deque(map(queue.pop, keys, repeat(None)), maxlen=0)
        self._held.difference_update(keys)
        if self._condemned:
            for key in keys:
                if self._condemned.pop(key, False):
                    name = self._name_of(key)
                    self._ghost[name] = None
                    self._ghost.move_to_end(name)
            while len(self._ghost) > self._most_keys:
                self._ghost.popitem(last=False)

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Remember what left by these names."""
        self._name_of = name_of

    def victims(self, n: int) -> list[K]:
        """Condemn until there are `n`.

        Amortised O(n) as long as most are not held: every step uses up a use, condemns, or passes a held key.
        """
        small, main, condemned, held = self._small, self._main, self._condemned, self._held
        n = min(n, len(self))
        while len(condemned) < n:
            if small and (not main or len(small) > SMALL_SHARE * (len(small) + len(main))):
                key, uses = small.popitem(last=False)
                if key in held:
                    main[key] = uses
                elif uses > 1:
                    main[key] = 0
                else:
                    condemned[key] = True
            else:
                key, uses = main.popitem(last=False)
                if key in held:
                    main[key] = uses
                elif uses:
                    main[key] = uses - 1
                else:
                    condemned[key] = False
        return list(islice(condemned, max(n, 0)))

    def members(self) -> list[K]:
        """Return every key."""
        keys = [*self._condemned, *self._small, *self._main]
        return [key for key in keys if key not in self._held] if self._held else keys

    def is_empty(self) -> bool:
        """True if it has no key, not even a held one."""
        return not (self._small or self._main or self._condemned)

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + len(self._condemned) - len(self._held)

    def __contains__(self, key: object) -> bool:
        known = key in self._small or key in self._main or key in self._condemned
        return known and key not in self._held

    def _in_queues(self, keys: list[K]) -> Iterable[K]:
        return (key for key in keys if key in self._small or key in self._main)

    def _pardon(self, keys: list[K]) -> None:
        for key in filter(self._condemned.__contains__, keys):
            del self._condemned[key]
            self._main[key] = 0

    def _add_new(self, keys: list[K], hits: int) -> None:
        if hits > 0:
            self._main.update(dict.fromkeys(keys, min(hits, MOST_USES)))
        elif not self._ghost:
            self._small.update(dict.fromkeys(keys, 0))
        else:
            for key in keys:
                (self._main if self._name_of(key) in self._ghost else self._small)[key] = 0
        self._most_keys = max(self._most_keys, len(self))


def _itself(key: Hashable) -> Hashable:
    return key


class S3Fifo(Ranked[K]):
    """Evict what failed its trial, then what main has not seen used, lower priorities first."""

    def __init__(self) -> None:
        super().__init__(S3FifoOrder)

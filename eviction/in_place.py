"""Holds of an order by arrival: a key in use keeps its place in its queue, and is no member until it is released."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic

from eviction.policy import K
from radix.ordered import OrderedMap


class InPlace(ABC, Generic[K]):
    """The part that SIEVE and S3-FIFO share.

    _held:      keys in use, which are in a queue.
    _condemned: keys that were taken out of the queues and leave next; a hold pardons them.
    """

    def __init__(self) -> None:
        self._held: set[K] = set()
        self._condemned: OrderedMap[K, bool] = OrderedMap()

    def hold(self, keys: list[K]) -> None:
        """Known keys are in use: they keep their place, and what is counted of them."""
        if self._condemned:
            self._pardon(keys)
        self._held.update(self._in_queues(keys))

    def release(self, keys: list[K], hits: int) -> None:
        """Make held keys members again, where they are; the others are new."""
        if self._held.isdisjoint(keys):
            self.add(keys, hits)
            return
        for key in keys:
            if key in self._held:
                self._held.remove(key)
            else:
                self.add([key], hits)

    def renew(self, keys: list[K]) -> None:
        """Change nothing: the order is by arrival."""

    @abstractmethod
    def add(self, keys: list[K], hits: int) -> None:
        """Take keys in, in this order. A known key is touched."""

    @abstractmethod
    def _pardon(self, keys: list[K]) -> None:
        """Take keys that were condemned back into a queue."""

    @abstractmethod
    def _in_queues(self, keys: list[K]) -> Iterable[K]:
        """Those of `keys` that are in a queue."""

"""An eviction policy of one's own: what was used least often leaves first.

PYTHONPATH=examples kvstore serve --set host.policy=policy:Lfu
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from eviction.ranked import Order, Ranked


class Uses(Order[Hashable]):
    """Keys by how often they were used; of equals, the one that came first leaves first."""

    def __init__(self) -> None:
        self._uses: dict[Hashable, int] = {}

    def add(self, keys: list[Hashable], hits: int) -> None:
        for key in keys:
            self._uses[key] = self._uses.get(key, hits) + 1

    def touch(self, keys: list[Hashable]) -> None:
        for key in keys:
            if key in self._uses:
                self._uses[key] += 1

    def discard(self, keys: list[Hashable]) -> None:
        for key in keys:
            self._uses.pop(key, None)

    def victims(self, n: int) -> list[Hashable]:
        return heapq.nsmallest(n, self._uses, key=self._uses.__getitem__)

    def members(self) -> list[Hashable]:
        return sorted(self._uses, key=self._uses.__getitem__)

    def __len__(self) -> int:
        return len(self._uses)

    def __contains__(self, key: object) -> bool:
        return key in self._uses


class Lfu(Ranked[Hashable]):
    """Priorities, and keys that were told to leave first, are `Ranked`'s."""

    def __init__(self) -> None:
        super().__init__(Uses)

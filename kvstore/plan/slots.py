"""Fixed-size places for pages.

A SlotPool hands out slot numbers 0..num_slots-1 and takes them back. It holds no memory: the host slab maps a slot
to bytes. Called by the planner, under the store's lock.

The hard thing: a slot given back twice would put two pages in one place, so `give` refuses it loudly.
"""

from __future__ import annotations

from collections.abc import Iterable


class SlotPool:
    """Free slots as a stack (the most recently used memory is the warmest)."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"slot pool: num_slots is {num_slots}; it must be at least 1")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._is_free = bytearray(b"\1") * num_slots

    def take(self, n: int) -> list[int]:
        """Take up to `n` slots; fewer when fewer are free."""
        n = min(n, len(self._free))
        if n == 0:
            return []
        taken = self._free[-n:]
        del self._free[-n:]
        for slot in taken:
            self._is_free[slot] = 0
        return taken

    def give(self, slots: Iterable[int]) -> None:
        """Take slots back. Raises ValueError for one that is free already."""
        for slot in slots:
            if self._is_free[slot]:
                raise ValueError(f"slot {slot} was given back twice")
            self._is_free[slot] = 1
            self._free.append(slot)

    @property
    def num_free(self) -> int:
        return len(self._free)

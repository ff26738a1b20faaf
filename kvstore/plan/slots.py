"""Fixed-size places for pages.

A SlotPool hands out slot numbers 0..num_slots-1 and takes them back. It holds no memory: the host slab maps a slot
to bytes. Called by the planner, under the store's lock.

Slots can be retired, so that a store gives memory back while it runs, and be taken into use again.

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
        self._num_in_use = num_slots  # as was asked for last
        self._retired: list[int] = []
        self.num_retiring = 0  # slots in use that will not come back
        self._news: list[int] = []  # retired since `take_retired`

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
            if self.num_retiring:
                self.num_retiring -= 1
                self._retire(slot)
            else:
                self._free.append(slot)

    def resize(self, num_in_use: int) -> None:
        """Keep `num_in_use` slots. Free ones retire at once, others when they are given back."""
        if not 1 <= num_in_use <= self.num_slots:
            raise ValueError(f"slot pool: {num_in_use} slots are asked for; there are 1 to {self.num_slots}")
        self._num_in_use = num_in_use
        wanted = self.num_slots - num_in_use
        while self.num_retired > wanted:
            self._free.append(self._retired.pop())
        while self.num_retired < wanted and self._free:
            self._retire(self._free.pop())
        self.num_retiring = wanted - self.num_retired

    def rebuild(self, used: Iterable[int]) -> None:
        """Hold free what is neither in use nor retired, whatever an exception in the middle of a call has left."""
        taken = set(used)
        num_in_use = self._num_in_use
        free = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in taken]
        self._is_free = bytearray(b"\1") * self.num_slots
        for slot in taken:
            self._is_free[slot] = 0
        retired = {*self._retired, *self._news}
        self._free = [slot for slot in free if slot not in retired] + [slot for slot in free if slot in retired]
        self._retired, self._news, self.num_retiring = [], [], 0
        self.resize(num_in_use)

    def take_retired(self) -> list[int]:
        """Slots that were retired since the last call and still are: their memory is of no use."""
        news, self._news = self._news, []
        retired = set(self._retired)
        return [slot for slot in news if slot in retired]

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_retired(self) -> int:
        return len(self._retired)

    @property
    def num_in_use(self) -> int:
        """Slots that pages may have, now or as soon as those that retire are given back."""
        return self.num_slots - self.num_retired - self.num_retiring

    def _retire(self, slot: int) -> None:
        self._retired.append(slot)
        self._news.append(slot)

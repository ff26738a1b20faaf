"""A bound on the bytes that are written to a tier in a day: flash wears out by writes.

A bucket that fills evenly. It holds an hour's share, so that a burst is written at once and the day is kept. A batch is
sent as long as there is anything in it, and may leave it in debt, so the long run is exact whatever the size of a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DAY_S = 86_400.0
BURST_S = 3_600.0


@dataclass(slots=True)
class WriteBudget:
    """The bytes that a tier may still be written now. Under the store's lock.

    bytes_per_day: positive. num_spent: how often nothing was left.
    """

    bytes_per_day: int
    num_spent: int = 0
    left_bytes: float = field(init=False)
    _filled_at: float = float("-inf")

    def __post_init__(self) -> None:
        self.left_bytes = self._most

    def fill(self, now: float) -> None:
        """Take what was earned up to this time of a steady clock."""
        earned = self.bytes_per_day * max(0.0, now - self._filled_at) / DAY_S
        self.left_bytes = min(self._most, self.left_bytes + earned)
        self._filled_at = now

    def spend(self, num_bytes: int) -> None:
        """Bytes are on their way."""
        was_left = self.left_bytes > 0
        self.left_bytes -= num_bytes
        self.num_spent += was_left and self.left_bytes <= 0

    @property
    def is_spent(self) -> bool:
        """True if nothing is left, as of the last `fill`."""
        return self.left_bytes <= 0

    @property
    def _most(self) -> float:
        return self.bytes_per_day * BURST_S / DAY_S

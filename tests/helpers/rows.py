"""An engine's host memory in rows, and a RowMover between it and tiers that fail on command."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.move.rows import RowMover
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import FaultyTier

ROW_BYTES = 4096
NUM_ROWS = 16


class Rows:
    """Rows as vLLM has them: one flat piece of memory. Written and read past the code under test."""

    def __init__(self, num_rows: int = NUM_ROWS, row_bytes: int = ROW_BYTES) -> None:
        self.row_bytes = row_bytes
        self.memory = memoryview(mmap.mmap(-1, num_rows * row_bytes))

    def __getitem__(self, row: int) -> bytes:
        return bytes(self.memory[row * self.row_bytes : (row + 1) * self.row_bytes])

    def __setitem__(self, row: int, byte: int) -> None:
        self.memory[row * self.row_bytes : (row + 1) * self.row_bytes] = bytes([byte]) * self.row_bytes

    def has(self, row: int, byte: int) -> bool:
        return self[row] == bytes([byte]) * self.row_bytes


def faulty(name: str, row_bytes: int = ROW_BYTES) -> FaultyTier:
    return FaultyTier(MemoryTier(256, row_bytes, name=name))


def open_mover(rows: Rows, tiers: Sequence[FaultyTier], *, timeout_s: float = 20.0, workers: int = 2) -> RowMover:
    """Lanes that take no tier out before its third failure, and never bring one back during a test."""

    def make_lanes(view: Callable[[int], memoryview]) -> list[Lane]:
        return [
            Lane(tier, view, workers=workers, timeout_s=timeout_s, breaker=Breaker(3, 1000.0, 1000.0)) for tier in tiers
        ]

    return RowMover(make_lanes, rows.memory, rows.row_bytes)

"""The address arithmetic of a page table, run by run, for devices that copy by a list of addresses.

run r of page i starts at base[r] + i * page_stride[r], and at slot_offset[r] of the slot
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.devices.base import Int64s, PageTable

UNITS = (8, 4, 2, 1)  # bytes a GPU thread may move at once


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs of one page, in slot order; one entry per run in each array."""

    base: Int64s
    page_stride: Int64s
    num_bytes: Int64s
    slot_offset: Int64s

    @classmethod
    def of(cls, table: PageTable) -> Runs:
        """Spread the pieces of a table out into runs."""
        piece = np.repeat(np.arange(len(table.base)), table.num_runs)
        first_run = np.cumsum(table.num_runs) - table.num_runs
        index: Int64s = np.arange(len(piece), dtype=np.int64) - first_run[piece]
        num_bytes = table.run_bytes[piece]
        return cls(
            base=np.add(table.base[piece], index * table.run_stride[piece], dtype=np.int64),
            page_stride=table.page_stride[piece],
            num_bytes=num_bytes,
            slot_offset=np.cumsum(num_bytes, dtype=np.int64) - num_bytes,
        )

    @property
    def unit(self) -> int:
        """The widest of UNITS that every address and every length is a multiple of."""
        bits = int(np.bitwise_or.reduce(np.concatenate([self.base, self.page_stride, self.num_bytes])))
        return next(unit for unit in UNITS if bits % unit == 0)


def memory_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The bytes at an address as an array, which keeps nothing alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def adjacent(addresses: list[int], num_bytes: int) -> list[tuple[int, int]]:
    """Half-open ranges of indices whose pieces of `num_bytes` lie end to end, so that one transfer can move each."""
    cuts = [i for i in range(1, len(addresses)) if addresses[i] != addresses[i - 1] + num_bytes]
    bounds = [0, *cuts, len(addresses)] if addresses else []
    return list(itertools.pairwise(bounds))

"""Copies for engines on the CPU: one call for all pages, without the GIL.

The C extension `_copy` does it at about the speed of one memcpy of the same bytes; where it was not built, numpy does
the same with a Python loop over pages and pieces. Both finish before they return, so their event is already done.
Threads are the caller's affair: a copy holds no lock and releases the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kvstore.devices.base import CopyEvent, Int64s, PageTable
from kvstore.devices.runs import memory_at
from kvstore.errors import ConfigError

_copy: Any
try:
    from kvstore.devices import _copy
except ImportError:  # no compiler at installation
    _copy = None

AUTO = -1  # _copy: non-temporal stores where they measured better


class DoneEvent:
    """A batch of copies that was finished before anyone asked."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """True."""
        return True


class CpuDevice:
    """Engine memory that the CPU can address. Any thread.

    native: use the C extension; None means where it was built.
    """

    name = "cpu"

    def __init__(self, *, native: bool | None = None) -> None:
        if native and _copy is None:
            raise ConfigError("device cpu: native is True, but kvstore.devices._copy was not built")
        self.is_native = _copy is not None if native is None else native

    def copy_out(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Gather engine pages into slots."""
        _check_on_cpu(table)
        if self.is_native:
            ids = np.asarray(page_ids, np.int64)
            _copy.gather(*_columns(table), ids, slots, table.first_page, table.num_pages, AUTO)
        else:
            ids = table.check(page_ids, slots, writes_slots=True)
            for piece, start, stop in _pieces(table):
                for page, slot in zip(ids.tolist(), slots, strict=True):
                    run = piece[page - table.first_page]
                    np.copyto(slot.reshape(-1)[start:stop].reshape(run.shape), run)
        return DoneEvent()

    def copy_in(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Scatter slots into engine pages."""
        _check_on_cpu(table)
        if self.is_native:
            ids = np.asarray(page_ids, np.int64)
            _copy.scatter(*_columns(table), ids, slots, table.first_page, table.num_pages, AUTO)
        else:
            ids = table.check(page_ids, slots, writes_slots=False)
            for piece, start, stop in _pieces(table):
                for page, slot in zip(ids.tolist(), slots, strict=True):
                    run = piece[page - table.first_page]
                    np.copyto(run, slot.reshape(-1)[start:stop].reshape(run.shape))
        return DoneEvent()

    def register(self, slab: npt.NDArray[np.uint8]) -> None:
        """Do nothing: the CPU needs no page-locked memory."""

    def unregister(self, slab: npt.NDArray[np.uint8]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: nothing is in flight between calls."""


def _check_on_cpu(table: PageTable) -> None:
    # An address on a GPU would not be a wrong answer here but the end of the process.
    for tensor in table.keep_alive:
        if not getattr(tensor, "is_cpu", True):
            raise ValueError(f"device cpu: the table's tensors are on {tensor.device}")


def _columns(table: PageTable) -> tuple[Int64s, Int64s, Int64s, Int64s, Int64s]:
    return table.base, table.page_stride, table.num_runs, table.run_stride, table.run_bytes


def _pieces(table: PageTable) -> list[tuple[npt.NDArray[np.uint8], int, int]]:
    """Every piece over the engine's memory, [pages from first_page on, runs, run bytes], and its place in a slot."""
    pieces: list[tuple[npt.NDArray[np.uint8], int, int]] = []
    start = 0
    num_pages = table.num_pages - table.first_page
    if num_pages < 1:
        return pieces
    for base, page_stride, num_runs, run_stride, run_bytes in zip(*(c.tolist() for c in _columns(table)), strict=True):
        address = base + table.first_page * page_stride
        extent = (num_pages - 1) * page_stride + (num_runs - 1) * run_stride + run_bytes
        memory = memory_at(address, extent)
        shape, strides = (num_pages, num_runs, run_bytes), (page_stride, run_stride, 1)
        stop = start + num_runs * run_bytes
        pieces.append((as_strided(memory, shape, strides), start, stop))
        start = stop
    return pieces

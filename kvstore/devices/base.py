"""A device moves pages between an engine's own memory and slots of the host slab, many pieces in one call.

The planner never sees this: between `prepare_*` and `complete` of a lease, whoever holds the lease copies. A
`PageTable` says where an engine keeps the pieces of its pages; a slot holds the same pieces end to end:

    engine memory                                        slot
    piece p, run r of page i starts at                   piece 0 run 0 | piece 0 run 1 | ... | piece P-1 run R-1
    base[p] + i * page_stride[p] + r * run_stride[p]

That one formula covers a paged engine (one run a piece, page_stride = bytes of a block) and a contiguous cache (page i
is tokens [i * S, (i + 1) * S) of a tensor [heads, tokens, dim]: one run a head). `tables.py` makes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

_COLUMNS = {"page_stride": 0, "num_runs": 1, "run_stride": 0, "run_bytes": 1}  # name: least value


@dataclass(frozen=True, slots=True, eq=False)
class PageTable:
    """The addresses of the pieces of an engine's pages; all arrays have one entry per piece.

    base:        address of run 0 of page 0.
    page_stride: bytes from a page to the next.
    num_runs:    contiguous runs in a piece.
    run_stride:  bytes from a run to the next.
    run_bytes:   bytes of a run.
    num_pages:   pages that may be addressed: first_page <= page id < num_pages.
    keep_alive:  the tensors behind the addresses, one per piece; a copy under way holds the table, and so them.
    first_page:  not 0 where the engine has dropped the pages before it (a sliding window): their addresses lie outside
                 of its memory.
    """

    base: Int64s
    page_stride: Int64s
    num_runs: Int64s
    run_stride: Int64s
    run_bytes: Int64s
    num_pages: int
    keep_alive: tuple[Any, ...] = ()
    first_page: int = 0

    def __post_init__(self) -> None:
        columns = {"base": self.base, **{name: getattr(self, name) for name in _COLUMNS}}
        for name, column in columns.items():
            if column.dtype != np.int64 or column.shape != self.base.shape or column.ndim != 1:
                raise ValueError(
                    f"page table: {name} is {column.dtype} of shape {column.shape}; it must be int64, 1-D, alike"
                )
            if name != "base" and column.size and int(column.min()) < _COLUMNS[name]:
                raise ValueError(f"page table: {name} has {int(column.min())}; at least {_COLUMNS[name]} is possible")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in a slot."""
        return int((self.num_runs * self.run_bytes).sum())

    def check(self, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]], *, writes_slots: bool) -> Int64s:
        """Return the ids as an array, or raise ValueError if a page is out of range or does not fit its slot."""
        ids = np.asarray(page_ids, np.int64)
        if ids.ndim != 1 or len(ids) != len(slots):
            raise ValueError(f"{ids.size} page ids and {len(slots)} slots")
        if len(ids) and not self.first_page <= int(ids.min()) <= int(ids.max()) < self.num_pages:
            wrong = next(i for i in ids.tolist() if not self.first_page <= i < self.num_pages)
            raise ValueError(f"page id {wrong} is outside of [{self.first_page}, {self.num_pages})")
        page_bytes = self.page_bytes
        for index, slot in enumerate(slots):
            if slot.dtype != np.uint8 or not slot.flags.c_contiguous or (writes_slots and not slot.flags.writeable):
                raise ValueError(
                    f"slot {index} of the call is not a contiguous{', writable' * writes_slots} uint8 array"
                )
            if slot.nbytes < page_bytes:
                raise ValueError(f"slot {index} of the call has {slot.nbytes} bytes, a page {page_bytes}")
        return ids


class CopyEvent(Protocol):
    """Completion of one batch of copies."""

    def wait(self) -> None:
        """Block until the copies are finished; raises what failed."""

    def done(self) -> bool:
        """True once `wait` would return at once."""


class Device(Protocol):
    """Engine memory on one side, host slots on the other.

    `slots[i]` is a whole slot (from `store.slots.array`) for the page `page_ids[i]`. Raises ValueError if a page id is
    out of range or a page does not fit its slot, before anything is copied.
    """

    name: str

    def copy_out(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Gather: engine pages -> slots (offload). The engine may overwrite the pages once the event is done."""

    def copy_in(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Scatter: slots -> engine pages (onload). The slots may be released once the event is done."""

    def register(self, slab: npt.NDArray[np.uint8]) -> None:
        """Make the host slab fit for direct transfers (page-lock it for CUDA); a no-op on CPU."""

    def unregister(self, slab: npt.NDArray[np.uint8]) -> None:
        """Undo `register`, if it was done; no copy from or to the slab is under way any more."""

    def close(self) -> None:
        """Wait for what is in flight and give everything back. Idempotent."""

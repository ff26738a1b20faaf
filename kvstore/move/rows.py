"""Pages between tiers and memory that somebody else owns, row by row.

An engine that keeps its own host memory (vLLM's offloading region) lends rows of it: to be read until a save is
answered, to be filled until a load is answered *or given up*. This is the mover for such rows: the same lanes,
priorities, deadlines and breakers as under a store, without a planner. The engine decides what is where.

The hard thing: a load that hangs inside its tier must not hold up a request for ever, and once the engine was told that
it failed, the row belongs to another page. So a tier never sees a row it is to fill. It reads into a page of ours, and
only what arrives before `give_up` is copied on: one copy at memory speed, and a disk that comes back after a minute
writes into memory that nobody reads. Saves read their rows in place: bytes that change under a hung write do not fit
the checksum that was made before.

Any method from one thread only, the engine's; lanes answer through a queue.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.errors import ConfigError, RequestError, StoreClosed, TierUnavailable
from kvstore.forks import forbid, harmless
from kvstore.move.lane import Lane
from kvstore.move.lanes import Lanes
from kvstore.move.mover import Mover
from kvstore.page import PageKey, PageMeta
from kvstore.plan.records import Op, Outcome, Priority, Transfer
from kvstore.tiers.host import HUGE_PAGE_BYTES, HostSlab

log = logging.getLogger(__name__)

PAGE = 4096


@dataclass(slots=True)
class _Load:
    """A FETCH under way: the rows it is for, and the pages of ours it reads into meanwhile."""

    rows: tuple[int, ...]
    tickets: tuple[int, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)  # held for the copy, and by whoever gives it up
    is_given_up: bool = False
    staged: dict[int, memoryview] = field(default_factory=dict)  # by ticket


class StagingPages:
    """Memory for what lanes read. Any thread.

    Grows to what lanes carry at once (workers x pages of a batch) and keeps that. It is made as the host slab is, of
    huge pages: to read with O_DIRECT into pages of 4 KiB, a disk is handed a list of as many pieces. Measured on a
    virtio disk, 128 MiB took 125 ms so and 50 ms into huge pages; the copies on into the rows take less than that.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = -(-page_bytes // PAGE) * PAGE
        self._pages_per_slab = max(1, HUGE_PAGE_BYTES // self._page_bytes)
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self.num_pages = 0  # ever made; a page in a tier that hangs stays there

    def take(self) -> memoryview:
        """One page, of whole sectors. Raises TierUnavailable if there is no memory for it."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return self._grow()

    def give(self, page: memoryview) -> None:
        """Take one back."""
        self._free.put(page)

    def _grow(self) -> memoryview:
        try:
            slab = HostSlab(self._pages_per_slab, self._page_bytes)
        except ConfigError as error:  # it speaks of the host tier's capacity, which is not what is short here
            num_bytes = self._pages_per_slab * self._page_bytes
            raise TierUnavailable(f"rows: there is no memory, {num_bytes} bytes, to read pages into") from error
        self.num_pages += slab.num_slots
        for slot in range(1, slab.num_slots):
            self._free.put(slab.view(slot))
        return slab.view(0)


class RowMover(Lanes):
    """Carries pages between lanes and the rows of `memory`. See the module.

    make_lanes: makes the lanes, not started, for a function that gives the bytes of a slot.
    memory:     flat and writable, `row_bytes` a row; borrowed until `close`.
    """

    def __init__(
        self,
        make_lanes: Callable[[Callable[[int], memoryview]], Sequence[Lane]],
        memory: memoryview,
        row_bytes: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if memory.ndim != 1 or memory.itemsize != 1 or row_bytes < 1 or memory.nbytes % row_bytes:
            raise RequestError(
                f"rows: memory is {memory.nbytes} bytes in {memory.ndim} dimensions; it must be flat and hold whole "
                f"rows of {row_bytes} bytes"
            )
        self.num_rows = memory.nbytes // row_bytes
        self.row_bytes = row_bytes
        self._memory = memory[:]
        self._staging = StagingPages(row_bytes)
        self._now = now
        self._next_id = 0
        self._next_ticket = self.num_rows  # slots from here on are pages of ours for one read
        self._loads: dict[int, _Load] = {}  # by transfer id; removed by the engine's thread only
        self._by_ticket: dict[int, _Load] = {}
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._num_open = 0
        self._is_closed = False
        self._mover = Mover(make_lanes(self._slot_view), self._landed, lambda state: None, lambda: None, now=now)
        forbid(self)

    # ---- verbs --------------------------------------------------------------------------------------------------

    def probe(self, tier: str, keys: Sequence[PageKey], *, deadline: float) -> int:
        """Ask which pages a tier has; the answer comes from `poll` under the number returned."""
        return self._submit(tier, Op.PROBE, keys, Priority.LOAD, deadline)

    def load(
        self, tier: str, keys: Sequence[PageKey], rows: Sequence[int], metas: Sequence[PageMeta], *, deadline: float
    ) -> int:
        """Fill rows. What `poll` says is ok is in its row; the other rows are untouched, and may be lent again."""
        self._check_open()
        tickets = tuple(range(self._next_ticket, self._next_ticket + len(rows)))
        self._next_ticket += len(tickets)
        load = _Load(tuple(rows), tickets)
        self._loads[self._next_id] = load
        self._by_ticket.update(dict.fromkeys(tickets, load))
        return self._submit(tier, Op.FETCH, keys, Priority.LOAD, deadline, slots=tickets, metas=tuple(metas))

    def save(
        self, tier: str, keys: Sequence[PageKey], rows: Sequence[int], metas: Sequence[PageMeta], *, deadline: float
    ) -> int:
        """Store rows; they must keep their bytes until the answer has come."""
        return self._submit(tier, Op.SPILL, keys, Priority.SAVE, deadline, slots=tuple(rows), metas=tuple(metas))

    def touch(self, tier: str, keys: Sequence[PageKey], *, expires_at: float, deadline: float) -> int:
        """Refresh recency and, unless `expires_at` (Unix time) is 0, the deadline of pages."""
        return self._submit(tier, Op.TOUCH, keys, Priority.SAVE, deadline, expires_at=expires_at)

    def delete(self, tier: str, keys: Sequence[PageKey], *, deadline: float) -> int:
        """Delete pages."""
        return self._submit(tier, Op.DELETE, keys, Priority.SAVE, deadline)

    def give_up(self, transfer_id: int) -> None:
        """End a load without its answer: from now on nothing of it reaches its rows, and `poll` will not name it.

        Returns after at most the copy of one batch. Does nothing for what has been answered.
        """
        load = self._loads.get(transfer_id)
        if load is not None:
            with load.lock:
                load.is_given_up = True
            self._mover.cancel((transfer_id,))

    def poll(self, timeout_s: float = 0.0) -> list[Outcome]:
        """The answers since the last call; waits up to `timeout_s` for the first."""
        answered: list[Outcome] = []
        until = time.monotonic() + timeout_s
        while True:
            try:
                left_s = 0.0 if answered else until - time.monotonic()
                outcome = self._outcomes.get(left_s > 0, max(0.0, left_s))
            except queue.Empty:
                return answered
            self._num_open -= 1
            load = self._loads.pop(outcome.transfer_id, None)
            if load is None or not load.is_given_up:
                answered.append(outcome)

    @harmless
    def close(self, timeout_s: float) -> int:
        """Drop what waits, let lanes finish what they carry, close the tiers; return how many transfers were lost."""
        if self._is_closed:
            return 0
        self._is_closed = True
        num_lost = self._mover.close(timeout_s)
        for lane in self._mover.lanes.values():
            lane.tier.close()
        if not self._mover.num_hung:
            self._memory.release()  # a write that hangs still reads it
        return num_lost

    # ---- what is so ---------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Transfers not answered yet, given up ones included."""
        return self._num_open

    @property
    def staging_pages(self) -> int:
        """Pages of our own memory that loads have needed at once so far."""
        return self._staging.num_pages

    def is_up(self, tier: str) -> bool:
        """False while pages are not asked of the tier: it is down, or refuses to be read."""
        return self.takes(tier, Op.FETCH)

    # ---- private ------------------------------------------------------------------------------------------------

    def _submit(
        self,
        tier: str,
        op: Op,
        keys: Sequence[PageKey],
        priority: Priority,
        deadline: float,
        *,
        slots: tuple[int, ...] = (),
        metas: tuple[PageMeta, ...] = (),
        expires_at: float = 0.0,
    ) -> int:
        self._check_open()
        transfer_id = self._next_id
        self._next_id += 1
        self._num_open += 1
        transfer = Transfer(
            transfer_id, op, tier, tuple(keys), priority, deadline, slots=slots, metas=metas, expires_at=expires_at
        )
        self._mover.submit((transfer,))
        return transfer_id

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed("rows: used after close")

    def _slot_view(self, slot: int) -> memoryview:
        """Called by a lane's worker, just before it enters the tier."""
        if slot < self.num_rows:
            return self._memory[slot * self.row_bytes : (slot + 1) * self.row_bytes]
        page = self._staging.take()
        self._by_ticket[slot].staged[slot] = page
        return page

    def _landed(self, outcome: Outcome) -> None:
        """Called with every outcome, by the worker that carried it or by the housekeeper."""
        load = self._loads.get(outcome.transfer_id)
        if load is not None:
            self._copy_on(load, outcome)
        self._outcomes.put(outcome)

    def _copy_on(self, load: _Load, outcome: Outcome) -> None:
        # Tickets were numbered in the order of the rows; nothing is staged where no worker has begun.
        with load.lock:
            if not load.is_given_up:
                for row, is_ok, page in zip(load.rows, outcome.ok, load.staged.values(), strict=False):
                    if is_ok:
                        target = self._memory[row * self.row_bytes : (row + 1) * self.row_bytes]
                        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(page, np.uint8, self.row_bytes))
        for ticket in load.tickets:
            self._by_ticket.pop(ticket, None)
        for page in load.staged.values():
            self._staging.give(page)
        load.staged = {}

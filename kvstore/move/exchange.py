"""Pages between tiers and memory in pieces, for an engine that waits in threads of its own.

Such an engine (SGLang's storage controller) calls when its pages are to be stored or fetched, holds their memory still
until the call returns, and waits. A page of its memory lies in pieces: keys here, values there, or one piece per layer.
This is the mover for it: the same lanes, priorities, deadlines and breakers as under a store, without a planner and
without a host tier, since the engine has one.

The hard thing: a call that has returned at its deadline must not touch the engine's memory any more, which belongs to
other pages by then. So a tier never sees that memory. It reads into a page of ours, and what arrives in time is copied
on; what is to be written is copied into a page of ours when a worker begins with it, or never. Both copies happen under
the lock of their batch, which the end of the call takes too.

Any thread; calls from several threads run at once.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.errors import StoreClosed, TierError
from kvstore.forks import forbid, harmless
from kvstore.move.lane import Lane
from kvstore.move.lanes import Lanes
from kvstore.move.mover import Mover
from kvstore.move.rows import StagingPages
from kvstore.page import PageKey, PageMeta
from kvstore.plan.records import Op, Outcome, Priority, Transfer

log = logging.getLogger(__name__)

BATCH_BYTES = 8 << 20  # less, and calls cost more than they carry; more, and the last copy begins late
MAX_FILLING_PAGES = 64  # pages on their way to the first tier at once; what is beyond is not worth its memory
FILL_DEADLINE_S = 30.0

Copy = Callable[[int, memoryview], None]  # of the page at an index of the call; it runs in a lane's thread


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a call wants of each tier that it asks. most: pages in one transfer."""

    op: Op
    keys: Sequence[PageKey]
    deadline: float
    most: int
    copy: Copy | None = None
    num_bytes: int = 0


@dataclass(slots=True)
class _Call:
    """A call that waits. `sources` holds the tier of what is done, "" for what is not."""

    sources: list[str]
    num_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Batch:
    """A transfer of a call, or of none: then it fills the first tier from pages of ours."""

    op: Op
    tier: str
    keys: tuple[PageKey, ...]
    indexes: Sequence[int] = ()
    call: _Call | None = None
    copy: Copy | None = None
    num_bytes: int = 0
    tickets: tuple[int, ...] = ()
    pages: dict[int, memoryview] = field(default_factory=dict)  # by ticket
    lock: threading.Lock = field(default_factory=threading.Lock)  # held for copies, and by whoever ends them
    is_over: bool = False


class Exchange(Lanes):
    """Blocking calls over lanes. See the module.

    make_lanes: makes the lanes, not started, for a function that gives the bytes of a slot.
    slot_bytes: of a page in a tier, padding included.
    batch_pages: pages in one call of a tier, at most.
    expires_at: when what is written to a tier now leaves it, in Unix seconds; 0 means never.
    """

    def __init__(
        self,
        make_lanes: Callable[[Callable[[int], memoryview]], Sequence[Lane]],
        slot_bytes: int,
        batch_pages: int,
        expires_at: Callable[[str], float] = lambda tier: 0.0,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_filled_pages = 0  # written to the first tier because another one had them
        self._batch_pages = max(1, min(batch_pages, BATCH_BYTES // slot_bytes))
        self._expires_at = expires_at
        self._now = now
        self._staging = StagingPages(slot_bytes)
        self._ids = itertools.count()
        self._next_tickets = itertools.count()
        self._batches: dict[int, _Batch] = {}  # by transfer
        self._by_ticket: dict[int, _Batch] = {}
        self._num_filling = 0
        self._is_closed = False
        self._mover = Mover(make_lanes(self._slot_view), self._landed, lambda state: None, lambda: None, now=now)
        forbid(self)

    # ---- verbs --------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[PageKey], *, deadline: float) -> list[str]:
        """Name a tier that has each page, "" where none has or none has said so by `deadline`."""
        return self._one_by_one(_Wish(Op.PROBE, keys, deadline, len(keys)))

    def load(self, keys: Sequence[PageKey], num_bytes: int, copy: Copy, *, deadline: float) -> list[str]:
        """Fetch pages of `num_bytes` each and have those that come copied on by `copy`; name where each came from.

        What is "" at the return has not come; its memory may have been written to, and will not be any more.
        """
        return self._one_by_one(_Wish(Op.FETCH, keys, deadline, self._batch_pages, copy, num_bytes))

    def save(self, keys: Sequence[PageKey], num_bytes: int, copy: Copy, *, deadline: float) -> list[str]:
        """Store pages of `num_bytes` each, which `copy` copies out, on every tier that takes them.

        Names one tier that has each page, "" where none has it by `deadline`. Nothing is copied after the return.
        """
        wish = _Wish(Op.SPILL, keys, deadline, self._batch_pages, copy, num_bytes)
        call = _Call([""] * len(keys))
        tiers = [tier for tier in self.tiers if self.takes(tier, Op.SPILL)]
        self._carry(call, wish, tiers, range(len(keys)))
        return self._sources(call)

    def touch(self, tier: str, keys: Sequence[PageKey], *, deadline: float) -> None:
        """Tell a tier that pages were used, the most recently used last. Does not wait."""
        self._submit(_Batch(Op.TOUCH, tier, tuple(keys)), deadline)

    def delete(self, tier: str, keys: Sequence[PageKey], *, deadline: float) -> None:
        """Delete pages of a tier, by `deadline` at the latest."""
        call = _Call([""] * len(keys))
        wish = _Wish(Op.DELETE, keys, deadline, len(keys))
        self._carry(call, wish, [tier], range(len(keys)))

    @harmless
    def close(self, timeout_s: float) -> int:
        """Drop what waits, let lanes finish what they carry, close the tiers; return how many transfers were lost."""
        if self._is_closed:
            return 0
        self._is_closed = True
        num_lost = self._mover.close(timeout_s)
        for lane in self._mover.lanes.values():
            lane.tier.close()
        return num_lost

    # ---- what is so ---------------------------------------------------------------------------------------------

    @property
    def staging_pages(self) -> int:
        """Pages of our own memory that calls have needed at once so far."""
        return self._staging.num_pages

    # ---- private ------------------------------------------------------------------------------------------------

    def _one_by_one(self, wish: _Wish) -> list[str]:
        """Ask each tier that is up for what those before it did not have."""
        call = _Call([""] * len(wish.keys))
        for tier in self.tiers:
            missing = [index for index, source in enumerate(self._sources(call)) if not source]
            if missing and self.takes(tier, wish.op):
                self._carry(call, wish, [tier], missing)
        return self._sources(call)

    def _carry(self, call: _Call, wish: _Wish, tiers: Sequence[str], indexes: Sequence[int]) -> None:
        """Have tiers do what a call wants, and wait; what has not ended by its deadline copies nothing any more."""
        parts = [indexes[start : start + wish.most] for start in range(0, len(indexes), max(1, wish.most))]
        batches = [
            _Batch(wish.op, tier, tuple(wish.keys[i] for i in part), part, call, wish.copy, wish.num_bytes)
            for tier in tiers
            for part in parts
        ]
        if not batches:
            return
        with call.lock:
            call.num_open += len(batches)
            call.done.clear()
        transfers: list[int] = []
        is_done = False
        try:
            transfers.extend(self._submit(batch, wish.deadline) for batch in batches)
            is_done = call.done.wait(max(0.0, wish.deadline - self._now()))
        finally:
            if not is_done:
                # Each of them, answered or not: one whose answer is being taken in may be about to copy, or copying.
                for batch in batches:
                    with batch.lock:
                        batch.is_over = True
                self._mover.cancel(transfers)

    def _submit(self, batch: _Batch, deadline: float) -> int:
        if self._is_closed:
            raise StoreClosed("exchange: used after close")
        transfer_id = next(self._ids)
        metas: tuple[PageMeta, ...] = ()
        if batch.op in (Op.FETCH, Op.SPILL):
            if not batch.tickets:
                batch.tickets = tuple(next(self._next_tickets) for _ in batch.keys)
            self._by_ticket.update(dict.fromkeys(batch.tickets, batch))
            metas = (PageMeta(batch.num_bytes, expires_at=self._expires_at(batch.tier)),) * len(batch.keys)
        self._batches[transfer_id] = batch
        is_late = batch.op in (Op.SPILL, Op.TOUCH, Op.DELETE)
        transfer = Transfer(
            transfer_id,
            batch.op,
            batch.tier,
            batch.keys,
            Priority.SAVE if is_late else Priority.LOAD,
            deadline,
            slots=batch.tickets,
            metas=metas,
            expires_at=self._expires_at(batch.tier) if batch.op is Op.TOUCH else 0.0,
        )
        self._mover.submit((transfer,))
        return transfer_id

    def _sources(self, call: _Call) -> list[str]:
        with call.lock:
            return list(call.sources)

    def _slot_view(self, slot: int) -> memoryview:
        """Called by a lane's worker, just before it enters the tier."""
        batch = self._by_ticket[slot]
        if slot in batch.pages:
            return batch.pages[slot]
        page = batch.pages[slot] = self._staging.take()
        if batch.op is Op.SPILL and batch.copy is not None:
            with batch.lock:
                if batch.is_over:
                    raise TierError("the call that wanted it written has ended")
                batch.copy(batch.indexes[slot - batch.tickets[0]], page)
        return page

    def _landed(self, outcome: Outcome) -> None:
        """Called with every outcome, by the worker that carried it or by the housekeeper."""
        batch = self._batches.pop(outcome.transfer_id)
        try:
            ok = self._copied(batch, outcome.ok) if batch.op is Op.FETCH else outcome.ok
        except BaseException:
            ok = (False,) * len(batch.keys)
            raise
        finally:
            self._end(batch, ok)

    def _copied(self, batch: _Batch, ok: tuple[bool, ...]) -> tuple[bool, ...]:
        assert batch.copy is not None
        with batch.lock:
            if batch.is_over:
                return (False,) * len(ok)
            for index, is_ok, ticket in zip(batch.indexes, ok, batch.tickets, strict=True):
                if is_ok:
                    batch.copy(index, batch.pages[ticket])
        return ok

    def _end(self, batch: _Batch, ok: tuple[bool, ...]) -> None:
        """Give the pages of a batch back, or on to the first tier, and tell its call."""
        for ticket in batch.tickets:
            self._by_ticket.pop(ticket, None)
        if batch.op is Op.SPILL and batch.call is None:
            self._num_filling -= len(batch.keys)
            self.num_filled_pages += sum(ok)
        if batch.op is Op.FETCH and batch.tier != self.tiers[0]:
            self._fill(batch, ok)
        for page in batch.pages.values():
            self._staging.give(page)
        batch.pages = {}
        call = batch.call
        if call is None:
            return
        with call.lock:
            for index, is_ok in zip(batch.indexes, ok, strict=True):
                if is_ok and not call.sources[index]:
                    call.sources[index] = batch.tier
            call.num_open -= 1
            if not call.num_open:
                call.done.set()

    def _fill(self, batch: _Batch, ok: tuple[bool, ...]) -> None:
        """Write what came from another tier to the first one too: the pages that it was read into go on there."""
        first = self.tiers[0]
        chosen = [position for position, is_ok in enumerate(ok) if is_ok]
        chosen = chosen[: max(0, MAX_FILLING_PAGES - self._num_filling)]
        if not chosen or self._is_closed or not self.takes(first, Op.SPILL):
            return
        fill = _Batch(Op.SPILL, first, tuple(batch.keys[i] for i in chosen), num_bytes=batch.num_bytes)
        fill.tickets = tuple(next(self._next_tickets) for _ in chosen)
        fill.pages = {new: batch.pages.pop(batch.tickets[i]) for new, i in zip(fill.tickets, chosen, strict=True)}
        self._num_filling += len(chosen)
        self._submit(fill, self._now() + FILL_DEADLINE_S)

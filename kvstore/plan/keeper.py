"""Promises to keep blocks in host memory: pins of an operator, and "retain until" of a request.

A kept block holds one pin on each of its resident pages, whatever the number of reasons; the latest deadline counts,
and the word of who gave it. A promise is about pages that are in host memory: it does not bring any there.

What is kept, nothing else can use. So all promises together have a budget, a share of the slots, and each has an end:
what one forgets to undo, or dies before it can, others get back in time. Of a path that does not fit the head is kept.

The hard thing: two clocks. "Retain until" is Unix time and ends when the wall clock says so, wherever that was set to
meanwhile; the longest time of a promise is counted by the boot clock. The queue of ends goes by the latter, and is made
anew when the former was set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from kvstore.clock import LARGE_STEP_S, Clock
from kvstore.plan.host import HostSpace
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES

MAX_STALE = 1024  # ends in the queue that do not count any more, beside as many as do


@dataclass(frozen=True, slots=True)
class Kept:
    """The pages kept on one holder's word, and until when at the latest, by the boot clock."""

    holder: str
    num_pages: int
    until: float


@dataclass(slots=True)
class _Promise:
    """until: by the boot clock, as things are now. unix: what was asked for. latest: by the boot clock."""

    until: float
    holder: str
    num_pages: int = 0
    unix: float = float("inf")
    latest: float = 0.0


class Keeper:
    """All holders' words to keep pages, and until when. Under the store's lock.

    budget: share of the host slots that may be kept. longest_s: after so long every promise ends.
    """

    def __init__(self, host: HostSpace, clock: Clock, *, budget: float, longest_s: float) -> None:
        self.num_pages = 0
        self.refused_pages = 0  # that found no budget
        self._host = host
        self._clock = clock
        self._ahead = 0.0  # wall clock before boot clock when the queue was made: it only says when to make it anew
        self._budget = budget
        self._longest_s = longest_s
        self._promises: dict[Block, _Promise] = {}
        self._queue: list[tuple[float, int, Block]] = []
        self._order = count()
        self._holders: dict[str, list[float]] = {}  # pages, latest end

    @property
    def max_pages(self) -> int:
        """How many pages may be kept."""
        return int(self._budget * self._host.pool.num_in_use)

    def keep(self, blocks: Sequence[Block], until: float, holder: str = "") -> int:
        """Hold the resident pages of blocks, given in path order; returns the number of blocks that hold any.

        until: Unix time; inf for as long as may be. holder: whose word it is, for operators.
        """
        boot = self._look()
        latest = boot + self._longest_s
        end = min(until - self._ahead, latest)
        if end <= boot:
            return 0
        asked = _Promise(end, holder, unix=until, latest=latest)
        pages: list[Page] = []
        most = self.max_pages
        num_kept = sum([self._keep(block, asked, most, pages) for block in blocks])
        self._host.pin(pages)
        return num_kept

    def let_go(self, blocks: Sequence[Block]) -> int:
        """End the promises for blocks given in path order; returns how many had one."""
        kept = [block for block in blocks if self._end(block)]
        pages = [page for block in kept for page in block.pages if page.kept]
        for page in pages:
            page.kept = False
        self.num_pages -= len(pages)
        self._host.unpin(pages, used=False)
        return len(kept)

    def expire(self) -> bool:
        """End promises whose time is over; True if there may be more of them than a step takes."""
        if not self._promises:
            return False
        boot = self._look()
        over: list[Block] = []
        while self._queue and self._queue[0][0] <= boot and len(over) < STEP_PAGES:
            until, _, block = heappop(self._queue)
            promise = self._promises.get(block)
            if promise is not None and promise.until == until:
                over.append(block)
        if over:
            over.sort(key=lambda block: block.depth)
            self.let_go(over)
        return len(over) == STEP_PAGES

    @property
    def holders(self) -> list[Kept]:
        """The number of pages that each holder keeps, and until when."""
        return [Kept(holder, int(pages), until) for holder, (pages, until) in self._holders.items()]

    def __len__(self) -> int:
        return len(self._promises)

    @property
    def blocks(self) -> list[Block]:
        """Those that a promise is about."""
        return list(self._promises)

    def rebuild(self, pages: Sequence[Page]) -> None:
        """Count anew what the promises there are about: an exception may have come between them and the sums.

        pages: all there are.
        """
        self._holders, self.num_pages = {}, 0
        for page in pages:
            page.kept = page.kept and page.state == PageState.READY and page.block in self._promises
        for block, promise in list(self._promises.items()):
            promise.num_pages = sum(page.kept for page in block.pages)
            if block.is_removed or not promise.num_pages or promise.until == float("-inf"):
                for page in block.pages:
                    page.kept = False
                del self._promises[block]
                continue
            self._book(promise, promise.num_pages)
            self.num_pages += promise.num_pages
        self._order_ends()

    def check(self) -> None:
        """Assert that the sums are right. For tests."""
        kept = [page for block in self._promises for page in block.pages if page.kept]
        assert self.num_pages == len(kept), f"{len(kept)} pages are kept, {self.num_pages} booked"
        assert self.num_pages == sum(kept.num_pages for kept in self.holders), f"{self.num_pages}: {self.holders}"

    def _look(self) -> float:
        """The boot clock; where the wall clock was set against it, all ends are found anew."""
        boot = self._clock.boot()
        ahead = self._clock.wall() - boot
        if abs(ahead - self._ahead) >= LARGE_STEP_S:
            self._ahead = ahead
            self._holders.clear()
            for promise in self._promises.values():
                promise.until = min(promise.unix - ahead, promise.latest)
                self._book(promise, promise.num_pages)
            self._order_ends()
        return boot

    def _keep(self, block: Block, asked: _Promise, most: int, pages: list[Page]) -> bool:
        """Promise to keep a block; adds to `pages` what is to be pinned."""
        promise = self._promises.get(block)
        wanted = [page for page in block.pages if page.state == PageState.READY and not page.kept]
        if wanted and len(wanted) > most - self.num_pages:
            self.refused_pages += len(wanted)  # half a block is of no use
            wanted = []
        if promise is None:
            if not wanted:
                return False
            promise = self._promises[block] = _Promise(float("-inf"), asked.holder)
        for page in wanted:
            page.kept = True
        pages += wanted
        self.num_pages += len(wanted)
        if asked.until > promise.until:
            self._book(promise, -promise.num_pages)
            promise.until, promise.unix, promise.latest = asked.until, asked.unix, asked.latest
            promise.holder = asked.holder
            self._book(promise, promise.num_pages)
            self._note_end(promise.until, block)
        promise.num_pages += len(wanted)
        self._book(promise, len(wanted))
        return True

    def _end(self, block: Block) -> bool:
        promise = self._promises.pop(block, None)
        if promise is not None:
            self._book(promise, -promise.num_pages)
        return promise is not None

    def _book(self, promise: _Promise, num_pages: int) -> None:
        booked = self._holders.setdefault(promise.holder, [0, promise.until])
        booked[0] += num_pages
        booked[1] = max(booked[1], promise.until)
        if not booked[0]:
            del self._holders[promise.holder]

    def _note_end(self, until: float, block: Block) -> None:
        if len(self._queue) > 2 * len(self._promises) + MAX_STALE:  # the same block, kept again and again
            self._order_ends()
        heappush(self._queue, (until, next(self._order), block))

    def _order_ends(self) -> None:
        self._queue = [(promise.until, next(self._order), block) for block, promise in self._promises.items()]
        heapify(self._queue)

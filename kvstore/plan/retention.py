"""Retention: the effect of a path's use on every tier's order, and of callers' wishes to keep it.

Retention has four words on all tiers: recency and how a use ends (`ending`), time to live (`set_ttl`), promises to keep
in host memory (`promise`), and the opposite (`let_go_first`, `leave`). The planner finds the blocks; here it is said to
whom it matters.

Promises, the keeper's part, are pins of an operator and "retain until" of a request. A kept block holds one pin on
each of its resident pages, whatever the number of reasons; the latest deadline counts, and the word of who gave it. A
promise is about pages that are in host memory: it does not bring any there. What is kept, nothing else can use. So all
promises together have a budget, a share of the slots, and each has an end: what one forgets to undo, or dies before it
can, others get back in time. Of a path that does not fit the head is kept.

The hard thing: two clocks. "Retain until" is Unix time and ends when the wall clock says so, wherever that was set to
meanwhile; the longest time of a promise is counted by the boot clock. The queue of ends goes by the latter, and is made
anew when the former was set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from eviction.policy import Ending, Hint
from kvstore.clock import LARGE_STEP_S
from kvstore.plan.books import Books
from kvstore.plan.records import Request
from kvstore.plan.state import SHARED_SESSION, Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES, Steps, parts, parts_from_tail

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


class Retention:
    """Tells host memory and the lower tiers what is worth keeping. Under the store's lock.

    keeper: who promised to keep what.
    """

    def __init__(self, books: Books) -> None:
        self.keeper = Keeper(books)
        self._host = books.host
        self._tiers = books.tiers
        self._touch_interval_s = books.settings.touch_interval_s  # media are told of a use at most this often
        self._ttl_after = books.settings.ttl_after

    def ending(self, path: Sequence[Block], request: Request, ending: Ending, now: float) -> Steps[None]:
        """A request is over: refresh its path, promise what it asked for, let go of what no turn will come back to."""
        yield from self._using(path, request, self._ttl_after.get(ending.finish_reason, inf), now)
        if request.options.pin or request.options.retain_until:
            for part in parts(path):
                if part is not path:
                    yield
                self.promise(part, request)
        if ending.last_turn:
            for part in parts(path):  # what comes last is the first to go
                if part is not path:
                    yield
                self.let_go_first(part, request)

    def _using(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> Steps[None]:
        """Refresh a path: in the policies always, at the media not more often than every touch_interval_s.

        left_s: the longest that what only this session has used lives from now on, until its next use.
        """
        used_before: list[Block] = []
        for part in parts_from_tail(path, 2 * STEP_PAGES):  # a use costs half of what other bookings do
            if part is not path:
                yield
                part = [block for block in part if not block.is_removed]
            used_before[:0] = self._use(part, request, left_s, now)
        for part in parts(used_before):
            if part is not used_before:
                yield
                part = [block for block in part if not block.is_removed]
            for tier in self._tiers:
                tier.make_up(part, now)

    def _use(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> list[Block]:
        """The same of a part of a path; returns the blocks that a medium should have had for some time."""
        self.note_session(path, request)
        self._host.touch(path)
        ending = self._limit(path, request, left_s, now) if self._ttl_after else ()
        fresh = [block for block in path if now - block.touched_at > self._touch_interval_s]
        used_before = [block for block in fresh if block.touched_at > float("-inf")]
        for block in fresh:
            block.touched_at = now
        for tier in self._tiers:
            tier.touch(path, fresh, now, is_limited=bool(self._ttl_after))
        if ending:
            pages = [page for block in reversed(ending) for page in block.pages]
            self._host.shorten(pages, left_s)
            for tier in self._tiers:
                tier.shorten(pages, left_s)
        return used_before

    def _limit(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> list[Block]:
        """Note with blocks how long they live from this use on; returns those whose time is limited by the session's.

        The media are told of those where that is another time than before, however lately they were told of a use.
        """
        session, long_ago = _session(request), now - self._touch_interval_s - 1.0
        ending: list[Block] = []
        for block in path:
            own_s = left_s if block.session == session else inf
            if own_s != block.left_s:
                block.left_s = own_s
                block.touched_at = min(block.touched_at, long_ago)
            if own_s != inf:
                ending.append(block)
        return ending

    def note_session(self, blocks: Sequence[Block], request: Request) -> None:
        """Remember whose blocks these are, for `let_go_first`."""
        session = _session(request)
        for block in blocks:
            if block.session != session:
                block.session = SHARED_SESSION if block.session else session

    def promise(self, blocks: Sequence[Block], request: Request) -> None:
        """Keep blocks in host memory as the request's options say, as far as the budget for that goes."""
        if request.options.pin:
            self.keeper.keep(blocks, float("inf"), request.holder)
        elif request.options.retain_until:
            self.keeper.keep(blocks, request.options.retain_until, request.holder)

    def let_go_first(self, path: Sequence[Block], request: Request) -> None:
        """No turn will follow: what only this session has used is the first to make room."""
        session = _session(request)
        leaving = [page for block in reversed(path) if block.session == session for page in block.pages]
        self._host.policy.demote(leaving)
        for tier in self._tiers:
            if tier.plan.policy is not None:
                tier.plan.policy.demote(leaving)

    def set_ttl(self, path: Sequence[Block], ttl_s: float, now: float) -> None:
        """Give blocks a time to live from now on, in every tier."""
        hints: dict[Hint, Hint] = {}  # one object for all that have the same: a policy is told of them together
        for block in path:
            hint = hints.get(block.hint)
            if hint is None:
                hint = hints[block.hint] = block.hint._replace(ttl_s=ttl_s)
            block.hint = hint
            block.touched_at = now
        pages = [page for block in path for page in block.pages]
        self._host.enter([page for page in pages if page in self._host.policy], used=False)
        for tier in self._tiers:
            tier.set_ttl(pages)
            tier.touch(path, path, now)

    def leave(self, removed: Sequence[Block]) -> list[Page]:
        """Blocks are forgotten: their pages leave host memory, those in use as soon as they are not; returns all."""
        self.keeper.let_go(removed)
        pages = [page for block in removed for page in block.pages]
        if not pages:
            return pages
        self.drop_idle(pages)
        self._host.doom([page for page in pages if page.state == PageState.READY])
        return pages

    def drop_idle(self, pages: Sequence[Page]) -> None:
        """Those of the pages of forgotten blocks, and of expired pages, that nothing uses give their slots back."""
        idle = [
            page
            for page in pages
            if not page.spilling and (page.block.is_removed or page.state is PageState.EXPIRED) and not page.pins
        ]
        if idle:
            self._host.drop_expired([page for page in idle if page.state is PageState.EXPIRED])
            self._host.drop([page for page in idle if page.state is PageState.READY])


class Keeper:
    """All holders' words to keep pages, and until when. Under the store's lock."""

    def __init__(self, books: Books) -> None:
        self.num_pages = 0
        self.refused_pages = 0  # that found no budget
        self._host = books.host
        self._clock = books.clock
        self._ahead = 0.0  # wall clock before boot clock when the queue was made: it only says when to make it anew
        self._budget = books.settings.max_pinned_fraction
        self._longest_s = books.settings.pin_max_s
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


def _session(request: Request) -> str:
    return request.options.session or f"\0request {request.id}"

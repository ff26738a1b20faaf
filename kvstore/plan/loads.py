"""Loads: leases over pages in host memory, which are held there while their holder copies.

The order of a load matters: first everything that is in host memory already is pinned, only then is room made for the
rest; otherwise making room may evict the very pages that are about to be read. Last, fetches are sent (fetches.py).

In steps. Between two of them pages may leave, come, or be forgotten, so each is looked at again when its turn comes.
Where one cannot be had any more, or finds no slot, the load is cut before its block.

The hard thing: what a load holds must be in its books at every yield, and nothing else. `Load.pages` therefore grows
as pages are held, in the order in which that happens, and is put in path order at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.plan.books import Books
from kvstore.plan.fetches import Fetches
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.match import FIRST_LOWER, Survey
from kvstore.plan.records import HOST, LeaseState, LoadLease, Request, SlotPages
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.state import Block, Load, Page, PageState
from kvstore.plan.steps import STEP_BLOCKS, STEP_PAGES, Steps, parts

READY = PageState.READY


@dataclass(slots=True)
class Needed:
    """The pages that a resume needs, in path order: block index, page, source code, slot when it was held."""

    blocks: list[int] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def add(self, survey: Survey, path: Sequence[Block], starts: Sequence[int], blocks: range) -> None:
        """Add what is needed of some blocks; `path` ends with the last of them. starts: first block, by group.

        A state is needed of the very last block only, so before it the groups of its pieces are left out.
        """
        before = starts[: len(starts) - survey.num_states] if survey.num_states else starts
        path = path[len(path) - len(blocks) :]
        num_before = len(self.pages)
        if len(starts) == 1:
            self.blocks += blocks
            self.pages += [block.pages[0] for block in path]
            self.codes += survey.sources[0][blocks.start : blocks.stop]
        else:
            for index, block in zip(blocks, path, strict=True):
                for group, start in enumerate(starts if index >= starts[-1] else before):
                    if index >= start:
                        self.blocks.append(index)
                        self.pages.append(block.pages[group])
                        self.codes.append(survey.source(index, group))
        self.slots += [page.slot for page in self.pages[num_before:]]


class Loader:
    """Load leases. Under the store's lock.

    hit_blocks:    blocks that were loaded, by the tier they came from.
    seconds_saved: by loading instead of computing, in all loads so far.
    """

    def __init__(self, books: Books, lookups: PrefixLookup, fetches: Fetches) -> None:
        self.loads: dict[int, Load] = {}
        self.num_loads = 0
        self.hit_blocks = {HOST: 0} | {tier.plan.name: 0 for tier in books.tiers}
        self.seconds_saved = 0.0
        self._lookups = lookups
        self._fetches = fetches
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._costs = books.costs
        self._windows = books.windows
        self._block_size = books.layout.block_size

    def preparing(
        self, lease_id: int, request: Request, num_blocks: int, now: float, owner: str, first: int = 0
    ) -> Steps[Load]:
        """Make a load lease over as many of the first `num_blocks` blocks as are stored and find room.

        first: blocks before it are in the engine already: they count as present and get no page.
        """
        load = Load(lease_id, request, 0, [], [], [], (), owner, now, waiting=1, is_preparing=True)
        self.loads[lease_id] = load
        survey = self._lookups.survey(request)
        limit = min(num_blocks, survey.known)
        while True:
            granted = longest_resume(survey.sources, self._windows, limit)
            cut = yield from self._hold(load, survey, granted, first, now)
            if cut is None or not self._is_open(load):
                break
            # Not all can be had: give back, and try for what ends before the first page without a slot.
            while not self._let_go_part(load, used=False):
                yield
            load.lost.clear()
            self._prune_tail(request, granted)
            limit = cut
        if self._is_open(load):
            load.num_blocks, load.first = granted, min(first, granted)
            load.sources = self._sources(survey, granted)
            load.is_preparing = False
            load.waiting -= 1
            self.num_loads += 1
            self._fetches.note_progress(load, now)
        return load

    def close(self, lease_id: int, now: float, *, is_well: bool) -> None:
        """A load ends from now on: `end` until it is over. Of no effect if its end has begun, or there is none.

        is_well: its pages were used.
        """
        load = self.loads.get(lease_id)
        if load is None or load.state is LeaseState.CLOSED:
            return
        if is_well:
            usable = load.usable_blocks(self._windows)
            for name, num_blocks in Counter(load.sources[load.first : usable]).items():
                self.hit_blocks[name] += num_blocks
            load.is_used = usable > 0
        load.state = LeaseState.CLOSED
        if is_well:
            self._note_use(load, now)

    def end(self, load: Load, now: float) -> Steps[None]:
        """Carry on with the end of a load (see `close`) until it is over."""
        loads = self.loads
        choosy = [tier for tier in self._tiers if tier.plan.admit == "second_use"] if load.is_used else []
        while choosy and load.num_owed < len(load.pages):
            pages = load.pages[load.num_owed : load.num_owed + STEP_PAGES]
            load.num_owed += len(pages)
            used = [page for page in pages if page.state == PageState.READY and page not in load.lost]
            for tier in choosy:
                tier.owe(used, used=True)
                tier.pump(now)
            if load.num_owed < len(load.pages):
                yield
                if load.id not in loads:
                    return
        while not self._let_go(load):
            yield
            if load.id not in loads:
                return

    def add_tier(self, name: str) -> None:
        """One more lower tier; the list of tiers is the planner's."""
        self.hit_blocks[name] = 0

    def _hold(self, load: Load, survey: Survey, granted: int, first: int, now: float) -> Steps[int | None]:
        """Hold every page that a resume after `granted` blocks needs, those in the engine (before `first`) excepted.

        Returns the block before which to cut if not all can be had; None if all is well, or the lease has ended.
        """
        starts = [max(first, needed_from(granted, window)) for window in self._windows]
        low = min(starts)
        needed, absent = Needed(), list[int]()
        above: Block | None = None
        at = 0
        while at < granted:
            if at:
                yield
                if load.state is LeaseState.CLOSED:
                    return None
                if above is not None and above.is_removed:
                    above = None  # what came before has left meanwhile: find the way anew
            end = min(max(at, low) + STEP_PAGES, granted)
            num_known = 0 if above is None else above.depth + 1
            path = self._lookups.insert_from(load.request, above, end)
            if num_known + len(path) < end:
                return num_known + len(path)  # a hash collides
            num_before, above = len(needed.pages), path[-1]
            if survey.num_states and end == granted:
                self._catalog.make_states(path[-1:])  # they may be somewhere that every lookup asks
            needed.add(survey, path, starts, range(max(at, low), end))
            fresh = needed.pages[num_before:]
            if all([page.state is READY for page in fresh]):
                self._host.pin(fresh)
                load.pages += fresh
            else:
                cut, missing = self._take(load, needed, range(num_before, len(needed.pages)))
                if cut is not None:
                    return cut
                absent += missing
            at = end
        is_long = granted - low > STEP_BLOCKS
        for part in parts(absent, STEP_BLOCKS) if absent else ():
            if is_long and part:
                yield
                if load.state is LeaseState.CLOSED:
                    return None
                cut, part = self._take(load, needed, part)
                if cut is not None:
                    return cut
            cut = self._reserve(load, needed, part, granted)
            if cut is not None:
                return cut
        for part in parts(absent, STEP_BLOCKS) if absent else ():
            if is_long and part:
                yield
                if load.state is LeaseState.CLOSED:
                    return None
            unsent = [index for index in part if needed.pages[index] in load.reserved]
            pages = [needed.pages[index] for index in unsent]
            self._fetches.fetch(pages, [needed.codes[index] for index in unsent], now)
            load.reserved.difference_update(pages)
        load.pages, load.blocks, load.slots = needed.pages, needed.blocks, needed.slots
        return None

    def _take(self, load: Load, needed: Needed, indexes: Sequence[int]) -> tuple[int | None, Sequence[int]]:
        """Pin those of some pages that are in host memory, and join the fetches of others.

        Returns the block before which to cut if one can be had from nowhere, and the indexes of the absent ones.
        """
        ready: list[int] = []
        joined: list[int] = []
        absent: list[int] = []
        for index in indexes:
            page = needed.pages[index]
            state = page.state
            if page.block.is_removed:
                return needed.blocks[index], ()
            if state is READY:
                ready.append(index)
            elif state is PageState.ABSENT:
                if needed.codes[index] < FIRST_LOWER:  # it has left since the walk
                    needed.codes[index] = self._fetches.elsewhere(page)
                    if not needed.codes[index]:
                        return needed.blocks[index], ()
                absent.append(index)
            elif page.flight:
                joined.append(index)
            else:
                return needed.blocks[index], ()  # somebody saves it just now
        held = [needed.pages[index] for index in ready]
        self._host.pin(held)
        load.pages += held
        if joined:
            pages = [needed.pages[index] for index in joined]
            self._fetches.join(load, pages)
            load.pages += pages
        for index in (*ready, *joined):
            needed.slots[index] = needed.pages[index].slot
        return None, absent

    def _reserve(self, load: Load, needed: Needed, indexes: Sequence[int], granted: int) -> int | None:
        """Take slots for absent pages; returns the block before which to cut if there is no room for all."""
        wanted = [needed.pages[index] for index in indexes]
        slots = self._host.take_for(wanted, load.request.keys[:granted])
        held = wanted[: len(slots)]
        for index, slot in zip(indexes, slots, strict=False):
            needed.slots[index] = slot
        for page in held:
            page.waiters = [load]
        load.waiting += len(held)
        load.reserved.update(held)
        load.pages += held
        return None if len(slots) == len(wanted) else needed.blocks[indexes[len(slots)]]

    def _is_open(self, load: Load) -> bool:
        return load.state is not LeaseState.CLOSED and load.id in self.loads

    def _sources(self, survey: Survey, granted: int) -> list[str]:
        worth, survey.worth = survey.worth, granted
        names = survey.block_sources(self._lookups.names, self._windows)
        survey.worth = worth
        return names

    def _note_use(self, load: Load, now: float) -> None:
        """Count a load with the block that it ends with, and the time that it saved."""
        for page in reversed(load.pages):
            if page.state == PageState.READY and page not in load.lost:
                page.block.num_loads += 1
                page.block.loaded_at = now
                break
        rate = self._costs.prefill_tokens_per_s
        if rate and not load.lost:
            computing = load.num_blocks * self._block_size / rate
            self.seconds_saved += computing - max(0.0, load.ready_at - load.started_at)

    def _let_go(self, load: Load) -> bool:
        """Unpin the last pages of a load that is closed; True at its end."""
        if not self._let_go_part(load, used=load.is_used):
            return False
        if load.is_preparing:
            self._prune_tail(load.request, len(load.request.keys))
        self.loads.pop(load.id, None)
        return True

    def _let_go_part(self, load: Load, *, used: bool) -> bool:
        """Unpin the last pages that a load holds, in whatever way; True when it holds no more. Tail first."""
        pages = load.pages[-STEP_PAGES:]
        del load.pages[-STEP_PAGES:]
        kept = pages if not load.lost else [page for page in pages if page not in load.lost]
        held = [page for page in kept if page.state == PageState.READY]
        if len(held) < len(kept):
            for page in kept:
                if page.state != PageState.READY and page.waiters is not None:
                    page.waiters.remove(load)
                    load.waiting -= 1
            unsent = [page for page in kept if page in load.reserved]
            load.reserved.difference_update(unsent)
            self._host.abandon(unsent)
            for page in reversed(unsent):
                self._catalog.prune(page.block)
        self._host.unpin(held, used=used)
        return not load.pages

    def _prune_tail(self, request: Request, end: int) -> None:
        """Forget the blocks that were made known for pages which are not brought."""
        path = self._catalog.match(request.keys[:end])
        if path:
            self._catalog.prune(path[-1])


def load_lease(load: Load, block_size: int) -> LoadLease:
    """The public face of a load that was prepared. Not under the lock: nothing of what it reads changes any more."""
    if not load.num_blocks:
        return LoadLease(load.id, 0, 0)
    return LoadLease(
        load.id,
        load.num_blocks,
        load.num_blocks * block_size,
        SlotPages(load.blocks, [page.group for page in load.pages], load.slots),
        dict(Counter(load.sources[load.first :])),
    )

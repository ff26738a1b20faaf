"""How a load comes to hold its pages: all that is in host memory is pinned, then room is made, then fetches are sent.

In steps. Between two of them pages may leave, come, or be forgotten, so each is looked at again when its turn comes.
Where one cannot be had any more, or finds no slot, the load is cut before its block.

The hard thing: what a load holds must be in its books at every yield, and nothing else. `Load.pages` therefore grows
as pages are held, in the order in which that happens, and is put in path order at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.plan.host import HostSpace
from kvstore.plan.lookup import Scout
from kvstore.plan.match import FIRST_LOWER, Survey
from kvstore.plan.records import LeaseState
from kvstore.plan.resume import needed_from
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
        """Add what is needed of some blocks; `path` ends with the last of them. starts: first block, by group."""
        path = path[len(path) - len(blocks) :]
        num_before = len(self.pages)
        if len(starts) == 1:
            self.blocks += blocks
            self.pages += [block.pages[0] for block in path]
            self.codes += survey.sources[0][blocks.start : blocks.stop]
        else:
            for index, block in zip(blocks, path, strict=True):
                for group, start in enumerate(starts):
                    if index >= start:
                        self.blocks.append(index)
                        self.pages.append(block.pages[group])
                        self.codes.append(survey.source(index, group))
        self.slots += [page.slot for page in self.pages[num_before:]]


class Holder:
    """Has loads hold their pages. Under the store's lock.

    join:      has a load wait for pages that others have fetched.
    elsewhere: source code of a tier that has a page; 0 if there is none.
    fetch:     sends fetches of pages from their sources.
    """

    def __init__(
        self,
        host: HostSpace,
        scout: Scout,
        windows: Sequence[int | None],
        join: Callable[[Load, Sequence[Page]], None],
        elsewhere: Callable[[Page], int],
        fetch: Callable[[Sequence[Page], Sequence[int], float], object],
    ) -> None:
        self._host = host
        self._scout = scout
        self._windows = windows
        self._join = join
        self._elsewhere = elsewhere
        self._fetch = fetch

    def hold(self, load: Load, survey: Survey, granted: int, first: int, now: float) -> Steps[int | None]:
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
            path = self._scout.insert_from(load.request, above, end)
            if num_known + len(path) < end:
                return num_known + len(path)  # a hash collides
            num_before, above = len(needed.pages), path[-1]
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
        for part in parts(absent, STEP_BLOCKS):
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
        for part in parts(absent, STEP_BLOCKS):
            if is_long and part:
                yield
                if load.state is LeaseState.CLOSED:
                    return None
            unsent = [index for index in part if needed.pages[index] in load.reserved]
            pages = [needed.pages[index] for index in unsent]
            self._fetch(pages, [needed.codes[index] for index in unsent], now)
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
                    needed.codes[index] = self._elsewhere(page)
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
            self._join(load, pages)
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

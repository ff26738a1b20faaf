"""Saves: slots handed out to be filled, and pages published when they are.

A save never waits and never fails: what host memory has already is not asked for again, and where no slot is free
and nothing can be evicted, or nothing that is worth less, the rest of the prompt is skipped and counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from itertools import compress

from eviction.policy import Ending
from kvstore.plan.books import Books
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.margin import Margin
from kvstore.plan.records import Request, SaveLease, SlotPages
from kvstore.plan.retention import Retention
from kvstore.plan.single_flight import SingleFlight
from kvstore.plan.state import Block, Page, PageState, Save
from kvstore.plan.steps import STEP_BLOCKS, STEP_PAGES, Steps


class Saver:
    """Save leases. Under the store's lock."""

    def __init__(
        self,
        books: Books,
        lookups: PrefixLookup,
        single_flight: SingleFlight,
        retention: Retention,
        margin: Margin,
    ) -> None:
        self.saves: dict[int, Save] = {}
        self.counters = {
            "saves": 0,
            "saved_pages": 0,
            "skipped_saves": 0,
            "dedup_saves": 0,
            "aborted_saves": 0,
        }
        self._lookups = lookups
        self._single_flight = single_flight
        self._retention = retention
        self._margin = margin
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._finishing: dict[int, Ending] = {}  # requests that ended while they were being saved

    def preparing(
        self,
        lease_id: int,
        request: Request,
        first: int,
        num_blocks: int,
        owner: str,
        states: Collection[int] = (),
    ) -> Steps[SaveLease]:
        """Make a save lease over the pages of blocks [first, first + num_blocks) that host memory does not have.

        states: the blocks among them whose states are saved, too; each has slots for all of its pieces or for none.

        The lease is there from the first step on. Once there is no room, what is left is only counted.
        """
        self.counters["saves"] += 1
        states = frozenset(states)
        save = self.saves[lease_id] = Save(lease_id, request, [], owner)
        first, last = max(0, first), min(first + num_blocks, len(request.keys))
        at = 0 if first < last else last  # blocks before it are done
        above: Block | None = None
        is_cut, skipped = False, 0
        blocks, groups, slots = array("q"), array("q"), array("q")  # grown step by step: turning lists takes its time
        while at < last:
            # Blocks before the first are only made known: as quick as a hundredth of the work on the others.
            end = min(max(at, first) + STEP_BLOCKS, last)
            if self._host.is_late and not is_cut:  # pages past their deadline would count as stored
                known = self._lookups.known_path(request)[at:end]
                self._host.expire_of([page for block in known for page in block.pages], None)
            if above is not None and above.is_removed:
                at, above = 0, None  # what came before has left meanwhile: find the way anew
            if not is_cut:
                num_before = len(save.pages)
                added, num_skipped, above = self._extend(save, above, max(at, first), end, states)
                blocks.extend(added)
                groups.extend([page.group for page in save.pages[num_before:]])
                slots.extend([page.slot for page in save.pages[num_before:]])
                skipped += num_skipped
                is_cut = above is None
            else:
                skipped += self._count_absent(request, at, end)
            at = end
            if at < last:
                yield
                if save.is_ending or save.id not in self.saves:  # its owner died meanwhile
                    return SaveLease(save.id, skipped=skipped)
        self.counters["skipped_saves"] += skipped
        return SaveLease(save.id, SlotPages(blocks, groups, slots), skipped)

    def close(self, lease_id: int, filled: Sequence[bool] | None) -> Save | None:
        """A save ends from now on: `end` until it is over. None if there is none.

        filled: which pages are whole, one entry per page of the lease; None means all. Raises ValueError, and ends
                nothing, if it has another length. Of no effect once the end has begun.
        """
        save = self.saves.get(lease_id)
        if save is None or save.is_ending:
            return save
        if filled is not None and len(filled) != len(save.pages):
            raise ValueError(f"filled has {len(filled)} entries, the lease has {len(save.pages)} pages")
        save.filled, save.num_pages, save.is_ending = filled, len(save.pages), True
        return save

    def drop(self, lease_id: int) -> Save | None:
        """The same, and nothing of it is published."""
        save = self.saves.get(lease_id)
        if save is not None and not save.is_ending:
            self.close(lease_id, [False] * len(save.pages))
            save.num_published = save.num_pages
        return save

    def end(self, save: Save, now: float) -> Steps[None]:
        """Carry on with the end of a save (see `close`) until it is over."""
        while save.num_published < save.num_pages:
            self._publish(save, now)
            if save.num_pages > STEP_PAGES:
                yield
                if save.id not in self.saves:
                    return  # somebody else has carried it on
        while not self._let_go(save):
            yield
            if save.id not in self.saves:
                return
        request = save.request
        if not self._catalog.num_groups:  # a block without a state has nothing that could leave, and take it along
            self._catalog.prune(next(reversed(self._lookups.known_path(request)), None))
        if save.num_whole < save.num_pages:
            self._single_flight.end(request, now)
        for tier in self._tiers:
            tier.pump(now)
        self._margin.keep(now)
        ending = self._finishing.get(request.id)
        if ending is not None:
            if not self._is_saving(request):
                self._finishing.pop(request.id, None)
                self._single_flight.end(request, now)
            yield from self._retention.ending(self._lookups.known_path(request), request, ending, now)

    def finished(self, request: Request, ending: Ending, now: float) -> None:
        """A request is over: nobody waits any longer for what it computes, unless that is still being saved."""
        if self._is_saving(request):
            self._finishing[request.id] = ending
        else:
            self._single_flight.end(request, now)

    def _extend(
        self, save: Save, above: Block | None, first: int, end: int, states: Collection[int]
    ) -> tuple[list[int], int, Block | None]:
        """Add to a save what host memory does not have of blocks [first, end), as far as there are slots.

        above: the block before the first that is not made known yet. Returns the blocks of the pages that were
        added, how many found no slot, and the last block, None if there is nothing behind which more could come.
        """
        request = save.request
        begin = 0 if above is None else above.depth + 1
        path = self._lookups.insert_from(request, above, end)
        num_groups = self._catalog.num_groups
        self._catalog.make_states([path[at - begin] for at in states if max(first, begin) <= at < begin + len(path)])
        wanted: list[Page] = []
        blocks: list[int] = []
        num_pages = 0
        for index in range(max(first, begin), begin + len(path)):
            pages = path[index - begin].pages
            for page in pages if len(pages) == num_groups or index in states else pages[:num_groups]:
                num_pages += 1
                if page.state == PageState.ABSENT:
                    wanted.append(page)
                    blocks.append(index)
        self.counters["dedup_saves"] += num_pages - len(wanted)
        # What host memory refuses no tier below would see: there it takes all.
        slots = self._host.take_for(wanted, request.keys) if self._tiers else self._host.take_worthy(wanted, request)
        if len(slots) < len(wanted) and wanted[len(slots)].group > num_groups:  # a state of which there is a piece
            num_whole = self._num_whole(wanted, len(slots), blocks)
            self._host.abandon(wanted[num_whole : len(slots)])
            slots = slots[:num_whole]
        save.pages += wanted[: len(slots)]
        skipped = len(wanted) - len(slots)
        if skipped:
            self._catalog.prune(path[-1])
        is_cut = skipped or begin + len(path) < end  # no room, or a hash collides
        return blocks[: len(slots)], skipped, None if is_cut or not path else path[-1]

    def _num_whole(self, wanted: Sequence[Page], num_slots: int, blocks: Sequence[int]) -> int:
        """How many of the pages that found a slot are before the state that found none for all of its pieces."""
        block, num_groups = blocks[num_slots], self._catalog.num_groups
        while num_slots and blocks[num_slots - 1] == block and wanted[num_slots - 1].group >= num_groups:
            num_slots -= 1
        return num_slots

    def _count_absent(self, request: Request, first: int, end: int) -> int:
        """How many pages of blocks [first, end) host memory does not have. O(end - first)."""
        num_absent, num_groups = 0, self._catalog.num_groups
        for key in request.keys[first:end]:
            block = self._catalog.tree.get(key)
            if block is None:
                return num_absent + (end - first) * num_groups
            num_absent += sum(page.state == PageState.ABSENT for page in block.pages)
            first += 1
        return num_absent

    def _publish(self, save: Save, now: float) -> None:
        request = save.request
        whole = self._make_ready(save)
        blocks = list(dict.fromkeys(page.block for page in whole))
        self._retention.note_session(blocks, request)
        self._retention.promise(blocks, request)
        self._single_flight.published((block.key for block in blocks), now)
        for tier in self._tiers:
            tier.owe(whole, used=False, is_saved=True)
            tier.pump(now)

    def _make_ready(self, save: Save) -> list[Page]:
        """Publish the next pages of a save, and hold them; returns those that are whole."""
        start = save.num_published
        pages = save.pages[start : start + STEP_PAGES]
        save.num_published += len(pages)
        if save.filled is not None:
            pages = list(compress(pages, save.filled[start : start + STEP_PAGES]))
        whole = [page for page in pages if not page.block.is_removed]
        self._host.ready(whole)
        for page in whole:
            page.pins = 1
        save.num_whole += len(whole)
        return whole

    def _let_go(self, save: Save) -> bool:
        """Unpin the last pages of a save that is published, and drop those that are not whole; True at its end."""
        pages = save.pages[-STEP_PAGES:]
        del save.pages[-STEP_PAGES:]
        held = [page for page in pages if page.state == PageState.READY]
        self._host.unpin(held, used=False)
        if len(held) < len(pages):
            lost = [page for page in pages if page.state == PageState.FILLING]
            self._host.abandon(lost)
            self.counters["aborted_saves"] += len(lost)
            for page in reversed(pages):
                self._catalog.prune(page.block)
        if save.pages:
            return False
        del self.saves[save.id]
        self.counters["saved_pages"] += save.num_whole
        return True

    def _is_saving(self, request: Request) -> bool:
        """True while a save of the request is open."""
        return any(save.request is request for save in self.saves.values())

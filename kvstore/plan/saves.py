"""Saves: slots handed out to be filled, and pages published when they are.

A save never waits and never fails: what host memory has already is not asked for again, and where no slot is free
and nothing can be evicted, the rest of the prompt is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from kvstore.plan.catalog import Block, Catalog, Page, PageState
from kvstore.plan.host import HostSpace
from kvstore.plan.leases import Save, slot_pages
from kvstore.plan.lookup import Scout
from kvstore.plan.records import Request, SaveLease

STEP_BLOCKS = 512  # of a save that is being prepared: about 4 ms where each costs 8 us


class Saver:
    """Save leases. Under the store's lock."""

    def __init__(self, host: HostSpace, catalog: Catalog, scout: Scout) -> None:
        self.saves: dict[int, Save] = {}
        self.counters = {
            "saves": 0,
            "saved_pages": 0,
            "skipped_saves": 0,
            "dedup_saves": 0,
            "aborted_saves": 0,
        }
        self._host = host
        self._catalog = catalog
        self._scout = scout

    def prepare(self, lease_id: int, request: Request, first: int, num_blocks: int, owner: str) -> SaveLease:
        """Make a save lease over the pages of blocks [first, first + num_blocks) that host memory does not have."""
        steps = self.preparing(lease_id, request, first, num_blocks, owner)
        while (lease := steps.step()) is None:
            pass
        return lease

    def preparing(self, lease_id: int, request: Request, first: int, num_blocks: int, owner: str) -> Preparing:
        """The same in steps."""
        self.counters["saves"] += 1
        save = self.saves[lease_id] = Save(lease_id, request, [], owner)
        return Preparing(self, save, max(0, first), min(first + num_blocks, len(request.keys)))

    def extend(self, save: Save, above: Block | None, first: int, end: int) -> tuple[list[int], int, Block | None]:
        """Add to a save what host memory does not have of blocks [first, end), as far as there are slots.

        above: the block before the first that is not made known yet. Returns the blocks of the pages that were added,
        how many found no slot, and the last block, None if there is nothing behind which more could come.
        """
        request = save.request
        begin = 0 if above is None else above.depth + 1
        path = self._scout.insert_from(request, above, end)
        wanted: list[Page] = []
        blocks: list[int] = []
        num_pages = 0
        for index in range(max(first, begin), begin + len(path)):
            for page in path[index - begin].pages:
                num_pages += 1
                if page.state == PageState.ABSENT:
                    wanted.append(page)
                    blocks.append(index)
        self.counters["dedup_saves"] += num_pages - len(wanted)
        slots = self._host.take_for(wanted, request.keys)
        save.pages += wanted[: len(slots)]
        skipped = len(wanted) - len(slots)
        if skipped:
            self._catalog.prune(path[-1])
        is_cut = skipped or begin + len(path) < end  # no room, or a hash collides
        return blocks[: len(slots)], skipped, None if is_cut or not path else path[-1]

    def count_absent(self, request: Request, first: int, end: int) -> int:
        """How many pages of blocks [first, end) host memory does not have. O(end - first)."""
        num_absent, num_groups = 0, self._catalog.num_groups
        for key in request.keys[first:end]:
            block = self._catalog.tree.get(key)
            if block is None:
                return num_absent + (end - first) * num_groups
            num_absent += sum(page.state == PageState.ABSENT for page in block.pages)
            first += 1
        return num_absent

    def end(self, lease_id: int, now: float, filled: Sequence[bool] | None) -> tuple[Save, list[Page]] | None:
        """End a save: the lease and the pages that are published now; None if there is no such save.

        filled: which pages are whole, one entry per page of the lease; None means all. Raises ValueError, and ends
                nothing, if it has another length.
        """
        save = self.saves.get(lease_id)
        if save is None:
            return None
        if filled is not None and len(filled) != len(save.pages):
            raise ValueError(f"filled has {len(filled)} entries, the lease has {len(save.pages)} pages")
        del self.saves[lease_id]
        pages = save.pages if filled is None else list(compress(save.pages, filled))
        whole = [page for page in pages if not page.block.is_removed]
        self._host.ready(whole)
        self._host.enter(whole, used=False)
        if len(whole) < len(save.pages):
            lost = [page for page in save.pages if page.state == PageState.FILLING]
            self._host.abandon(lost)
            self.counters["aborted_saves"] += len(lost)
            for page in reversed(save.pages):
                self._catalog.prune(page.block)
        self.counters["saved_pages"] += len(whole)
        return save, whole

    def drop(self, lease_id: int, now: float) -> tuple[Save, list[Page]] | None:
        """End a save of which nothing is published; None if there is no such save."""
        save = self.saves.get(lease_id)
        return None if save is None else self.end(lease_id, now, [False] * len(save.pages))

    def is_saving(self, request: Request) -> bool:
        """True while a save of the request is open."""
        return any(save.request is request for save in self.saves.values())


class Preparing:
    """A save that is being prepared, STEP_BLOCKS at a time: a long prompt must not keep others waiting.

    Between two steps the books are in order, and others may use the store; the lease is there from the beginning. Once
    there is no room, what is left is only counted.
    """

    def __init__(self, saver: Saver, save: Save, first: int, end: int) -> None:
        self.lease_id = save.id
        self._saver = saver
        self._save = save
        self._first = first
        self._at = 0 if first < end else end  # blocks before it are done
        self._end = end
        self._above: Block | None = None
        self._is_cut = False
        self._blocks: list[int] = []
        self._skipped = 0

    def step(self) -> SaveLease | None:
        """Go on; the lease when all is done. Under the store's lock."""
        saver, save = self._saver, self._save
        if save.id not in saver.saves:  # its owner died meanwhile
            return SaveLease(save.id, (), self._skipped)
        if self._at < self._end:
            # Blocks before the first are only made known: as quick as a hundredth of the work on the others.
            end = min(max(self._at, self._first) + STEP_BLOCKS, self._end)
            if self._above is not None and self._above.is_removed:
                self._at, self._above = 0, None  # what came before has left meanwhile: find the way anew
            if not self._is_cut:
                blocks, skipped, self._above = saver.extend(save, self._above, max(self._at, self._first), end)
                self._blocks += blocks
                self._skipped += skipped
                self._is_cut = self._above is None
            else:
                self._skipped += saver.count_absent(save.request, self._at, end)
            self._at = end
        if self._at < self._end:
            return None
        saver.counters["skipped_saves"] += self._skipped
        return SaveLease(save.id, slot_pages(self._blocks, save.pages), self._skipped)

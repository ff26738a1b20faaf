"""Saves: slots handed out to be filled, and pages published when they are.

A save never waits and never fails: what host memory has already is not asked for again, and where no slot is free
and nothing can be evicted, the rest of the prompt is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.plan.catalog import Catalog, Page, PageState
from kvstore.plan.hostspace import HostSpace
from kvstore.plan.leases import Save, slot_pages
from kvstore.plan.records import Request, SaveLease
from kvstore.plan.scout import Scout


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
        end = min(first + num_blocks, len(request.keys))
        first = max(0, first)
        save = Save(lease_id, request, [], owner)
        blocks: list[int] = []
        skipped = 0
        if first < end:
            path = self._scout.insert(request, end)
            wanted: list[Page] = []
            num_pages = 0
            for index in range(first, len(path)):
                for page in path[index].pages:
                    num_pages += 1
                    if page.state == PageState.ABSENT:
                        wanted.append(page)
                        blocks.append(index)
            self.counters["dedup_saves"] += num_pages - len(wanted)
            slots = self._host.take_for(wanted, path)
            skipped = len(wanted) - len(slots)
            save.pages = wanted[: len(slots)]
            del blocks[len(slots) :]
            if skipped:
                self.counters["skipped_saves"] += skipped
                self._catalog.prune(path[-1])
        self.counters["saves"] += 1
        self.saves[save.id] = save
        return SaveLease(save.id, slot_pages(blocks, save.pages), skipped)

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
        whole: list[Page] = []
        for index, page in enumerate(save.pages):
            if (filled is None or filled[index]) and not page.block.is_removed:
                self._host.ready(page)
                whole.append(page)
            else:
                self._host.abandon(page)
                self.counters["aborted_saves"] += 1
        self._host.enter(whole, used=False)
        if len(whole) < len(save.pages):
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

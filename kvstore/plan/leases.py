"""The planner's record of a lease while its holder copies.

A lease is the promise at the boundary: the slots it names stay what they are until it ends. It ends by complete or
release, whichever comes first; a second end is ignored, so that clean-up code may always release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.plan.catalog import Page, PageState
from kvstore.plan.records import LeaseState, LoadLease, Request, SlotPage
from kvstore.plan.resume import longest_resume


@dataclass(slots=True, eq=False)
class Load:
    """A load lease.

    pages:   parallel to the SlotPages of the public lease, in path order.
    sources: tier name of each block's first group.
    first:   the blocks before it are in the engine's own memory.
    waiting: pages whose fetch is not over.
    lost:    pages that failed to load: they are in no slot and hold no pin.
    slots:   parallel to pages, as they were when the lease was made.
    reserved: pages with a slot whose fetch is not sent yet; only while the load is being prepared.
    is_preparing: its caller has not heard of it yet; that counts as one page in `waiting`.
    is_used: of a load that is ending (CLOSED; `pages` are those not let go yet): its pages were used.
    num_owed: of a load that is ending: pages that tiers which admit on second use were told of.
    """

    id: int
    request: Request
    num_blocks: int
    pages: list[Page]
    blocks: Sequence[int]
    slots: Sequence[int]
    sources: Sequence[str]
    owner: str
    started_at: float
    waiting: int = 0
    lost: set[Page] = field(default_factory=set)
    ready_at: float = 0.0
    state: LeaseState = LeaseState.WAITING
    first: int = 0
    reserved: set[Page] = field(default_factory=set)
    is_preparing: bool = False
    is_used: bool = False
    num_owed: int = 0

    def usable_blocks(self, windows: Sequence[int | None]) -> int:
        """Blocks that can be resumed from with the pages that are ready now."""
        if not self.waiting and not self.lost:
            return self.num_blocks
        ahead = bytes([1]) * self.first
        present = [bytearray(ahead.ljust(self.num_blocks, b"\0")) for _ in windows]
        for block, page in zip(self.blocks, self.pages, strict=True):
            if page not in self.lost and page.state == PageState.READY:
                present[page.group][block] = 1
        return longest_resume(present, windows, self.num_blocks)


@dataclass(slots=True, eq=False)
class Save:
    """A save lease: filling pages, one per SlotPage of the public lease.

    It ends in two passes: first to last, pages are published and held; last to first, they are let go. `pages` are
    those that are not let go yet.

    filled:        which pages are whole; None means all.
    num_pages:     of the lease, when its end began.
    num_published: pages that the first pass is past. num_whole: of these, the ones that were published.
    """

    id: int
    request: Request
    pages: list[Page]
    owner: str
    is_ending: bool = False
    filled: Sequence[bool] | None = None
    num_pages: int = 0
    num_published: int = 0
    num_whole: int = 0


def load_lease(load: Load, block_size: int) -> LoadLease:
    """The public face of a load that was prepared. Not under the lock: nothing of what it reads changes any more."""
    if not load.num_blocks:
        return LoadLease(load.id, 0, 0, ())
    return LoadLease(
        load.id,
        load.num_blocks,
        load.num_blocks * block_size,
        tuple(slot_pages(load.blocks, load.pages, load.slots)),
        dict(Counter(load.sources[load.first :])),
    )


def slot_pages(blocks: Iterable[int], pages: Iterable[Page], slots: Iterable[int]) -> list[SlotPage]:
    """The public face of planner pages."""
    return list(map(SlotPage, blocks, [page.group for page in pages], slots))

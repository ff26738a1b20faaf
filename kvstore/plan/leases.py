"""What the planner remembers of a lease while its holder copies.

A lease is the promise at the boundary: the slots it names stay what they are until it ends. It ends by complete or
release, whichever comes first; a second end is ignored, so that clean-up code may always release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.plan.catalog import Page, PageState
from kvstore.plan.records import LeaseState, Request, SlotPage
from kvstore.plan.resume import longest_resume


@dataclass(slots=True, eq=False)
class Load:
    """A load lease.

    pages:   parallel to the SlotPages of the public lease, in path order.
    sources: tier name of each block's first group.
    first:   the blocks before it are in the engine's own memory.
    waiting: pages whose fetch is not over.
    lost:    pages that failed to load: they are in no slot and hold no pin.
    """

    id: int
    request: Request
    num_blocks: int
    pages: list[Page]
    blocks: list[int]
    sources: Sequence[str]
    owner: str
    started_at: float
    waiting: int = 0
    lost: set[Page] = field(default_factory=set)
    ready_at: float = 0.0
    state: LeaseState = LeaseState.WAITING
    first: int = 0

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
    """A save lease: filling pages, one per SlotPage of the public lease."""

    id: int
    request: Request
    pages: list[Page]
    owner: str


def slot_pages(blocks: Sequence[int], pages: Sequence[Page]) -> tuple[SlotPage, ...]:
    """The public face of planner pages."""
    return tuple([SlotPage(block, page.group, page.slot) for block, page in zip(blocks, pages, strict=True)])

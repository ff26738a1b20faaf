"""The mutable records of the planner: blocks and their pages, load and save leases while their holders copy.

    Block   one node of the prefix tree: its hash, its parent, what its sender said about retention
    Page    one layer group of a block: host slot and state, the lower tiers that have a copy, who holds it
    Load    a load lease: the pages that it holds, and those that it waits for
    Save    a save lease: the pages that its holder fills

A lease is the promise at the boundary: the slots it names stay what they are until it ends. It ends by complete or
release, whichever comes first; a second end is ignored, so that clean-up code may always release.

The four name each other (a page names the loads that wait for it), so they are one file. They do nothing by themselves:
the catalog, host memory, loads and saves change them. Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from eviction.policy import NO_HINT, Hint
from kvstore.page import PageKey, PageMeta, page_key
from kvstore.plan.records import LeaseState, Request
from kvstore.plan.resume import longest_resume
from radix.hashing import BlockHash

NEVER = float("-inf")
SHARED_SESSION = "\0shared"  # a block that more than one session has used; no session name starts with NUL


class PageState(IntEnum):
    """The state of a page in host memory."""

    ABSENT = 0
    FILLING = 1  # a fetch or a save lease is writing its slot
    READY = 2
    EXPIRED = 3  # it outlived its time to live while a tier reads its slot; it goes as soon as none does


class Page:
    """One layer group of one block. Mutable; belongs to the planner.

    homes:    bit set of lower tiers that hold a copy; spilling: those a copy is under way to. A page under way to
              a tier is not evicted from host memory.
    pins:     leases and promises that hold the host copy; a pinned page is held by its policy.
    flight:   number of the FETCH that fills the slot; 0 if none does (a save lease may).
    waiters:  load leases to be told when that fetch ends.
    """

    __slots__ = ("block", "flight", "group", "homes", "kept", "pins", "slot", "spilling", "state", "waiters")

    def __init__(self, block: Block, group: int) -> None:
        self.block = block
        self.group = group
        self.slot = -1
        self.state = PageState.ABSENT
        self.homes = 0
        self.spilling = 0
        self.flight = 0
        self.pins = 0
        self.kept = False
        self.waiters: list[Load] | None = None

    @property
    def key(self) -> PageKey:
        """The page's name in every tier."""
        return page_key(self.block.key, self.group)


class Block:
    """One known block of tokens.

    session:    name of the only session that used it, SHARED_SESSION after a second one came.
    left_s:     seconds that it lives from its last use on, where that is less than its time to live; else inf.
    touched_at: when the lower tiers were last told of a use (planner's clock).
    num_loads:  loads that ended with this block, or with one that continued it and was pruned since. So what was loaded
                through a block is a sum over all that continues it, and a load counts in one place.
    loaded_at:  when the last of them ended (planner's clock).
    is_removed: it was forgotten; what is still under way for it is dropped on arrival.
    pages:      one for each group that every block has; behind them the pieces of the state after this block, if there
                is or was one (`make_states`). Most blocks never have one, and are not to pay for its many pieces.
    """

    __slots__ = (
        "depth",
        "hint",
        "is_removed",
        "key",
        "left_s",
        "loaded_at",
        "num_loads",
        "pages",
        "parent",
        "session",
        "tokens",
        "touched_at",
    )

    def __init__(self, key: BlockHash, parent: Block | None, num_groups: int) -> None:
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        # A tuple, and no list of waiters yet: what the garbage collector need not walk may be kept by the million.
        self.pages = (Page(self, 0),) if num_groups == 1 else tuple(Page(self, group) for group in range(num_groups))
        self.hint: Hint = NO_HINT
        self.session = ""
        self.tokens = b""
        self.left_s = inf
        self.touched_at = NEVER
        self.num_loads = 0
        self.loaded_at = NEVER
        self.is_removed = False

    def make_states(self, num_groups: int) -> None:
        """Have a page for each of `num_groups` groups, those of a state too. Idempotent."""
        if len(self.pages) < num_groups and not self.is_removed:
            self.pages += tuple(Page(self, group) for group in range(len(self.pages), num_groups))

    def is_gone(self, homes_that_count: int) -> bool:
        """True if none of its pages is in host memory, on a tier of that bit set, or under way."""
        for page in self.pages:  # noqa: SIM110 - a generator costs 3x here, and every eviction asks
            if page.state or page.homes & homes_that_count or page.spilling:
                return False
        return True

    def meta(self, num_bytes: int, expires_at: float) -> PageMeta:
        """The metadata written beside a page of this block."""
        parent = b"" if self.parent is None else self.parent.key
        return PageMeta(num_bytes, parent, self.depth, expires_at, self.tokens)


def name_of(page: Page) -> BlockHash:
    """The name of a page in policies: it stays when the page is gone and comes back as another object."""
    return page.block.key


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

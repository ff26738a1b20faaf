"""A walk over everything that is stored, in small steps, for people who look.

The catalog of a big store has a million blocks, and looking at each takes longer than a lookup may wait. So a tour
visits a bounded number of blocks at a time, each time under the store's lock, and lets go of it between. What comes or
goes meanwhile is seen or not; whatever is told of a prefix was true at one moment of the tour.

    tour = Tour()
    while not store.admin.guide(tour, max_blocks=2048):
        ...                                # others use the store
    tour.prefixes                          # each after the one it continues
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.plan.books import Books
from kvstore.plan.records import HOST
from kvstore.plan.state import NEVER, Block, PageState
from radix.hashing import BlockHash


@dataclass(slots=True)
class Prefix:
    """Blocks that follow each other without a branch.

    depth:     blocks before it.
    pages:     of its blocks, by the tier that holds them; a page on two tiers counts in both.
    num_loads: loads that ended in it, not those that went through; loaded_at: the last, and touched_at: the last use
               that the lower tiers were told of; planner's clock, -inf for never.
    session:   the only session that used its last block; the planner's own words begin with NUL.
    """

    key: BlockHash
    parent: BlockHash | None
    depth: int
    num_blocks: int = 0
    num_children: int = 0
    pages: dict[str, int] = field(default_factory=dict)
    num_loads: int = 0
    loaded_at: float = NEVER
    touched_at: float = NEVER
    session: str = ""


class Tour:
    """One walk over the prefixes of a store."""

    def __init__(self, max_prefixes: int = 1 << 17) -> None:
        self.prefixes: list[Prefix] = []
        self.now = NEVER  # of the last step; ages are told from it
        self.is_cut = False  # there are more prefixes than max_prefixes
        self._max_prefixes = max_prefixes
        self._has_begun = False
        # (first block, the prefix above it): to be visited. A block without a place of its own continues `above`.
        self._ahead: list[tuple[BlockHash, Prefix | None]] = []
        self._half: Prefix | None = None  # was longer than a step

    def step(self, books: Books, max_blocks: int, now: float) -> bool:
        """Visit up to `max_blocks` blocks (at least a prefix or a part of one); True when nothing is left."""
        self.now = now
        tree = books.catalog.tree
        if not self._has_begun:
            self._has_begun = True
            self._ahead = [(key, None) for key in reversed(tree.children(None))]
        left = max_blocks
        while self._ahead and left > 0:
            key, above = self._ahead.pop()
            if key not in tree:  # gone since
                self._half = None
                continue
            if len(self.prefixes) >= self._max_prefixes and self._half is None:
                self.is_cut = True
                self._ahead.clear()
                return True
            stretch = tree.stretch(key, left)
            prefix, self._half = self._half, None
            if prefix is None:
                depth = 0 if above is None else above.depth + above.num_blocks
                prefix = Prefix(key, None if above is None else above.key, depth)
                self.prefixes.append(prefix)
            _look(books, prefix, stretch.values)
            left -= len(stretch.values) + len(stretch.children)
            if len(stretch.children) == 1:
                self._half = prefix
                self._ahead.append((stretch.children[0], above))
            else:
                prefix.num_children = len(stretch.children)
                self._ahead += [(child, prefix) for child in reversed(stretch.children)]
        return not self._ahead


def _look(books: Books, prefix: Prefix, blocks: list[Block]) -> None:
    """Add blocks to what is known of their prefix."""
    names = {0: HOST} | {tier.bit: tier.plan.name for tier in books.tiers}
    held = dict.fromkeys(names, 0)
    bits = [bit for bit in names if bit]
    ready = PageState.READY
    for block in blocks:
        for page in block.pages:
            if page.state == ready:
                held[0] += 1
            if page.homes:
                for bit in bits:
                    if page.homes & bit:
                        held[bit] += 1
        if block.num_loads:
            prefix.num_loads += block.num_loads
            prefix.loaded_at = max(prefix.loaded_at, block.loaded_at)
        prefix.touched_at = max(prefix.touched_at, block.touched_at)
    for bit, num_pages in held.items():
        prefix.pages[names[bit]] = prefix.pages.get(names[bit], 0) + num_pages
    prefix.num_blocks += len(blocks)
    prefix.session = blocks[-1].session

"""Which prefixes fill a directory: the stored blocks as a tree, and its biggest trunks.

A trunk is what all prompts below it share: the run of blocks from a root to the first fork or end. Pure; made for
`kvstore inspect`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.page import split_key
from kvstore.tiers.base import StoredPage


@dataclass(slots=True)
class _Block:
    """A stored block: its pages of all groups, and everything stored that continues it."""

    depth: int
    parent: bytes
    pages: int = 0
    num_bytes: int = 0
    below_pages: int = 0
    below_bytes: int = 0
    deepest: int = 0
    children: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trunk:
    """A shared beginning and what hangs on it.

    root:          block hash of its first block, hex.
    depth:         blocks before it; above 0, they are not stored here and it can be used only with another tier's help.
    shared_blocks: blocks all prompts below have in common.
    branches:      ways in which it goes on after them.
    longest:       blocks of the longest stored prompt through it, from the prompt's start.
    """

    root: str
    depth: int
    shared_blocks: int
    branches: int
    longest: int
    pages: int
    num_bytes: int


def find_trunks(stored: Iterable[StoredPage]) -> list[Trunk]:
    """All trunks of the stored pages, most bytes first."""
    blocks: dict[bytes, _Block] = {}
    for page in stored:
        block_hash, _, _ = split_key(page.key)
        block = blocks.setdefault(block_hash, _Block(page.meta.depth, page.meta.parent))
        block.pages += 1
        block.num_bytes += page.meta.num_bytes
    roots = []
    # Deepest first: a block's own sums are whole before they are added to its parent's.
    for block_hash, block in sorted(blocks.items(), key=lambda item: -item[1].depth):
        block.below_pages += block.pages
        block.below_bytes += block.num_bytes
        block.deepest = max(block.deepest, block.depth)
        parent = blocks.get(block.parent) if block.depth else None
        if parent is None or parent.depth >= block.depth:
            roots.append(block_hash)
            continue
        parent.children.append(block_hash)
        parent.below_pages += block.below_pages
        parent.below_bytes += block.below_bytes
        parent.deepest = max(parent.deepest, block.deepest)
    return sorted((_trunk(blocks, root) for root in roots), key=lambda trunk: -trunk.num_bytes)


def _trunk(blocks: dict[bytes, _Block], root: bytes) -> Trunk:
    first = last = blocks[root]
    shared = 1
    while len(last.children) == 1:
        last = blocks[last.children[0]]
        shared += 1
    return Trunk(
        root=root.hex(),
        depth=first.depth,
        shared_blocks=shared,
        branches=len(last.children),
        longest=first.deepest + 1,
        pages=first.below_pages,
        num_bytes=first.below_bytes,
    )

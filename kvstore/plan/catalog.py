"""The catalog of all blocks (state.py): which tiers hold their pages, and in which host slot.

The catalog keeps blocks in a radix tree, so that the longest known prefix is one walk. A block none of whose pages
is left anywhere is pruned, unless something continues it: then it stays as a *hole*, and lookups end there until
somebody computes it again.

A tier that every lookup asks (Redis) is no reason to remember a block: only as long as another tier has a page of it,
it is noted that Redis has one too. Otherwise the catalog would grow with everything that was ever saved.

Blocks and pages are not tracked by the garbage collector (radix/untracked.py), and a block and its pages name each
other. So a block that leaves is taken apart where nothing of it is left; else, as its pages are still in use, it is
tracked.

Pages found on disk before their parents (another process was still writing them) have no place in the tree yet. They
wait in `strays` and are adopted when their path is inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvstore.plan.journal import Journal
from kvstore.plan.state import Block, Page
from radix.hashing import BlockHash
from radix.ordered import OrderedMap
from radix.tree import RadixTree
from radix.untracked import track_with, untrack_with


class Catalog:
    """All known blocks, by path and by hash.

    num_groups:       pages that every block has.
    num_all_groups:   pages of a block with a state; the same where the layout has none.
    homes_that_count: bit set of the tiers for whose copies a block is remembered.
    on_prune:         told of every block that is forgotten because nothing of it is left there.
    """

    def __init__(self, num_groups: int, num_all_groups: int | None = None) -> None:
        self.num_groups = num_groups
        self.num_all_groups = num_groups if num_all_groups is None else num_all_groups
        self.homes_that_count = -1
        self.on_prune: Callable[[Block], None] = lambda block: None
        self.tree: RadixTree[Block] = RadixTree()
        self.strays: OrderedMap[BlockHash, Block] = OrderedMap()
        self.journal: Journal | None = None  # told what comes and goes, where anybody wants to know

    def match(self, path: Sequence[BlockHash]) -> list[Block]:
        """The blocks of the longest known prefix of `path`, holes included."""
        return self.tree.match(path)

    def insert(self, path: Sequence[BlockHash]) -> list[Block]:
        """Make every block of `path` known; return them all, root first."""
        blocks = self.tree.match(path)
        depth = len(blocks)
        if depth == len(path):
            return blocks
        parent = blocks[-1] if blocks else None
        for key in path[depth:]:
            block = self._adopt(key, parent) if self.strays else Block(key, parent, self.num_groups)
            blocks.append(block)
            parent = block
        new = blocks[depth:]
        self.tree.extend(path, depth, new)
        untrack_with(new, "pages")
        return blocks

    def insert_from(self, path: Sequence[BlockHash], above: Block | None, end: int) -> list[Block]:
        """Make the blocks of `path` from behind `above` up to `end` known; return those. O(answer).

        above: the block of the path before them, which is known; None to begin with the first.
        """
        depth = 0 if above is None else above.depth + 1
        blocks = self.tree.match_from(path, depth, end)
        at = depth + len(blocks)
        if at < end:
            parent = blocks[-1] if blocks else above
            first = parent
            new: list[Block] = []
            for key in path[at:end]:
                parent = self._adopt(key, parent) if self.strays else Block(key, parent, self.num_groups)
                new.append(parent)
            self.tree.attach(None if first is None else first.key, path[at:end], new)
            blocks += new
            untrack_with(new, "pages")
        return blocks

    def get(self, key: BlockHash) -> Block | None:
        """The block of `key`, stray or not."""
        return self.tree.get(key) or self.strays.get(key)

    def attach(self, key: BlockHash, parent_key: BlockHash | None, depth: int) -> Block:
        """Make one block known whose parent is given by hash; a stray if the parent is not known."""
        known = self.get(key)
        if known is not None:
            return known
        parent = None if parent_key is None else self.tree.get(parent_key)
        block = Block(key, parent, self.num_groups)
        untrack_with([block], "pages")
        if parent_key is not None and parent is None:
            block.depth = depth
            self.strays[key] = block
        else:
            self.tree.attach(parent_key, [key], [block])
        return block

    def adopt_on(self, path: Sequence[BlockHash]) -> None:
        """Give strays on a path their place: blocks between two states may have no page that told of them."""
        if self.strays:
            depth = next((at for at in range(len(path) - 1, -1, -1) if path[at] in self.strays), None)
            if depth is not None:
                self.insert(path[: depth + 1])

    def make_states(self, blocks: Sequence[Block]) -> None:
        """Give blocks the pages of a state, absent as yet."""
        new = [block for block in blocks if len(block.pages) < self.num_all_groups]
        for block in new:
            block.make_states(self.num_all_groups)
        untrack_with(new, "pages")

    def prune(self, block: Block | None) -> None:
        """Forget a block that is nowhere any more, and the holes above it that nothing continues."""
        while block is not None and not block.is_removed and block.is_gone(self.homes_that_count):
            if self.strays.pop(block.key, None) is None and not self.tree.prune(block.key):
                return
            block.is_removed = True
            self.on_prune(block)
            block.pages = ()  # takes the cycle apart
            above = block.parent
            if block.num_loads and above is not None:
                above.num_loads += block.num_loads
                above.loaded_at = max(above.loaded_at, block.loaded_at)
            block = above

    def trim(self, key: BlockHash, limit: int) -> list[Block]:
        """Forget up to `limit` blocks of this one and all that continues it, this one as the last; return them.

        Deepest first, since a block that is known needs all before it. Empty when nothing is left.
        """
        return [] if key in self.strays else self._forget(self.tree.trim(key, limit))

    def take_strays(self, keys: Sequence[BlockHash]) -> list[Block]:
        """Forget the strays among `keys`; return them."""
        found = [key for key in keys if key in self.strays] if self.strays else []
        return self._forget([self.strays.pop(key) for key in found])

    def _forget(self, removed: list[Block]) -> list[Block]:
        for block in removed:
            block.is_removed = True
        return removed

    def take_apart(self, removed: Sequence[Block]) -> None:
        """Blocks that were forgotten have left all books: what is still in use of them is for the collector to find."""
        used: list[Block] = []
        for block in removed:
            if block.is_gone(-1):
                block.pages = ()  # takes the cycle apart
            else:
                used.append(block)
        track_with(used, "pages")

    def blocks(self) -> list[Block]:
        """Every block that is known, in no order; also after an exception in the middle of a change."""
        return [*self.tree.values(), *self.strays.values()]

    def rebuild(self, blocks: Sequence[Block]) -> None:
        """Know exactly these blocks, given by depth. For the tree nothing is done if it has them, and is whole."""
        placed = {block.key for block in blocks if block.parent is not None or block.depth == 0}
        self.strays.clear()
        self.strays.update((block.key, block) for block in blocks if block.key not in placed)
        if self.tree.is_sound() and len(self.tree) == len(placed) and all(key in self.tree for key in placed):
            return
        self.tree.clear()
        for block in blocks:
            if block.key in placed:
                self.tree.attach(None if block.parent is None else block.parent.key, [block.key], [block])

    def pages(self) -> Iterator[Page]:
        """Every page that is known, in no order."""
        stack = list(self.tree.children(None))
        while stack:
            key = stack.pop()
            block = self.tree.get(key)
            assert block is not None
            yield from block.pages
            stack.extend(self.tree.children(key))
        for stray in self.strays.values():
            yield from stray.pages

    def __del__(self) -> None:
        for block in self.blocks():
            block.pages = ()

    def _adopt(self, key: BlockHash, parent: Block | None) -> Block:
        block = self.strays.pop(key, None)
        if block is None:
            return Block(key, parent, self.num_groups)
        block.parent = parent
        block.depth = 0 if parent is None else parent.depth + 1
        return block

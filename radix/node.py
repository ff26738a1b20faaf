"""One run of a radix tree: blocks that follow each other with no branch between them.

Only `radix.tree` makes and changes runs; this file says what they are and what always holds (`check`).
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import compress, count
from operator import ne
from typing import Generic, TypeVar

from radix.namespace import BlockHash
from radix.untracked import untrack

V = TypeVar("V")

DEPTH_BITS = 32  # more than a path has blocks
SPAN = 1 << DEPTH_BITS
DEPTH = SPAN - 1  # place & DEPTH is the depth, place >> DEPTH_BITS the run's number
LONGEST = 4096  # blocks of a run: what a branch in its middle has to move, in one go, is a millisecond's work at most


class Run(Generic[V]):
    """A stretch of a path, at most LONGEST blocks.

    base:     number of this run times SPAN: what its blocks' addresses have in common.
    depth:    blocks before keys[0]; the root run, which holds no block, has 0.
    keys:     block hashes in path order.
    values:   parallel to keys.
    parent:   the run that ends where this one begins; None only for the root run.
    children: runs that continue this one, by their first key. A run with one child is merged with it if it may, so
              the number is 1 at the root and where a prompt is longer than a run alone.
    """

    __slots__ = ("base", "children", "depth", "keys", "parent", "values")

    def __init__(self, base: int, depth: int, keys: list[BlockHash], values: list[V], parent: Run[V] | None) -> None:
        self.base = base
        self.depth = depth
        self.keys = keys
        self.values = values
        self.parent = parent
        self.children: dict[BlockHash, Run[V]] = {}
        untrack([self, keys, values])  # the tree takes itself apart, see there

    @property
    def end(self) -> int:
        """Depth of whatever continues this run."""
        return self.depth + len(self.keys)

    def shared(self, path: list[BlockHash]) -> int:
        """Return how many keys of `path[depth:]` are this run's, from its first on. Every key is compared, in C."""
        keys = self.keys
        ahead = path[self.depth : self.depth + len(keys)]
        if ahead == keys:
            return len(keys)
        # A block hash names all before it, so the difference can be found by halves (2 us in 8192 blocks, where
        # walking to it takes up to 320); a caller whose keys are not chained gets the walk.
        num = bisect_left(range(len(ahead)), True, key=lambda i: keys[i] != ahead[i])
        if keys[:num] == ahead[:num]:
            return num
        return next(compress(count(), map(ne, keys, ahead)))

    def check(self) -> None:
        """Assert what holds of every run by itself."""
        assert len(self.keys) == len(self.values)
        if self.parent is None:
            assert not self.keys
            assert self.depth == 0
        else:
            assert self.keys, "a run without blocks"
            assert self.depth == self.parent.end
            assert self.parent.children.get(self.keys[0]) is self
        assert len(self.keys) <= LONGEST, "a run that is too long"

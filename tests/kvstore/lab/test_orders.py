"""Orders of a prefix cache: one LRU, one optimum, and tail first; against a tree that evicts its oldest leaf."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from kvstore.lab import compiled
from kvstore.lab.compiled import TraceArrays
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.traces import ReplayTrace
from tests.kvstore.lab.test_compiled import forest_traffic

pytestmark = pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")


class LeafLru:
    """A radix tree of blocks that evicts the leaf whose last use is longest ago, searched for each time."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.used_at: dict[int, tuple[int, int]] = {}  # block: request, and depth negated: of a path the tail is older
        self.children: dict[int, set[int]] = {}
        self.parent: dict[int, int] = {}
        self.turn = 0

    def serve(self, path: tuple[int, ...]) -> int:
        self.turn += 1
        hits = next((i for i, block in enumerate(path) if block not in self.used_at), len(path))
        for depth, block in enumerate(path):
            self.used_at[block] = (self.turn, -depth)
            self.children.setdefault(block, set())
        for above, block in pairwise(path):
            self.parent[block] = above
            self.children[above].add(block)
        while len(self.used_at) > self.num_blocks:
            self.evict(min((b for b in self.used_at if not self.children[b]), key=self.used_at.__getitem__))
        return hits

    def evict(self, block: int) -> None:
        del self.used_at[block], self.children[block]
        if block in self.parent:
            self.children[self.parent.pop(block)].discard(block)


def lru_hits(trace: ReplayTrace, num_blocks: int, *, tail_first: bool) -> int:
    """Blocks that a plain list of blocks by last use hits."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in trace.requests:
        path = request.blocks
        hits += next((i for i, block in enumerate(path) if block not in cache), len(path))
        for block in reversed(path) if tail_first else path:
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_blocks", [5, 30, 100])
def test_lru_told_tail_first_is_a_tree_that_evicts_its_oldest_leaf(seed: int, num_blocks: int) -> None:
    trace = forest_traffic(seed)
    tree = LeafLru(num_blocks)

    hits = compiled.play(TraceArrays.of(trace), Setup(((HOST, num_blocks),))).hit_blocks

    assert hits[:, 0].tolist() == [tree.serve(request.blocks) for request in trace.requests]


def test_lru_told_root_first_hits_less() -> None:
    trace = forest_traffic(5, num_requests=2000)
    for num_blocks in (20, 60):
        played = compiled.play(TraceArrays.of(trace), Setup(((HOST, num_blocks),)))

        assert played.hit_blocks.sum() == lru_hits(trace, num_blocks, tail_first=True)
        assert played.hit_blocks.sum() > lru_hits(trace, num_blocks, tail_first=False)


@pytest.mark.parametrize("num_blocks", [1, 7, 40, 150])
def test_the_optimum_keeps_prefixes_whole(num_blocks: int) -> None:
    """Blocks found anywhere on a path are then those of its prefix."""
    trace = forest_traffic(2)
    arrays = TraceArrays.of(trace)
    hits = compiled.optimum(arrays, num_blocks).hit_blocks[:, 0]

    # Plain Belady, which knows of no prefix and counts every block that it has: what is used again first is kept.
    kept: set[int] = set()
    uses = arrays.next_uses()
    next_use: dict[int, tuple[int, int]] = {}
    for number in range(arrays.num_requests):
        start, end = arrays.offsets[number : number + 2].tolist()
        path = arrays.ids[start:end].tolist()
        found = [block in kept for block in path]
        assert found == sorted(found, reverse=True)
        assert sum(found) == hits[number]
        for depth, (block, use) in enumerate(zip(path, uses[start:end].tolist(), strict=True)):
            next_use[block] = (use, depth)
        kept.update(path)
        kept = set(sorted(kept, key=next_use.__getitem__)[:num_blocks])


def test_no_policy_beats_the_optimum() -> None:
    arrays = TraceArrays.of(forest_traffic(4, num_requests=1500))
    for num_blocks in (5, 40, 160):
        most = int(compiled.optimum(arrays, num_blocks).hit_blocks.sum())
        for policy in ("lru", "fifo", "lfu", "arc", "s3fifo-paper"):
            hits = int(compiled.play(arrays, Setup(((HOST, num_blocks),), policy)).hit_blocks.sum())
            assert 0 < hits <= most


def test_a_store_that_has_room_for_all_hits_the_same_by_any_policy() -> None:
    arrays = TraceArrays.of(forest_traffic(6))
    setup = Setup(((HOST, arrays.num_blocks),))

    first, *others = [
        compiled.play(arrays, replace(setup, policy=policy)).hit_blocks
        for policy in ("lru", "fifo", "lfu", "arc", "s3fifo-paper")
    ]

    assert all(np.array_equal(first, other) for other in others)

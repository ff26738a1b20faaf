"""Whether the runs of a radix tree and the places of its blocks agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from radix.namespace import BlockHash
from radix.node import DEPTH, DEPTH_BITS, LONGEST, Run

V = TypeVar("V")


def check(root: Run[V], runs: Mapping[int, Run[V]], places: Mapping[BlockHash, int]) -> None:
    """Assert that every block lies where its place says. O(blocks)."""
    seen = 0
    stack = [root]
    num_runs = 0
    while stack:
        run = stack.pop()
        run.check()
        num_runs += 1
        assert run.base & DEPTH == 0
        assert runs[run.base >> DEPTH_BITS] is run
        for depth, key in enumerate(run.keys, run.depth):
            assert places[key] == run.base + depth
        seen += len(run.keys)
        stack += run.children.values()
    assert num_runs == len(runs)
    assert seen == len(places)


def is_sound(root: Run[V], runs: Mapping[int, Run[V]], places: Mapping[BlockHash, int]) -> bool:
    """False if an exception in the middle of a change has left the tree half done. O(runs)."""
    num_blocks = 0
    for number, run in runs.items():
        num_blocks += len(run.keys)
        if len(run.keys) != len(run.values) or run.base != number << DEPTH_BITS:
            return False
        if run is root:
            continue
        above = run.parent
        if above is None or not run.keys or above.children.get(run.keys[0]) is not run or above.end != run.depth:
            return False
        if runs.get(above.base >> DEPTH_BITS) is not above or len(run.keys) > LONGEST:
            return False
        # Places of a run are written in one go, first to last.
        if any(places.get(run.keys[at]) != run.base + run.depth + at for at in (0, len(run.keys) - 1)):
            return False
    return num_blocks == len(places)

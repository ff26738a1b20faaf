"""What a tree and a catalog keep by the million is not the collector's, and goes all the same when it is dropped."""

from __future__ import annotations

import gc
import sys

import pytest

from kvstore.plan.planner import Planner
from radix.hashing import _chain
from tests.helpers.planners import make, path, save

pytestmark = pytest.mark.skipif(_chain is None, reason="needs the C extension")
NUM_BLOCKS = 2000


def without_journal(num_slots: int) -> Planner:
    planner, _ = make(num_slots)
    planner.books.catalog.journal = None  # which remembers what has left
    return planner


def tracked() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_the_collector_has_nearly_nothing_more_to_walk_with_more_blocks() -> None:
    planner = without_journal(2 * NUM_BLOCKS)
    save(planner, path(1, 10))
    before = tracked()

    save(planner, path(2, NUM_BLOCKS))

    assert tracked() - before < NUM_BLOCKS / 20  # 3 for each block, were they tracked
    planner.check()


def test_the_collector_has_nearly_nothing_more_to_walk_with_pinned_blocks() -> None:
    planner = without_journal(4 * NUM_BLOCKS)
    request = path(1, NUM_BLOCKS)
    save(planner, request)
    before = tracked()

    assert planner.pin(request, 0.0) == NUM_BLOCKS

    assert tracked() - before < NUM_BLOCKS / 20  # 2 for each block, were they tracked
    planner.check()


@pytest.mark.parametrize("way", ["evicted", "forgotten", "cleared"])
def test_blocks_that_leave_leave_no_memory_behind(way: str) -> None:
    planner = without_journal(NUM_BLOCKS)

    def come_and_go(seed: int) -> None:
        request = path(seed, NUM_BLOCKS)
        save(planner, request)
        if way == "forgotten":
            planner.forget(request, 0, 0.0)
        elif way == "cleared":
            planner.clear(0.0)
        planner.finished(request, 0.0)

    for seed in range(3):
        come_and_go(seed)
    gc.collect()
    before = sys.getallocatedblocks()
    for seed in range(3, 8):
        come_and_go(seed)
    gc.collect()

    assert sys.getallocatedblocks() - before < 5 * NUM_BLOCKS  # 5 rounds would leave 25 for each


def test_a_planner_that_is_dropped_takes_its_blocks_along() -> None:
    def one() -> None:
        planner = without_journal(NUM_BLOCKS)
        save(planner, path(1, NUM_BLOCKS))

    one()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(5):
        one()
    gc.collect()

    assert sys.getallocatedblocks() - before < NUM_BLOCKS

"""Words to keep pages, of which each has an end, and all together, and each payer's, a budget."""

from __future__ import annotations

from typing import Any

import pytest

from eviction.registry import make_policy
from kvstore.plan.ends import MAX_STALE
from kvstore.plan.keeper import Kept
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings
from kvstore.plan.state import Block, Page
from radix.hashing import BlockHash
from tests.helpers.clocks import Clocks
from tests.helpers.planners import LAYOUT

INF = float("inf")


class Shelf:
    """Host memory of ten slots, of which five may be kept, for at most a hundred seconds."""

    def __init__(self) -> None:
        self.clocks = Clocks(now=0.0, unix=0.0)
        settings = PlanSettings(10, max_pinned_fraction=0.5, pin_max_s=100.0)
        planner = Planner(LAYOUT, settings, make_policy("lru"), clock=self.clocks)
        self.catalog, self.host = planner.books.catalog, planner.books.host
        self.keeper = planner.retention.keeper
        self._count = 0

    def blocks(self, num_blocks: int) -> list[Block]:
        """A path whose pages are all in host memory."""
        keys = []
        for _ in range(num_blocks):
            self._count += 1
            keys.append(BlockHash(self._count.to_bytes(32, "big")))
        blocks = self.catalog.insert(keys)
        pages: list[Page] = [page for block in blocks for page in block.pages]
        self.host.take_for(pages, ())
        self.host.ready(pages)
        self.host.enter(pages, used=False)
        return blocks

    def keep(self, blocks: list[Block], until: float = INF, holder: str = "", **word: Any) -> int:
        """Give a word to keep blocks."""
        return self.keeper.keep(blocks, self.keeper.word(until, holder=holder, **word))

    def expire(self, at: float) -> None:
        """Let time pass until `at`, and end what is over then."""
        self.clocks.advance(at - self.clocks.boot())
        self.keeper.expire()

    @property
    def num_pinned(self) -> int:
        self.keeper.check()
        return self.host.num_resident - len(self.host.policy)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_of_a_path_larger_than_the_budget_the_head_is_kept(shelf: Shelf) -> None:
    path = shelf.blocks(8)

    assert shelf.keep(path, INF) == 5

    assert shelf.num_pinned == 5
    assert [page.kept for block in path for page in block.pages] == [True] * 5 + [False] * 3
    assert shelf.keeper.refused_pages == 3


def test_the_budget_is_for_all_holders_together_and_comes_back(shelf: Shelf) -> None:
    first, second = shelf.blocks(4), shelf.blocks(4)
    assert shelf.keep(first, INF, "one") == 4
    assert shelf.keep(second, INF, "two") == 1

    assert shelf.keeper.let_go(first) == 4

    assert shelf.keep(second, INF, "two") == 4
    assert shelf.num_pinned == 4


@pytest.mark.parametrize("until", [INF, 1e300, 101.0, 100.0])
def test_every_promise_ends(shelf: Shelf, until: float) -> None:
    path = shelf.blocks(3)
    shelf.keep(path, until)

    shelf.expire(99.0)
    assert shelf.num_pinned == 3
    shelf.expire(100.0)

    assert shelf.num_pinned == 0
    assert len(shelf.keeper) == 0


def test_a_promise_that_is_over_already_keeps_nothing(shelf: Shelf) -> None:
    shelf.clocks.advance(5.0)

    assert shelf.keep(shelf.blocks(3), 4.0) == 0

    assert shelf.num_pinned == 0


def test_the_later_of_two_promises_counts(shelf: Shelf) -> None:
    path = shelf.blocks(2)
    shelf.keep(path, 50.0)
    shelf.keep(path, 20.0)
    shelf.keep(path[:1], 80.0)

    shelf.expire(50.0)

    assert shelf.num_pinned == 1
    shelf.expire(80.0)
    assert shelf.num_pinned == 0


def test_operators_see_who_has_how_much_kept_until_when(shelf: Shelf) -> None:
    ours, theirs = shelf.blocks(2), shelf.blocks(3)
    shelf.keep(ours, 30.0, "one")
    shelf.keep(theirs, 40.0, "two")
    assert shelf.keeper.holders == [Kept("one", 2, 30.0), Kept("two", 3, 40.0)]

    shelf.keep(theirs[:1], 60.0, "one")  # the later end is one's word
    assert shelf.keeper.holders == [Kept("one", 3, 60.0), Kept("two", 2, 40.0)]

    shelf.expire(40.0)
    assert shelf.keeper.holders == [Kept("one", 1, 60.0)]
    shelf.keeper.check()


def test_keeping_the_same_again_and_again_takes_no_memory(shelf: Shelf) -> None:
    path = shelf.blocks(1)
    for step in range(5 * MAX_STALE):
        shelf.keep(path, 100.0 + step * 1e-3)
        shelf.clocks.advance(1e-3)

    assert len(shelf.keeper._ends) <= MAX_STALE + 3
    shelf.expire(100.0)
    assert shelf.num_pinned == 1
    shelf.expire(200.0)
    assert shelf.num_pinned == 0

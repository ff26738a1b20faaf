"""The pages that a tier is owed: in order, counted, and lost as soon as they leave host memory."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.plan.debts import Debts
from kvstore.plan.state import Block, Page, PageState
from radix.hashing import BlockHash
from tests.helpers.interrupts import interrupted_at
from tests.helpers.planners import make, path, publish


def ready(num_pages: int) -> list[Page]:
    blocks = [Block(BlockHash(b"%d" % number), None, 1) for number in range(num_pages)]
    for block in blocks:
        block.pages[0].state = PageState.READY
    return [block.pages[0] for block in blocks]


def test_pages_are_taken_in_the_order_in_which_they_were_owed() -> None:
    debts, pages = Debts(), ready(4)
    debts.owe(pages[:2], is_saved=True)
    debts.owe(pages[2:], is_saved=False)
    debts.owe(pages[:1], is_saved=False)  # it keeps its place, and stays a save's

    assert debts.take(3, None) == {pages[0]: True, pages[1]: True, pages[2]: False}
    assert (debts.num_owed_saves, len(debts)) == (0, 1)


def test_what_a_save_brings_after_a_load_did_is_a_saves_from_then_on() -> None:
    debts, pages = Debts(), ready(1)
    debts.owe(pages, is_saved=False)
    debts.owe(pages, is_saved=True)

    assert debts.num_owed_saves == 1
    debts.check()


def test_a_page_waits_for_the_delete_of_its_key() -> None:
    debts, pages = Debts(), ready(2)
    debts.owe(pages, is_saved=True)

    assert debts.take(2, lambda key: key == pages[0].key) == {pages[1]: True}
    assert debts.num_owed_saves == 1
    debts.let_go()
    assert debts.take(2, None) == {pages[0]: True}


def test_a_page_that_is_held_and_owed_again_is_owed_once() -> None:
    debts, pages = Debts(), ready(2)
    debts.owe(pages, is_saved=False)
    debts.take(1, lambda _: True)
    debts.owe(pages, is_saved=True)  # its path was used meanwhile

    debts.check()
    assert (len(debts), debts.num_owed_saves) == (2, 2)
    debts.lose(pages)
    assert (debts.num_lost, debts.num_lost_saves) == (2, 2)


def test_what_failed_is_tried_again_with_what_waits_whichever_is_more() -> None:
    for num_failed in (1, 3):
        debts, pages = Debts(), ready(4)
        debts.owe(pages, is_saved=True)
        for page in debts.take(num_failed, None):
            debts.fail(page, is_saved=True)
        assert (debts.num_failed_saves, debts.num_owed_saves) == (num_failed, 4 - num_failed)

        debts.retry()

        assert (debts.num_failed_saves, debts.num_owed_saves) == (0, 4)
        debts.check()
        assert debts.take(5, None).keys() == set(pages)


def test_what_leaves_host_memory_is_lost_and_what_is_forgotten_is_not() -> None:
    debts, pages = Debts(), ready(4)
    debts.owe(pages[:3], is_saved=True)
    debts.owe(pages[3:], is_saved=False)
    debts.fail(next(iter(debts.take(1, None))), is_saved=True)

    debts.lose([pages[0], pages[3]])
    debts.settle([pages[1]])

    assert (debts.num_lost, debts.num_lost_saves, len(debts)) == (2, 1, 1)


def test_a_page_that_left_while_it_was_written_in_vain_is_lost() -> None:
    debts, pages = Debts(), ready(1)
    debts.owe(pages, is_saved=True)
    (page,) = debts.take(1, None)
    page.state = PageState.ABSENT

    debts.fail(page, is_saved=True)

    assert (debts.num_lost_saves, len(debts)) == (1, 0)


def test_a_cut_short_change_is_counted_anew() -> None:
    debts, pages = Debts(), ready(3)
    debts.owe(pages, is_saved=True)
    debts.waiting.num_saves = 7
    pages[0].state = PageState.ABSENT
    pages[1].block.is_removed = True

    debts.rebuild()

    debts.check()
    assert (debts.num_lost, debts.num_owed_saves) == (1, 1)


def test_a_page_is_owed_once_after_an_exception_at_any_line_of_a_move() -> None:
    moves: list[Callable[[Debts], object]] = [Debts.retry, Debts.let_go, lambda debts: debts.take(3, lambda _: True)]
    for move in moves:
        for n in range(1, 1000):
            debts, pages = Debts(), ready(6)
            debts.owe(pages, is_saved=True)
            debts.take(2, lambda _: True)
            for page in debts.take(2, None):
                debts.fail(page, is_saved=True)
            with interrupted_at(n) as where:
                move(debts)
            debts.rebuild()
            debts.check()
            assert debts.num_failed_saves == 0
            if not where:
                break
        assert 5 < n < 999


def test_an_eviction_tells_the_tier_that_is_owed_the_page() -> None:
    planner, _ = make(num_slots=4, disk_pages=8)
    planner.set_tier_up("disk", False, 0.0)
    publish(planner, path(1, 4))
    debts = planner.books.tiers[0].debts
    assert len(debts) == 4

    publish(planner, path(2, 3))

    assert (debts.num_lost, len(debts)) == (3, 4)
    planner.check()

"""The book of transfers: what is under way, and what the lanes do not have yet."""

from __future__ import annotations

import pytest

from kvstore.page import PageKey
from kvstore.plan.records import Op, Priority, Transfer
from kvstore.plan.transfers import TransferBook


@pytest.fixture
def book() -> TransferBook:
    return TransferBook()


def send(book: TransferBook, tier: str = "disk") -> Transfer:
    return book.send(Op.FETCH, tier, [PageKey(b"key")], priority=Priority.LOAD, deadline=1.0)


def test_a_transfer_goes_out_once_in_the_order_in_which_it_was_made(book: TransferBook) -> None:
    made = [send(book) for _ in range(3)]

    assert book.take() == made
    assert book.take() == []
    assert len(book) == 3


def test_a_transfer_stays_in_the_outbox_until_the_lanes_have_it(book: TransferBook) -> None:
    made = send(book)
    book.promoted.append(made.id)

    assert book.outbox == [made]
    book.sent()

    assert (book.outbox, book.promoted) == ([], [])


def test_the_outcome_of_a_transfer_finds_it_once(book: TransferBook) -> None:
    made = send(book)

    found = book.land(made.id)

    assert found is not None
    assert found.transfer is made
    assert book.land(made.id) is None
    assert book.land(4711) is None


def test_what_is_under_way_in_a_tier_that_goes_down_is_told_once(book: TransferBook) -> None:
    lost, other = send(book, "disk"), send(book, "redis")

    book.stall("disk")

    assert book.stalled == {lost.id}
    assert [flight.transfer for flight in book.take_stalled()] == [lost]
    assert book.take_stalled() == []
    book.land(lost.id)
    assert book.stalled == set()
    assert [flight.transfer for flight in book.under_way()] == [other]


def test_what_the_lanes_do_not_have_goes_out_again_after_an_interrupt(book: TransferBook) -> None:
    there = send(book)
    book.sent()
    here = send(book)
    book.outbox = []  # an exception came between booking it and this
    book.land(there.id)

    book.rebuild()

    assert book.take() == [here]
    assert send(book).id > here.id

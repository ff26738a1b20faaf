"""The plain values: pages of a lease are arrays and read like a sequence."""

from __future__ import annotations

import pickle

import numpy as np

from kvstore.plan.records import LoadLease, SaveLease, SlotPage, SlotPages

PAGES = [SlotPage(0, 0, 7), SlotPage(0, 1, 5), SlotPage(1, 0, (1 << 32) + (1 << 31))]


def test_pages_are_read_one_by_one_or_as_arrays() -> None:
    pages = SlotPages.of(PAGES)

    assert list(pages) == PAGES
    assert [pages[0], pages[-1]] == [PAGES[0], PAGES[-1]]
    assert (len(pages), PAGES[1] in pages, pages.index(PAGES[2])) == (3, True, 2)
    assert (pages.blocks.tolist(), pages.groups.tolist()) == ([0, 0, 1], [0, 1, 0])
    assert pages.slots.dtype == np.int64  # slots of the 4th billion and later are those of a further daemon
    assert all(type(number) is int for page in pages for number in page)


def test_a_part_of_the_pages_is_pages() -> None:
    pages = SlotPages.of(PAGES)

    assert pages[1:] == SlotPages.of(PAGES[1:])
    assert pages.at(pages.groups == 0) == SlotPages.of([PAGES[0], PAGES[2]])
    assert pages.at(np.array([2, 0])) == SlotPages.of([PAGES[2], PAGES[0]])


def test_pages_are_equal_if_all_their_numbers_are() -> None:
    assert SlotPages.of(PAGES) == SlotPages.of(PAGES)
    for other in (
        [PAGES[0]],
        [PAGES[0], PAGES[1], SlotPage(1, 0, 6)],
        [PAGES[0], PAGES[1], SlotPage(2, 0, PAGES[2].slot)],
    ):
        assert SlotPages.of(PAGES) != SlotPages.of(other)
    assert SlotPages() == SlotPages.of([])


def test_leases_travel() -> None:
    for lease in (
        LoadLease(1, 2, 32, SlotPages.of(PAGES), {"host": 2}),
        SaveLease(1, SlotPages.of(PAGES), 3),
        SaveLease(2),
    ):
        assert pickle.loads(pickle.dumps(lease)) == lease

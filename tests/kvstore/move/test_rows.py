from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.errors import ConfigError, RequestError, StoreClosed
from kvstore.move.rows import RowMover, StagingPages
from kvstore.page import PageMeta
from kvstore.plan.records import Outcome
from kvstore.testing.pages import keys_of
from kvstore.tiers.host import HUGE_PAGE_BYTES
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.rows import ROW_BYTES, Rows, faulty, open_mover

META = PageMeta(ROW_BYTES)
KEYS = keys_of("row", 4)


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def rows() -> Rows:
    rows = Rows()
    for row in range(4):
        rows[row] = row + 1
    return rows


@pytest.fixture
def tier() -> FaultyTier:
    return faulty("disk")


@pytest.fixture
def mover(rows: Rows, tier: FaultyTier) -> Iterator[RowMover]:
    mover = open_mover(rows, [tier])
    yield mover
    tier.recover()
    mover.close(20.0)


def answer(mover: RowMover, transfer: int) -> Outcome:
    (outcome,) = mover.poll(20.0)
    assert outcome.transfer_id == transfer
    return outcome


def save(mover: RowMover) -> None:
    assert answer(mover, mover.save("disk", KEYS, [0, 1, 2, 3], [META] * 4, deadline=soon())).ok == (True,) * 4


def test_what_was_saved_from_rows_is_loaded_into_others(mover: RowMover, rows: Rows) -> None:
    save(mover)

    outcome = answer(mover, mover.load("disk", KEYS, [9, 8, 7, 6], [META] * 4, deadline=soon()))

    assert outcome.ok == (True,) * 4
    assert [rows[row][0] for row in (9, 8, 7, 6)] == [1, 2, 3, 4]
    assert rows[9] == rows[0]
    assert outcome.num_bytes == 4 * ROW_BYTES


def test_a_page_that_is_gone_leaves_its_row_as_it_was(mover: RowMover, rows: Rows, tier: FaultyTier) -> None:
    save(mover)
    tier.inner.delete(KEYS[1:2], timeout_s=1.0)
    rows[8] = 99

    outcome = answer(mover, mover.load("disk", KEYS[:3], [9, 8, 7], [META] * 3, deadline=soon()))

    assert outcome.ok == (True, False, True)
    assert rows.has(8, 99)
    assert rows.has(9, 1)
    assert rows.has(7, 3)


def test_rubbish_of_a_damaged_page_never_reaches_the_row(mover: RowMover, rows: Rows, tier: FaultyTier) -> None:
    save(mover)
    tier.corrupt_next(1)

    outcome = answer(mover, mover.load("disk", KEYS[:1], [9], [META], deadline=soon()))

    assert outcome.ok == (False,)
    assert rows.has(9, 0)


def test_a_load_that_was_given_up_does_not_write_when_its_tier_comes_back(
    mover: RowMover, rows: Rows, tier: FaultyTier
) -> None:
    save(mover)
    tier.hang(honour_timeout=False, only=("read_into",))
    load = mover.load("disk", KEYS[:1], [9], [META], deadline=soon())
    tier.wait_for_hanging()

    mover.give_up(load)
    rows[9] = 77  # another page has the row now
    tier.recover()
    probe = mover.probe("disk", KEYS[:1], deadline=soon())

    named = []
    while mover.num_open:
        named += [outcome.transfer_id for outcome in mover.poll(20.0)]
    assert named == [probe]
    assert tier.calls["read_into"] == 1
    assert rows.has(9, 77)


def test_a_load_given_up_before_it_began_is_not_begun(mover: RowMover, rows: Rows, tier: FaultyTier) -> None:
    save(mover)
    tier.hang(honour_timeout=False, only=("contains",))
    for _ in range(2):  # both workers
        mover.probe("disk", KEYS[:1], deadline=soon())
    tier.wait_for_hanging(2)

    mover.give_up(mover.load("disk", KEYS[:1], [9], [META], deadline=soon()))
    tier.recover()

    while mover.num_open:
        mover.poll(20.0)
    assert tier.calls["read_into"] == 0
    assert rows.has(9, 0)


def test_giving_up_what_was_answered_changes_nothing(mover: RowMover, rows: Rows) -> None:
    save(mover)
    load = mover.load("disk", KEYS[:1], [9], [META], deadline=soon())
    answer(mover, load)

    mover.give_up(load)

    assert rows.has(9, 1)


def test_loads_after_loads_reuse_the_same_staging_pages(mover: RowMover) -> None:
    save(mover)
    answer(mover, mover.load("disk", KEYS, [9, 8, 7, 6], [META] * 4, deadline=soon()))
    needed_once = mover.staging_pages

    for _ in range(20 + needed_once):
        answer(mover, mover.load("disk", KEYS, [9, 8, 7, 6], [META] * 4, deadline=soon()))

    assert mover.staging_pages == needed_once >= 4


@pytest.mark.parametrize(("page_bytes", "per_slab"), [(4096, 512), (5000, 256), (3 << 20, 1)])
def test_staging_pages_lie_in_huge_pages_and_do_not_overlap(page_bytes: int, per_slab: int) -> None:
    staging = StagingPages(page_bytes)

    pages = [np.frombuffer(staging.take(), np.uint8) for _ in range(3)]
    for number, page in enumerate(pages):
        page[:] = number

    assert pages[0].ctypes.data % HUGE_PAGE_BYTES == 0
    assert [len(page) for page in pages] == [-(-page_bytes // 4096) * 4096] * 3
    assert all((page == number).all() for number, page in enumerate(pages))
    assert staging.num_pages == max(3, per_slab)


def test_a_load_that_gets_no_memory_to_read_into_fails_alone(
    mover: RowMover, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(num_slots: int, slot_bytes: int) -> None:
        raise ConfigError("host.capacity_bytes is too much")

    save(mover)
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr("kvstore.move.rows.HostSlab", refuse)
        refused = answer(mover, mover.load("disk", KEYS[:1], [9], [META], deadline=soon()))
    served = answer(mover, mover.load("disk", KEYS[:1], [8], [META], deadline=soon()))

    assert refused.ok == (False,)
    assert refused.error is not None
    assert "there is no memory" in refused.error
    assert served.ok == (True,)
    assert rows.has(9, 0)
    assert rows.has(8, 1)


def test_a_tier_that_fails_three_times_is_taken_out_and_answers_at_once(mover: RowMover, tier: FaultyTier) -> None:
    tier.fail()
    for _ in range(3):
        assert answer(mover, mover.load("disk", KEYS[:1], [9], [META], deadline=soon())).ok == (False,)

    outcome = answer(mover, mover.load("disk", KEYS[:1], [9], [META], deadline=soon()))

    assert not mover.is_up("disk")
    assert mover.num_opened("disk") == 1
    assert outcome.ok == (False,)
    assert "breaker" in (outcome.error or "")
    assert tier.calls["read_into"] == 3


def test_poll_without_time_returns_at_once_with_nothing(mover: RowMover) -> None:
    assert mover.poll() == []


def test_after_close_nothing_is_taken(mover: RowMover) -> None:
    mover.close(20.0)

    with pytest.raises(StoreClosed):
        mover.load("disk", KEYS[:1], [9], [META], deadline=soon())
    assert mover.close(1.0) == 0


def test_memory_of_broken_rows_is_refused() -> None:
    rows = Rows(2, 4096)

    with pytest.raises(RequestError, match="whole rows of 3000 bytes"):
        RowMover(lambda view: [], rows.memory, 3000)

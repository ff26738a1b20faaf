from __future__ import annotations

import pytest

from kvstore.plan.slots import SlotPool


def test_slots_are_handed_out_once() -> None:
    pool = SlotPool(4)

    taken = pool.take(3) + pool.take(3)

    assert sorted(taken) == [0, 1, 2, 3]
    assert pool.take(1) == []


def test_slots_come_back() -> None:
    pool = SlotPool(2)

    pool.give(pool.take(2))

    assert pool.num_free == 2


def test_a_slot_given_back_twice_is_refused() -> None:
    pool = SlotPool(2)
    (slot,) = pool.take(1)
    pool.give([slot])

    with pytest.raises(ValueError, match=f"slot {slot} was given back twice"):
        pool.give([slot])


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_slots is 0"):
        SlotPool(0)

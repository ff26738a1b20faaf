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


def test_slots_retire_as_they_come_free_and_come_back() -> None:
    pool = SlotPool(4)
    taken = pool.take(3)

    pool.resize(2)
    assert (pool.num_free, pool.num_retired, pool.num_retiring, pool.num_in_use) == (0, 1, 1, 2)
    pool.give(taken)
    assert (pool.num_free, pool.num_retired, pool.num_retiring) == (2, 2, 0)
    assert len(pool.take_retired()) == 2
    assert pool.take_retired() == []
    pool.resize(4)
    assert (pool.num_free, pool.num_retired) == (4, 0)
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [0, 5])
def test_a_pool_keeps_at_least_one_slot_and_makes_none(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"{wrong} slots are asked for"):
        SlotPool(4).resize(wrong)

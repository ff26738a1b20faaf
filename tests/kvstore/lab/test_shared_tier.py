"""A tier that planners share: presence, order of eviction, and load by the second."""

from __future__ import annotations

from kvstore.lab.shared_tier import SharedTier
from kvstore.page import PageKey, page_key
from kvstore.plan.records import Op, Priority, Transfer


def key(number: int) -> PageKey:
    return page_key(bytes([number]) * 32)


def transfer(op: Op, *numbers: int) -> Transfer:
    return Transfer(1, op, "redis", tuple(map(key, numbers)), Priority(min(Priority)), 1e9)


def test_it_has_what_was_written_and_tells_what_it_carried_by_the_second() -> None:
    tier = SharedTier(8)

    tier.answer(transfer(Op.SPILL, 1, 2), 0.5)
    assert tier.answer(transfer(Op.PROBE, 1, 3), 0.9) == (True, False)
    assert tier.answer(transfer(Op.FETCH, 1, 2, 3), 7.2) == (True, True, False)
    tier.answer(transfer(Op.SPILL, 2, 3), 7.9)

    assert dict(tier.written) == {0: 2, 7: 1}  # what is there is not written again
    assert dict(tier.read) == {7: 2}


def test_what_was_used_longest_ago_leaves_and_a_probe_is_no_use() -> None:
    tier = SharedTier(2)
    tier.answer(transfer(Op.SPILL, 1, 2), 0.0)
    tier.answer(transfer(Op.FETCH, 1), 1.0)
    tier.answer(transfer(Op.PROBE, 2), 1.0)

    tier.answer(transfer(Op.SPILL, 3), 2.0)

    assert [key(number) in tier for number in (1, 2, 3)] == [True, False, True]
    tier.answer(transfer(Op.DELETE, 1), 3.0)
    assert len(tier) == 1

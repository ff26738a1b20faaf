from __future__ import annotations

from connectors.sglang.hits import PoolRule, Restorable, Share, restorable

YES, NO = True, False


def test_without_other_pools_every_prefix_of_what_is_there_counts() -> None:
    assert restorable([YES, YES, NO, YES], []) == Restorable(2, {"kv": 2}, [1, 2])


def test_nothing_is_nothing() -> None:
    assert restorable([NO, YES], [Share("swa", PoolRule.ALL, [YES, YES])]) == Restorable(0, {}, [])


def test_a_pool_of_all_pages_cuts_the_prefix() -> None:
    found = restorable([YES] * 4, [Share("indexer", PoolRule.ALL, [YES, YES, NO, YES])])

    assert found == Restorable(2, {"kv": 4, "indexer": 2}, [1, 2])


def test_a_pool_of_trailing_pages_allows_the_ends_that_it_has() -> None:
    found = restorable([YES] * 5, [Share("swa", PoolRule.TRAILING, [NO, YES, YES, NO, YES], trailing=2)])

    assert found == Restorable(3, {"kv": 5, "swa": 3}, [3])


def test_the_lengths_are_those_that_all_pools_allow() -> None:
    swa = Share("swa", PoolRule.TRAILING, [YES, NO, YES, YES], trailing=1)
    mamba = Share("mamba", PoolRule.TRAILING, [NO, YES, YES, NO], trailing=1)

    assert restorable([YES] * 4, [swa, mamba]) == Restorable(3, {"kv": 4, "swa": 4, "mamba": 3}, [3])


def test_groups_tell_what_they_cover_and_bound_nothing() -> None:
    groups = Share("c4", PoolRule.GROUPS, [YES, YES, YES, NO], block_pages=8, group_pages=2)

    assert restorable([YES] * 3, [groups]) == Restorable(3, {"kv": 3, "c4": 8}, [1, 2, 3])

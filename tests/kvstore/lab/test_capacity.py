"""Capacities, lists and ranges are read as people write them."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.capacity import parse_capacities, parse_capacity
from tests.kvstore.lab.test_optimum import trace_of, tree_traffic

TRACE = trace_of(*tree_traffic(7, num_requests=400, width=5, depth=6))


def test_capacities_are_shares_blocks_or_sizes() -> None:
    assert parse_capacity("10%", TRACE, None) == TRACE.num_distinct // 10
    assert parse_capacity(" 250 ", TRACE, None) == 250
    assert parse_capacity("4Ktokens", TRACE, None) == parse_capacity("0.004M tokens", TRACE, None) == 1000
    assert parse_capacity("1MiB", TRACE, 1024) == 256  # 4 tokens a block


@pytest.mark.parametrize(
    "text", ["0%", "-5%", "0", "x", "5 apples", "%", "1KiB", "3tokens", "Mtokens", "inf%", "\u00b2"]
)
def test_capacities_that_make_no_sense_are_told(text: str) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        parse_capacity(text, TRACE, 1024)


def test_a_size_needs_to_know_how_large_a_token_is() -> None:
    with pytest.raises(ConfigError, match="--bytes-per-token"):
        parse_capacity("64GiB", TRACE, None)


def test_a_range_doubles_up_to_its_end() -> None:
    assert parse_capacities("10..100", TRACE, None) == [10, 20, 40, 80, 100]
    assert parse_capacities("1MiB..4MiB, 300", TRACE, 1024) == [256, 300, 512, 1024]
    assert parse_capacities("7..7", TRACE, None) == [7]


def test_a_range_goes_by_steps_where_one_is_given() -> None:
    assert parse_capacities("10..45+10", TRACE, None) == [10, 20, 30, 40, 45]
    assert parse_capacities("10%..30%+10%", TRACE, None) == [
        parse_capacity(f"{percent}%", TRACE, None) for percent in (10, 20, 30)
    ]


def test_nothing_is_a_size_only_where_a_tier_may_be_missing() -> None:
    assert parse_capacities("0,5", TRACE, None, may_be_none=True) == [0, 5]
    with pytest.raises(ConfigError, match="less than one block"):
        parse_capacities("0,5", TRACE, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (",", "names nothing"),
        ("20..10", "goes down"),
        ("1..9999+1", "more than 1000 sizes"),
        ("1..", "capacity is ''|less than one block"),
        ("..5", "capacity is ''|less than one block"),
        ("1..5+0", "less than one block"),
        ("1..2..3", "capacity is '2..3'"),
    ],
)
def test_lists_and_ranges_that_make_no_sense_are_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_capacities(text, TRACE, 1024)

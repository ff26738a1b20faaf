"""Advice is the least that is enough: a block less is not, and what is cheaper is told first."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.advice import NEAR, SizingAdvice, advise, parse_share
from kvstore.lab.price import Prices, Pricing
from kvstore.lab.setup import DISK, HOST, REDIS, Setup
from kvstore.lab.sweep import Player, setups_of
from kvstore.units import MiB
from tests.kvstore.lab.test_replay import trace_of
from tests.kvstore.lab.test_sweep import BASE, COSTS, TRACE

PLAYER = Player(TRACE, COSTS)
PRICING = Pricing(Prices(), MiB, 1, 400.0, TRACE.prompt_tokens)


def advice_of(share: float, sizes: list[int] | None = None, *lower: list[tuple[str, int]]) -> SizingAdvice:
    return advise(PLAYER, share, setups_of(BASE, [[(HOST, 1)], *lower], ["lru"]), sizes, PRICING)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_any_size_is_found_to_two_percent(share: float) -> None:
    (best,) = advice_of(share).choices

    all_of_it, less = (
        PLAYER.outcome(Setup(((HOST, size),))) for size in (PLAYER.num_distinct, int(best.cell.capacity / NEAR) - 1)
    )
    reached_by_less = min(less.token_hit_rate / all_of_it.token_hit_rate, less.timing.saved / all_of_it.timing.saved)
    assert reached_by_less < share <= best.reached


def test_of_given_sizes_the_first_that_is_enough_is_chosen_and_its_neighbours_are_told() -> None:
    advice = advice_of(0.6, [5, 20, 40, 80, 160, 320])

    best = advice.choices[0]
    assert advice.less is not None
    assert advice.more is not None
    assert advice.less.reached < 0.6 <= best.reached <= advice.more.reached
    assert advice.more.cell.capacity == 2 * best.cell.capacity == 4 * advice.less.cell.capacity


def test_a_disk_below_saves_memory_and_the_cheaper_setup_comes_first() -> None:
    advice = advice_of(0.9, None, [(DISK, 0), (DISK, TRACE.num_distinct)])

    assert len(advice.choices) == 2
    assert advice.choices[0].bill.million <= advice.choices[1].bill.million
    by_tiers = {choice.cell.setup.names: choice for choice in advice.choices}
    assert by_tiers[HOST, DISK].cell.capacity < by_tiers[(HOST,)].cell.capacity


def test_what_is_out_of_reach_is_told_with_what_is_reached() -> None:
    advice = advice_of(0.99, [5, 20], [(REDIS, 0)])

    (most,) = advice.out_of_reach
    assert (advice.choices, advice.less, most.cell.capacity) == ((), None, 20)
    assert most.reached < 0.99


def test_a_trace_in_which_nothing_repeats_needs_no_store() -> None:
    player = Player(trace_of((1, 2), (3, 4)))

    with pytest.raises(ConfigError, match="no prompt repeats"):
        advise(player, 0.9, [BASE], None, PRICING)


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert parse_share("95%") == parse_share(" 0.95 ") == 0.95
    for text in ("0%", "101%", "1.01", "95", "most", "nan", ""):
        with pytest.raises(ConfigError, match="such as 95%"):
            parse_share(text)

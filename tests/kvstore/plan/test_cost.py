from __future__ import annotations

import pytest

from kvstore.plan.cost import REMEASURE_AFTER_S, CostModel, TierCost

MB = 1_000_000


def model(**tiers: float) -> CostModel:
    """Tiers by seconds per MB."""
    costs = CostModel({name: TierCost(1) for name in tiers}, batch_bytes=MB)
    for name, seconds in tiers.items():
        costs.tiers[name].observe(seconds, MB, now=0.0)
    return costs


def test_everything_is_worth_loading_while_nothing_is_known() -> None:
    costs = CostModel({"disk": TierCost(1)}, batch_bytes=MB)

    assert costs.best_end([(100, {"disk": 100 * MB})], block_size=16) == 100


def test_a_tier_slower_than_the_engine_is_not_worth_it() -> None:
    costs = model(disk=1.0)
    costs.observe_prefill(1000, 1.0)

    assert costs.best_end([(10, {}), (11, {"disk": MB})], block_size=16) == 10  # 16 ms of computing against 1 s


def test_a_tier_faster_than_the_engine_is_worth_it() -> None:
    costs = model(disk=0.001)
    costs.observe_prefill(1000, 1.0)

    assert costs.best_end([(10, {}), (11, {"disk": MB})], block_size=16) == 11


def test_a_slow_stretch_is_loaded_for_the_sake_of_what_follows() -> None:
    costs = model(redis=0.02)
    costs.observe_prefill(1000, 1.0)

    ends = [(1, {"redis": MB}), (101, {"redis": MB})]  # 20 ms for 16 ms, and then 1.6 s for nothing

    assert costs.best_end(ends, block_size=16) == 101


def test_latency_counts_for_small_loads() -> None:
    costs = model(redis=0.001)
    costs.tiers["redis"].latency_s = 0.5
    costs.observe_prefill(1000, 1.0)

    assert costs.best_end([(1, {"redis": MB})], block_size=16) == 0
    assert costs.best_end([(100, {"redis": 100 * MB})], block_size=16) == 100


def test_workers_share_the_load() -> None:
    alone, four = TierCost(1), TierCost(4)
    for cost in (alone, four):
        cost.observe(1.0, MB, now=0.0)

    assert four.load_seconds(4 * MB, MB) == pytest.approx(alone.load_seconds(4 * MB, MB) / 4)
    assert four.load_seconds(MB, MB) == pytest.approx(alone.load_seconds(MB, MB))  # one batch is one worker's


def test_a_short_prefill_says_nothing_about_the_rate() -> None:
    costs = model()

    costs.observe_prefill(1, 10.0)

    assert costs.prefill_tokens_per_s is None


def test_estimates_follow_a_change() -> None:
    costs = model(disk=0.001)
    for _ in range(10):
        costs.tiers["disk"].observe(1.0, MB, now=1.0)

    assert costs.tiers["disk"].load_seconds(MB, MB) > 0.9


def test_an_old_estimate_wants_a_sample() -> None:
    costs = model(disk=1.0)

    assert not costs.wants_sample("disk", REMEASURE_AFTER_S / 2)
    assert costs.wants_sample("disk", REMEASURE_AFTER_S + 1)

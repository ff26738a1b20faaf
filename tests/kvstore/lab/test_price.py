"""Bills beside sums done by hand."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.price import HOURS_A_MONTH, Prices, Pricing, parse_prices
from kvstore.lab.setup import DISK, HOST, REDIS, Setup
from kvstore.lab.sweep import Player
from kvstore.units import GiB, MiB
from tests.kvstore.lab.test_sweep import COSTS, TRACE

PRICES = Prices(gpu=2.0, host=3.0, disk=0.5, redis=10.0)
PRICING = Pricing(PRICES, MiB, num_gpus=4, span_s=7200.0, prompt_tokens=TRACE.prompt_tokens)


def test_a_bill_is_the_rooms_for_the_time_of_the_trace_and_the_gpus_for_their_work() -> None:
    cell = Player(TRACE, COSTS).cell(Setup(((HOST, 2048), (DISK, 4096)), replicas=2))

    bill = PRICING.bill(cell)

    assert bill.tier_bytes == {HOST: 4 * GiB, DISK: 8 * GiB}
    assert bill.month == pytest.approx(4 * 3 + 8 * 0.5)
    of_trace = bill.month * 2 / HOURS_A_MONTH + cell.gpu_s * 4 / 3600 * 2
    assert bill.million == pytest.approx(of_trace / TRACE.prompt_tokens * 1e6)
    assert PRICING.without(cell.gpu_s) < bill.million


def test_an_encoded_redis_costs_less() -> None:
    exact, lossless = (
        PRICING.tier_bytes(Setup(((HOST, 1), (REDIS, 1450)), codec=codec))[REDIS] for codec in ("exact", "lossless")
    )

    assert exact / lossless == pytest.approx(1.45)


def test_prices_left_out_are_the_usual_ones() -> None:
    assert parse_prices("usual") == parse_prices("") == Prices()
    assert parse_prices("gpu=2, disk=0.5 ,host=3,redis=10") == PRICES


@pytest.mark.parametrize("text", ["gpu", "gpu=cheap", "gpu=-1", "tape=1", "gpu=nan", "gpu=inf", "=3"])
def test_prices_that_are_none_are_told_with_the_usual_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"of gpu, host, disk, redis .* or usual for gpu=3 an hour"):
        parse_prices(text)

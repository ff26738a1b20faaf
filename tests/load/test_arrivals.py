from __future__ import annotations

from itertools import pairwise

import pytest

from kvstore.errors import ConfigError
from kvstore.load.arrivals import Closed, poisson, trace_times
from kvstore.load.requests import Message, PlannedRequest, Workload


def timed(*times: float | None) -> Workload:
    requests = tuple(PlannedRequest(n, n, (Message("user", "x"),), 1, at_s=at) for n, at in enumerate(times))
    return Workload("made", requests, "completions", 0)


def test_poisson_times_have_the_rate_and_their_seed() -> None:
    times = poisson(4000, 5.0, seed=1).times_s

    assert times[0] == 0
    assert all(a <= b for a, b in pairwise(times))
    assert 4000 / times[-1] == pytest.approx(5.0, rel=0.1)
    assert times == poisson(4000, 5.0, seed=1).times_s
    assert times != poisson(4000, 5.0, seed=2).times_s


def test_gaps_of_poisson_times_vary_like_an_exponential_distribution() -> None:
    gaps = [b - a for a, b in pairwise(poisson(4000, 2.0, seed=1).times_s)]
    mean = sum(gaps) / len(gaps)

    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5

    assert deviation == pytest.approx(mean, rel=0.1)


def test_trace_times_begin_at_zero_and_are_sped_up() -> None:
    assert trace_times(timed(10.0, 14.0, 20.0), 2.0).times_s == (0.0, 2.0, 5.0)


def test_what_cannot_be_is_told_with_what_can() -> None:
    with pytest.raises(ConfigError, match="no times of its own; use --rate or --concurrency"):
        trace_times(timed(None, None), 1.0)
    with pytest.raises(ConfigError, match="backwards"):
        trace_times(timed(2.0, 1.0), 1.0)
    with pytest.raises(ConfigError, match="speedup = 0"):
        trace_times(timed(1.0), 0.0)
    with pytest.raises(ConfigError, match="rate = 0"):
        poisson(3, 0.0, 1)
    with pytest.raises(ConfigError, match="rate = nan"):
        poisson(3, float("nan"), 1)
    with pytest.raises(ConfigError, match="concurrency = 0"):
        Closed(0)

"""Samples in rings: sums, rates, the two resolutions, what comes and goes."""

import numpy as np
import pytest

from kvstore.service.dashboard.history import COARSE_ROWS, COLUMNS, FINE_ROWS, INDEX, History, Row, row_of
from tests.helpers.stores import LAYOUT, open_small, prompt, use


def row(**values: float) -> Row:
    made = np.zeros(len(COLUMNS))
    for name, value in values.items():
        made[INDEX[name]] = value
    return made


def filled(seconds: int, per_second: float = 10.0) -> History:
    history = History()
    for at in range(seconds):
        history.add(1000.0 + at, {"a": row(prompt_tokens=per_second * at)})
    return history


def test_a_rate_is_the_growth_between_two_samples() -> None:
    history = History()
    for at, tokens in ((1000.0, 0), (1001.0, 30), (1003.0, 50)):
        history.add(at, {"a": row(prompt_tokens=tokens)})

    columns = history.span(["a"], 60.0)

    assert columns.rate("prompt_tokens").tolist() == [30.0, 10.0]
    assert columns.growth("prompt_tokens") == 50


def test_stores_are_summed_and_one_opened_later_counted_nothing_before() -> None:
    history = History()
    history.add(1000.0, {"a": row(lookups=5)})
    history.add(1001.0, {"a": row(lookups=6), "b": row(lookups=2)})

    assert history.span(["a", "b"], 60.0).rate("lookups").tolist() == [3.0]
    assert history.span(["a"], 60.0).rate("lookups").tolist() == [1.0]
    assert history.span(["nobody"], 60.0).rate("lookups").tolist() == [0.0]


def test_a_span_has_a_sample_more_than_seconds_so_that_each_has_a_rate() -> None:
    columns = filled(100).span(["a"], 10.0)

    assert columns.at.tolist() == [1088.0 + second for second in range(12)]
    assert columns.rate("prompt_tokens").tolist() == [10.0] * 11


def test_what_is_asked_since_a_sample_continues_it() -> None:
    history = filled(100)

    columns = history.span(["a"], 300.0, since=1097.0)

    assert columns.at[1:].tolist() == [1097.0, 1098.0, 1099.0]


def test_the_fine_ring_forgets_and_the_coarse_one_goes_on() -> None:
    history = filled(FINE_ROWS + 500)

    fine = history.span(["a"], FINE_ROWS)
    coarse = history.span(["a"], 86_400.0)

    assert len(fine.at) == FINE_ROWS
    assert fine.at[0] == 1500.0
    assert coarse.at.tolist() == [1000.0 + 60 * minute for minute in range(24)]
    assert set(coarse.rate("prompt_tokens").tolist()) == {10.0}


def test_memory_is_bounded() -> None:
    history = History()
    for minute in range(COARSE_ROWS + 10):
        history.add(1000.0 + 60.0 * minute, {"a": row(lookups=minute)})

    columns = history.span(["a"], 86_400.0)

    assert len(columns.at) == COARSE_ROWS
    assert columns.column("lookups")[-1] == COARSE_ROWS + 9


def test_a_store_that_is_gone_is_forgotten() -> None:
    history = History()
    history.add(1000.0, {"a": row(lookups=1)})
    history.add(1001.0, {})

    assert history.span(["a"], 60.0).column("lookups").tolist() == [0.0, 0.0]


def test_a_clock_that_was_set_back_starts_anew() -> None:
    history = filled(50)

    history.add(500.0, {"a": row(lookups=1)})

    assert history.span(["a"], 60.0).at.tolist() == [500.0]


def test_nothing_was_sampled_yet() -> None:
    columns = History().span(["a"], 60.0)

    assert columns.rate("lookups").tolist() == []
    assert columns.growth("lookups") == 0.0


@pytest.mark.parametrize("blocks", [1, 7])
def test_a_sample_of_a_store_has_what_it_did(blocks: int) -> None:
    with open_small() as store:
        use(store, prompt(blocks))
        use(store, prompt(blocks))

        made = row_of(store.stats(), num_groups=1)

        assert made[INDEX["lookups"]] == 2
        assert made[INDEX["prompt_tokens"]] == 2 * (16 * blocks + 1)
        assert made[INDEX["hit_tokens.host"]] == 16 * blocks
        assert made[INDEX["saved_bytes"]] == made[INDEX["loaded_bytes"]] == blocks * LAYOUT.slot_bytes

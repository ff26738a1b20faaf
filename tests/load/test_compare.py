from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvstore.load.compare import Comparison, ComparisonLine, compare
from kvstore.load.player import PlayedWorkload
from kvstore.load.record import FAILED, Record
from kvstore.load.summary import summarize

Make = Callable[..., Record]
TOLD = {"hit_tokens": {"host": 0}, "cached_tokens": 0}


def compared(cache: list[Record], baseline: list[Record], same_server: bool = True) -> Comparison:
    runs = [PlayedWorkload("with", cache, 2.0), PlayedWorkload("without", baseline, 4.0)]
    return compare(*runs, *(summarize(run, False) for run in runs), same_server=same_server)


def line(comparison: Comparison, name: str) -> ComparisonLine:
    return next(line for line in comparison.lines if line.name == name)


def test_gain_above_one_is_better_with_the_cache(record: Make) -> None:
    comparison = compared([record(ttft_s=0.5, **TOLD)], [record(ttft_s=2.0, **TOLD)])

    assert line(comparison, "time to first token, p50").gain == pytest.approx(4.0)
    assert line(comparison, "time per output token, p99").gain == pytest.approx(1.0)
    assert line(comparison, "output tokens").gain == pytest.approx(2.0)
    assert comparison.warnings == ()


def test_gain_of_nothing_is_none() -> None:
    assert ComparisonLine("x", "s", None, 1.0).gain is None
    assert ComparisonLine("x", "s", 0.0, 1.0).gain is None


def test_equal_texts_are_the_same(record: Make) -> None:
    comparison = compared([record(n, **TOLD) for n in range(3)], [record(n, **TOLD) for n in range(3)])

    assert (comparison.compared, comparison.differences) == (3, ())
    assert comparison.to_json()["same"] == 3


def test_other_text_is_told_with_request_and_place(record: Make) -> None:
    ours, theirs = "a common beginning, then this", "a common beginning, then that"

    comparison = compared(
        [record(0, **TOLD), record(1, text=ours, replica="replica-1", **TOLD)],
        [record(0, **TOLD), record(1, text=theirs, **TOLD)],
    )

    assert comparison.compared == 2
    (difference,) = comparison.differences
    assert (difference.number, difference.at_character, difference.replica) == (1, 27, "replica-1")
    assert difference.cache.endswith("this")
    assert difference.baseline.endswith("that")


@pytest.mark.parametrize("texts", [("same", "same and more"), ("", "x")])
def test_text_that_goes_on_is_another_text(record: Make, texts: tuple[str, str]) -> None:
    comparison = compared([record(text=texts[0], **TOLD)], [record(text=texts[1], **TOLD)])

    assert [difference.at_character for difference in comparison.differences] == [len(texts[0])]


def test_only_what_both_answered_is_compared(record: Make) -> None:
    comparison = compared(
        [record(0, **TOLD), record(1, status=FAILED, **TOLD), record(2, **TOLD)],
        [record(0, **TOLD), record(1, **TOLD), record(2, text="other", status=FAILED, **TOLD)],
    )

    assert (comparison.compared, comparison.differences) == (1, ())
    assert "2 requests were not answered in both runs" in comparison.warnings[0]


@pytest.mark.parametrize(
    ("baseline", "told"),
    [
        ({"hit_tokens": {"host": 64}, "cached_tokens": 64}, "had hits too"),
        ({"cached_tokens": 32}, "had hits too"),
        ({}, "tells nothing of its cache"),
    ],
)
def test_baseline_that_may_have_used_the_cache_is_warned_of(record: Make, baseline: dict[str, Any], told: str) -> None:
    comparison = compared([record(**TOLD)], [record(**baseline)])

    assert told in comparison.warnings[0]
    assert "--baseline-url" in comparison.warnings[0]
    assert compared([record(**TOLD)], [record(**baseline)], same_server=False).warnings == ()

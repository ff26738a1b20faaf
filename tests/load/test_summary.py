from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kvstore.load.player import PlayedWorkload
from kvstore.load.record import FAILED, REFUSED, SKIPPED, Record
from kvstore.load.summary import spread, summarize

Make = Callable[..., Record]


def hits(host: int = 0, disk: int = 0, redis: int = 0) -> dict[str, object]:
    return {"hit_tokens": {"host": host, "disk": disk, "redis": redis}, "cached_tokens": host + disk + redis}


def test_percentiles_lie_between_neighbours() -> None:
    values = spread([float(n) for n in range(1, 101)])

    assert values is not None
    assert (values.count, values.mean, values.p50, values.max) == (100, 50.5, 50.5, 100.0)
    assert values.p95 == pytest.approx(95.05)
    assert values.p99 == pytest.approx(99.01)


def test_values_that_are_not_there_do_not_count() -> None:
    assert spread([None, None]) is None
    assert spread([None, 3.0]) == spread([3.0])


def test_times_of_a_record_are_reckoned_from_when_it_was_due(record: Make) -> None:
    made = record(planned_s=10.0, ttft_s=2.0)

    assert made.ttft_s == pytest.approx(2.0)
    assert made.token_s == pytest.approx(0.1)
    assert made.end_to_end_s == pytest.approx(2.3)


def test_time_per_token_is_over_the_servers_tokens_where_it_sends_several_at_once(record: Make) -> None:
    assert record(completion_tokens=7).token_s == pytest.approx(0.05)


def test_hit_rate_is_weighted_by_tokens(record: Make) -> None:
    run = PlayedWorkload(
        "run",
        [
            record(0, prompt_tokens=1000, **hits(host=900)),
            record(1, prompt_tokens=10, **hits()),
            record(2, prompt_tokens=990, **hits(disk=90, redis=10)),
        ],
        wall_s=2.0,
    )

    summary = summarize(run, open_loop=False)

    assert summary.all.hit_rate == pytest.approx(0.5)
    assert summary.all.hit_tokens == {"host": 900, "disk": 90, "redis": 10}
    assert summary.prompt_tokens_per_s == 1000.0
    assert summary.output_tokens_per_s == 6.0
    assert summary.requests_per_s == 1.5


def test_server_that_tells_no_hits_has_no_hit_rate(record: Make) -> None:
    summary = summarize(PlayedWorkload("run", [record()], 1.0), open_loop=False)

    assert summary.all.hit_rate is None
    assert list(summary.by_source) == ["not told"]


def test_requests_are_grouped_by_replica_part_and_farthest_tier(record: Make) -> None:
    run = PlayedWorkload(
        "run",
        [
            record(0, replica="b", part="first", **hits()),
            record(1, replica="a", part="later", **hits(host=50)),
            record(2, replica="b", part="later", **hits(host=20, redis=30)),
            record(3, replica="a", part="later", **hits(host=20, disk=5)),
        ],
        1.0,
    )

    summary = summarize(run, open_loop=False)

    assert {name: group.requests for name, group in summary.by_replica.items()} == {"a": 2, "b": 2}
    assert list(summary.by_replica) == ["a", "b"]
    assert {name: group.requests for name, group in summary.by_part.items()} == {"first": 1, "later": 3}
    assert list(summary.by_source) == ["computed", "host", "disk", "redis"]
    assert summary.by_replica["b"].hit_rate == pytest.approx(0.25)


def test_what_was_not_answered_is_counted_by_kind_with_an_example(record: Make) -> None:
    failures = [
        record(n, status=FAILED, error=kind, error_detail=f"detail {n}", replica="replica-1")
        for n, kind in enumerate(["timeout", "HTTP 500", "HTTP 500"])
    ]
    others = [
        record(3, status=REFUSED, refusals=["queue_full"]),
        record(4, status=SKIPPED, sent_s=None),
        record(5, refusals=["queue_full", "token_budget"]),
    ]

    summary = summarize(PlayedWorkload("run", [*failures, *others], 1.0), open_loop=False)

    assert (summary.requests, summary.answered, summary.failed, summary.refused, summary.skipped) == (6, 1, 3, 1, 1)
    assert summary.refusals == {"queue_full": 2, "token_budget": 1}
    assert {kind: failure.count for kind, failure in summary.errors.items()} == {"HTTP 500": 2, "timeout": 1}
    assert summary.errors["HTTP 500"].example == "request 1 (replica-1): detail 1"
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == 1


def test_lateness_leaves_out_what_waited_for_its_conversation(record: Make) -> None:
    run = PlayedWorkload(
        "run", [record(0, planned_s=1.0, sent_s=1.25), record(1, planned_s=1.0, sent_s=3.0, held_s=2.0)], 5.0
    )

    summary = summarize(run, open_loop=True)

    assert summary.late_s is not None
    assert summary.held_s is not None
    assert summary.ttft_sent_s is not None
    assert (summary.late_s.max, summary.held_s.max) == (0.25, 2.0)
    closed = summarize(run, open_loop=False)
    assert (closed.late_s, closed.held_s, closed.ttft_sent_s) == (None, None, None)


def test_parts_of_a_ttft_make_the_whole(record: Make) -> None:
    made = record(planned_s=1.0, ttft_s=3.0, sent_s=3.5, held_s=2.25)

    summary = summarize(PlayedWorkload("run", [made], 5.0), open_loop=True)

    assert summary.late_s is not None
    assert summary.ttft_sent_s is not None
    assert made.held_s + summary.late_s.max + summary.ttft_sent_s.max == pytest.approx(3.0)


def test_nothing_answered_is_a_summary_too() -> None:
    summary = summarize(PlayedWorkload("run", [], 0.0, interrupted=True), open_loop=False)

    assert (summary.requests, summary.ttft_s, summary.all.hit_rate, summary.requests_per_s) == (0, None, None, 0.0)
    json.dumps(summary.to_json())

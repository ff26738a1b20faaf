from __future__ import annotations

import pytest

from kvstore.plan.endings import MAX_REASONS
from kvstore.plan.planner import Planner
from kvstore.plan.records import Request
from tests.helpers.planners import BLOCK, make, path, save


def leaving(planner: Planner, *requests: Request) -> list[str]:
    """Who owns the pages that leave next, the first to leave first."""
    owners = {key: chr(ord("a") + index) for index, request in enumerate(requests) for key in request.keys}
    return [owners[page.block.key] for page in planner.host.policy.victims(8)]


def test_the_pages_of_a_request_that_ended_while_it_was_saved_are_the_most_recent_when_they_are_published() -> None:
    planner, _ = make(num_slots=8)
    first, second = path(0, 3), path(1, 2)
    save(planner, second)
    lease = planner.prepare_save(first, 0, 3, 1.0)

    planner.finished(first, 2.0)
    planner.finished(second, 3.0)
    planner.complete(lease.id, 4.0)

    assert leaving(planner, first, second) == ["b", "b", "a", "a", "a"]
    planner.check()


def test_a_path_that_was_saved_in_parts_after_its_request_ended_leaves_tail_first() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 4)
    leases = [planner.prepare_save(request, first, 2, 0.0) for first in (0, 2)]
    planner.finished(request, 1.0)

    for lease in leases:
        planner.complete(lease.id, 2.0)

    assert [page.block.key for page in planner.host.policy.victims(4)] == request.keys[::-1]
    planner.check()


def test_the_time_that_loading_saved_is_that_of_computing() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 3)
    save(planner, request)
    planner.observe_prefill(100 * BLOCK, 200.0)  # a block in two seconds

    planner.complete(planner.prepare_load(request, 3, 0.0).id, 0.0)

    assert planner.endings.seconds_saved == pytest.approx(6.0)


def test_a_load_that_was_given_up_saved_no_time() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 3)
    save(planner, request)
    planner.observe_prefill(100 * BLOCK, 200.0)

    planner.release(planner.prepare_load(request, 3, 0.0).id, 0.0)

    assert planner.endings.seconds_saved == 0.0


def test_reasons_are_counted_as_long_as_there_are_few() -> None:
    planner, _ = make(num_slots=8)
    for number in range(MAX_REASONS + 5):
        planner.finished(path(0, 1), 0.0, finish_reason="stop")
        planner.finished(path(0, 1), 0.0, finish_reason=f"reason {number}")

    reasons = planner.endings.finish_reasons
    assert reasons["stop"] == MAX_REASONS + 5
    assert reasons["other"] == 6
    assert len(reasons) == MAX_REASONS + 1

from __future__ import annotations

import pytest

from kvstore.cluster.admission import MAX_RETRY_S, QUEUE_FULL, TOKEN_BUDGET, Admission, Rate, Refused


@pytest.fixture
def admission() -> Admission:
    """100 prompt tokens and 10 answer tokens per second."""
    return Admission(max_queue=2, max_tokens=1000, prefill=Rate(100.0, True), decode=Rate(10.0, True))


def test_what_is_inside_holds_its_prompt_and_its_answer_until_it_leaves(admission: Admission) -> None:
    ticket = admission.enter(100, 20, num_queued=0)
    assert admission.tokens == 120

    admission.leave(ticket)
    admission.leave(ticket)

    assert admission.tokens == 0


def test_a_full_queue_refuses(admission: Admission) -> None:
    admission.enter(100, 10, num_queued=1)

    with pytest.raises(Refused, match="2 requests wait, and no more than 2 may") as refused:
        admission.enter(1, 1, num_queued=2)

    assert refused.value.reason == QUEUE_FULL
    assert admission.refusals == {QUEUE_FULL: 1}
    assert admission.tokens == 110


def test_a_request_that_exceeds_the_budget_is_refused_with_the_numbers(admission: Admission) -> None:
    admission.enter(900, 0, num_queued=0)

    with pytest.raises(Refused, match="the request needs 101 tokens; 900 of 1000 are taken") as refused:
        admission.enter(100, 1, num_queued=0)

    assert refused.value.reason == TOKEN_BUDGET
    admission.enter(99, 1, num_queued=0)


def test_the_wait_for_a_place_is_the_work_over_the_number_of_requests(admission: Admission) -> None:
    for _ in range(2):
        admission.enter(200, 30, num_queued=0)  # 2 s of prompt and 3 s of answer
    assert admission.work_s == pytest.approx(10.0)

    with pytest.raises(Refused) as refused:
        admission.check_queue(2)

    assert refused.value.retry_after_s == 5


def test_the_wait_for_tokens_is_the_share_of_the_work_that_frees_them(admission: Admission) -> None:
    admission.enter(500, 100, num_queued=0)  # 15 s

    with pytest.raises(Refused) as refused:
        admission.enter(500, 100, num_queued=0)  # 200 too many of 600

    assert refused.value.retry_after_s == 5


def test_work_that_is_done_shortens_the_wait(admission: Admission) -> None:
    ticket = admission.enter(500, 100, num_queued=0)
    ticket.prompt_left, ticket.new_left = 0, 10

    with pytest.raises(Refused) as refused:
        admission.check_queue(2)

    assert admission.tokens_left == 10
    assert refused.value.retry_after_s == 1


def test_a_wait_is_at_least_one_second_and_never_for_ever() -> None:
    slow = Admission(0, 1000, Rate(1e-9, True), Rate(1e-9, True))
    with pytest.raises(Refused) as soon:
        slow.check_queue(0)
    slow._inside.add(slow_ticket := Admission(9, 1000).enter(100, 0, num_queued=0))

    with pytest.raises(Refused) as late:
        slow.check_queue(0)

    assert slow_ticket.tokens == 100
    assert (soon.value.retry_after_s, late.value.retry_after_s) == (1, MAX_RETRY_S)


def test_the_first_measurement_replaces_the_guess_and_later_ones_are_averaged() -> None:
    rate = Rate(1.0)

    rate.observe(100, 1.0)
    assert rate.tokens_per_s == 100.0
    rate.observe(200, 1.0)

    assert rate.tokens_per_s == pytest.approx(110.0)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (1, 0.0)])
def test_a_measurement_of_nothing_is_not_taken(tokens: int, seconds: float) -> None:
    rate = Rate(7.0)

    rate.observe(tokens, seconds)

    assert rate == Rate(7.0)

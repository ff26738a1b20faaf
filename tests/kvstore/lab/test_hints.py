"""Hints that clients of a trace could have given, and what a replay makes of them."""

from __future__ import annotations

from kvstore.lab.hints import TOOL_PAUSE_S, hints_of
from kvstore.lab.replay import play
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.sweep import Player
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

BLOCK = 4


def agents(num_sessions: int, num_turns: int) -> ReplayTrace:
    """Sessions one after another, each of which grows by two blocks a turn and calls tools until its end."""
    requests = []
    for number in range(num_sessions * num_turns):
        session, turn = divmod(number, num_turns)
        blocks = tuple(range(1000 * session, 1000 * session + 2 * (turn + 1)))
        reason = "end_turn" if turn == num_turns - 1 else "tool_use"
        requests.append(KvtRequest(float(number), session, -1, BLOCK * len(blocks), 1, blocks, finish_reason=reason))
    return ReplayTrace("agents", BLOCK, tuple(requests))


def hit_tokens(trace: ReplayTrace, num_blocks: int, hints: float) -> int:
    played = play(trace, Setup(((HOST, num_blocks),), hints=hints))
    return int(Player(trace, engine="planner").hit_tokens(played).sum())


def test_without_hints_the_store_is_told_nothing() -> None:
    assert hints_of(agents(2, 2), 0.0) is None


def test_the_last_request_of_a_session_and_tool_calls_are_told() -> None:
    trace = agents(1, 3)

    told = hints_of(trace, 1.0)

    assert told is not None
    assert [hint.options.last_turn for hint in told] == [False, False, True]
    assert [[wish.ttl_s for wish in hint.wishes] for hint in told] == [[TOOL_PAUSE_S], [TOOL_PAUSE_S], []]
    assert {hint.options.session for hint in told} == {"0"}


def test_a_larger_share_adds_requests_that_give_hints() -> None:
    trace = agents(50, 4)
    gave = []
    for share in (0.25, 0.5, 1.0):
        told = hints_of(trace, share)
        assert told is not None
        gave.append({number for number, hint in enumerate(told) if hint.options.last_turn or hint.wishes})

    assert gave[0] < gave[1] < gave[2]
    assert 0.15 < len(gave[0]) / len(gave[2]) < 0.35
    assert hints_of(trace, 0.25) == hints_of(trace, 0.25)


def test_a_session_that_is_told_to_be_over_makes_room_for_one_that_comes_back() -> None:
    back = tuple(range(9000, 9010))
    requests = []
    for number in range(40):  # sessions of one request each, and one that comes back after four of them
        own = tuple(range(100 * number, 100 * number + 6))
        requests.append(KvtRequest(3.0 * number, number, -1, BLOCK * len(own), 1, own))
        if number % 4 == 3:
            requests.append(KvtRequest(3.0 * number + 1, 99, -1, BLOCK * len(back), 1, back))
    trace = ReplayTrace("over", BLOCK, tuple(requests))

    assert hit_tokens(trace, 20, 0.0) == 0
    assert hit_tokens(trace, 20, 1.0) == 9 * len(back) * BLOCK


def test_a_prefix_whose_reply_calls_a_tool_outlives_what_comes_in_between() -> None:
    requests = [KvtRequest(0.0, 0, -1, 4 * BLOCK, 1, (0, 1, 2, 3), finish_reason="tool_use")]
    others = [tuple(range(100 * number, 100 * number + 6)) for number in range(1, 9)]
    requests += [KvtRequest(float(n), n, -1, 6 * BLOCK, 1, blocks) for n, blocks in enumerate(others, 1)]
    requests.append(KvtRequest(9.0, 0, -1, 5 * BLOCK, 1, (0, 1, 2, 3, 4)))
    trace = ReplayTrace("pause", BLOCK, tuple(requests))

    assert hit_tokens(trace, 12, 0.0) == 0
    assert hit_tokens(trace, 12, 1.0) == 4 * BLOCK


def test_promises_end_by_the_traces_clock() -> None:
    times = (0.0, 1.0, 2 * TOOL_PAUSE_S, 2 * TOOL_PAUSE_S + 1)
    prompts = ((1, 2), (3, 4), (5, 6, 7, 8), (5, 6, 7, 8))
    trace = ReplayTrace(
        "pauses",
        BLOCK,
        tuple(
            KvtRequest(now, number, -1, BLOCK * len(blocks), 1, blocks, finish_reason="tool_use")
            for number, (now, blocks) in enumerate(zip(times, prompts, strict=True))
        ),
    )

    assert hit_tokens(trace, 4, 1.0) == 4 * BLOCK

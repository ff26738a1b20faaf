from __future__ import annotations

import asyncio

from kvstore.load.arrivals import Closed, Open
from kvstore.load.player import Asking
from kvstore.load.record import FAILED, OK, SKIPPED
from kvstore.load.requests import CHAT, COMPLETIONS
from kvstore.load.workloads import MultiRound, NoReuse, SharedPrompt
from tests.helpers.openai_server import Behaviour, FakeServer
from tests.load.conftest import Play

TALK = MultiRound(users=2, rounds=3, system_tokens=20, history_tokens=20, question_tokens=5, answer_tokens=3)


async def test_every_request_of_a_closed_loop_is_answered_and_no_more_run_at_once(
    server: FakeServer, played: Play
) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.02)

    run = await played(NoReuse(requests=9, prompt_tokens=20, answer_tokens=3).make(0), Closed(3))

    assert [record.number for record in run.records] == list(range(9))
    assert all(record.ok for record in run.records)
    assert server.most_at_once == 3
    assert not run.interrupted


async def test_conversation_goes_on_from_the_answer_that_was_given(server: FakeServer, played: Play) -> None:
    run = await played(TALK.make(0), Closed(4))

    assert len(run.records) == 6
    sent = {tuple(message["content"] for message in body["messages"]) for body in server.bodies}
    for record in run.records[:4]:
        assert any(record.text in contents for contents in sent)
    assert [len(body["messages"]) for body in server.bodies] == [2, 2, 4, 4, 6, 6]


async def test_turn_after_a_failed_one_is_skipped(server: FakeServer, played: Play) -> None:
    server.behave = lambda number, body: Behaviour(500) if number == 0 else Behaviour()

    run = await played(TALK.make(0), Closed(1))

    assert [record.status for record in run.records] == [FAILED, OK, SKIPPED, OK, SKIPPED, OK]
    assert len(server.bodies) == 4


async def test_given_answers_make_the_prompts_of_another_run(server: FakeServer, played: Play) -> None:
    first = await played(TALK.make(0))
    prompts = sorted(str(body["messages"]) for body in server.bodies)
    server.bodies.clear()
    server.behave = lambda number, body: Behaviour(pieces=[" other"])

    second = await played(TALK.make(0), answers=first.answers)

    assert sorted(str(body["messages"]) for body in server.bodies) == prompts
    assert {record.text for record in second.records} == {" other"}


async def test_open_loop_sends_without_waiting_for_answers(server: FakeServer, played: Play) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.3)

    await played(NoReuse(requests=8, prompt_tokens=20).make(0), Open((0.0,) * 8, "at once"))

    assert server.most_at_once == 8


async def test_user_of_an_open_loop_waits_from_the_time_that_was_due(server: FakeServer, played: Play) -> None:
    # One engine that needs 0.1 s each, all due at once: the last one has waited for all.
    server.one_at_a_time = True
    server.behave = lambda number, body: Behaviour(first_s=0.1)

    run = await played(NoReuse(requests=4, prompt_tokens=20, answer_tokens=2).make(0), Open((0.0,) * 4, "at once"))

    ttfts = sorted(record.ttft_s or 0.0 for record in run.records)
    assert all(ttft >= 0.1 * (place + 1) for place, ttft in enumerate(ttfts))


async def test_turn_that_was_due_before_the_last_answer_counts_its_wait(server: FakeServer, played: Play) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.2)
    talk = MultiRound(users=1, rounds=2, system_tokens=5, history_tokens=0, question_tokens=5, answer_tokens=3).make(0)

    run = await played(talk, Open((0.0, 0.01), "close together"))

    second = run.records[1]
    assert second.planned_s == 0.01
    assert second.held_s >= 0.15
    assert second.ttft_s is not None
    assert second.ttft_s >= 0.35


async def test_stop_keeps_what_is_done_and_leaves_nothing_under_way(server: FakeServer, played: Play) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.0 if number < 2 else 30)
    stop = asyncio.Event()

    playing = asyncio.ensure_future(played(NoReuse(requests=6, prompt_tokens=20).make(0), Closed(2), stop=stop))
    while len(server.bodies) < 4:
        await asyncio.sleep(0.01)
    stop.set()
    run = await playing

    assert run.interrupted
    assert [record.number for record in run.records] == [0, 1]
    assert all(task.done() or task is asyncio.current_task() for task in asyncio.all_tasks())


async def test_our_replicas_are_told_session_and_last_turn(server: FakeServer, played: Play) -> None:
    await played(TALK.make(7), Closed(1), asking=Asking(CHAT, tenant="acme"))

    extensions = [body["kvstore"] for body in server.bodies]
    assert [extension["last_turn"] for extension in extensions] == [False] * 4 + [True] * 2
    assert [extension["session"] for extension in extensions] == [f"multi-round-7-{user}" for user in (0, 1)] * 3
    assert {extension["tenant"] for extension in extensions} == {"acme"}


async def test_single_requests_say_nothing_of_sessions(server: FakeServer, played: Play) -> None:
    await played(SharedPrompt(requests=2, system_tokens=20).make(0))

    assert all("kvstore" not in body for body in server.bodies)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)


async def test_run_without_cache_asks_for_that(server: FakeServer, played: Play) -> None:
    await played(TALK.make(0), asking=Asking(CHAT, cache=False))

    assert [body["kvstore"] for body in server.bodies] == [{"cache": False}] * 6


async def test_plain_requests_have_only_what_openai_knows(server: FakeServer, played: Play) -> None:
    await played(TALK.make(0), asking=Asking(COMPLETIONS, plain=True))

    allowed = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert all(set(body) == allowed for body in server.bodies)
    assert set(server.paths) == {"/v1/completions"}

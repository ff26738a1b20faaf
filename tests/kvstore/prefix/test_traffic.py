"""Sessions of real requests: what each turn lost, by whom, within bounds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvstore.errors import RequestError
from kvstore.prefix import shapes
from kvstore.prefix.rendering import RenderProcess, Template
from kvstore.prefix.requests import parse, read_log
from kvstore.prefix.spans import Spans
from kvstore.prefix.template import ModelTemplate, plain
from kvstore.prefix.tokens import StandIn
from kvstore.prefix.traffic import Traffic
from tests.kvstore.prefix import templates


def ask(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), "session": "one", **more}


SYSTEM = {"role": "system", "content": "You are the harbour's clerk. It is 9:15."}
ANSWER = {"role": "assistant", "content": shapes.sentence("Answer", 0)}
FIRST = ask(SYSTEM, shapes.user(0))
TOOLS = shapes.tools()


@pytest.mark.parametrize(
    ("old", "new", "mechanism"),
    [
        (FIRST, ask(SYSTEM, shapes.user(0), ANSWER, shapes.user(1)), "kept"),
        (FIRST, ask({**SYSTEM, "content": "Another clerk."}, shapes.user(0), ANSWER, shapes.user(1)), "system_changed"),
        (
            FIRST,
            ask({**SYSTEM, "content": SYSTEM["content"].replace("9:15", "10:40")}, shapes.user(0), ANSWER),
            "date",
        ),
        (
            ask(SYSTEM, shapes.user(0), ANSWER, shapes.user(1)),
            ask(SYSTEM, shapes.user(1), ANSWER, shapes.user(2)),
            "history_cut",
        ),
        (
            ask(SYSTEM, shapes.user(0), ANSWER, shapes.user(1)),
            ask(SYSTEM, shapes.user(0), {**ANSWER, "content": "cut"}, shapes.user(1), ANSWER, shapes.user(2)),
            "history_edited",
        ),
        (FIRST, ask(SYSTEM, shapes.user(1)), "turn_repeated"),
        ({**FIRST, "tools": TOOLS}, ask(SYSTEM, shapes.user(0), ANSWER, tools=shapes.permuted(TOOLS)), "key_order"),
        ({**FIRST, "tools": TOOLS}, ask(SYSTEM, shapes.user(0), ANSWER, tools=shapes.tools(True)), "tools_first"),
        ({**FIRST, "tools": TOOLS}, ask(SYSTEM, shapes.user(0), ANSWER, tools=TOOLS[1:]), "tools_changed"),
        ({"prompt": "a b c d", "session": "1"}, {"prompt": "a b x d e", "session": "1"}, "text_changed"),
        ({"prompt": [1, 2, 3], "session": "1"}, {"prompt": [1, 2, 3, 4], "session": "1"}, "kept"),
    ],
)
def test_a_clients_change_is_named(
    process: RenderProcess, old: dict[str, Any], new: dict[str, Any], mechanism: str
) -> None:
    traffic = Traffic(plain(), process)

    traffic.observe(parse(old))
    traffic.observe(parse(new))

    (group,) = traffic.report()["groups"]
    assert group["mechanism"] == mechanism
    assert (group["lost_tokens"] > 0) == (mechanism != "kept")


def test_a_template_that_breaks_what_the_client_kept_is_named(process: RenderProcess) -> None:
    traffic = Traffic(ModelTemplate("ours", Template(templates.LOOP_REASONING_DROPPED), StandIn()), process)
    loop = next(shape for shape in shapes.shapes() if shape.key == "loop_reasoning")

    for number, prompt in enumerate(loop.prompts):
        traffic.observe(parse(ask(*prompt.messages, tools=list(prompt.tools))), f"line {number}")

    report = traffic.report()
    assert [(group["mechanism"], group["turns"]) for group in report["groups"]] == [
        ("loop_reasoning_dropped", 1),
        ("kept", 6),
    ]
    assert report["groups"][0]["shape"] == "tool loop, reasoning"
    assert report["examples"]["loop_reasoning_dropped"][0]["at"] == "line 7"


def test_requests_without_a_session_are_put_together_by_their_first_question(process: RenderProcess) -> None:
    traffic = Traffic(plain(), process)

    for body in (FIRST, ask(shapes.user(3)), ask(SYSTEM, shapes.user(0), ANSWER, shapes.user(1))):
        traffic.observe(parse({"messages": body["messages"]}))

    assert (traffic.report()["sessions"], traffic.report()["turns"]) == (2, 1)


def test_sessions_and_text_that_are_kept_have_bounds(process: RenderProcess) -> None:
    traffic = Traffic(plain(), process, max_sessions=3)
    small = Traffic(plain(), process, max_chars=10)

    for number in range(10):
        traffic.observe(parse({**FIRST, "session": f"s{number}"}))
        small.observe(parse({**FIRST, "session": f"s{number}"}))

    assert len(traffic._last) == 3
    assert (len(small._last), small._chars) == (0, 0)


def test_a_passage_that_moves_is_counted_and_a_prefix_is_not() -> None:
    rng = np.random.default_rng(1)
    passage, other = rng.integers(0, 50_000, 2000), rng.integers(0, 50_000, 300)
    spans = Spans()

    first = spans.observe(passage)
    again = spans.observe(np.concatenate([passage, other]))
    moved = spans.observe(np.concatenate([other, other, passage]))

    assert (first.prefix, first.elsewhere) == (0, 0)
    assert (again.prefix, again.elsewhere) == (2000, 0)
    assert moved.prefix == 0
    assert 1700 < moved.elsewhere <= 2600


def test_what_is_remembered_of_spans_has_a_bound() -> None:
    spans = Spans(max_known=10)

    spans.observe(np.arange(5000))

    assert len(spans._blocks) == len(spans._pieces) == 10


def test_lines_that_are_no_requests_are_told_with_number_and_reason() -> None:
    lines = [
        json.dumps(FIRST).encode(),
        b"",
        b"{",
        b"[1]",
        b'{"messages": []}',
        b'{"messages": [{"content": "x"}]}',
        b"{}",
    ]
    deep = b"[" * 100_000

    found = dict(read_log([*lines, deep, json.dumps({"body": FIRST}).encode()]))

    assert sorted(found) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert found[4] == "it is no JSON object"
    assert found[5] == "messages is empty"
    assert found[6] == "a message has no role"
    assert str(found[3]).startswith("it is not JSON")
    assert str(found[8]).startswith("it is not JSON")
    assert found[9] == found[1]


@pytest.mark.parametrize(
    "body", [{"prompt": ["a", "b"]}, {"prompt": 3}, {**FIRST, "tools": "x"}, {**FIRST, "chat_template_kwargs": [1]}]
)
def test_a_wrong_request_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        parse(body)

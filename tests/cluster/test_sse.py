from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstore.cluster.sse import MAX_EVENT_BYTES, BrokenStream, Progress, events

DONE = b"data: [DONE]\n\n"


def chunk(text: str, finish: str | None = None, *, id: str = "one", chat: bool = False) -> bytes:
    part: dict[str, Any] = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {"id": id, "created": 7, "choices": [{"index": 0, **part, "finish_reason": finish}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def read(event: bytes | None) -> Any:
    assert event is not None
    return json.loads(event.removeprefix(b"data: "))


async def split(raw: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(raw), size):
        yield raw[at : at + size]


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_events_come_out_whole_however_they_were_cut(size: int) -> None:
    sent = [chunk("é"), b": still here\n\n", chunk("b", "stop"), DONE]

    assert [one async for one in events(split(b"".join(sent), size))] == sent


async def test_half_an_event_is_never_passed_on() -> None:
    assert [one async for one in events(split(chunk("a") + chunk("b")[:-1], 10))] == [chunk("a")]


async def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(BrokenStream, match="longer than"):
        _ = [one async for one in events(split(b"x" * (MAX_EVENT_BYTES + 2), MAX_EVENT_BYTES))]


def test_a_stream_that_nothing_happens_to_is_passed_on_untouched() -> None:
    progress = Progress()
    sent = [chunk("a"), b": comment\n\n", chunk("b", "length"), b'data: {"choices": [], "usage": {}}\n\n', DONE]

    assert [progress.take(one) for one in sent] == sent
    assert (progress.text, progress.is_done) == ("ab", True)


def test_a_second_answer_goes_on_where_the_first_one_ended_under_its_id() -> None:
    progress = Progress()
    for text in ("on", "ce", ""):
        progress.take(chunk(text))

    progress.restart()
    passed = [progress.take(chunk(text, id="two")) for text in ("o", "nce", " up", "on")]
    progress.take(DONE)

    assert passed[:2] == [None, None]
    assert [read(event)["choices"][0]["text"] for event in passed[2:]] == [" up", "on"]
    assert {read(event)["id"] for event in passed[2:]} == {"one"}
    assert (progress.text, progress.is_done) == ("once upon", True)


@pytest.mark.parametrize("chat", [True, False])
def test_a_piece_that_is_known_in_part_is_cut(chat: bool) -> None:
    progress = Progress()
    progress.take(chunk("on", chat=chat))
    progress.restart()

    choice = read(progress.take(chunk("once", id="two", chat=chat)))["choices"][0]

    assert choice.get("text", choice.get("delta")) == ({"content": "ce"} if chat else "ce")


def test_the_last_chunk_is_passed_on_also_if_its_text_is_known() -> None:
    progress = Progress()
    progress.take(chunk("once", "length"))
    progress.restart()

    last = read(progress.take(chunk("once", "length", id="two")))

    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "length")
    assert progress.take(b'data: {"id": "two", "choices": [], "usage": {"total_tokens": 3}}\n\n') is not None


def test_it_may_be_restarted_more_than_once() -> None:
    progress = Progress()
    progress.take(chunk("a"))
    for text in ("ab", "abc"):
        progress.restart()
        progress.take(chunk(text))

    assert progress.text == "abc"


def test_a_second_answer_that_differs_is_not_gone_on_with() -> None:
    progress = Progress()
    progress.take(chunk("once"))
    progress.restart()

    with pytest.raises(BrokenStream, match="differs"):
        progress.take(chunk("one day"))


def test_a_second_answer_that_is_shorter_is_not_gone_on_with() -> None:
    progress = Progress()
    progress.take(chunk("once"))
    progress.restart()
    progress.take(chunk("on"))

    with pytest.raises(BrokenStream, match="shorter"):
        progress.take(DONE)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (b'data: {"error": {"message": "the replica is closing"}}\n\n', "the replica is closing"),
        (b'data: {"error": "no"}\n\n', "no"),
        (b"data: {no json}\n\n", "not JSON"),
        (b"data: [1]\n\n", "not a JSON object"),
    ],
)
def test_what_is_no_piece_of_an_answer_breaks_it(event: bytes, told: str) -> None:
    with pytest.raises(BrokenStream, match=told):
        Progress().take(event)

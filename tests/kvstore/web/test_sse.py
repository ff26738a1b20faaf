from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from kvstore.web.sse import MAX_EVENT_BYTES, ServerEvent, read_events

DONE = b"data: [DONE]\n\n"


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}, ensure_ascii=False).encode() + b"\n\n"


async def read(raw: bytes, size: int = 1000) -> list[ServerEvent]:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), size):
            yield raw[at : at + size]

    return [event async for event in read_events(pieces())]


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_events_come_out_whole_however_they_were_cut(size: int) -> None:
    sent = [chunk("é"), b": still here\n\n", chunk("b"), DONE]

    assert [event.raw for event in await read(b"".join(sent), size)] == sent


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
async def test_lines_may_end_as_on_windows(size: int) -> None:
    events = await read(b'event: x\r\ndata: {"a": 1}\r\n\r\ndata:[DONE]\r\n\r\n', size)

    assert [event.is_done for event in events] == [False, True]
    assert events[0].as_json() == {"a": 1}


async def test_half_an_event_is_never_passed_on() -> None:
    assert [event.raw for event in await read(chunk("a") + chunk("b")[:-1], 10)] == [chunk("a")]


async def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than"):
        await read(b"x" * (MAX_EVENT_BYTES + 2), MAX_EVENT_BYTES)


async def test_a_comment_says_nothing_and_several_lines_of_data_are_one() -> None:
    comment, event = await read(b': hello\n\nid: 7\ndata: {"a":\ndata: 1}\n\n')

    assert comment.data is None
    assert not comment.is_done
    assert event.as_json() == {"a": 1}


@pytest.mark.parametrize("data", [b"{no json}", b"[1]", b""])
async def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    (event,) = await read(b"data: " + data + b"\n\n")

    with pytest.raises(ValueError, match=r"Expecting|no object"):
        event.as_json()

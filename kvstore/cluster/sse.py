"""Server-sent events of an answer on their way through a router, and how another replica can go on with it.

The same request at temperature 0 gives the same text everywhere. So when a replica dies in the middle of a stream, the
request can be asked elsewhere: of the second answer, that part is dropped which the client has already, after it has
been compared; what follows is sent under the first answer's id.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

MAX_EVENT_BYTES = 1 << 22
END = b"\n\n"
DATA = b"data:"
DONE = b"[DONE]"


class BrokenStream(Exception):
    """An answer that cannot be gone on with: it ended early, reported an error, or differs from its first part."""


async def events(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Whole events out of pieces of any length, each with its empty line. What is not whole at the end is dropped."""
    buffer = b""
    async for piece in pieces:
        buffer += piece
        while (end := buffer.find(END)) >= 0:
            yield buffer[: end + len(END)]
            buffer = buffer[end + len(END) :]
        if len(buffer) > MAX_EVENT_BYTES:
            raise BrokenStream(f"an event is longer than {MAX_EVENT_BYTES} bytes")


class Progress:
    """What a client has of one answer. `restart` before another replica's answer is taken."""

    def __init__(self) -> None:
        self.text = ""
        self.is_done = False
        self._head: dict[str, Any] = {}
        self._again = ""  # text that the client has, and the answer that is now read has not come to yet
        self._restarted = False

    def restart(self) -> None:
        """The next events are those of an answer from its beginning."""
        self._again, self._restarted = self.text, True

    def take(self, event: bytes) -> bytes | None:
        """What to send of an event: itself where nothing was restarted. None: the client has it already.

        Raises BrokenStream.
        """
        data = event.strip()
        if not data.startswith(DATA):
            return event  # a comment that keeps the connection alive
        data = data[len(DATA) :].strip()
        if data == DONE:
            if self._again:
                raise BrokenStream("the second answer is shorter than what was sent of the first")
            self.is_done = True
            return event
        try:
            body = json.loads(data)
        except ValueError:
            raise BrokenStream("an event is not JSON") from None
        if not isinstance(body, dict):
            raise BrokenStream("an event is not a JSON object")
        if "error" in body:
            error = body["error"]
            raise BrokenStream(str(error.get("message") if isinstance(error, dict) else error)[:300])
        return self._pass(event, body)

    def _pass(self, event: bytes, body: dict[str, Any]) -> bytes | None:
        text = _text(body)
        if not self._restarted:
            self._head = self._head or {name: body[name] for name in ("id", "created") if name in body}
            self.text += text
            return event
        is_known = bool(self._again)
        known, text = text[: len(self._again)], text[len(self._again) :]
        if not self._again.startswith(known):
            raise BrokenStream("the second answer differs from what was sent of the first")
        self._again = self._again[len(known) :]
        self.text += text
        if is_known and not text and not _ends(body):
            return None
        _set_text(body, text)
        return b"data: " + json.dumps({**body, **self._head}, ensure_ascii=False).encode() + END


def _choice(body: dict[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _text(body: dict[str, Any]) -> str:
    choice = _choice(body)
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _set_text(body: dict[str, Any], text: str) -> None:
    choice = _choice(body)
    delta = choice.get("delta")
    if isinstance(delta, dict):
        delta.pop("role", None)
        if "content" in delta:
            delta["content"] = text
    elif "text" in choice:
        choice["text"] = text


def _ends(body: dict[str, Any]) -> bool:
    return not body.get("choices") or _choice(body).get("finish_reason") is not None

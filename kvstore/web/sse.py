"""Server-sent events as they come from a server, for whoever reads a stream: the router, the load generator.

An event ends with an empty line; lines end with LF or CRLF. What is not whole when the stream ends is dropped, as the
standard says: half an event must not be taken for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, NamedTuple

MAX_EVENT_BYTES = 1 << 22
DONE = b"[DONE]"  # how a stream of OpenAI's API ends

_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_END = 4  # bytes


class ServerEvent(NamedTuple):
    """An event as it came, with its empty line, and what it says; None for a comment that keeps a connection alive."""

    raw: bytes
    data: bytes | None

    @property
    def is_done(self) -> bool:
        """Whether it says that the stream is complete."""
        return self.data == DONE

    def as_json(self) -> dict[str, Any]:
        """The object that it brings. Raises ValueError if it is none."""
        value = json.loads(self.data or b"null")
        if not isinstance(value, dict):
            raise ValueError(f"an event that is no object: {(self.data or b'')[:80]!r}")
        return value


async def read_events(pieces: AsyncIterable[bytes]) -> AsyncIterator[ServerEvent]:
    """Whole events out of pieces of any length. Raises ValueError for one longer than MAX_EVENT_BYTES."""
    buffer, looked_at = b"", 0
    async for piece in pieces:
        buffer += piece
        while (end := _END.search(buffer, looked_at)) is not None:
            raw, buffer, looked_at = buffer[: end.end()], buffer[end.end() :], 0
            yield ServerEvent(raw, _data(raw))
        looked_at = max(0, len(buffer) - _LONGEST_END)
        if len(buffer) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")


def _data(raw: bytes) -> bytes | None:
    lines = [line[len(b"data:") :].strip() for line in raw.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None

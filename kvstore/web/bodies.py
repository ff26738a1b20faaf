"""Bodies of requests: read whole, within a time and a size, and all of them together within one size.

Small ones are always taken. What is larger shares a budget, so that many senders of large bodies at once get a 429
instead of the machine's memory. The event loop only.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from kvstore.web.server import BAD_BODY, Handler

MAX_BYTES = 16 << 20  # a million tokens as JSON
SMALL_BYTES = 64 << 10
MAX_ALL_BYTES = 256 << 20
TIMEOUT_S = 30.0


class BodyError(Exception):
    """A body that is not taken. status, and the field of the request that is wrong."""

    def __init__(self, status: int, why: str, field: str = "body") -> None:
        super().__init__(why)
        self.status = status
        self.field = field


class Bodies:
    """The bodies under way of one server.

    num_bytes: in large ones now.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_all_bytes: int = MAX_ALL_BYTES) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._max_all_bytes = max_all_bytes

    async def read(self, request: web.Request, timeout_s: float | None = None) -> bytes:
        """The whole body, within TIMEOUT_S unless said otherwise. Raises BodyError, or ConnectionError."""
        timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        if (request.content_length or 0) > self._max_bytes:
            raise self._too_long()
        try:
            body = await asyncio.wait_for(self._read(request), timeout_s)
        except asyncio.TimeoutError:
            raise BodyError(408, f"the body did not come within {timeout_s:.0f} s") from None
        except BAD_BODY as error:
            raise bad_body(request, error) from None
        if isinstance(request.protocol, Handler):
            request.protocol.working()
        return body

    async def _read(self, request: web.Request) -> bytes:
        parts: list[bytes] = []
        size = booked = 0
        try:
            while piece := await request.content.readany():
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_long()
                if size > SMALL_BYTES:
                    self.num_bytes += size - booked
                    booked = size
                    if self.num_bytes > self._max_all_bytes:
                        raise BodyError(429, "too many large bodies are under way; send it again in a moment")
                parts.append(piece)
            return b"".join(parts)
        finally:
            self.num_bytes -= booked

    def _too_long(self) -> BodyError:
        return BodyError(413, f"the body is longer than {self._max_bytes} bytes")


def bad_body(request: web.Request, error: BaseException) -> BodyError:
    """The error of a body that its own headers do not describe; nothing of the body is repeated."""
    if request.headers.get("Content-Encoding"):
        return BodyError(400, "the body is not what Content-Encoding says", "Content-Encoding")
    if request.headers.get("Transfer-Encoding"):
        return BodyError(400, "the body is not in chunks as Transfer-Encoding says", "Transfer-Encoding")
    return BodyError(400, "the body ends before Content-Length says", "Content-Length")

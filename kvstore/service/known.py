"""The requests of one client that the daemon knows.

A message names a request and brings the keys that the client believes are new here. What the daemon knows may be more
(another connection was faster) or less (it forgot, or is another daemon): then the client sends all keys once more.

In the daemon's event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.errors import RequestError
from kvstore.plan.records import Request, RequestOptions
from kvstore.service.messages import RequestPart
from kvstore.service.stores import OpenStore

MAX_REQUEST_TOKENS = (1 << 32) - 1  # answers tell tokens in 32 bits
MAX_REQUESTS = 16_384  # as many as the planner keeps notes about


class Resend(Exception):
    """The request is not known here as the client thinks: it shall send all keys."""


class KnownRequests:
    """Requests by the client's numbers. Bounded: the oldest is forgotten."""

    def __init__(self, opened: OpenStore, holder: str) -> None:
        """holder: the client, as operators know it."""
        self._opened = opened
        self._holder = holder
        self._requests: OrderedDict[int, Request] = OrderedDict()

    def take(self, part: RequestPart) -> Request:
        """The request of a message, brought up to date. Raises Resend, or RequestError for what cannot be."""
        request = self._requests.get(part.id)
        if part.base == 0:
            request = self._whole(part, request)
        elif request is None or len(request.keys) < part.base:
            raise Resend
        else:
            # Another connection may have brought the same keys meanwhile; what is known is not appended again.
            request.keys += self._opened.bind(part.keys[len(request.keys) - part.base :])
        if part.num_tokens > MAX_REQUEST_TOKENS:
            raise RequestError(f"request has {part.num_tokens} tokens; at most {MAX_REQUEST_TOKENS} are allowed")
        request.num_tokens = max(request.num_tokens, part.num_tokens)
        request.held = part.held
        least = len(request.keys) * self._opened.layout.block_size
        if request.num_tokens < least:
            raise RequestError(
                f"request has {request.num_tokens} tokens; its {len(request.keys)} blocks need at least {least}"
            )
        return request

    def drop(self, request_id: int) -> None:
        """Forget a request. Idempotent."""
        self._requests.pop(request_id, None)

    def clear(self) -> None:
        """Forget all."""
        self._requests.clear()

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def _whole(self, part: RequestPart, known: Request | None) -> Request:
        keys = self._opened.bind(part.keys)
        if known is not None and known.keys[: len(keys)] == keys[: len(known.keys)]:
            known.keys += keys[len(known.keys) :]
            return known
        while len(self._requests) >= MAX_REQUESTS:
            self._requests.popitem(last=False)
        # Planner ids must differ between clients: this one's number is the store's, not the client's.
        request = self._opened.new_request(keys, part.num_tokens, part.options or RequestOptions(), self._holder)
        self._requests[part.id] = request
        return request

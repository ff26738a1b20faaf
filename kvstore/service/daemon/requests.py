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
from kvstore.requests import check_options
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.protocol import messages
from kvstore.service.protocol.messages import RequestPart

MAX_REQUEST_TOKENS = (1 << 32) - 1  # answers tell tokens in 32 bits
MAX_REQUESTS = 16_384  # of one client; as many as the planner keeps notes about
MAX_KEYS = 1 << 21  # of one client's requests, two of the longest: about 190 MiB with the planner's notes


class Resend(Exception):
    """The request is not known here as the client thinks: it shall send all keys."""


class KnownRequests:
    """Requests by the client's numbers. Bounded in number and in keys: the one unused for longest is forgotten.

    What is forgotten here is over for the store, too: its notes end, and nobody waits for what it was to compute.
    """

    def __init__(self, opened: OpenStore, holder: str) -> None:
        """holder: the client, as operators know it."""
        self.num_keys = 0
        self._opened = opened
        self._holder = holder
        self._requests: OrderedDict[int, Request] = OrderedDict()
        self._counted: dict[int, int] = {}  # keys of each that are counted in num_keys

    def take(self, part: RequestPart) -> Request:
        """The request of a message, brought up to date. Raises Resend, or RequestError for what cannot be."""
        if part.base + len(part.keys) > messages.MAX_KEYS:
            raise messages.too_long(part.base + len(part.keys))
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
        self._count(part.id, request)
        least = len(request.keys) * self._opened.layout.block_size
        if request.num_tokens < least:
            raise RequestError(
                f"request has {request.num_tokens} tokens; its {len(request.keys)} blocks need at least {least}"
            )
        return request

    def drop(self, request_id: int) -> None:
        """Forget a request that is over. Idempotent."""
        if self._requests.pop(request_id, None) is not None:
            self._book(-self._counted.pop(request_id, 0))

    def forget_oldest(self) -> bool:
        """Forget the request that was unused for longest, for the store as well; False if it is the only one."""
        if len(self._requests) < 2:
            return False
        self.end(next(iter(self._requests)))
        return True

    def end(self, request_id: int) -> None:
        """Forget a request, for the store as well."""
        request = self._requests[request_id]
        self.drop(request_id)
        self._opened.store.abandon(request)

    def clear(self) -> None:
        """Forget all, for the store as well."""
        for request_id in self.ids:
            self.end(request_id)

    @property
    def ids(self) -> list[int]:
        """The client's numbers of those that are known."""
        return list(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def _count(self, request_id: int, request: Request) -> None:
        self._requests.move_to_end(request_id)
        grown = len(request.keys) - self._counted.get(request_id, 0)
        if grown:
            self._counted[request_id] = len(request.keys)
            self._book(grown)
        while self.num_keys > MAX_KEYS and self.forget_oldest():
            pass

    def _book(self, num_keys: int) -> None:
        self.num_keys += num_keys
        self._opened.ledger.add(self, num_keys)

    def _whole(self, part: RequestPart, known: Request | None) -> Request:
        keys = self._opened.bind(part.keys)
        if known is not None and known.keys[: len(keys)] == keys[: len(known.keys)]:
            known.keys += keys[len(known.keys) :]
            return known
        self.drop(part.id)
        while len(self._requests) >= MAX_REQUESTS:
            self.forget_oldest()
        # Planner ids must differ between clients: this one's number is the store's, not the client's.
        request = self._opened.new_request(keys, part.num_tokens, _options(part), self._holder)
        request.payer = "" if part.options is None else part.options.payer
        self._requests[part.id] = request
        return request


def _options(part: RequestPart) -> RequestOptions:
    """Raises RequestError naming the field."""
    options = RequestOptions() if part.options is None else part.options.options()
    check_options(options)
    return options

"""The part of a daemon client's face that concerns keeping: calls that the daemon's planner carries out."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.errors import StoreClosed
from kvstore.plan.records import Request
from kvstore.requests import check_range, check_ttl
from kvstore.service.client.calls import Calls
from kvstore.service.protocol import messages


class ClientKeep:
    """The `Keep` (see base.py) of a RemoteStore. Any thread.

    check_open: raises StoreClosed after close.
    """

    def __init__(self, calls: Calls, check_open: Callable[[], None]) -> None:
        self._calls = calls
        self._check_open = check_open

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until unpin; returns the blocks pinned."""
        self._check_open()
        return self._calls.number(request, messages.PinCall)

    def unpin(self, request: Request) -> int:
        """Undo pin; returns the blocks that had one."""
        self._check_open()
        return self._calls.number(request, messages.UnpinCall)

    def set_ttl(self, request: Request, ttl_s: float) -> int:
        """Give the request's known blocks a time to live from now on; returns how many."""
        check_ttl("ttl_s", ttl_s)
        self._check_open()
        return self._calls.number(request, lambda part: messages.SetTtlCall(part, ttl_s))

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that continues them; returns the blocks deleted."""
        check_range("first", first, len(request.keys))
        self._check_open()
        return self._calls.number(request, lambda part: messages.ForgetCall(part, first))

    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        """The request is over."""
        try:
            self._check_open()
        except StoreClosed:
            return
        reason = finish_reason[: messages.MAX_TEXT]
        self._calls.number(request, lambda part: messages.FinishedCall(part, reason, last_turn, reply_tokens))
        self._calls.unsend(request)

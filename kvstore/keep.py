"""How long pages stay: the part of a store's face that concerns keeping, for the store in this process."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.dispatcher import Dispatcher, silent_after_close
from kvstore.plan.in_steps import InSteps
from kvstore.plan.records import Request
from kvstore.requests import check_range, check_ttl


class LocalKeep:
    """The `Keep` (see base.py) of a LocalStore. Any thread."""

    def __init__(self, dispatcher: Dispatcher, in_steps: InSteps, now: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self._in_steps = in_steps
        self._now = now

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until unpin; returns the blocks pinned."""
        return self._dispatcher.carry_out(self._in_steps.pin(request))

    def unpin(self, request: Request) -> int:
        """Undo pin; returns the blocks that had one."""
        return self._dispatcher.carry_out(self._in_steps.unpin(request))

    def set_ttl(self, request: Request, ttl_s: float) -> int:
        """Give the request's known blocks a time to live from now on; returns how many."""
        check_ttl("ttl_s", ttl_s)
        return self._dispatcher.carry_out(self._in_steps.set_ttl(request, ttl_s, self._now()))

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that continues them; returns the blocks deleted."""
        check_range("first", first, len(request.keys))
        return self._dispatcher.carry_out(self._in_steps.forget(request, first, self._now()), tell=True)

    @silent_after_close
    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        """The request is over."""
        steps = self._in_steps.finished(
            request, self._now(), finish_reason, last_turn=last_turn, reply_tokens=reply_tokens
        )
        self._dispatcher.carry_out(steps, tell=True)

"""Admission: a bounded queue and a token budget, and an honest answer about when to come again.

Every request that was let in *holds* its prompt and the tokens it may generate until it ends. A request is refused when
as many wait as may wait, or when it would push the sum over the budget. Retry-After is then the time in which, at the
measured rates, as much work is done as has to leave first: prompts may hit and answers may stop early, so the wait is
rather shorter than told.

No clock, no I/O. One thread.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

QUEUE_FULL = "queue_full"
TOKEN_BUDGET = "token_budget"
MAX_RETRY_S = 3600
# Before anything has been measured; a guess that errs on the slow side for a small model on one core.
START_PREFILL_TOKENS_PER_S = 200.0
START_DECODE_TOKENS_PER_S = 10.0
RATE_WEIGHT = 0.1  # of the newest measurement in a moving average


class Refused(Exception):
    """Not now. reason: QUEUE_FULL or TOKEN_BUDGET; retry_after_s: whole seconds, at least 1."""

    def __init__(self, reason: str, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Rate:
    """A moving average of tokens per second."""

    tokens_per_s: float
    measured: bool = False

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take a measurement; the first one replaces the guess."""
        if num_tokens < 1 or seconds <= 0:
            return
        now = num_tokens / seconds
        self.tokens_per_s += (now - self.tokens_per_s) * (RATE_WEIGHT if self.measured else 1.0)
        self.measured = True


@dataclass(slots=True, eq=False)
class Ticket:
    """One request inside: what it holds of the budget, and what is left to do for it."""

    prompt_tokens: int
    max_new_tokens: int
    prompt_left: int = 0
    new_left: int = 0

    def __post_init__(self) -> None:
        self.prompt_left, self.new_left = self.prompt_tokens, self.max_new_tokens

    @property
    def tokens(self) -> int:
        """The tokens that it holds of the budget."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def tokens_left(self) -> int:
        """The tokens still to be computed for it, at most."""
        return self.prompt_left + self.new_left


@dataclass(slots=True)
class Admission:
    """The books.

    max_queue:  requests that may wait for their turn.
    max_tokens: prompt and answer tokens of all that wait or run.
    refusals:   by reason.
    """

    max_queue: int
    max_tokens: int
    prefill: Rate = field(default_factory=lambda: Rate(START_PREFILL_TOKENS_PER_S))
    decode: Rate = field(default_factory=lambda: Rate(START_DECODE_TOKENS_PER_S))
    refusals: Counter[str] = field(default_factory=Counter)
    _inside: set[Ticket] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Tokens held by all that are inside."""
        return sum(ticket.tokens for ticket in self._inside)

    @property
    def tokens_left(self) -> int:
        """Tokens still to be computed, at most."""
        return sum(ticket.tokens_left for ticket in self._inside)

    @property
    def work_s(self) -> float:
        """Seconds until all that are inside are done, at the measured rates, if nothing hits and nobody stops early."""
        return sum(self._seconds(ticket) for ticket in self._inside)

    def check_queue(self, num_queued: int) -> None:
        """Raise Refused if `num_queued` requests wait and no more may; before work is put into reading a request."""
        if num_queued >= self.max_queue:
            self._refuse(
                QUEUE_FULL,
                f"{num_queued} requests wait, and no more than {self.max_queue} may",
                # One has to end. Of the whole work that is, on average, the share of one request.
                self.work_s / max(1, len(self._inside)),
            )

    def enter(self, prompt_tokens: int, max_new_tokens: int, num_queued: int) -> Ticket:
        """Admit a request, or raise Refused. The caller has checked that it fits into an empty budget."""
        self.check_queue(num_queued)
        ticket = Ticket(prompt_tokens, max_new_tokens)
        held = self.tokens
        over = held + ticket.tokens - self.max_tokens
        if over > 0 and self._inside:
            self._refuse(
                TOKEN_BUDGET,
                f"the request needs {ticket.tokens} tokens; {held} of {self.max_tokens} are taken",
                # `over` tokens have to go, and they go as the work does.
                self.work_s * min(1.0, over / held),
            )
        self._inside.add(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The request is over, well or not. Idempotent."""
        self._inside.discard(ticket)

    def _seconds(self, ticket: Ticket) -> float:
        return ticket.prompt_left / self.prefill.tokens_per_s + ticket.new_left / self.decode.tokens_per_s

    def _refuse(self, reason: str, message: str, wait_s: float) -> None:
        self.refusals[reason] += 1
        retry_after_s = min(MAX_RETRY_S, max(1, math.ceil(wait_s)))
        raise Refused(reason, f"{message}; try again in {retry_after_s} s", retry_after_s)

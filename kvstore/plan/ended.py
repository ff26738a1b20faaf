"""A request that is over, as the planner tells it to an observer: what was asked, what it got, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvstore.plan.records import Request

ABANDONED = "abandoned"  # dropped by its maker, or its maker is gone


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """One request. Plain values; `request` is not written to any more.

    num_tokens: of the prompt when it was looked up first; what came after is the answer.
    hit_tokens: of the match that the lookup gave, by tier.
    took_s:     from the first lookup to the end.
    reason:     the finish reason as the engine told it, "" for none; ABANDONED.
    """

    request: Request
    num_tokens: int
    hit_tokens: Mapping[str, int]
    took_s: float
    reason: str


Observer = Callable[[EndedRequest], None]

"""Wishes: actions of hints in the words of the planner, in blocks of a request."""

from __future__ import annotations

from typing import NamedTuple

from kvstore.hints.actions import HintKind
from kvstore.hints.outcome import HintOutcome, HintStatus

ALL = (1 << 32) - 1  # the end of a range that is as long as its request, which may grow
MAX_WISHES = 16  # kept with one request; each is done to all that is saved of it, in steps of a thousand blocks


class Wish(NamedTuple):
    """One action of a hint about blocks [first, end) of a request.

    ttl_s:      how long, from now on or, for what is saved later, from then on.
    is_clipped: that is less than was asked for.
    priority:   0 to 100, of a RETAIN.
    session:    by which it is taken back; "" for none.
    is_own:     the request is the one that the hint came with: the wish stays with it until it is finished.
    """

    action_id: str
    kind: HintKind
    first: int = 0
    end: int = ALL
    ttl_s: float = 0.0
    is_clipped: bool = False
    priority: int = 0
    session: str = ""
    is_own: bool = False

    def outcome(self, status: HintStatus, tokens: int = 0, until: float | None = None, reason: str = "") -> HintOutcome:
        """Return what became of it."""
        return HintOutcome(self.action_id, self.kind.value, status, tokens, until, reason)

    def rejected(self, reason: str) -> HintOutcome:
        """Return that nothing was done."""
        return self.outcome(HintStatus.REJECTED, reason=reason)

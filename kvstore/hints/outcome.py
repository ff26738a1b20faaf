"""The answer to an action of a hint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class HintStatus(Enum):
    """What became of an action. Counted by action (`kvstore_hints_total`)."""

    ACCEPTED = "accepted"
    CLIPPED = "clipped"  # done in part, or for a shorter time; `tokens` and `until` say what was granted
    DEFERRED = "deferred"  # to be done when it can be: pages are on their way, or the prompt is not saved yet
    REJECTED = "rejected"  # nothing was done; `reason` says why
    IGNORED = "ignored"  # a type or version that is not known here


@dataclass(frozen=True, slots=True)
class HintOutcome:
    """What became of one action.

    action_id: as it was sent, so that answers find their questions.
    action:    one of `HintKind`'s words; "unknown" for another type, "envelope" where no action could be read.
    tokens:    granted so far, in whole blocks.
    until:     Unix time at which what was granted ends; None where nothing ends.
    reason:    one line; "" where there is nothing to add.
    """

    action_id: str
    action: str
    status: HintStatus
    tokens: int = 0
    until: float | None = None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as doors answer it; what has nothing to say is left out."""
        told: dict[str, Any] = {"action_id": self.action_id, "action": self.action, "status": self.status.value}
        if self.tokens:
            told["tokens"] = self.tokens
        if self.until is not None:
            told["until"] = self.until
        if self.reason:
            told["reason"] = self.reason
        return told

"""Hints on their way to a store: the prompt that each action means is found here, the same for all stores."""

from __future__ import annotations

from kvstore.hints.actions import HintAction
from kvstore.hints.envelope import parse
from kvstore.hints.limits import HintLimits
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.plan.records import Request, RequestOptions


class Hinting:
    """The part of a KVStore's face that takes hints (see base.py). Any thread."""

    _hint_limits = HintLimits()

    def hint(
        self, envelope: object, request: Request | None = None, *, options: RequestOptions | None = None
    ) -> tuple[HintOutcome, ...]:
        """Do what a caller says of the future of prompts, as far as the bounds allow; one outcome for each action."""
        message = parse(envelope, self._hint_limits)
        return tuple(
            item.outcome(HintStatus.REJECTED, "not yet") if isinstance(item, HintAction) else item
            for item in message.items
        )

"""What a policy may be able to say beside its order: the worth of a copy, and of one that is not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

K_contra = TypeVar("K_contra", contravariant=True)


class Forecaster(Protocol[K_contra]):
    """A policy with a forecast. A policy that has none lacks the methods; it may lack the second one alone."""

    def worth(self, keys: Sequence[K_contra], now: float) -> list[float]:
        """Return what a copy of each key is worth in this tier, members or not; more is better. Changes nothing."""

    def num_worthy(
        self, request_id: int, keys: Sequence[K_contra], victims: Sequence[K_contra], now: float, priority: int = 0
    ) -> int:
        """Return how many of the first of `keys` are worth what they push out, each the victim beside it.

        They are judged as what they will be when the request, which the policy was told of, has ended with them.
        priority: theirs. Victims that were told to leave first, or are of a lower priority, are worth nothing. Changes
        nothing.
        """


def has_forecast(policy: object) -> bool:
    """True if the policy can tell what a copy is worth."""
    return hasattr(policy, "worth")


def has_prospects(policy: object) -> bool:
    """True if the policy can tell what a copy that is not there yet is worth."""
    return hasattr(policy, "num_worthy")

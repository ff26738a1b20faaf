"""What a policy may be able to say beside its order: the worth of a copy, for admission by forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

K_contra = TypeVar("K_contra", contravariant=True)


class Forecaster(Protocol[K_contra]):
    """A policy with a forecast. A policy that has none lacks the method."""

    def worth(self, keys: Sequence[K_contra], now: float) -> list[float]:
        """Return what a copy of each key is worth in this tier, members or not; more is better. Changes nothing."""


def has_forecast(policy: object) -> bool:
    """True if the policy can tell what a copy is worth."""
    return hasattr(policy, "worth")

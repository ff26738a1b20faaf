"""Which replica a request goes to first, and which ones after it. Pure: no I/O, no clock.

    round-robin   each in its turn
    prefix        the one that has least to compute: the prompt without what it can load, and what is queued there;
                  what it would load from a tier that all share counts for a little less than what is its own

All replicas stand in the order: those after the first are tried if the ones before refuse or cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.errors import ConfigError

# A token that a replica would load from a tier which all share, where one of its own is 1. At 1 the shared tier hides
# which replica has the pages, and is read for what lies in another's memory: three to five times as much, by simulation
# of coding sessions (docs/fleet.md), with equal hits. 0.9 to 0.99 are alike there; at 0.7 a third of that is read, and
# the busiest replica has twice the work of the mean.
SHARED_WORTH = 0.9


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """How one replica sees a request: the answer to `POST /v1/lookup`.

    queued_tokens: still to be computed for requests it has already.
    shared_tokens: those of hit_tokens that come from a tier which other replicas read too.
    """

    prompt_tokens: int
    hit_tokens: int
    queued_tokens: int
    shared_tokens: int = 0

    @property
    def compute_tokens(self) -> int:
        """The tokens that it would compute before this request is done with its prompt, at most."""
        return self.prompt_tokens - self.hit_tokens + self.queued_tokens


class Policy(Protocol):
    """Orders replicas for one request. asks: whether it wants their views."""

    name: str
    asks: bool

    def order(self, urls: Sequence[str], views: Mapping[str, ReplicaView]) -> list[str]:
        """All of `urls`, best first. A replica that did not answer in time has no view."""


class RoundRobin:
    """Each in its turn, whoever is there."""

    name = "round-robin"
    asks = False

    def __init__(self) -> None:
        self._turn = 0

    def order(self, urls: Sequence[str], views: Mapping[str, ReplicaView]) -> list[str]:
        """Rotated by one more than the last time."""
        if not urls:
            return []
        first = self._turn % len(urls)
        self._turn += 1
        return [*urls[first:], *urls[:first]]


class PrefixAware:
    """The least to compute first; equal ones, and those without a view, in their turn.

    shared_worth: of a token that is only in a shared tier.
    """

    name = "prefix"
    asks = True

    def __init__(self, shared_worth: float = SHARED_WORTH) -> None:
        self._turns = RoundRobin()
        self._shared_costs = 1.0 - shared_worth

    def order(self, urls: Sequence[str], views: Mapping[str, ReplicaView]) -> list[str]:
        """Sorted by `ReplicaView.compute_tokens` and what its shared tokens cost; without a view last."""
        turns = self._turns.order(urls, views)
        known = sorted((url for url in turns if url in views), key=lambda url: self._cost(views[url]))
        return [*known, *(url for url in turns if url not in views)]

    def _cost(self, view: ReplicaView) -> float:
        return view.compute_tokens + self._shared_costs * view.shared_tokens


POLICIES: dict[str, type[RoundRobin] | type[PrefixAware]] = {one.name: one for one in (RoundRobin, PrefixAware)}


def make_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"--policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    return POLICIES[name]()

"""Tiers, and directions of them, that went down or came back, as samples of the stores' counters tell.

A tier that goes down as a whole is one incident, that of its reads. The daemon's event loop only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvstore.service.dashboard.models import Incident

MAX_INCIDENTS = 64
READ = "read"

Place = tuple[str, str]  # tenant, namespace


class Incidents:
    """Compares each sample with the one before."""

    def __init__(self) -> None:
        # By tenant, namespace, tier and direction: is it up, and since when.
        self._states: dict[tuple[str, str, str, str], tuple[bool, float]] = {}
        self._incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)

    def note(self, place: Place, stats: Mapping[str, Any], at: float) -> None:
        """Take the counters of one store."""
        for tier, is_open in stats["direction_open"].items():
            changed: dict[str, bool] = {}
            for direction, is_out in is_open.items():
                is_up = not is_out
                where = (*place, tier, direction)
                was_up, _ = self._states.setdefault(where, (True, at))
                if is_up != was_up:
                    changed[direction] = is_up
                    self._states[where] = (is_up, at)
            whole = changed.get(READ)
            for direction, is_up in changed.items():
                if direction == READ or is_up is not whole:
                    reason = "" if is_up else stats["down_reasons"][tier].get(direction, "")
                    self._add(place, tier, direction, is_up, reason, at)

    def reads(self, place: Place, tier: str) -> tuple[bool, float] | None:
        """Whether a tier is read, and since when that is so; None if it was not seen yet."""
        return self._states.get((*place, tier, READ))

    def of(self, places: Collection[Place]) -> list[Incident]:
        """Those of some stores, newest first."""
        return [one for one in self._incidents if (one.tenant, one.namespace) in places][::-1]

    def _add(self, place: Place, tier: str, direction: str, is_up: bool, reason: str, at: float) -> None:
        tenant, namespace = place
        self._incidents.append(
            Incident(
                at=at,
                tenant=tenant,
                namespace=namespace,
                tier=tier,
                direction=direction,
                is_up=is_up,
                reason=reason,
            )
        )


def left_out(every: Sequence[Mapping[str, Any]], tier: str) -> dict[str, str]:
    """The directions of a tier that some store leaves out, with the first words for why."""
    found: dict[str, str] = {}
    for stats in every:
        for direction, is_out in stats["direction_open"].get(tier, {}).items():
            if is_out:
                found[direction] = found.get(direction) or stats["down_reasons"][tier].get(direction, "")
    return found

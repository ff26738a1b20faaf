"""The counters of a lane, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.direction import Direction
from kvstore.plan.records import Op, Transfer

MAX_REASONS = 32  # per direction; a label of a metric must not grow with what a server may say


@dataclass(slots=True)
class LaneCounters:
    """The work of a lane so far. Plain numbers, written under the lane's lock and read without it.

    transfers: begun, that is, handed to the tier.
    errors:    of those, not answered by the tier.
    expired:   never begun, because the deadline passed; likewise `cancelled`, `refused` (the breaker is open or the
               queue full) and `dropped` (the lane was closed).
    seconds:   time inside the tier, summed over workers.
    queued:    transfers that wait now; likewise `running` (inside the tier) and `stuck` (of those, for far too long).
    pings:     asked of a tier, or of a direction of it, that was down.
    refusals:  of the errors, those that the medium answered with: by direction, then by its reason (READONLY, ENOSPC).
    """

    transfers: int = 0
    errors: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    dropped: int = 0
    fetched_pages: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    failed_fetch_pages: int = 0
    spilled_pages: int = 0
    spilled_bytes: int = 0
    spill_seconds: float = 0.0
    failed_spill_pages: int = 0
    seconds: float = 0.0
    queued: int = 0
    running: int = 0
    stuck: int = 0
    pings: int = 0
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, transfer: Transfer, ok: tuple[bool, ...], seconds: float, num_bytes: int) -> None:
        """Count a transfer that came back from the tier."""
        self.seconds += seconds
        if transfer.op is Op.FETCH:
            self.fetched_pages += sum(ok)
            self.fetched_bytes += num_bytes
            self.fetch_seconds += seconds
            self.failed_fetch_pages += len(ok) - sum(ok)
        elif transfer.op is Op.SPILL:
            self.spilled_pages += sum(ok)
            self.spilled_bytes += num_bytes
            self.spill_seconds += seconds
            self.failed_spill_pages += len(ok) - sum(ok)

    def add_refusal(self, way: Direction, reason: str) -> None:
        """Count an answer that was a refusal."""
        # A new mapping each time: metrics walk them without the lock.
        reasons = self.refusals.get(way.value, {})
        reason = reason if reason in reasons or len(reasons) < MAX_REASONS else "other"
        self.refusals = {**self.refusals, way.value: {**reasons, reason: reasons.get(reason, 0) + 1}}

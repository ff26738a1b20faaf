"""The counters of the tier, carried by vLLM's own offloading metrics to its /metrics as `vllm:kvstore_tier_*`.

A snapshot is (kind, name, value, labels); counters as what was added since the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from connectors.vllm_tier.core import TierCore
from kvstore.hints.outcome import HintStatus

_PREFIX = "vllm:kvstore_tier_"
# name -> help; those of _BY_MEDIUM carry the label "medium": disk or redis
_PLAIN = {
    "hits": "Lookups of chunks answered with a hit.",
    "misses": "Lookups of chunks answered with a miss.",
    "late_answers": "Lookups answered with a miss because no medium answered within store.lookup_deadline_s.",
    "skipped_chunks": "Chunks not saved because saves under way held too much of vLLM's host memory.",
    "lost_loads": "Chunks that were offered and that no medium gave; they were computed.",
    "given_up": "Jobs that ended at their deadline.",
}
_BY_MEDIUM = {
    "loaded_chunks": "Chunks loaded, verified.",
    "failed_chunks": "Chunks a medium had and did not give.",
    "stored_chunks": "Chunks stored, or found stored.",
    "unstored_chunks": "Chunks a medium did not take.",
    "loaded_bytes": "Bytes loaded.",
    "stored_bytes": "Bytes stored.",
    "corrupt_pages": "Copies whose checksum or identity was wrong; they were misses and are dropped.",
    "expired_pages": "Copies found past their time to live.",
    "lost_pages": "Copies gone between lookup and load.",
    "evicted_pages": "Copies evicted by the tier to make room.",
    "breaker_opens": "Times a failing medium was taken out.",
}
_BY_OUTCOME = {"hints": "Actions of KV hints, by what became of them."}
_GAUGES = {"breaker_open": "1 while a failing medium is taken out."}


class Definition(NamedTuple):
    """A metric: what vLLM must know of it beforehand."""

    name: str
    help: str
    labels: tuple[str, ...]
    is_counter: bool


class Sample(NamedTuple):
    """One value of a metric; of a counter, what was added."""

    name: str
    value: float
    labels: tuple[str, ...]
    is_counter: bool


def definitions() -> Iterator[Definition]:
    """All metrics of a tier."""
    for name, text in _PLAIN.items():
        yield Definition(_PREFIX + name, text, (), True)
    for name, text in _BY_MEDIUM.items():
        yield Definition(_PREFIX + name, text, ("medium",), True)
    for name, text in _BY_OUTCOME.items():
        yield Definition(_PREFIX + name, text, ("outcome",), True)
    for name, text in _GAUGES.items():
        yield Definition(_PREFIX + name, text, ("medium",), False)


class TierSamples:
    """Makes snapshots of a core's growing counters."""

    def __init__(self, core: TierCore) -> None:
        self._core = core
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}

    def take(self) -> list[Sample]:
        """The changes since the last time; at first everything, so that each counter is there from the start."""
        samples = []
        for name, labels, total in self._totals():
            is_new = (name, labels) not in self._last
            added = total - self._last.get((name, labels), 0.0)
            self._last[name, labels] = total
            if added or is_new:
                samples.append(Sample(_PREFIX + name, added, labels, True))
        for medium in self._core.mover.tiers:
            is_open = 0.0 if self._core.mover.is_up(medium) else 1.0
            if self._last.get(("breaker_open", (medium,))) != is_open:
                self._last["breaker_open", (medium,)] = is_open
                samples.append(Sample(_PREFIX + "breaker_open", is_open, (medium,), False))
        return samples

    def _totals(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        counters, mover = self._core.counters, self._core.mover
        for name in _PLAIN:
            late = name == "late_answers"
            yield name, (), float(self._core.lookups.num_late if late else getattr(counters, name))
        for medium in mover.tiers:
            lane, tier, count = mover.lane_counters(medium), mover.tier_counters(medium), counters.by_tier[medium]
            values = {
                "loaded_chunks": count.loaded_chunks,
                "failed_chunks": count.failed_chunks,
                "stored_chunks": count.stored_chunks,
                "unstored_chunks": count.unstored_chunks,
                "loaded_bytes": lane.fetched_bytes,
                "stored_bytes": lane.spilled_bytes,
                "corrupt_pages": tier.corrupt_pages,
                "expired_pages": tier.expired_pages,
                "lost_pages": tier.lost_pages,
                "evicted_pages": tier.fallback_evictions,
                "breaker_opens": mover.num_opened(medium),
            }
            for name, value in values.items():
                yield name, (medium,), float(value)
        for outcome in HintStatus:
            yield "hints", (outcome.value,), float(self._core.hints.counts[outcome])

"""The counters of the connector, carried by vLLM: a line in its log, and `vllm:kvstore_*` at its /metrics.

A snapshot of the scheduler's half travels to the process that serves metrics as plain numbers: counters as what was
added since the last one, gauges as they are. Nested names are joined with dots: "hit_tokens.disk".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# name in the snapshot -> (Prometheus name, help, label that the part after the dot gets)
COUNTERS: dict[str, tuple[str, str, str]] = {
    "load_requests": ("load_requests", "Requests that began after a load.", ""),
    "loaded_tokens": ("loaded_tokens", "Prompt tokens loaded instead of computed.", ""),
    "loaded_bytes": ("loaded_bytes", "Bytes copied from host slots into engine blocks.", ""),
    "load_seconds": ("load_copy_seconds", "Seconds of those copies, summed over ranks.", ""),
    "short_loads": ("short_loads", "Loads promised shorter than what was looked up, since pages came late or not.", ""),
    "load_failures": ("load_failures", "Promised loads that failed; the request computed.", ""),
    "compute_waits": ("compute_waits", "Requests that waited for another one to compute what they missed.", ""),
    "compute_wait_seconds": ("compute_wait_seconds", "Seconds of those waits.", ""),
    "asked_again": ("asked_again", "Times vLLM was told to ask again.", ""),
    "saved_pages": ("saved_pages", "Pages saved.", ""),
    "saved_bytes": ("saved_bytes", "Bytes copied from engine blocks into host slots.", ""),
    "save_seconds": ("save_copy_seconds", "Seconds of those copies, summed over ranks.", ""),
    "skipped_pages": ("skipped_pages", "Pages not saved for want of a free slot.", ""),
    "unsaved_pages": (
        "unsaved_pages",
        "Pages of answers that were not saved because no next turn can begin with them.",
        "",
    ),
    "save_failures": ("save_failures", "Saves that failed.", ""),
    "hook_errors": ("hook_errors", "Exceptions in our hooks, kept from the engine.", ""),
    "hook_seconds": ("hook_seconds", "Seconds of the scheduler's thread spent in our hooks, without rests.", ""),
    "rest_seconds": ("rest_seconds", "Seconds that steps with nothing to compute waited for our tiers.", ""),
    "steps": ("steps", "Engine steps seen.", ""),
    "hit_tokens": ("hit_tokens", "Prompt tokens loaded, by the tier they came from.", "tier"),
    "hints": ("hints", "Actions of KV hints, by what became of them.", "outcome"),
    "corrupt_pages": ("corrupt_pages", "Pages whose checksum or identity was wrong; they were misses.", "tier"),
    "breaker_opens": ("breaker_opens", "Times a failing tier was taken out.", "tier"),
}
GAUGES: dict[str, tuple[str, str, str]] = {
    "pages": ("pages", "Pages in a tier.", "tier"),
    "breaker_open": ("breaker_open", "1 while a failing tier is taken out.", "tier"),
    "slots": ("slots", "Host slots by state.", "state"),
}
_LOGGED = ("loaded_tokens", "load_requests", "saved_pages", "skipped_pages", "load_failures", "hook_errors")


class KVStoreStats(KVConnectorStats):  # type: ignore[misc]  # vLLM's classes are untyped here
    """One snapshot: {"added": {...}, "now": {...}}."""

    def reset(self) -> None:
        """Begin a new interval."""
        self.data: dict[str, Any] = {"added": {}, "now": {}}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the counters of `other`, take over its gauges."""
        added = dict(self.data.get("added", {}))
        for name, value in other.data.get("added", {}).items():
            added[name] = added.get(name, 0) + value
        self.data = {"added": added, "now": {**self.data.get("now", {}), **other.data.get("now", {})}}
        return self

    def reduce(self) -> dict[str, int | float]:
        """The numbers of vLLM's log line."""
        added = self.data.get("added", {})
        names = [*_LOGGED, *sorted(name for name in added if name.startswith("hit_tokens."))]
        return {name: added[name] for name in names if added.get(name)}

    def is_empty(self) -> bool:
        """True if nothing was counted."""
        return not any(self.data.get("added", {}).values())


class KVStorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvstore_*`, per engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        for specs, make in ((COUNTERS, self._counter_cls), (GAUGES, self._gauge_cls)):
            for key, (name, text, label) in specs.items():
                names = [*labelnames, label] if label else labelnames
                self._metrics[key] = make(name=f"vllm:kvstore_{name}", documentation=text, labelnames=names)
                if specs is COUNTERS and not label:  # 0 until something is counted: alerts need both
                    for values in per_engine_labelvalues.values():
                        self._metrics[key].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take over one snapshot."""
        values = self.per_engine_labelvalues[engine_idx]
        for part, specs in (("added", COUNTERS), ("now", GAUGES)):
            for name, value in transfer_stats_data.get(part, {}).items():
                key, _, label = name.partition(".")
                if key in specs:
                    metric = self._metrics[key].labels(*values, *filter(None, [label]))
                    metric.inc(value) if part == "added" else metric.set(value)


class Snapshots:
    """Makes snapshots of growing counters: what was added since the last one."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def take(self, connector: Mapping[str, float], store: Mapping[str, Any]) -> dict[str, Any]:
        """The data of a `KVStoreStats`. A counter that is new is told even if it is 0: so it is there from then on."""
        totals = {f"hit_tokens.{tier}": 0.0 for tier in store.get("pages") or {}}
        totals |= {name: float(value) for name, value in connector.items()}
        for name in ("corrupt_pages", "breaker_opens"):
            totals |= {f"{name}.{label}": float(value) for label, value in (store.get(name) or {}).items()}
        # A daemon that was started again counts from 0, and one that is away not at all.
        added = {name: max(0.0, value - self._last.get(name, 0.0)) for name, value in totals.items()}
        new = totals.keys() - self._last.keys()
        self._last |= totals
        now = {f"{name}.{label}": float(value) for name in GAUGES for label, value in (store.get(name) or {}).items()}
        return {"added": {name: value for name, value in added.items() if value or name in new}, "now": now}

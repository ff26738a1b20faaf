"""Prometheus metrics of a store, made from the plain numbers of `store.stats()`.

`METRICS` is the one catalogue: it names the metrics, says what they mean, documents the schema of `stats()`, and
`markdown()` prints it for the documentation. A metric with labels is a mapping nested as deep as it has labels:

    stats() == {
        "lookups": 12,                                          # no label
        "hit_tokens": {"host": 640, "disk": 128},               # {tier}
        "lane_bytes": {"disk": {"fetch": 2097152, "spill": 0}}, # {tier, op}
        ...
    }

A key that is missing is a metric without samples: a store without Redis has nothing to say about it. Counting itself
happens where things happen (the planner counts decisions, the lanes count bytes and seconds); nothing is counted here,
and scraping takes one `stats()` call. Each store has a registry of its own, so that two stores in one process do not
collide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

TEXTS = "down_reasons"  # the one key of `stats()` with words in it: why a direction of a tier is out
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricKind(Enum):
    """A counter only grows while its store is open; a gauge goes both ways."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    key:    where its numbers are in `stats()`.
    name:   as exported; a counter's ends in `_total`.
    labels: names of the levels of nesting under the key, outermost first.
    """

    key: str
    name: str
    kind: MetricKind
    labels: tuple[str, ...]
    help: str


def _counter(key: str, noun_unit: str, help: str, *labels: str) -> MetricSpec:
    return MetricSpec(key, f"kvstore_{noun_unit}_total", MetricKind.COUNTER, labels, help)


def _gauge(key: str, noun_unit: str, help: str, *labels: str) -> MetricSpec:
    return MetricSpec(key, f"kvstore_{noun_unit}", MetricKind.GAUGE, labels, help)


METRICS: tuple[MetricSpec, ...] = (
    # What lookups found.
    _counter("lookups", "lookups", "Lookups answered with a hit or a miss."),
    _counter("lookup_pending", "lookups_pending", "Lookups answered with pending: a shared tier was being asked."),
    _counter("hit_tokens", "hit_tokens", "Tokens loaded, by the tier their pages came from.", "tier"),
    _counter("hit_blocks", "hit_blocks", "Blocks loaded, by the tier their pages came from.", "tier"),
    _counter("matched_tokens", "matched_tokens", "Tokens of prompts that a match covered."),
    _counter("miss_tokens", "miss_tokens", "Tokens of prompts that no match covered."),
    _counter("cut", "matches_cut", "Matches by why they ended where they did.", "reason"),
    _counter("stateless_tokens", "stateless_tokens", "Tokens whose KV was stored without a state at a usable length."),
    _counter("stranded_blocks", "stranded_blocks", "Blocks that lost the states behind them, or pages before them."),
    _counter("probes", "probed_blocks", "Blocks a shared tier was asked about.", "tier"),
    _counter("collisions", "collision_pages", "Pages whose tokens were not those asked for (hash collision).", "tier"),
    _counter("compute_claims", "compute_claims", "Requests that computed what others would have waited for."),
    _counter("compute_waits", "compute_waits", "Requests that waited for another one to compute the same blocks."),
    _counter("compute_waits_given_up", "compute_waits_given_up", "Of those, the ones that waited in vain."),
    _counter("compute_wait_seconds", "compute_wait_seconds", "Seconds that requests waited so."),
    # Loading.
    _counter("loads", "loads", "Load leases prepared."),
    _counter("loads_incomplete", "loads_incomplete", "Load leases that got less than they were granted."),
    _counter("shared_fetches", "shared_fetch_pages", "Pages a load found already under way for another."),
    _counter("load_failures", "load_failed_pages", "Pages of a hit that could not be loaded.", "tier"),
    _counter("prefetches", "prefetches", "Prefetches started."),
    _counter("speculated_pages", "speculated_pages", "Pages brought for idle sessions, by their fate.", "fate"),
    _gauge("speculated_held", "speculated_held_pages", "Pages brought for idle sessions that nothing has used yet."),
    _counter("speculation_stops", "speculation_stops", "Times speculation stopped itself: it wasted too much."),
    _counter("corrupt_pages", "corrupt_pages", "Copies that failed verification and were dropped.", "tier"),
    # Saving and writing behind.
    _counter("saves", "saves", "Save leases prepared."),
    _counter("saved_pages", "saved_pages", "Pages published in host memory by saves."),
    _counter(
        "skipped_saves",
        "save_skipped_pages",
        "Pages not saved: no slot was free, or policy outlook held what was there for worth more.",
    ),
    _counter("dedup_saves", "save_known_pages", "Pages not saved because the store had them."),
    _counter("aborted_saves", "saves_aborted", "Save leases released or expired before they were complete."),
    _counter("spilled_pages", "spilled_pages", "Pages written to a lower tier.", "tier"),
    _counter("spill_failures", "spill_failed_pages", "Pages a lower tier failed to take.", "tier"),
    _counter("refused_pages", "refused_pages", "Pages worth less than what would have left a tier for them.", "tier"),
    _gauge("write_budget", "write_budget_bytes", "Bytes that a tier's write budget allows now.", "tier"),
    _gauge("write_budget_day", "write_budget_bytes_per_day", "A tier's write budget for a day.", "tier"),
    _counter("write_budget_spent", "write_budget_spent", "Times nothing was left of a write budget.", "tier"),
    _counter("spill_lost", "spill_lost_pages", "Pages evicted from host memory before a tier got them.", "tier"),
    # Leaving.
    _counter("deleted_pages", "deleted_pages", "Deletes that a tier has done; clearing it counts as one.", "tier"),
    _counter("delete_failures", "delete_failed_pages", "Deletes that a tier did not do; they are tried again.", "tier"),
    _counter("deletes_dropped", "deletes_dropped", "Deletes that were given up: a flush says so.", "tier"),
    _counter("evicted_pages", "evicted_pages", "Copies that made room for others.", "tier"),
    _counter("expired_pages", "expired_pages", "Copies that outlived their TTL.", "tier"),
    _counter("lost_pages", "lost_pages", "Copies believed to be in a tier that were not.", "tier"),
    _counter("tier_events", "tier_events", "What only the tier sees: timeouts, OOM replies.", "tier", "event"),
    # Moving.
    _counter("lane_bytes", "lane_bytes", "Bytes moved between host memory and a tier.", "tier", "op"),
    _counter("lane_seconds", "lane_seconds", "Seconds inside a tier, summed over a lane's threads.", "tier", "op"),
    _counter("lane_transfers", "lane_transfers", "Batches a lane has finished.", "tier", "op"),
    _counter("lane_errors", "lane_errors", "Batches that failed as a whole.", "tier", "op"),
    _counter("lane_refused", "lane_refused_transfers", "Batches not taken: queue full, or tier taken out.", "tier"),
    _counter("lane_expired", "lane_expired_transfers", "Batches dropped because their deadline had passed.", "tier"),
    _gauge("lane_queue", "lane_queued_transfers", "Batches waiting in a lane.", "tier"),
    _gauge("breaker_open", "breaker_open", "1 while no pages are asked of a failing tier, else 0.", "tier"),
    _gauge("direction_open", "direction_open", "1 while a tier is left out in one direction.", "tier", "direction"),
    _counter("breaker_opens", "breaker_opens", "Times a tier, or a direction of it, was taken out.", "tier"),
    _counter("refusals", "refusals", "Batches that a medium answered with an error.", "tier", "direction", "reason"),
    # The store's own recording, where there is one.
    _counter("recorded", "recorded_requests", "Requests written to the recording."),
    _counter("record_dropped", "record_dropped_requests", "Requests not recorded: queue full, or file not writable."),
    # What policies have learned, where they learn and a tier has a directory.
    _counter("tables_written", "policy_tables_written", "Files of what policies learned that were written."),
    _counter("tables_failed", "policy_tables_failed", "Times what a policy learned could not be written."),
    _counter("tables_unread", "policy_tables_unread", "Files of it that were not taken in at the start.", "reason"),
    # What is there now.
    _gauge("slots", "slots", "Host slots by state; the sum is the capacity.", "state"),
    _gauge("pinned_pages", "pinned_pages", "Resident pages that nothing may evict now."),
    _gauge("kept_pages", "kept_pages", "Pages that a pin or retain_until keeps in host memory."),
    _counter("keep_refused_pages", "keep_refused_pages", "Pages that are not kept: no budget was left."),
    _gauge("kept_bytes", "kept_bytes", "The same, and pages on their way to be kept, in bytes by salt.", "salt"),
    _gauge("raised_blocks", "raised_blocks", "Blocks that a Retain gives a higher priority."),
    _counter("hints", "hints", "Actions of KV hints, by what became of them.", "action", "outcome"),
    _gauge("leases", "leases", "Leases that are open."),
    _gauge("blocks", "indexed_blocks", "Blocks the prefix index knows."),
    _gauge("owed_pages", "owed_pages", "Pages waiting to be written to a tier.", "tier"),
    _gauge("owed_deletes", "owed_deletes", "Pages waiting to be deleted from a tier.", "tier"),
    _gauge("pages", "pages", "Pages known to be in a tier.", "tier"),
    _gauge("capacity_pages", "capacity_pages", "Pages that fit into a tier.", "tier"),
    _gauge("slot_bytes", "slot_bytes", "Bytes of one slot."),
    # Whether loading pays.
    _gauge("prefill_rate", "prefill_tokens_per_second", "The engine's measured prefill rate."),
    _gauge("tier_bandwidth", "tier_bandwidth_bytes_per_second", "A tier's measured read bandwidth.", "tier"),
    _gauge("tier_latency", "tier_latency_seconds", "A tier's measured time to the first byte.", "tier"),
    _counter("ttft_saved_seconds", "ttft_saved_seconds", "Prefill time that loading saved, less the time it took."),
)  # fmt: skip


class HasStats(Protocol):
    """The part of a store that metrics need."""

    def stats(self) -> Mapping[str, Any]: ...


class StoreCollector(Collector):
    """Turns one `stats()` call into metric families. Any thread."""

    def __init__(self, store: HasStats) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Yield the families of `METRICS` that `stats()` has numbers for."""
        stats = self._store.stats()
        for spec in METRICS:
            samples = list(_samples(stats.get(spec.key), len(spec.labels)))
            if not samples:
                continue
            family = (CounterMetricFamily if spec.kind is MetricKind.COUNTER else GaugeMetricFamily)(
                spec.name, spec.help, labels=spec.labels
            )
            for labels, value in samples:
                family.add_metric(labels, value)
            yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not call `stats()` of a store that is still being built."""
        return ()


def registry(store: HasStats) -> CollectorRegistry:
    """A registry of this store's metrics alone."""
    own = CollectorRegistry(auto_describe=False)
    own.register(StoreCollector(store))
    return own


def render(store: HasStats) -> bytes:
    """The store's metrics in Prometheus' text format (serve it as `CONTENT_TYPE`)."""
    return generate_latest(registry(store))


def unknown_keys(stats: Mapping[str, Any]) -> list[str]:
    """Keys of `stats()` whose numbers no metric exports, sorted."""
    return sorted(set(stats) - {spec.key for spec in METRICS} - {TEXTS})


def markdown() -> str:
    """The catalogue as a table, as it stands in docs/metrics.md."""
    lines = ["| metric | kind | labels | what it counts | key in `stats()` |", "|---|---|---|---|---|"]
    for spec in METRICS:
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "none"
        lines.append(f"| `{spec.name}` | {spec.kind.value} | {labels} | {spec.help} | `{spec.key}` |")
    return "\n".join(lines) + "\n"


def _samples(value: Any, depth: int) -> Iterator[tuple[list[str], float]]:
    """Walk `depth` levels of nesting. What has another shape has no sample: a scrape never fails."""
    if depth == 0:
        if isinstance(value, (int, float)):
            yield [], float(value)
    elif isinstance(value, Mapping):
        for label, below in value.items():
            for labels, number in _samples(below, depth - 1):
                yield [str(getattr(label, "value", label)), *labels], number

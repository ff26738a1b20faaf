"""One snapshot of everything a store counts, as plain numbers, in the shape that kvstore/metrics.py documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.direction import Direction
from kvstore.move.lane import Lane
from kvstore.plan.planner import Planner
from kvstore.plan.records import HOST
from kvstore.tiers.base import TierCounters

REASONS = "down_reasons"  # {tier: {direction: the medium's words}}; the only texts in a snapshot


def snapshot(planner: Planner, lanes: Mapping[str, Lane]) -> dict[str, Any]:
    """Count. Under the store's lock for the planner's part; lanes and tiers are read without theirs."""
    lookups, loader, fetches = planner.lookups, planner.loader, planner.fetches
    host, costs = planner.books.host, planner.books.costs
    tiers = {tier.plan.name: tier for tier in planner.books.tiers}
    media = {name: lanes[name].tier.counters if name in lanes else TierCounters() for name in tiers}
    return {
        "lookups": lookups.counters["lookups"],
        "lookup_pending": lookups.counters["pending"],
        "hit_blocks": dict(loader.hit_blocks),
        "hit_tokens": {name: n * planner.books.layout.block_size for name, n in loader.hit_blocks.items()},
        "matched_tokens": lookups.counters["matched_tokens"],
        "miss_tokens": lookups.counters["missed_tokens"],
        "cut": dict(lookups.cuts),
        "stateless_tokens": lookups.counters["stateless_tokens"],
        "stranded_blocks": host.stranded_blocks,
        "probes": dict(lookups.probes.counters),
        "collisions": {HOST: lookups.counters["collisions"]} | {name: m.collisions for name, m in media.items()},
        **planner.single_flight.counters,
        "compute_wait_seconds": planner.single_flight.seconds_waited,
        "loads": loader.num_loads,
        "loads_incomplete": fetches.counters["load_failures"],
        "load_failures": dict(fetches.failures),
        "shared_fetches": fetches.counters["shared_fetches"],
        "prefetches": fetches.counters["prefetches"],
        **_speculation_stats(planner),
        "corrupt_pages": {name: m.corrupt_pages for name, m in media.items()},
        **planner.saver.counters,
        "spilled_pages": {name: tier.counters.spilled_pages for name, tier in tiers.items()},
        "spill_failures": {name: tier.counters.failed_pages for name, tier in tiers.items()},
        "spill_lost": {name: tier.debts.num_lost for name, tier in tiers.items()},
        "owed_pages": {name: len(tier.debts) for name, tier in tiers.items()},
        "refused_pages": {name: tier.counters.refused_pages for name, tier in tiers.items()},
        "write_budget": {name: tier.budget.left_bytes for name, tier in tiers.items() if tier.budget is not None},
        "write_budget_day": {n: tier.budget.bytes_per_day for n, tier in tiers.items() if tier.budget is not None},
        "write_budget_spent": {name: tier.budget.num_spent for name, tier in tiers.items() if tier.budget is not None},
        "deleted_pages": {name: tier.deletes.num_done for name, tier in tiers.items()},
        "delete_failures": {name: tier.deletes.num_failed for name, tier in tiers.items()},
        "deletes_dropped": {name: tier.deletes.num_dropped for name, tier in tiers.items()},
        "owed_deletes": {name: len(tier.deletes) for name, tier in tiers.items()},
        "evicted_pages": {HOST: host.evicted_pages}
        | {name: tier.counters.evicted_pages + media[name].fallback_evictions for name, tier in tiers.items()},
        "expired_pages": {HOST: host.expired_pages}
        | {name: tier.counters.expired_pages + media[name].expired_pages for name, tier in tiers.items()},
        "lost_pages": {name: m.lost_pages for name, m in media.items()},
        "tier_events": {name: dict(m.extra) for name, m in media.items()},
        **_lane_stats(lanes),
        "slots": {
            "free": host.pool.num_free,
            "filling": host.num_filling,
            "resident": host.num_resident,
        }
        | ({"retired": host.pool.num_retired} if host.pool.num_retired else {}),
        "pinned_pages": host.num_resident - len(host.policy),
        "kept_pages": planner.retention.keeper.num_pages,
        "keep_refused_pages": planner.retention.keeper.refused_pages,
        "kept_bytes": {
            payer: num_pages * planner.books.layout.slot_bytes
            for payer, num_pages in planner.retention.keeper.payers.items()
        },
        "raised_blocks": len(planner.retention.raises),
        "hints": {action: dict(counts) for action, counts in planner.hints.counters.items()},
        "leases": planner.num_leases,
        "blocks": len(planner.books.catalog.tree),
        "pages": {HOST: host.num_resident} | {name: tier.used_pages for name, tier in tiers.items()},
        "capacity_pages": {HOST: host.pool.num_in_use}
        | {name: tier.plan.capacity_pages for name, tier in tiers.items() if tier.plan.capacity_pages is not None},
        "slot_bytes": planner.books.layout.slot_bytes,
        "prefill_rate": costs.prefill_tokens_per_s or 0.0,
        "tier_bandwidth": {
            name: 1.0 / cost.seconds_per_byte for name, cost in costs.tiers.items() if cost.seconds_per_byte
        },
        "tier_latency": {name: cost.latency_s for name, cost in costs.tiers.items()},
        "ttft_saved_seconds": planner.loader.seconds_saved,
    }


def _speculation_stats(planner: Planner) -> dict[str, Any]:
    speculation = planner.speculation
    if speculation is None:
        return {}
    return {
        "speculated_pages": dict(speculation.counters),
        "speculated_held": speculation.num_held,
        "speculation_stops": speculation.verdict.num_stopped,
    }


def _lane_stats(lanes: Mapping[str, Lane]) -> dict[str, Any]:
    counters = {name: lane.counters for name, lane in lanes.items()}
    return {
        "lane_bytes": {n: {"fetch": c.fetched_bytes, "spill": c.spilled_bytes} for n, c in counters.items()},
        "lane_seconds": {n: {"fetch": c.fetch_seconds, "spill": c.spill_seconds} for n, c in counters.items()},
        "lane_transfers": {n: {"all": c.transfers} for n, c in counters.items()},
        "lane_errors": {n: {"all": c.errors} for n, c in counters.items()},
        "lane_refused": {n: c.refused for n, c in counters.items()},
        "lane_expired": {n: c.expired for n, c in counters.items()},
        "lane_queue": {n: c.queued for n, c in counters.items()},
        "breaker_open": {n: int(Direction.READ not in lane.directions.open_ways) for n, lane in lanes.items()},
        "breaker_opens": {n: lane.directions.num_opened for n, lane in lanes.items()},
        "direction_open": {
            n: {way.value: int(way not in lane.directions.open_ways) for way in Direction} for n, lane in lanes.items()
        },
        "refusals": {n: c.refusals for n, c in counters.items()},
        REASONS: {
            n: {way.value: reason for way, reason in list(lane.directions.reasons.items())} for n, lane in lanes.items()
        },
    }

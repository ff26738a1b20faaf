"""The numbers a planner works with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Made by `kvstore.build` from the configuration.

    hash_bytes:  length of a block hash (32, or 16 for xxh3_128).
    compare_tokens: verify the tokens of every block on a hit (hashes that are not collision resistant).
    compute_wait_s: longest wait without progress for another request's computing (single flight); 0 never waits.
    max_pinned_fraction: share of the host slots that pins and promises of `retain_until` may hold, all together.
    pin_max_s:   after so long each of them ends.
    claimer:     names this store among those that share a tier; no two have the same.
    """

    num_slots: int
    min_hit_blocks: int = 1
    load_or_recompute: bool = True
    lookup_deadline_s: float = 0.05
    load_deadline_s: float = 2.0
    batch_pages: int = 8
    max_prefetch_slots: int = 64
    touch_interval_s: float = 60.0
    hash_bytes: int = 32
    compare_tokens: bool = False
    compute_wait_s: float = 10.0
    max_pinned_fraction: float = 0.5
    pin_max_s: float = 86400.0
    claimer: bytes = b""

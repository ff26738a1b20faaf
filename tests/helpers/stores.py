"""Small stores over real tiers, and pages whose bytes tell which page they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eviction.registry import make_policy
from kvstore.base import KVStore
from kvstore.build import open_store
from kvstore.config.sections import Config
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.plan.planner import Planner
from kvstore.plan.records import Match, PlanSettings, Request, RequestOptions
from kvstore.plan.tier_plan import TierPlan
from kvstore.store import LocalStore
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostSlab
from kvstore.tiers.memory import MemoryTier
from radix.namespace import Namespace

BLOCK = 16
PAGE_BYTES = 8192
# A busy machine: tests of deadlines set their own.
PATIENCE = {"lookup_deadline_s": 10.0, "load_deadline_s": 30.0}
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0, 1), PAGE_BYTES),), "test:bytes", "uint8")


def namespace(layout: Layout = LAYOUT, **changes: Any) -> Namespace:
    """The namespace of the tests' pages."""
    fields: dict[str, Any] = {"model": "tiny", "revision": "1", "dtype": layout.dtype}
    return Namespace(layout=layout.fingerprint, block_size=layout.block_size, **(fields | changes))


def open_small(directory: Path | None = None, redis_url: str | None = None, **sections: Any) -> LocalStore:
    """A store with 64 host slots and, where asked for, 128 pages of disk and Redis."""
    values: dict[str, Any] = {"host": {"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False}}
    if directory is not None:
        values["disk"] = {"path": directory, "capacity_bytes": 128 * PAGE_BYTES, "workers": 2}
    if redis_url is not None:
        values["redis"] = {"url": redis_url}
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    values["store"] = {**PATIENCE, **values.get("store", {})}
    config = Config(**values)
    return open_store(config, LAYOUT, namespace(hash=config.store.hash))


def store_over(
    tiers: Sequence[tuple[Tier, TierPlan]],
    *,
    num_slots: int = 64,
    layout: Layout = LAYOUT,
    timeout_s: float = 1.0,
    policy: str = "lru",
    ttl_s: float | None = None,
    **settings: Any,
) -> LocalStore:
    """A store over tiers of the test's own making (faulty ones, say), with a breaker that comes back quickly."""
    slab = HostSlab(num_slots, layout.slot_bytes, huge_pages=False)
    lanes = [
        Lane(tier, slab.view, workers=plan.workers, breaker=Breaker(3, 0.1, 0.2), timeout_s=timeout_s)
        for tier, plan in tiers
    ]
    numbers: dict[str, Any] = {"lookup_deadline_s": 0.5}
    planner = Planner(
        layout, PlanSettings(num_slots, **(numbers | settings)), make_policy(policy, ttl_s), [plan for _, plan in tiers]
    )
    return LocalStore(layout, namespace(layout), planner, slab, lanes)


def memory_tier(capacity_pages: int = 128, name: str = "memory", **plan: object) -> tuple[MemoryTier, TierPlan]:
    """A tier in a dict that the planner takes for a disk."""
    fields: dict[str, object] = {"is_indexed": True, "is_shared": False, "policy": make_policy("lru")}
    tier = MemoryTier(capacity_pages, LAYOUT.slot_bytes, name=name)
    return tier, TierPlan(name=name, capacity_pages=capacity_pages, **(fields | plan))  # type: ignore[arg-type]


def redis_like(name: str = "shared") -> tuple[MemoryTier, TierPlan]:
    """A tier in a dict that others may write to, and that the catalog says nothing about."""
    return memory_tier(name=name, is_indexed=False, is_shared=True, capacity_pages=128)


def prompt(num_blocks: int, seed: int = 0, tail: int = 1) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of a prompt of `num_blocks` full blocks and `tail` more."""
    return np.random.default_rng(seed).integers(0, 50_000, num_blocks * BLOCK + tail)


def ids(num_blocks: int, seed: int = 0) -> list[int]:
    """The same tokens as a plain list, for JSON."""
    tokens: list[int] = prompt(num_blocks, seed).tolist()
    return tokens


def page_of(key: bytes, group: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that only the page of this block and group has."""
    seed = int.from_bytes(key[:8], "little") + group
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def save(store: KVStore, request: Request, first: int = 0, num_blocks: int | None = None) -> int:
    """Save blocks of a request as an engine would; returns the pages saved."""
    lease = store.prepare_save(request, first, len(request.keys) - first if num_blocks is None else num_blocks)
    for page in lease.pages:
        stored = store.layout.stored_bytes(page.group)
        np.copyto(store.slots.array(page.slot)[:stored], page_of(request.keys[page.block], page.group, stored))
    store.complete(lease)
    return len(lease.pages)


def load(store: KVStore, request: Request, timeout_s: float = 5.0) -> tuple[int, Match]:
    """Load what is stored of a request and compare every byte; returns the blocks that came."""
    match = store.wait_lookup(request)
    lease = store.prepare_load(request, match.num_blocks)
    try:
        status = store.wait(lease, timeout_s)
        for page in lease.pages:
            if page.block < status.num_blocks:
                stored = store.layout.stored_bytes(page.group)
                expected = page_of(request.keys[page.block], page.group, stored)
                assert np.array_equal(store.slots.array(page.slot)[:stored], expected), f"wrong bytes in {page}"
    finally:
        store.complete(lease)
    return status.num_blocks, match


def use(store: KVStore, tokens: Any, options: RequestOptions | None = None) -> int:
    """One request from lookup to end; returns the blocks that were loaded."""
    request = store.request(tokens, options)
    loaded, _ = load(store, request)
    save(store, request, loaded)
    store.keep.finished(request)
    return loaded

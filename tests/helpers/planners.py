"""Planners with a journal, and requests of blocks that are nothing but hashes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from eviction.registry import make_policy
from kvstore.clock import SYSTEM_CLOCK, Clock
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.journal import Journal
from kvstore.plan.planner import Planner
from kvstore.plan.records import Outcome, PlanSettings, Request, RequestOptions
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

BLOCK = 4
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")


def make(
    num_slots: int = 8,
    disk_pages: int | None = None,
    *,
    clock: Clock = SYSTEM_CLOCK,
    host_ttl_s: float | None = None,
    disk_ttl_s: float = 0.0,
) -> tuple[Planner, Journal]:
    tiers = []
    if disk_pages is not None:
        tiers = [
            TierPlan(
                "disk", disk_pages, make_policy("lru", disk_ttl_s), is_indexed=True, is_shared=False, ttl_s=disk_ttl_s
            )
        ]
    settings = PlanSettings(num_slots, load_or_recompute=False)
    planner = Planner(LAYOUT, settings, make_policy("lru", host_ttl_s), tiers, clock)
    journal = planner.books.catalog.journal = Journal(lambda: 1000.0)
    journal.wants_events = True
    return planner, journal


def take_small_steps(patch: pytest.MonkeyPatch, *, blocks: int = 2, pages: int = 2) -> None:
    """Have every verb take steps of so many pages that need room, or are only booked."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kvstore.plan."):
            for size, value in (("STEP_BLOCKS", blocks), ("STEP_PAGES", pages)):
                if hasattr(module, size):
                    patch.setattr(module, size, value)


def path(seed: int, num_blocks: int) -> Request:
    rng = np.random.default_rng(seed)
    keys = [BlockHash(rng.bytes(32)) for _ in range(num_blocks)]
    return Request(seed + 1, keys, num_blocks * BLOCK + 1, RequestOptions())


def save(planner: Planner, request: Request) -> None:
    publish(planner, request)
    land(planner)


def publish(planner: Planner, request: Request) -> None:
    """Save; what is written behind is on its way."""
    lease = planner.prepare_save(request, 0, len(request.keys), 0.0)
    planner.complete(lease.id, 0.0)


def land(planner: Planner) -> None:
    """Every transfer succeeds."""
    while transfers := planner.take_transfers():
        for transfer in transfers:
            planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 1), 0.0)
    planner.check()

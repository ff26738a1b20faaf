"""The cost of planning per block of 16 tokens: index, policy, leases and book-keeping, without moving a byte.

The ceiling is the least a prefix cache can do per block: one look into a dict and one entry written. Time is virtual,
and a disk tier's lane answers at once.
"""

from __future__ import annotations

import numpy as np

from eviction.registry import make_policy
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.engine import VirtualEngine
from kvstore.plan.records import PlanSettings, Request
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

BLOCK_SIZE = 16
PROMPT_BLOCKS = 1024
SHARED_BLOCKS = 768  # of a conversation's prompt, seen in the turn before
NUM_SLOTS = 16 * PROMPT_BLOCKS


class _Traffic:
    """An engine that is asked made-up prompts, a second apart."""

    def __init__(self, *, with_disk: bool) -> None:
        tiers = []
        if with_disk:
            tiers = [TierPlan("disk", 4 * NUM_SLOTS, make_policy("lru"), is_indexed=True, is_shared=False)]
        self.engine = VirtualEngine(BLOCK_SIZE, PlanSettings(NUM_SLOTS), make_policy("lru"), tiers)
        self._rng = np.random.default_rng(0)

    def request(self, before: list[BlockHash] | None = None) -> Request:
        """A prompt that begins with `before` and goes on with blocks never seen."""
        keys = list(before or [])
        fresh = self._rng.bytes(32 * (PROMPT_BLOCKS - len(keys)))
        keys += [BlockHash(fresh[i : i + 32]) for i in range(0, len(fresh), 32)]
        self.engine.now += 1.0
        return self.engine.request(keys)


def run(argument: str, quick: bool) -> list[Table]:
    """Measure a lookup that hits, a prompt that is new, and a turn of a conversation, all with evictions going on."""
    hosts = {False: _Traffic(with_disk=False), True: _Traffic(with_disk=True)}
    for traffic in hosts.values():
        for _ in range(NUM_SLOTS // PROMPT_BLOCKS + 1):  # full: from here on every save evicts
            traffic.engine.serve(traffic.request())
    plain = hosts[False]
    engine, known = plain.engine, plain.request()
    engine.serve(known)
    waiting: dict[str, Request] = {}
    table: dict[BlockHash, int] = dict.fromkeys(known.keys, 0)

    def dict_floor() -> None:
        for key in known.keys:
            table[key] = table[key] + 1

    def fresh(name: str, traffic: _Traffic, shared: int) -> None:
        before = None
        if shared:
            first = traffic.request()
            traffic.engine.serve(first)
            before = first.keys[:shared]
        waiting[name] = traffic.request(before)

    def served(name: str, *, with_disk: bool, shared: int) -> Case:
        traffic = hosts[with_disk]
        return Case(
            name,
            lambda: traffic.engine.serve(waiting[name]),
            PROMPT_BLOCKS,
            prepare=lambda: fresh(name, traffic, shared),
        )

    cases = [
        Case("dict: read and write one entry per block", dict_floor, PROMPT_BLOCKS),
        Case("lookup that hits every block", lambda: engine.planner.lookup(known, engine.now), PROMPT_BLOCKS),
        served("new prompt: miss, save, evict as much", with_disk=False, shared=0),
        served("turn of a conversation: 3/4 hit, 1/4 saved", with_disk=False, shared=SHARED_BLOCKS),
        served("new prompt, written behind to a disk tier", with_disk=True, shared=0),
        served("turn of a conversation, with a disk tier", with_disk=True, shared=SHARED_BLOCKS),
    ]
    return [measure(f"prompts of {PROMPT_BLOCKS} blocks of {BLOCK_SIZE} tokens", "blocks", cases, quick=quick)]

"""The cost of planning per block of 16 tokens: index, policy, leases and book-keeping, without moving a byte.

The ceiling is the least a prefix cache can do per block: one look into a dict and one entry written. Time is virtual,
and a disk tier's lane answers at once.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from eviction.registry import make_policy
from kvstore.lab.bench import Case, Table, measure
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.planner import Planner
from kvstore.plan.records import Outcome, Request
from kvstore.plan.settings import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

BLOCK_SIZE = 16
PROMPT_BLOCKS = 1024
SHARED_BLOCKS = 768  # of a conversation's prompt, seen in the turn before
NUM_SLOTS = 16 * PROMPT_BLOCKS


class _Driver:
    """A planner, requests with made-up hashes, and a clock that goes a second per request."""

    def __init__(self, *, with_disk: bool) -> None:
        layout = Layout(BLOCK_SIZE, (LayerGroup(GroupKind.FULL, (0,), 4096),), "bench", "uint8")
        tiers = []
        if with_disk:
            tiers = [TierPlan("disk", 4 * NUM_SLOTS, make_policy("lru"), is_indexed=True, is_shared=False)]
        self.planner = Planner(layout, PlanSettings(NUM_SLOTS), make_policy("lru"), tiers)
        self._rng = np.random.default_rng(0)
        self._ids = count(1)
        self.now = 0.0

    def request(self, before: list[BlockHash] | None = None) -> Request:
        """A prompt that begins with `before` and goes on with blocks never seen."""
        keys = list(before or [])
        fresh = self._rng.bytes(32 * (PROMPT_BLOCKS - len(keys)))
        keys += [BlockHash(fresh[i : i + 32]) for i in range(0, len(fresh), 32)]
        self.now += 1.0
        # One token more than the blocks hold: an engine has to compute at least one.
        return Request(next(self._ids), keys, len(keys) * BLOCK_SIZE + 1)

    def serve(self, request: Request) -> None:
        """The calls of an engine for one request: look up, load, save the rest, finish."""
        planner, now = self.planner, self.now
        match = planner.lookup(request, now)
        if match.num_blocks:
            planner.complete(planner.prepare_load(request, match.num_blocks, now).id, now)
        planner.complete(planner.prepare_save(request, match.num_blocks, PROMPT_BLOCKS, now).id, now)
        planner.finished(request, now)
        self.carry()

    def carry(self) -> None:
        """Answer every transfer at once, as a lane would in time."""
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                answer = Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 4096 * len(transfer.keys))
                self.planner.outcome(answer, self.now)


def run(argument: str, quick: bool) -> list[Table]:
    """Measure a lookup that hits, a prompt that is new, and a turn of a conversation, all with evictions going on."""
    hosts = {False: _Driver(with_disk=False), True: _Driver(with_disk=True)}
    for driver in hosts.values():
        for _ in range(NUM_SLOTS // PROMPT_BLOCKS + 1):  # full: from here on every save evicts
            driver.serve(driver.request())
    plain = hosts[False]
    known = plain.request()
    plain.serve(known)
    waiting: dict[str, Request] = {}
    table: dict[BlockHash, int] = dict.fromkeys(known.keys, 0)

    def dict_floor() -> None:
        for key in known.keys:
            table[key] = table[key] + 1

    def fresh(name: str, driver: _Driver, shared: int) -> None:
        before = None
        if shared:
            first = driver.request()
            driver.serve(first)
            before = first.keys[:shared]
        waiting[name] = driver.request(before)

    def served(name: str, *, with_disk: bool, shared: int) -> Case:
        driver = hosts[with_disk]
        return Case(
            name,
            lambda: driver.serve(waiting[name]),
            PROMPT_BLOCKS,
            prepare=lambda: fresh(name, driver, shared),
        )

    cases = [
        Case("dict: read and write one entry per block", dict_floor, PROMPT_BLOCKS),
        Case("lookup that hits every block", lambda: plain.planner.lookup(known, plain.now), PROMPT_BLOCKS),
        served("new prompt: miss, save, evict as much", with_disk=False, shared=0),
        served("turn of a conversation: 3/4 hit, 1/4 saved", with_disk=False, shared=SHARED_BLOCKS),
        served("new prompt, written behind to a disk tier", with_disk=True, shared=0),
        served("turn of a conversation, with a disk tier", with_disk=True, shared=SHARED_BLOCKS),
    ]
    return [measure(f"prompts of {PROMPT_BLOCKS} blocks of {BLOCK_SIZE} tokens", "blocks", cases, quick=quick)]

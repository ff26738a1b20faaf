"""A slow tier must not make time to first token worse than computing, and a tier that recovers must be used again.

An engine that computes 1000 tokens a second and a tier whose speed the test sets, both under a virtual clock.
"""

from __future__ import annotations

import hashlib

import pytest

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.cost import REMEASURE_AFTER_S
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Request
from kvstore.plan.tier_plan import TierPlan
from radix.namespace import BlockHash
from tests.helpers.planners import land

BLOCK = 16
PAGE_BYTES = 1 << 20
TOKENS_PER_S = 1000.0
PROMPT_BLOCKS = 64


class Engine:
    """Serves prompts: loads what the planner offers, computes the rest, tells how long the first token took."""

    def __init__(self, *, load_or_recompute: bool = True) -> None:
        self.layout = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), PAGE_BYTES),), "test", "uint8")
        self.planner = Planner(
            self.layout,
            PlanSettings(PROMPT_BLOCKS, load_or_recompute=load_or_recompute, batch_pages=8, load_deadline_s=1e9),
            make_policy("lru"),
            [TierPlan("disk", None, None, is_indexed=True, is_shared=False, workers=1, window_pages=10_000)],
        )
        self.now = 0.0
        self.tier_seconds_per_page = 0.001
        self._ids = 0

    def serve(self, seed: int) -> float:
        """Time to first token of prompt `seed`, in seconds."""
        self._ids += 1
        request = Request(self._ids, path(seed), PROMPT_BLOCKS * BLOCK + 1)
        began = self.now
        match = self.planner.lookup(request, self.now)
        lease = self.planner.prepare_load(request, match.num_blocks, self.now)
        while self.planner.is_waiting(lease.id):
            self.carry()
        loaded = self.planner.poll(lease.id).num_blocks
        self.planner.complete(lease.id, self.now)
        computed = request.num_tokens - loaded * BLOCK
        self.now += computed / TOKENS_PER_S
        self.planner.observe_prefill(computed, computed / TOKENS_PER_S)
        ttft = self.now - began
        self.planner.complete(self.planner.prepare_save(request, loaded, PROMPT_BLOCKS, self.now).id, self.now)
        self.planner.finished(request, self.now)
        self.carry(in_background=True)
        return ttft

    def carry(self, *, in_background: bool = False) -> None:
        """Let the tier's one worker do what waits; time passes unless it happens beside the engine."""
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                seconds = len(transfer.keys) * self.tier_seconds_per_page if transfer.op is Op.FETCH else 0.0
                if not in_background:
                    self.now += seconds
                answer = Outcome(transfer.id, (True,) * len(transfer.keys), seconds, PAGE_BYTES * len(transfer.keys))
                self.planner.outcome(answer, self.now)


def path(seed: int) -> list[BlockHash]:
    return [BlockHash(hashlib.sha256(bytes([seed, block])).digest()) for block in range(PROMPT_BLOCKS)]


COLD_S = (PROMPT_BLOCKS * BLOCK + 1) / TOKENS_PER_S


def played(engine: Engine, turns: int) -> list[float]:
    """Two prompts in turn, each of which pushes the other out of host memory: every hit comes from the tier."""
    return [engine.serve(turn % 2) for turn in range(turns)]


def test_hits_of_a_fast_tier_are_loaded() -> None:
    engine = Engine()

    times = played(engine, 6)

    assert times[0] == pytest.approx(COLD_S)
    assert max(times[2:]) < 0.1 * COLD_S


def test_hits_of_a_slow_tier_do_not_make_the_first_token_later_than_cold() -> None:
    engine = Engine()
    played(engine, 4)
    engine.tier_seconds_per_page = 0.1  # a page's 16 tokens take 0.016 s to compute

    times = played(engine, 12)

    assert max(times[:2]) > 2 * COLD_S  # what it costs to find out
    assert max(times[2:]) <= 1.01 * COLD_S


def test_without_the_rule_they_do() -> None:
    engine = Engine(load_or_recompute=False)
    played(engine, 4)
    engine.tier_seconds_per_page = 0.1

    assert min(played(engine, 12)) > 2 * COLD_S


def test_a_tier_that_recovers_is_used_again() -> None:
    engine = Engine()
    played(engine, 4)
    engine.tier_seconds_per_page = 0.1
    played(engine, 6)
    engine.tier_seconds_per_page = 0.001

    times = played(engine, 60)

    assert max(times) <= 1.01 * COLD_S
    assert max(times[-4:]) < 0.2 * COLD_S


@pytest.mark.parametrize(("held", "expected"), [(0, PROMPT_BLOCKS), (PROMPT_BLOCKS - 4, PROMPT_BLOCKS - 4)])
def test_only_what_the_engine_does_not_hold_is_weighed(held: int, expected: int) -> None:
    engine = Engine()
    played(engine, 4)  # prompt 0 is on the tier only
    tier = engine.planner.books.costs.tiers["disk"]
    for _ in range(40):
        tier.observe(0.2, 0, engine.now)  # asking takes long: four blocks are computed in 0.064 s, all of it in 1.024
    request = Request(1000, path(0), PROMPT_BLOCKS * BLOCK + 1, held=held)

    match = engine.planner.lookup(request, engine.now)

    assert match.num_blocks == expected
    assert match.known == PROMPT_BLOCKS


PIECE = LayerGroup(GroupKind.RECURRENT, (1,), PAGE_BYTES)
PAIRS = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), PAGE_BYTES), PIECE, PIECE), "test", "uint8")


def paired(disk_seconds_per_page: float, *states: int) -> tuple[Planner, Request]:
    """A prompt whose pages are in host memory, and the states after so many blocks on disk, all that is stored."""
    plans = [TierPlan("disk", None, None, is_indexed=True, is_shared=False, workers=1, window_pages=10_000)]
    planner = Planner(PAIRS, PlanSettings(2 * PROMPT_BLOCKS), make_policy("lru"), plans)
    request = Request(1, path(0), PROMPT_BLOCKS * BLOCK + 1)
    lease = planner.prepare_save(request, 0, PROMPT_BLOCKS, 0.0, states=[after - 1 for after in states])
    planner.complete(lease.id, 0.0)
    land(planner)
    blocks = [planner.books.catalog.get(request.keys[after - 1]) for after in states]
    planner.books.host.drop([page for block in blocks if block is not None for page in block.pages[1:]])
    planner.observe_prefill(1000, 1000 / TOKENS_PER_S)
    planner.books.costs.tiers["disk"].observe(disk_seconds_per_page, PAGE_BYTES, 0.0)
    return planner, request


@pytest.mark.parametrize(
    ("disk_seconds_per_page", "states", "expected"),
    [
        (0.1, (PROMPT_BLOCKS,), PROMPT_BLOCKS),  # longer than a block, and a fifth of the prompt
        (0.1, (PROMPT_BLOCKS // 2, PROMPT_BLOCKS), PROMPT_BLOCKS),
        (0.6, (PROMPT_BLOCKS,), 0),  # longer than the prompt
        (0.6, (), 0),
    ],
)
def test_a_state_is_weighed_against_all_that_is_computed_without_it(
    disk_seconds_per_page: float, states: tuple[int, ...], expected: int
) -> None:
    planner, request = paired(disk_seconds_per_page, *states)

    match = planner.lookup(request, 1.0)

    assert match.num_blocks == expected
    assert match.known == max(states, default=0)


def test_a_tier_that_had_a_state_only_is_measured_again() -> None:
    planner, request = paired(0.6, PROMPT_BLOCKS)
    assert planner.lookup(request, 1.0).num_blocks == 0

    planner.lookup(request, 1.0 + REMEASURE_AFTER_S)
    (sample,) = planner.take_transfers()
    planner.outcome(Outcome(sample.id, (True,) * len(sample.keys), 0.001, 2 * PAGE_BYTES), 20.0)

    assert (sample.op, len(sample.keys)) == (Op.FETCH, 2)
    assert planner.lookup(request, 21.0).num_blocks == PROMPT_BLOCKS
    planner.check()

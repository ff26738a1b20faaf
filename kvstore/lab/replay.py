"""The planner's engine of replay: a trace played through the planner and the policies of a server.

    played = play(read_trace(path), Setup((("host", 10_000),), "lru"))

Only the bytes are missing: the clock is the trace's own, and what lanes carry is there at once. It knows every policy,
one's own too, at about 10 us a block reference; sweeps ask the compiled engine (compiled.py), which hits the same. Two
things differ, because the planner writes in batches and ahead: a page kept back by a spent budget is written once the
budget has filled, where the compiled engine tries again at its next use; and of what leaves host memory for a disk
that is exclusive in one go, the part beyond the margin (plan/margin.py) is lost, where the compiled engine moves all.

A trace's last block counts as a hit although it may be filled in part only, and although an engine would compute at
least one token of it; so the rates are those of the trace, a little above an engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.errors import ConfigError
from kvstore.lab.engine import PAGE_BYTES, VirtualEngine
from kvstore.lab.hints import TraceHint, hints_of
from kvstore.lab.setup import DISK, PREFILL_TOKENS_PER_S, Played, Setup, Speculated
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest
from kvstore.plan.records import PlanSettings, SpeculationSettings
from kvstore.plan.tier_plan import TierPlan
from kvstore.policies import can_forecast, forecasting, make_policy
from radix.namespace import BlockHash

KEY_BYTES = 32
PROGRESS_EVERY = 64  # requests


def play(trace: ReplayTrace, setup: Setup, on_progress: Callable[[int], object] | None = None) -> Played:
    """Play a whole trace through stores that are empty at first.

    on_progress: is told now and then how many references are done; what it raises ends the play.

    Raises ConfigError for a policy that is none, and for what the planner has no words for.
    """
    if setup.speculate is not None and setup.replicas > 1:
        raise ConfigError("speculation is played in one store; leave the replicas out")
    scale, num_stores = (setup.replicas, 1) if setup.is_pooled else (1, setup.replicas)
    fleet = _Fleet(
        [_engine(trace, setup, scale) for _ in range(num_stores)],
        by_prefix=setup.routing == "prefix",
        blocks_per_s=PREFILL_TOKENS_PER_S / trace.block_tokens,
    )
    names = [name for name, _ in setup.tiers]
    hits = np.zeros((len(trace.requests), len(names)), np.int32)
    told = hints_of(trace, setup.hints, names_sessions=setup.speculate is not None)
    began, num_done = time.thread_time(), 0
    for number, request in enumerate(trace.requests):
        by_tier = fleet.serve(request, None if told is None else told[number])
        hits[number] = [by_tier.get(name, 0) for name in names]
        num_done += len(request.blocks)
        if on_progress is not None and number % PROGRESS_EVERY == 0:
            on_progress(num_done)
    cpu_s = time.thread_time() - began
    written = np.zeros(len(names), np.int64)
    for engine in fleet.engines:
        engine.planner.check()
        to_host = engine.planner.saver.counters["saved_pages"] + engine.num_fetched
        written += [to_host, *(tier.counters.spilled_pages for tier in engine.planner.books.tiers)]
    return Played(hits, tuple(map(int, written)), cpu_s, _speculated(fleet.engines))


def key_of(block: int) -> BlockHash:
    """Return the hash that stands for a trace's block. Ids are unique within a trace, so no hash is needed."""
    return BlockHash(block.to_bytes(KEY_BYTES, "big"))


def _engine(trace: ReplayTrace, setup: Setup, scale: int) -> VirtualEngine:
    host = make_policy(setup.policy, setup.ttl_s)
    (_, num_slots), *lower = setup.tiers
    speculation = None
    if (asked := setup.speculate) is not None:
        speculation = SpeculationSettings(
            "auto", int(asked.slots * num_slots), asked.blocks_per_s * PAGE_BYTES, asked.max_waste
        )
    settings = PlanSettings(scale * num_slots, max_prefetch_slots=num_slots // 4, speculation=speculation)
    return VirtualEngine(trace.block_tokens, settings, host, [_plan(setup, *tier, scale) for tier in lower])


def _speculated(engines: Sequence[VirtualEngine]) -> Speculated | None:
    (speculation, *_) = [engine.planner.speculation for engine in engines]
    if speculation is None:
        return None
    return Speculated(**speculation.counters, stops=speculation.verdict.num_stopped)


def _plan(setup: Setup, name: str, num_blocks: int, scale: int) -> TierPlan:
    if setup.admit == "predicted" and not can_forecast(setup.policy):
        raise ConfigError(
            f"admission is 'predicted', and policy {setup.policy!r} forecasts nothing; "
            f"it must be one that does: {', '.join(forecasting())}"
        )
    policy = make_policy(setup.policy, setup.ttl_s)
    writes = setup.writes_per_day if name == DISK else None
    return TierPlan(
        name,
        scale * num_blocks,
        policy,
        is_indexed=True,
        is_shared=False,
        admit=setup.admit,
        exclusive=setup.is_exclusive,
        max_writes_per_day=0 if writes is None else scale * writes * PAGE_BYTES,
    )


class _Fleet:
    """Replicas, and how requests are spread over them; see kvstore/cluster/routing.py, which this follows.

    A queue is worked off at a stated rate; of replicas with equally much to compute the next in turn is taken.
    """

    def __init__(self, engines: list[VirtualEngine], *, by_prefix: bool, blocks_per_s: float) -> None:
        self.engines = engines
        self._by_prefix = by_prefix and len(engines) > 1
        self._blocks_per_s = blocks_per_s
        self._queued = [0.0] * len(engines)
        self._now = 0.0
        self._turn = 0

    def serve(self, request: KvtRequest, hint: TraceHint | None) -> dict[str, int]:
        """Have one replica serve a request; return its hit blocks by tier.

        hint: None where no request of the trace has one.
        """
        keys = [key_of(block) for block in request.blocks]
        passed, self._now = max(0.0, request.at_s - self._now), max(self._now, request.at_s)
        for engine in self.engines:
            engine.run_until(self._now)
            if hint is not None:
                engine.planner.tick(self._now)  # what is retained ends by it
        engine = self.engines[self._choose(keys, passed)]
        asked = engine.request(keys, None if hint is None else hint.options)
        for wish in () if hint is None else hint.wishes:
            engine.planner.obey(asked, wish, self._now)
        return engine.serve(asked, request.finish_reason, request.num_answer_tokens).by_tier

    def _choose(self, keys: list[BlockHash], passed: float) -> int:
        num = len(self.engines)
        turn, self._turn = self._turn % num, self._turn + 1
        if not self._by_prefix:
            return turn
        done = self._blocks_per_s * passed
        self._queued = [max(0.0, queued - done) for queued in self._queued]
        order = [(turn + step) % num for step in range(num)]
        work = {i: self._queued[i] + (len(keys) - self.engines[i].num_stored(keys)) for i in order}
        best = min(order, key=work.__getitem__)
        self._queued[best] = work[best]
        return best

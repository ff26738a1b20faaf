"""Many machines: replicas under a router, with tiers of their own or one that all share.

    fleet = Fleet(trace.block_tokens, FleetPlan(num_replicas=16, routing="prefix", is_pooled=True))
    for request in copies_of(trace, 6, 300.0):
        fleet.serve(request)

Planner, policies and the router's orders are those of a server and of a cluster (kvstore/cluster/routing.py). Time,
bytes and queues are modelled: arrivals are the trace's whatever happened before, a replica works off its queue of
prompt tokens at PREFILL_TOKENS_PER_S, and a transfer takes no time; what a shared tier would have to carry is told.

    round-robin, prefix   every replica computes prompts and answers them
    pd                    three quarters of them compute prompts and publish every page to the shared tier; the others
                          load the whole prompt from there, as far as they do not have it, and decode
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from eviction.registry import make_policy
from kvstore.cluster.routing import SHARED_WORTH, Policy, PrefixAware, ReplicaView, RoundRobin
from kvstore.errors import ConfigError
from kvstore.lab.engine import VirtualEngine
from kvstore.lab.replay import key_of
from kvstore.lab.setup import DISK, PREFILL_TOKENS_PER_S, REDIS
from kvstore.lab.shared_tier import SharedTier
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest
from kvstore.page import page_key
from kvstore.plan.records import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from radix.namespace import BlockHash

ROUND_ROBIN, PREFIX, PD = FLEET_ROUTINGS = ("round-robin", "prefix", "pd")
PREFILL_SHARE = 0.75  # of the replicas of pd: prompts are most of the work of these traces
DECODE_TOKENS_PER_S = 2_500.0  # of one replica, all its answers together: an assumption, for queues alone
START_WITHIN_S = 30.0  # copies of a trace begin at random within it


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Replicas, and what each has room for.

    host_blocks, lower_blocks: of one replica, in host memory and below it. is_pooled: what is below is one tier that
    all share, of all their room; else each has a disk of its own. shared_worth: what the router takes a token for that
    only the shared tier has, where one in the replica's host memory is 1.
    """

    num_replicas: int
    routing: str = PREFIX
    is_pooled: bool = True
    host_blocks: int = 1024
    lower_blocks: int = 4096
    shared_worth: float = SHARED_WORTH


@dataclass(slots=True)
class FleetTotals:
    """Requests that were served, their prompt tokens, and how many of these were hit in host memory and below it."""

    requests: int = 0
    prompt: int = 0
    host: int = 0
    lower: int = 0

    @property
    def computed(self) -> int:
        """Prompt tokens that were not hit."""
        return self.prompt - self.host - self.lower


class _Pool:
    """Replicas that do one kind of work, and the router's order over them. tokens_per_s: their queues' rate."""

    def __init__(self, engines: Sequence[VirtualEngine], policy: Policy, tokens_per_s: float) -> None:
        self.engines = {str(number): engine for number, engine in enumerate(engines)}
        self.done = dict.fromkeys(self.engines, 0.0)
        self._policy = policy
        self._rate = tokens_per_s
        self._queued = dict.fromkeys(self.engines, 0.0)
        self._now = 0.0

    def choose(self, prompt_tokens: int, hits: dict[str, tuple[int, int]], now: float) -> str:
        """Return the name of the replica that a request goes to first. hits: by name, its own and shared tokens."""
        done, self._now = self._rate * (now - self._now), now
        for name, queued in self._queued.items():
            self._queued[name] = max(0.0, queued - done)
        views = {
            name: ReplicaView(prompt_tokens, own + shared, int(self._queued[name]), shared)
            for name, (own, shared) in hits.items()
        }
        return self._policy.order(list(self.engines), views)[0]

    def charge(self, name: str, num_tokens: int) -> None:
        """So much more is to be done there."""
        self._queued[name] += num_tokens
        self.done[name] += num_tokens

    @property
    def imbalance(self) -> float:
        """The most that one replica had to do, over the mean of all."""
        total = sum(self.done.values())
        return max(self.done.values()) * len(self.done) / total if total else 1.0


class Fleet:
    """Replicas that serve one stream of requests. totals: may be set anew after a warm-up."""

    def __init__(self, block_tokens: int, plan: FleetPlan) -> None:
        """Raise ConfigError for a routing that is none, or pd without a shared tier."""
        if plan.routing not in FLEET_ROUTINGS:
            raise ConfigError(f"routing is {plan.routing!r}; it must be one of {', '.join(FLEET_ROUTINGS)}")
        if plan.routing == PD and (not plan.is_pooled or plan.num_replicas < 2):
            raise ConfigError("pd hands pages over in a shared tier: is_pooled, and two replicas or more")
        self.plan = plan
        self.totals = FleetTotals()
        self.shared = SharedTier(plan.num_replicas * plan.lower_blocks) if plan.is_pooled else None
        self._block_tokens = block_tokens
        num_prefill = int(PREFILL_SHARE * plan.num_replicas) or 1 if plan.routing == PD else plan.num_replicas
        order = RoundRobin() if plan.routing == ROUND_ROBIN else PrefixAware(plan.shared_worth)
        self.prefill = _Pool([self._engine() for _ in range(num_prefill)], order, PREFILL_TOKENS_PER_S)
        others = [self._engine() for _ in range(plan.num_replicas - num_prefill)]
        self.decode = _Pool(others, PrefixAware(), DECODE_TOKENS_PER_S) if others else None

    def serve(self, request: KvtRequest) -> None:
        """Route a request, serve it, and book it."""
        keys = [key_of(block) for block in request.blocks]
        hits = self._run(self.prefill, keys, request, is_decode=False)
        if self.decode is not None:
            self._run(self.decode, keys, request, is_decode=True)
        tokens = [min(num * self._block_tokens, request.num_prompt_tokens) for num in (hits[0], sum(hits))]
        self.totals.requests += 1
        self.totals.prompt += request.num_prompt_tokens
        self.totals.host += tokens[0]
        self.totals.lower += tokens[1] - tokens[0]

    def _run(self, pool: _Pool, keys: list[BlockHash], request: KvtRequest, *, is_decode: bool) -> tuple[int, int]:
        """Have one of a pool serve a request; return the blocks hit in host memory, and below it."""
        prompt, size = request.num_prompt_tokens, self._block_tokens
        in_shared = 0 if is_decode else self._num_shared(keys)
        hits = {}
        for name, engine in pool.engines.items() if self.plan.routing != ROUND_ROBIN else ():
            stored = self._num_stored(engine, keys)
            own, all_hits = (min(prompt, size * num) for num in (stored, max(stored, in_shared)))
            hits[name] = own, all_hits - own
        name = pool.choose(prompt, hits, request.at_s)
        engine = pool.engines[name]
        engine.run_until(request.at_s)
        match = engine.serve(engine.request(keys), request.finish_reason, request.num_answer_tokens)
        in_host = match.by_tier.get("host", 0)
        missing = prompt - min(prompt, size * match.num_blocks)
        pool.charge(name, max(request.num_answer_tokens, 1) if is_decode else missing)
        return in_host, match.num_blocks - in_host

    def _num_stored(self, engine: VirtualEngine, keys: list[BlockHash]) -> int:
        return engine.num_in_host(keys) if self.shared is not None else engine.num_stored(keys)

    def _num_shared(self, keys: list[BlockHash]) -> int:
        if self.shared is None:
            return 0
        return next((i for i, key in enumerate(keys) if page_key(key, 0, 0) not in self.shared), len(keys))

    def _engine(self) -> VirtualEngine:
        plan = self.plan
        settings = PlanSettings(plan.host_blocks, load_or_recompute=False)
        if plan.is_pooled:
            lower = TierPlan(REDIS, None, None, is_indexed=False, is_shared=True)
        else:
            lower = TierPlan(DISK, plan.lower_blocks, make_policy("lru"), is_indexed=True, is_shared=False)
        return VirtualEngine(self._block_tokens, settings, make_policy("lru"), [lower], self.shared)


def copies_of(
    trace: ReplayTrace, num_copies: int, first_s: float, span_s: float, seed: int = 0
) -> Iterator[KvtRequest]:
    """Yield the requests of [first_s, first_s + span_s) of a trace, so many times, with blocks of their own each.

    More users, not faster ones: copies begin at random within START_WITHIN_S and share nothing.
    """
    draw = random.Random(seed)
    window = [request for request in trace.requests if first_s <= request.at_s < first_s + span_s]
    stream = []
    for number in range(num_copies):
        begins = draw.uniform(0.0, START_WITHIN_S) - first_s
        for request in window:
            blocks = tuple(block * num_copies + number for block in request.blocks)
            stream.append(replace(request, at_s=request.at_s + begins, blocks=blocks))
    stream.sort(key=lambda request: request.at_s)
    yield from stream

"""Replay of a trace: what share of its prompt tokens would have been hits, by policy and capacity.

    trace = read_trace(path)
    report = replay(trace, trace.blocks_of(0.05), policy="lru")
    print(report.hit_rate, report.us_per_block)

The planner and the policies are those of a server, under the trace's own times; only the bytes are missing. A trace is
each request's blocks (traces.py), of which an id means a content.

A trace's last block counts as a hit although it may be filled in part only, and although an engine would compute at
least one token of it; so the rates are those of the trace, a little above an engine's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.lab.engine import VirtualEngine
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest
from kvstore.plan.records import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from kvstore.policies import make_policy
from radix.namespace import BlockHash

KEY_BYTES = 32


@dataclass(slots=True)
class ReplayReport:
    """What a replay counted.

    hit_tokens: by the tier that they came from.
    cpu_s:      of the planning, all of it.
    """

    trace: str
    policy: str
    num_slots: int
    num_requests: int = 0
    num_blocks: int = 0
    prompt_tokens: int = 0
    hit_tokens: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hit tokens over prompt tokens; 0 of a trace without any."""
        return sum(self.hit_tokens.values()) / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def us_per_block(self) -> float:
        """Microseconds of CPU time per block of a prompt."""
        return self.cpu_s / self.num_blocks * 1e6 if self.num_blocks else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return record | {"hit_rate": self.hit_rate, "us_per_block": self.us_per_block}


def replay(
    trace: ReplayTrace,
    num_slots: int,
    *,
    policy: str = "lru",
    ttl_s: float | None = None,
    tiers: Sequence[TierPlan] = (),
) -> ReplayReport:
    """Play a whole trace through a store that is empty at first.

    num_slots: blocks that host memory has room for.
    policy:    of host memory: a name, or "package.module:Class".
    ttl_s:     how long a page lives unused, by the trace's own times; None for ever.
    tiers:     below host memory; each has its own policy.

    Raises ConfigError for a policy that is none.
    """
    engine = VirtualEngine(trace.block_tokens, PlanSettings(num_slots), make_policy(policy, ttl_s), tiers)
    report = ReplayReport(trace.name, policy, num_slots)
    for request in trace.requests:
        engine.now = max(engine.now, request.at_s)
        asked = engine.request([key_of(block) for block in request.blocks])
        began = time.thread_time()
        match = engine.serve(asked)
        report.cpu_s += time.thread_time() - began
        _count(report, request, match.by_tier, trace.block_tokens)
    engine.planner.check()
    return report


def key_of(block: int) -> BlockHash:
    """Return the hash that stands for a trace's block. Ids are unique within a trace, so no hash is needed."""
    return BlockHash(block.to_bytes(KEY_BYTES, "big"))


def _count(report: ReplayReport, request: KvtRequest, by_tier: dict[str, int], block_tokens: int) -> None:
    report.num_requests += 1
    report.num_blocks += len(request.blocks)
    report.prompt_tokens += request.num_prompt_tokens
    left = request.num_prompt_tokens  # the last block may be filled in part only
    for tier, num_blocks in by_tier.items():
        num_tokens = min(num_blocks * block_tokens, left)
        report.hit_tokens[tier] = report.hit_tokens.get(tier, 0) + num_tokens
        left -= num_tokens

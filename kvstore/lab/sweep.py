"""A trace replayed at several capacities and by several policies, beside the floor and the ceiling.

The floor is LRU, the policy to beat; the ceiling is the offline optimum (optimum.py). Computed tokens stand beside the
hit rate: where nearly all is hit, a fall of 0.2 points is 5 % more to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvstore.errors import ConfigError
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.replay import replay
from kvstore.lab.traces import ReplayTrace
from kvstore.units import parse_bytes

LRU = "lru"
LEAST_GAP = 0.005  # between floor and ceiling; a share of less says nothing


@dataclass(frozen=True, slots=True)
class ReplayCell:
    """One policy at one capacity.

    capacity:       blocks. share: of the trace's different blocks.
    lru, min:       token hit rates of the floor and the ceiling at this capacity.
    lru_gap_closed: of the way from one to the other; None where that is too short to say.
    seconds:        CPU time of the replay.
    """

    trace: str
    policy: str
    capacity: int
    share: float
    token_hit_rate: float
    hit_rate_by_tier: dict[str, float]
    computed_tokens: int
    lru: float
    min: float
    lru_gap_closed: float | None
    requests: int
    seconds: float
    ttl_s: float | None = None

    def as_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def sweep(
    trace: ReplayTrace,
    capacities: Sequence[int],
    policies: Sequence[str],
    ttl_s: float | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Iterator[ReplayCell]:
    """Yield a cell for each capacity and policy, capacity by capacity. on_step: is told what is computed next.

    LRU without a time to live is the floor, and is replayed though it be not among the policies.
    """
    prompt_tokens = trace.prompt_tokens or 1
    num_distinct = trace.num_distinct or 1
    for capacity in capacities:
        on_step(f"{trace.name}: the optimum at {capacity} blocks")
        ceiling = optimal_hit_tokens(trace, capacity) / prompt_tokens
        on_step(f"{trace.name}: {LRU} at {capacity} blocks")
        floor = replay(trace, capacity, policy=LRU)
        for policy in policies:
            if policy != LRU or ttl_s is not None:
                on_step(f"{trace.name}: {policy} at {capacity} blocks")
                report = replay(trace, capacity, policy=policy, ttl_s=ttl_s)
            else:
                report = floor
            gap = ceiling - floor.hit_rate
            yield ReplayCell(
                trace.name,
                policy,
                capacity,
                capacity / num_distinct,
                report.hit_rate,
                {tier: tokens / prompt_tokens for tier, tokens in report.hit_tokens.items()},
                report.prompt_tokens - sum(report.hit_tokens.values()),
                floor.hit_rate,
                ceiling,
                (report.hit_rate - floor.hit_rate) / gap if gap >= LEAST_GAP else None,
                report.num_requests,
                report.cpu_s,
                ttl_s,
            )


def parse_capacity(text: str, trace: ReplayTrace, bytes_per_token: int | None) -> int:
    """Read a capacity as blocks of a trace: "5%" of its different blocks, "20000" blocks, or "64GiB" of memory.

    Raises ConfigError, with what would be right.
    """
    written = text.strip()
    try:
        share = float(written[:-1]) / 100 if written.endswith("%") else None
        num_bytes = 0 if share is not None or written.isdecimal() else parse_bytes(written)
    except ValueError:
        raise ConfigError(
            f"capacity is {text!r}; write a share of the trace's blocks (5%), blocks (20000) or a size (64GiB)"
        ) from None
    if share is not None:
        return trace.blocks_of(share)
    if num_bytes and bytes_per_token is None:
        raise ConfigError(f"capacity {text!r} is a size; say with --bytes-per-token how large a token's KV is")
    num_blocks = num_bytes // ((bytes_per_token or 1) * trace.block_tokens) if num_bytes else int(written or 0)
    if num_blocks < 1:
        raise ConfigError(f"capacity {text!r} is less than one block of {trace.block_tokens} tokens")
    return num_blocks

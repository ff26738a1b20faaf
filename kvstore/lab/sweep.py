"""A trace replayed at several capacities and by several policies, beside the floor and the ceiling.

The floor is LRU, the policy to beat; the ceiling is the offline optimum (optimum.py). Computed tokens stand beside the
hit rate: where nearly all is hit, a fall of 0.2 points is 5 % more to compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from kvstore.errors import ConfigError
from kvstore.lab.player import Player
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.timing import PrefillModel, time_of
from kvstore.lab.traces import ReplayTrace
from kvstore.units import parse_bytes

LRU = "lru"
BASE = Setup(((HOST, 1),))
PERCENTILES = (50, 95, 99)  # of TTFT
LEAST_GAP = 0.005  # between floor and ceiling; a share of less says nothing


@dataclass(frozen=True, slots=True)
class ReplayCell:
    """One policy at one capacity.

    capacity:       blocks. share: of the trace's different blocks.
    lru, min:       token hit rates of the floor and the ceiling at this capacity.
    lru_gap_closed: of the way from one to the other; None where that is too short to say.
    seconds:        CPU time of the replay.
    min is that of one store as large as the largest tier of all replicas, or as all of them if they are exclusive.
    prefill_time_saved: share of all prompts' prefill seconds, after loading; ttft_s: by percentile (timing.py).
    tiers, written: blocks of room, and blocks written, by tier.
    hints:          share of the requests that gave hints.
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
    engine: str = ""
    tiers: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    prefill_time_saved: float = 0.0
    ttft_s: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    hints: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def sweep(
    player: Player,
    model: PrefillModel,
    capacities: Sequence[int],
    policies: Sequence[str],
    base: Setup = BASE,
    on_step: Callable[[str], None] = lambda what: None,
    hints: Sequence[float] = (0.0,),
) -> Iterator[ReplayCell]:
    """Yield a cell for each capacity of host memory, policy and share of hints, capacity by capacity.

    base:    all else of the setups. on_step: is told what is computed next.
    hints:   shares of the requests that give hints.

    LRU without a time to live and hints is the floor, and is replayed though it be not among the policies.
    """
    trace = player.trace
    prompt_tokens, num_distinct = trace.prompt_tokens or 1, trace.num_distinct or 1
    at_s = np.array([request.at_s for request in trace.requests], np.float64)
    for capacity in capacities:
        floor_setup = replace(base, tiers=((HOST, capacity), *base.tiers[1:]), policy=LRU, ttl_s=None, hints=0.0)
        sizes = [num_blocks for _, num_blocks in floor_setup.tiers]
        room = base.replicas * (sum(sizes) if base.is_exclusive else max(sizes))
        on_step(f"{trace.name}: the optimum at {room} blocks")
        ceiling = player.optimal_tokens(room) / prompt_tokens
        on_step(f"{trace.name}: {LRU} at {capacity} blocks")
        floor = player.play(floor_setup)
        floor_rate = int(player.hit_tokens(floor).sum()) / prompt_tokens
        for policy, share in product(policies, hints):
            setup = replace(floor_setup, policy=policy, ttl_s=base.ttl_s, hints=share)
            played = floor
            if setup != floor_setup:
                on_step(f"{trace.name}: {policy} at {capacity} blocks")
                played = player.play(setup)
            tokens = player.hit_tokens(played)
            hit_tokens = int(tokens.sum())
            timing = time_of(model, at_s, player.prompt_tokens, tokens, base.replicas)
            rate, gap = hit_tokens / prompt_tokens, ceiling - floor_rate
            names = [name for name, _ in setup.tiers]
            yield ReplayCell(
                trace.name,
                policy,
                capacity,
                capacity / num_distinct,
                rate,
                {name: int(num) / prompt_tokens for name, num in zip(names, tokens.sum(axis=0), strict=True)},
                trace.prompt_tokens - hit_tokens,
                floor_rate,
                ceiling,
                (rate - floor_rate) / gap if gap >= LEAST_GAP else None,
                len(trace.requests),
                played.cpu_s,
                base.ttl_s,
                player.engine_of(setup),
                dict(setup.tiers),
                dict(zip(names, played.written, strict=True)),
                timing.saved,
                {f"p{percent}": timing.percentile(percent) for percent in PERCENTILES},
                timing.busy,
                share,
            )


def parse_capacity(text: str, trace: ReplayTrace, bytes_per_token: int | None) -> int:
    """Read a capacity as blocks of a trace.

    "5%" of its different blocks, "20000" blocks, "3Mtokens" or "500Ktokens", or "64GiB" of memory.

    Raises ConfigError, with what would be right.
    """
    written = text.strip()
    if tokens := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?) ?tokens", written, re.ASCII):
        num_tokens = float(tokens[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[tokens[2]]
        if num_tokens >= trace.block_tokens:
            return int(num_tokens / trace.block_tokens)
        raise ConfigError(f"capacity {text!r} is less than one block of {trace.block_tokens} tokens")
    try:
        share = float(written[:-1]) / 100 if written.endswith("%") else None
        num_bytes = 0 if share is not None or written.isdecimal() else parse_bytes(written)
    except ValueError:
        raise ConfigError(
            f"capacity is {text!r}; write a share of the trace's blocks (5%), blocks (20000), tokens (3Mtokens) or a "
            "size (64GiB)"
        ) from None
    if share is not None:
        return trace.blocks_of(share)
    if num_bytes and bytes_per_token is None:
        raise ConfigError(f"capacity {text!r} is a size; say with --bytes-per-token how large a token's KV is")
    num_blocks = num_bytes // ((bytes_per_token or 1) * trace.block_tokens) if num_bytes else int(written or 0)
    if num_blocks < 1:
        raise ConfigError(f"capacity {text!r} is less than one block of {trace.block_tokens} tokens")
    return num_blocks

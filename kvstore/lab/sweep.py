"""A trace replayed at several capacities and by several policies, beside the floor and the ceiling.

The floor is LRU, the policy to beat; the ceiling is the offline optimum (optimum.py). Computed tokens stand beside the
hit rate: where nearly all is hit, a fall of 0.2 points is 5 % more to compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvstore.errors import ConfigError
from kvstore.lab.player import Player
from kvstore.lab.setup import HOST, Setup
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
    player = Player(trace)
    prompt_tokens = trace.prompt_tokens or 1
    num_distinct = trace.num_distinct or 1
    for capacity in capacities:
        on_step(f"{trace.name}: the optimum at {capacity} blocks")
        ceiling = player.optimal_tokens(capacity) / prompt_tokens
        on_step(f"{trace.name}: {LRU} at {capacity} blocks")
        floor = _played(player, Setup(((HOST, capacity),)))
        floor_rate = sum(floor[0].values()) / prompt_tokens
        for policy in policies:
            played = floor
            if policy != LRU or ttl_s is not None:
                on_step(f"{trace.name}: {policy} at {capacity} blocks")
                played = _played(player, Setup(((HOST, capacity),), policy, ttl_s))
            hit_tokens = sum(played[0].values())
            rate, gap = hit_tokens / prompt_tokens, ceiling - floor_rate
            yield ReplayCell(
                trace.name,
                policy,
                capacity,
                capacity / num_distinct,
                rate,
                {tier: tokens / prompt_tokens for tier, tokens in played[0].items()},
                trace.prompt_tokens - hit_tokens,
                floor_rate,
                ceiling,
                (rate - floor_rate) / gap if gap >= LEAST_GAP else None,
                len(trace.requests),
                played[1],
                ttl_s,
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


def _played(player: Player, setup: Setup) -> tuple[dict[str, int], float]:
    played = player.play(setup)
    tokens = player.hit_tokens(played).sum(axis=0)
    return {name: int(num) for (name, _), num in zip(setup.tiers, tokens, strict=True) if num}, played.cpu_s

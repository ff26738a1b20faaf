"""A setup: the stores whose hits the laboratory wants to know, as the two engines of replay take it.

Both engines answer with the same `Played`: the one that runs the planner and the policies of a server (replay.py), and
the compiled one for sweeps. What hits are worth in seconds and money is figured out from that, elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HOST, DISK, REDIS = "host", "disk", "redis"  # nearest first
ROUTINGS = ("round_robin", "prefix")
ALWAYS, SECOND_USE, PREDICTED = ADMISSIONS = ("always", "second_use", "predicted")

# What a replica computes in a second, where requests go to the one that has least to do: an 8B model on one H100 takes
# 40 us a token at the head of a prompt. It says how soon a queue is worked off, nothing else.
PREFILL_TOKENS_PER_S = 25_000.0


@dataclass(frozen=True, slots=True)
class Speculate:
    """Speculative prefetch (plan/speculation.py), in mode auto.

    max_waste:    bytes brought in vain for each that is used, at most.
    blocks_per_s: that may be brought. slots: share of host memory for what was brought and not used yet.
    """

    max_waste: float
    blocks_per_s: float
    slots: float


@dataclass(frozen=True, slots=True)
class Speculated:
    """The pages that speculation brought, and those of them that were used, and wasted. stops: of itself."""

    brought: int
    used: int
    wasted: int
    stops: int


@dataclass(frozen=True, slots=True)
class Setup:
    """Stores that serve one trace together; empty at first.

    tiers:        names, nearest first, with the blocks that each has room for; host memory is always the first.
    policy:       of every tier: a name, or "package.module:Class".
    ttl_s:        how long a block lives unused, by the trace's own times; None for ever.
    is_exclusive: a block is in one tier at a time; else lower tiers have a copy of what is above.
    admit:        of lower tiers, one of ADMISSIONS.
    writes_per_day: blocks that may be written to disk in 86,400 s of the trace; None for any number.
    replicas:     stores, each with tiers of these sizes. routing: how requests are spread over them.
    is_pooled:    the replicas are one store of all their room, instead.
    hints:        share of the requests whose clients say what they know (hints.py).
    codec:        of the pages in Redis (hardware.py); hits are the same, bytes and seconds are not.
    speculate:    whether pages of idle sessions are brought to host memory, and how many.
    """

    tiers: tuple[tuple[str, int], ...]
    policy: str = "lru"
    ttl_s: float | None = None
    is_exclusive: bool = False
    admit: str = ALWAYS
    writes_per_day: int | None = None
    replicas: int = 1
    routing: str = "prefix"
    is_pooled: bool = False
    hints: float = 0.0
    codec: str = "exact"
    speculate: Speculate | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tiers' names, nearest first."""
        return tuple(name for name, _ in self.tiers)

    @property
    def room(self) -> int:
        """How many different blocks all replicas together can hold at most: lower tiers repeat what is above."""
        sizes = [num_blocks for _, num_blocks in self.tiers]
        return self.replicas * (sum(sizes) if self.is_exclusive else max(sizes))


@dataclass(frozen=True, slots=True)
class Played:
    """The outcome of a trace played through a setup.

    hit_blocks: int32, shape (num_requests, num_tiers): blocks of each prompt's hit by the tier that had them.
    written:    blocks written to each tier, parallel to the setup's tiers.
    cpu_s:      of the playing alone.
    speculated: None where nothing was brought ahead of need.
    """

    hit_blocks: npt.NDArray[np.int32]
    written: tuple[int, ...]
    cpu_s: float
    speculated: Speculated | None = None

    def hit_tokens(self, prompt_tokens: npt.NDArray[np.int64], block_tokens: int) -> npt.NDArray[np.int64]:
        """Return the hit tokens of each request by tier, shape (num_requests, num_tiers), nearest tier first.

        prompt_tokens: shape (num_requests,); the last block of a prompt counts with the tokens that are in it.
        """
        reached = np.cumsum(self.hit_blocks.astype(np.int64), axis=1) * block_tokens
        return np.diff(np.minimum(reached, prompt_tokens[:, None]), axis=1, prepend=0)

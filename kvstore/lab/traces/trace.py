"""A trace in memory, as every reader makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvstore.errors import ConfigError
from kvstore.load.kvt import KvtRequest


@dataclass(frozen=True, slots=True)
class ReplayTrace:
    """A trace in memory. Within it a block's id names the block with all that comes before it.

    num_skipped: broken lines that were left out.
    notes:       what a reader of figures has to know about how the file was read, a sentence each.
    """

    name: str
    block_tokens: int
    requests: tuple[KvtRequest, ...]
    num_skipped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_distinct(self) -> int:
        """How many different blocks there are: a store of so many never evicts."""
        return len({block for request in self.requests for block in request.blocks})

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def recorded_hit_rate(self) -> float | None:
        """Hit tokens over prompt tokens as the recorded store counted them; None where the trace does not say."""
        known = [request for request in self.requests if request.hit_tokens >= 0]
        tokens = sum(request.num_prompt_tokens for request in known)
        return sum(request.hit_tokens for request in known) / tokens if tokens else None

    def blocks_of(self, share: float) -> int:
        """Return how many blocks a store of this share of all different ones has, at least one."""
        if not 0 < share < math.inf:
            raise ConfigError(f"capacity is {share}; it must be a share above 0 of the trace's different blocks")
        return max(1, int(self.num_distinct * share))

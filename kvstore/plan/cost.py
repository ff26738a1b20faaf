"""Does loading pay? Moving averages of what tiers deliver, against the engine's own prefill rate.

A tier is described by two numbers: the latency of a small question and the seconds a byte takes on one worker. Both
are exponential moving averages over outcomes, so a tier that becomes slow is avoided after a few transfers. One that
is avoided is measured again in the background now and then, or it would stay avoided for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WEIGHT = 0.25  # of a new sample; four transfers replace most of an old belief
STALE_WEIGHT = 0.5  # of one that comes after REMEASURE_AFTER_S without any: a tier that recovered is back after three
REMEASURE_AFTER_S = 10.0  # how long an estimate that keeps a tier unused is believed
MIN_PREFILL_TOKENS = 16  # shorter prefills measure overhead, not a rate
MAX_PREFILL_TOKENS = 1 << 32  # and what is longer, or faster than this, was not measured at all
MAX_PREFILL_RATE = 1e9  # tokens per second


@dataclass(slots=True)
class TierCost:
    """The recent rates of one tier; None until something was measured."""

    parallel: int  # batches that run at the same time
    latency_s: float = 0.0
    seconds_per_byte: float | None = None
    measured_at: float = float("-inf")

    def observe(self, seconds: float, num_bytes: int, now: float) -> None:
        """Take in one finished batch."""
        weight = STALE_WEIGHT if now - self.measured_at > REMEASURE_AFTER_S else WEIGHT
        if num_bytes == 0:
            self.latency_s += WEIGHT * (seconds - self.latency_s)
            return
        self.measured_at = now
        sample = max(seconds - self.latency_s, 0.1 * seconds) / num_bytes
        if self.seconds_per_byte is None:
            self.seconds_per_byte = sample
        else:
            self.seconds_per_byte += weight * (sample - self.seconds_per_byte)

    def load_seconds(self, num_bytes: int, batch_bytes: int) -> float:
        """Expected time to load `num_bytes`; 0 while nothing is known, so that a new tier gets its chance."""
        if self.seconds_per_byte is None or num_bytes == 0:
            return 0.0
        batches = -(-num_bytes // batch_bytes)
        return self.latency_s + num_bytes * self.seconds_per_byte / min(self.parallel, batches)


class CostModel:
    """Load seconds of every tier, and the engine's prefill rate."""

    def __init__(self, tiers: dict[str, TierCost], batch_bytes: int) -> None:
        self.tiers = tiers
        self.prefill_tokens_per_s: float | None = None
        self._batch_bytes = batch_bytes

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Take in one prefill of the engine."""
        if not (MIN_PREFILL_TOKENS <= num_tokens <= MAX_PREFILL_TOKENS and 0 < seconds < float("inf")):
            return  # not a number is not in there either
        rate = num_tokens / seconds
        if rate > MAX_PREFILL_RATE:
            return
        if self.prefill_tokens_per_s is None:
            self.prefill_tokens_per_s = rate
        else:
            self.prefill_tokens_per_s += WEIGHT * (rate - self.prefill_tokens_per_s)

    def load_seconds(self, bytes_by_tier: Mapping[str, int]) -> float:
        """Expected seconds until all of it is in host memory; the tiers work side by side."""
        times = [self.tiers[name].load_seconds(n, self._batch_bytes) for name, n in bytes_by_tier.items()]
        return max(times, default=0.0)

    def best_end(self, ends: Sequence[tuple[int, Mapping[str, int]]], block_size: int) -> int:
        """The number of blocks that is most worth loading: that of one of `ends`, or 0.

        ends: where a load may end, the shortest first: blocks, and bytes to load for them, by tier. Cost and gain are
              linear along blocks of one tier, so ends within such a stretch need not be among them.
        """
        if self.prefill_tokens_per_s is None:
            return ends[-1][0] if ends else 0
        best, best_gain = 0, 0.0
        for num_blocks, loaded in ends:
            gain = num_blocks * block_size / self.prefill_tokens_per_s - self.load_seconds(loaded)
            if gain > best_gain:
                best, best_gain = num_blocks, gain
        return best

    def wants_sample(self, tier: str, now: float) -> bool:
        """True if what is believed of a tier is old enough to be checked again."""
        return now - self.tiers[tier].measured_at > REMEASURE_AFTER_S

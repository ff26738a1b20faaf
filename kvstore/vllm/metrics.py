"""The front's metrics: the names of every replica, filled from what it sees itself and from vLLM's own counters."""

from __future__ import annotations

from kvstore.cluster.metrics import ENGINE, ReplicaMetrics
from kvstore.vllm.counters import LOCAL, EngineCounters


class VllmMetrics(ReplicaMetrics):
    """Of one front. Times to first tokens, queueing and statuses are its own; tokens and tiers are vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self._last = EngineCounters()

    def take(self, now: EngineCounters) -> None:
        """Add what was counted since the last time. A server that was started anew counts from 0 again."""
        last = self._last if now.prompt_tokens >= self._last.prompt_tokens else EngineCounters()
        self._last = now
        hits = {**now.by_tier, ENGINE: now.by_source.get(LOCAL, 0)}
        before = {**last.by_tier, ENGINE: last.by_source.get(LOCAL, 0)}
        for tier, tokens in hits.items():
            self.hit_tokens.labels(tier).inc(max(0, tokens - before.get(tier, 0)))
        for counter, value, earlier in (
            (self.prompt_tokens, now.prompt_tokens, last.prompt_tokens),
            (self.new_tokens, now.new_tokens, last.new_tokens),
            (self.prefill, now.prefill_s, last.prefill_s),
            (self.decode, now.decode_s, last.decode_s),
            (self.load, now.load_s, last.load_s),
            (self.compute_wait, now.compute_wait_s, last.compute_wait_s),
            (self.unsaved_pages, now.unsaved_pages, last.unsaved_pages),
        ):
            counter.inc(max(0.0, value - earlier))

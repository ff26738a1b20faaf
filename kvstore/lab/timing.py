"""Seconds of prefill and of loading, and the time to first token of a trace: a model, stated.

prefill   floating-point operations of the tokens (geometry.py) over what the GPUs give (hardware.py)
load      latency of each tier that is asked, plus its bytes over its rate; tiers one after the other
cut       of a hit, the leading part is loaded whose prefill would take longest beyond its load; or none of it
TTFT      waiting + load + prefill of the rest. A replica serves one prompt at a time, first come, first served, and
          arrivals are the trace's own whatever happened before (open loop). Decoding, batching and the engine's own
          overhead are left out, so differences mean more than the figures themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.lab.geometry import PRESETS, ModelGeometry
from kvstore.lab.hardware import CODECS, GPUS, MEDIA, Gpu, Medium
from kvstore.lab.setup import REDIS, Setup

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReplayTiming:
    """Seconds of a trace under a setup.

    prefill_s: of all prompts without a store. spent_s: with it, loading included.
    ttft_s:    float64, shape (num_requests,). busy: share of the replicas' time; above 1 their queues only grow.
    """

    prefill_s: float
    spent_s: float
    ttft_s: Floats
    busy: float

    @property
    def saved(self) -> float:
        """Return the share of prefill time that is saved after loading."""
        return 1 - self.spent_s / self.prefill_s if self.prefill_s else 0.0

    def percentiles(self) -> tuple[float, ...]:
        """Return the 0th to the 100th percentile of TTFT, in seconds; nothing of a trace without requests."""
        return tuple(np.percentile(self.ttft_s, range(101)).tolist()) if len(self.ttft_s) else ()


@dataclass(frozen=True, slots=True)
class Costs:
    """What the seconds of a trace are figured out from. media: of every tier, by name. num_gpus: of one replica."""

    geometry: ModelGeometry = PRESETS["llama-3-8b"]
    gpu: Gpu = GPUS["h100"]
    media: Mapping[str, Medium] = field(default_factory=lambda: {"host": MEDIA["pcie5"]})
    num_gpus: int = 1

    def model(self, setup: Setup) -> PrefillModel:
        """Return the cost of prompts under a setup."""
        codec = CODECS[setup.codec]
        media = (codec.over(self.media[name]) if name == REDIS else self.media[name] for name in setup.names)
        return PrefillModel(self.geometry, self.gpu, tuple(media), self.num_gpus)


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """What a prompt costs in seconds. media: of the tiers of a setup, nearest first. num_gpus: of one replica."""

    geometry: ModelGeometry
    gpu: Gpu
    media: tuple[Medium, ...]
    num_gpus: int = 1

    def prefill_s(self, first: float, end: float) -> float:
        """Seconds of the prefill of tokens [first, end) of a prompt."""
        return self.geometry.prefill_flops(first, end) / (self.gpu.prefill_flops * self.num_gpus)

    def load_s(self, tier: int, num_tokens: int) -> float:
        """Seconds of loading so many tokens from a tier; the state of linear layers is not in it."""
        if not num_tokens:
            return 0.0
        shape = self.geometry
        num_bytes = num_tokens * (shape.token_bytes - shape.window_bytes) + min(num_tokens, shape.window) * (
            shape.window_bytes
        )
        return self.media[tier].latency_s + num_bytes / self.media[tier].bytes_per_s

    def serve_s(self, num_prompt_tokens: int, hits: list[int]) -> float:
        """Return the seconds of a prompt of which the tiers hit so many tokens, with the best cut.

        Tiers are taken in the order of the prompt as nearest first; a cut inside a tier's part is never the best but at
        its ends, or where a token's prefill begins to take as long as its load.
        """
        best, loading, reached = self.prefill_s(0, num_prompt_tokens), 0.0, 0
        for tier, num_tokens in enumerate(hits):
            if not num_tokens:
                continue
            loading += self.load_s(tier, num_tokens)
            reached += num_tokens
            state_s = self.geometry.state_bytes / self.media[tier].bytes_per_s
            best = min(best, loading + state_s + self.prefill_s(reached, num_prompt_tokens))
        return best


def time_of(
    model: PrefillModel,
    at_s: Floats,
    prompt_tokens: npt.NDArray[np.int64],
    hit_tokens: npt.NDArray[np.int64],
    replicas: int = 1,
) -> ReplayTiming:
    """Return the seconds of a trace. hit_tokens: shape (num_requests, num_tiers).

    A request goes to the replica that is free first.
    """
    free = [0.0] * replicas
    ttft = np.empty(len(at_s))
    whole = spent = 0.0
    for number, (now, length, hits) in enumerate(
        zip(at_s.tolist(), prompt_tokens.tolist(), hit_tokens.tolist(), strict=True)
    ):
        seconds = model.serve_s(length, hits)
        replica = min(range(replicas), key=free.__getitem__)
        free[replica] = max(free[replica], now) + seconds
        ttft[number] = free[replica] - now
        whole += model.prefill_s(0, length)
        spent += seconds
    span_s = float(at_s[-1] - at_s[0]) if len(at_s) > 1 else 0.0
    return ReplayTiming(whole, spent, ttft, spent / (span_s * replicas) if span_s else 0.0)

"""The worth of a KV cache in this run: `measure` in the replica, `ReuseExplanation` for people and for JSON.

Two questions, with numbers of the very model that was loaded: what does one new token cost with and without the keys
and values of those before it, and how many bytes is that memory per token?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from kvstore.units import format_bytes

STEPS = 8  # decode steps per length; their median is told
SHORT = 256  # tokens; the first of the two lengths compared


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Seconds for one new token behind `num_tokens` others."""

    num_tokens: int
    cached_s: float
    uncached_s: float


@dataclass(frozen=True, slots=True)
class ReuseExplanation:
    """The measured values, and the geometry behind the bytes.

    layers:      that keep keys and values.
    value_bytes: bytes of one number.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    steps: tuple[DecodeCost, ...]

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token: K and V, all layers, the KV heads that the model has."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes

    @property
    def mha_token_bytes(self) -> int:
        """The same if every query head had keys and values of its own (multi-head attention)."""
        return 2 * self.layers * self.query_heads * self.head_dim * self.value_bytes

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ReuseExplanation:
        """Read what a replica sent."""
        fields = {name: record[name] for name in cls.__slots__ if name != "steps"}
        return cls(**fields, steps=tuple(DecodeCost(**step) for step in record["steps"]))

    def to_record(self) -> dict[str, Any]:
        """For JSON, the derived bytes included."""
        return {**asdict(self), "token_bytes": self.token_bytes, "mha_token_bytes": self.mha_token_bytes}

    def lines(self) -> list[str]:
        """The explanation as plain lines."""
        last = self.steps[-1]
        enough = int(self.token_bytes * self.prefill_tokens_per_s)
        share = self.query_heads / self.kv_heads
        kind = (
            f"multi-head attention, where all {self.query_heads} heads keep keys and values"
            if self.kv_heads == self.query_heads
            else f"grouped-query attention, where {self.query_heads} query heads share {self.kv_heads} KV heads"
        )
        told = [
            "A KV cache keeps the keys and values of every token, so that a new token is one small step instead of the "
            "whole text again.",
            *(
                f"One new token behind {step.num_tokens:,}: {_ms(step.cached_s)} with the cache, "
                f"{_ms(step.uncached_s)} without ({step.uncached_s / step.cached_s:.0f} times as much)."
                for step in self.steps
            ),
            f"This model has {kind}. K and V (2) x {self.layers} layers x {self.kv_heads} heads x {self.head_dim} "
            f"numbers x {self.value_bytes} bytes = {self.token_bytes:,} bytes per token; {last.num_tokens:,} tokens "
            f"take {format_bytes(self.token_bytes * last.num_tokens)}.",
        ]
        if self.kv_heads != self.query_heads:
            told.append(
                f"With multi-head attention it would be {self.mha_token_bytes:,} bytes per token, {share:.3g} times as "
                "much to keep, to move and to read in every step."
            )
        told.append(
            f"Prefill computes {self.prefill_tokens_per_s:,.0f} tokens per second (many at once), decoding "
            f"{self.decode_tokens_per_s:,.1f} (one after the other). Loading a token's "
            f"{format_bytes(self.token_bytes)} pays as long as a tier delivers more than {format_bytes(enough)}/s."
        )
        return told

    def panel(self) -> RenderableType:
        """For the terminal."""
        return Panel(Group(*(Text("• " + line) for line in self.lines())), title="How KV caching works in this run")


def measure(model: Any, ids: Sequence[int], chunk: int) -> dict[str, Any]:
    """Time the model on the prompt `ids`; the record is read by `ReuseExplanation.from_record`.

    Without a cache a step computes the whole text again: that is a prefill, timed in chunks as the demo's own.
    """
    import torch

    lengths = sorted({min(SHORT, len(ids)), len(ids)})
    steps = []
    with torch.inference_mode():
        for length in lengths:
            began = time.perf_counter()
            cache = _prefilled(model, ids[:length], chunk)
            uncached_s = time.perf_counter() - began
            steps.append(DecodeCost(length, _cached_step_s(model, cache, length), uncached_s))
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return {
        "layers": len(held),
        "query_heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(held[0].keys.shape[-1]),
        "value_bytes": int(held[0].keys.element_size()),
        "prefill_tokens_per_s": len(ids) / steps[-1].uncached_s,
        "decode_tokens_per_s": 1 / steps[-1].cached_s,
        "steps": [asdict(step) for step in steps],
    }


def _prefilled(model: Any, ids: Sequence[int], chunk: int) -> Any:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for first in range(0, len(ids), chunk):
        piece = torch.tensor([ids[first : first + chunk]])
        positions = torch.arange(first, first + piece.shape[1])[None]
        model(input_ids=piece, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return cache


def _cached_step_s(model: Any, cache: Any, length: int) -> float:
    import torch

    token = torch.tensor([[1]])
    times = []
    for step in range(STEPS):
        positions = torch.tensor([[length + step]])
        began = time.perf_counter()
        model(input_ids=token, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"

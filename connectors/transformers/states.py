"""The places of a prompt at which a model's state is taken. A state cannot be had afterwards, only while passing.

A prompt's next turn resumes at the end of this one, so there is a state at the last place of it; another prompt that
parts from a stored one resumes where they part, so the first request that finds pages without a state at their end
takes one there; and one every few thousand tokens bounds what is lost when those are gone. All are multiples of a unit:

    reuse "exact"  the prefill chunk: every run, with a store or without, stops there anyhow
    reuse "any"    whole blocks and whole chunks of the model's scan; every run stops at the last one of its prompt

The hard thing is what they cost: a state has a size whatever its length, that of 40 to 3,000 tokens' keys and values.
So the spacing goes by size, and a prompt has a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

from connectors.transformers.layout import model_layout
from kvstore.errors import UnsupportedModel
from kvstore.layout import Layout

STATE_SHARE = 0.3  # of the bytes of keys and values: what states at regular places may take up
MIN_SPACING = 512  # tokens; closer ones are not worth their bookkeeping
COLD_BLOCK = 64  # tokens; the default of `store.block_size`
BARE_SPACING = 4096  # of a model that has nothing but states
MAX_STATES = 4  # of one prompt; the end and the branch come first
_SCAN_FIELDS = ("mamba_chunk_size", "chunk_size")  # of configs, in tokens
GATED_DELTA_CHUNK = 64  # tokens; the default of every chunked gated delta rule in transformers, no field of a config


@dataclass(frozen=True, slots=True)
class StatePlan:
    """Where states are taken. unit: states lie at its multiples. spacing: tokens between regular ones."""

    unit: int
    spacing: int

    def last(self, num_tokens: int) -> int:
        """The place of the last state of so many tokens."""
        return num_tokens // self.unit * self.unit

    def stops(self, num_tokens: int, branch: int) -> list[int]:
        """The places at which every run of a prompt stops: its end, and where it parts from what is stored.

        The last token is always computed. So for the same prompt again there is one before, where it ends at a place.
        """
        ends = (self.last(num_tokens), self.last(num_tokens - 1), self.last(min(branch, num_tokens)))
        return list(dict.fromkeys(ends))

    def places(self, start: int, num_tokens: int, branch: int = 0) -> list[int]:
        """The places in (start, num_tokens] of a prompt of which `start` tokens are loaded, at most MAX_STATES.

        branch: tokens whose keys and values were stored, as far as they are the same prompt's.
        """
        end = self.last(num_tokens)
        first = [place for place in self.stops(num_tokens, branch) if place > start]
        regular = [place for place in range(self.spacing, end, self.spacing) if place > start and place not in first]
        room = MAX_STATES - len(first)
        step = max(1, -(-len(regular) // room))  # evenly, from the end: the deepest are worth most
        return sorted([*first, *regular[::-1][::step][:room]])


def plan_for(model: Any, layout: Layout, prefill_chunk: int, *, is_exact: bool) -> StatePlan | None:
    """The plan for a model; None for one without states."""
    if not layout.state_bytes:
        return None
    unit = prefill_chunk if is_exact else lcm(layout.block_size, scan_chunk(model.config))
    spacing = BARE_SPACING
    if layout.block_bytes:
        least = layout.state_bytes * layout.block_size / (STATE_SHARE * layout.block_bytes)
        spacing = MIN_SPACING
        while spacing < least:
            spacing *= 2
    return StatePlan(unit, -(-spacing // unit) * unit)


def cold_plan(model: Any, prefill_chunk: int) -> StatePlan | None:
    """The plan for a run without a store in mode "any"; None for a model whose cache is not known, which needs none."""
    try:
        return plan_for(model, model_layout(model, COLD_BLOCK), prefill_chunk, is_exact=False)
    except UnsupportedModel:
        return None


def scan_chunk(config: Any) -> int:
    """Tokens that the model's scan computes at once; 1 if it has none.

    From a state that lies within one, the sums go another way than in a run from the start: the same up to rounding.
    """
    for name in _SCAN_FIELDS:
        if isinstance(size := getattr(config, name, None), int) and size > 0:
            return size
    return GATED_DELTA_CHUNK if hasattr(config, "linear_num_value_heads") else 1

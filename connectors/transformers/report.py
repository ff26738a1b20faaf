"""The report of a run: the pieces of an answer as they come, and the origin of its prompt.

Plain values; made by `transformers_run` and `transformers`, read by servers, tables and tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvstore.base import HOST, HintOutcome
from kvstore.tiers import registry

if TYPE_CHECKING:
    import torch

TIERS = (HOST, *registry.OURS)  # always named in a report, so that a table has its columns


@dataclass(slots=True)
class Report:
    """The origin of a prompt's tokens and the times taken. All seconds are wall time unless the name says cpu.

    by_tier:    tokens loaded, by tier.
    load_s:     from the call until the cache held what could be loaded: lookup, waiting, copying.
    compute_wait_s: the part of load_s in which another request was computing the same blocks (single flight).
    prefill_s:  computing what was not loaded: the forwards alone, whatever else ran between them.
    ttft_s:     from the call to the first token.
    cpu_s:      the same in CPU seconds of this process, all threads.
    decode_s:   from the first token to the last.
    new_tokens: generated so far.
    unsaved_pages: of the answer, left out because no next turn can begin with it (save "auto"); known at the end.
    outcomes:   what became of the hints that came with it.
    bypassed:   why the store was not used although there is one: the model is not what its pages were named for. "" if
                it was.
    """

    prompt_tokens: int
    by_tier: dict[str, int] = field(default_factory=dict)
    load_s: float = 0.0
    compute_wait_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    cpu_s: float = 0.0
    decode_s: float = 0.0
    new_tokens: int = 0
    unsaved_pages: int = 0
    bypassed: str = ""
    outcomes: tuple[HintOutcome, ...] = ()

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were loaded."""
        return sum(self.by_tier.values())

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def sources(self) -> dict[str, int]:
        """Prompt tokens by where they came from; the values add up to prompt_tokens."""
        return {**dict.fromkeys(TIERS, 0), **self.by_tier, "computed": self.computed_tokens}

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rate of computing the prompt."""
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate of generating after the first token."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """The part of a prompt that the tiers have before it is computed.

    by_tier: tokens that would be loaded, by tier.
    """

    prompt_tokens: int
    by_tier: dict[str, int] = field(default_factory=dict)

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that would be loaded."""
        return sum(self.by_tier.values())


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt in a cache. logits: [1, 1, vocabulary] of its last token, or of all computed tokens where asked."""

    cache: Any
    logits: torch.Tensor
    report: Report


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token, and the text that became certain with it ("" without a tokenizer)."""

    token: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """The generated tokens and text.

    tokens:        with the end token, if it came to that.
    finish_reason: "stop" (an end token or a stop string), "length" or "cancelled".
    """

    tokens: list[int]
    text: str
    finish_reason: str
    report: Report

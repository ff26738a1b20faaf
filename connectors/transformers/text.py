"""From logits to tokens to text: sampling, and text that grows with the tokens.

Both are small on purpose: greedy by default, temperature / top-k / top-p where asked, stop strings that never leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import RequestError

if TYPE_CHECKING:
    import torch

_UNFINISHED = "\ufffd"  # what a decoder shows for a character whose bytes are not all there yet


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most likely token (greedy); above it, logits are divided by it and a token is drawn.
    top_k:       draw among the k most likely tokens only; 0 means all.
    top_p:       draw among the fewest tokens whose probabilities add up to at least this.
    seed:        makes the draw repeatable; None takes torch's own state.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        import torch

        self._sampling = sampling
        # On the CPU whatever the model is on: the same seed gives the same tokens everywhere.
        self._generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)

    def pick(self, logits: torch.Tensor) -> int:
        """The next token from the logits of the last one, [1, 1, vocabulary]."""
        import torch

        row = logits[0, -1]
        sampling = self._sampling
        if sampling.temperature == 0.0:
            return int(row.argmax())
        probs, order = torch.softmax(row.float().cpu() / sampling.temperature, dim=-1).sort(descending=True)
        keep = torch.ones_like(probs, dtype=torch.bool)
        if sampling.top_k:
            keep[sampling.top_k :] = False
        keep &= probs.cumsum(0) - probs < sampling.top_p  # the token that crosses top_p stays in
        drawn = torch.multinomial(probs * keep, 1, generator=self._generator)
        return int(order[drawn])


class TextStream:
    """Turns tokens into text piece by piece. `push` returns what is certain; `finish` what was held back.

    Held back are characters whose bytes are not complete and whatever may become a stop string. `stopped` is set once
    a stop string has appeared; it and all after it are dropped.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise RequestError("stop: an empty string would stop at once; leave it out")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._from = 0  # decoding starts here: a token's text may depend on its neighbour on the left
        self._read = 0  # tokens before this have become text
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._ids.append(token)
        fresh = self._fresh()
        if self.stopped or fresh.endswith(_UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._ids)
        self._held += fresh
        return self._release(final=False)

    def finish(self) -> str:
        """No token will follow: return what was held back."""
        if self.stopped:
            return ""
        self._held += self._fresh()
        self._from = self._read = len(self._ids)
        return self._release(final=True)

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._from : self._read])
        return self._decode(self._ids[self._from :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, *, final: bool) -> str:
        places = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if places:
            self.stopped = True
            piece, self._held = self._held[: min(places)], ""
        else:
            keep = 0 if final else self._may_become_stop()
            piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += piece
        return piece

    def _may_become_stop(self) -> int:
        """Length of the longest tail of the held text that begins a stop string."""
        longest = max((len(text) - 1 for text in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0

"""Forwards of a transformers model over one prompt, in chunks that always end at the same places.

A prompt is computed in pieces that end at multiples of `chunk` tokens, wherever it starts. So a run that resumes at
such a boundary makes exactly the calls, with exactly the shapes, that a run from the start makes from there on, and
gets the same bits.

Positions are always passed: left to themselves, some models count from zero again behind a cache that was filled from
outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from connectors.transformers.layout import cache_argument, model_device
from connectors.transformers.positions import max_tokens
from connectors.transformers.ropes import RopeState, ropes_of
from kvstore.errors import RequestError
from radix.tokens import TokenArray, as_tokens

if TYPE_CHECKING:
    import torch


def chunk_bounds(start: int, stop: int, chunk: int, also: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) at the multiples of `chunk`, and at the places `also`.

    >>> list(chunk_bounds(64, 300, 128))
    [(64, 128), (128, 256), (256, 300)]
    >>> list(chunk_bounds(64, 300, 128, also=[280]))
    [(64, 128), (128, 256), (256, 280), (280, 300)]
    """
    while start < stop:
        end = min((start // chunk + 1) * chunk, stop, *(at for at in also if at > start))
        yield start, end
        start = end


class Forward:
    """Calls one model, one prompt at a time. Any thread; the cache is the caller's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model_device(model)
        self._cache_argument = cache_argument(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(_forward_of(model)).parameters
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.max_tokens = max_tokens(model.config)
        self.ropes = ropes_of(model)

    def __call__(
        self, tokens: TokenArray, cache: Any, start: int, *, last_only: bool = True, rope: RopeState | None = None
    ) -> torch.Tensor:
        """Run `tokens`, which stand at `start` of the prompt, through the model; the cache grows by them.

        rope: of this prompt, where the model's depends on the length; None: one that has seen nothing yet.

        Returns the logits [1, len(tokens), vocabulary], or [1, 1, vocabulary] of the last token.
        """
        import torch

        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        positions = torch.arange(start, start + len(tokens), device=self._device)[None]
        keep = {"logits_to_keep": int(last_only)} if self._keeps_logits else {}
        turn = nullcontext() if self.ropes is None else self.ropes.turn(self.ropes.fresh() if rope is None else rope)
        with torch.inference_mode(), turn:
            arguments = {self._cache_argument: cache, "position_ids": positions, "use_cache": True, **keep}
            output = self._model(input_ids=ids, **arguments)
            logits: torch.Tensor = output.logits
            return logits[:, -1:] if last_only else logits

    def prompt(self, ids: Any, max_new_tokens: int = 1) -> TokenArray:
        """Check a prompt: ids, one row of a tensor or array, or any sequence of ints.

        Raises RequestError for an empty prompt, a batch, ids outside the vocabulary, or more tokens than the model has
        positions for.
        """
        try:
            tokens = as_tokens(_one_row(ids))
        except (TypeError, ValueError) as error:
            raise RequestError(f"prompt: {error}") from error
        if not len(tokens):
            raise RequestError("prompt: it is empty; give at least one token")
        if int(tokens.max()) >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise RequestError(f"prompt: token {at} is {tokens[at]}; the vocabulary has {self.vocab_size} ids")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        total = len(tokens) + max_new_tokens - 1  # the last new token is never fed back
        if self.max_tokens is not None and total > self.max_tokens:
            raise RequestError(
                f"prompt: {len(tokens)} tokens and {max_new_tokens} new ones; the model has {self.max_tokens} positions"
            )
        return tokens


ONE_AT_A_TIME = (
    "here one prompt is computed at a time: call once for each (what they share is computed once), or serve the model "
    "by vLLM, which batches (kvstore vllm, docs/vllm.md)"
)


def _one_row(ids: Any) -> Any:
    """Unwrap a batch of one; refuse larger ones."""
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    elif isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
        if len(ids) != 1:
            raise ValueError(f"it is a batch of {len(ids)}; {ONE_AT_A_TIME}")
        return ids[0]
    if getattr(ids, "ndim", 1) == 2:
        if ids.shape[0] != 1:
            raise ValueError(f"it is a batch of shape {tuple(ids.shape)}; {ONE_AT_A_TIME}")
        ids = ids[0]
    return ids


def _forward_of(model: Any) -> Any:
    """The model's own forward, also where PEFT has wrapped it."""
    get_base = getattr(model, "get_base_model", None)
    return (get_base() if get_base is not None else model).forward

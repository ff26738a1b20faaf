"""Ropes whose frequencies depend on the length, kept apart for each run, and what a model does at its border.

A "dynamic" rope grows with the longest prompt and stays grown until a short one comes; a "longrope" is set anew in each
forward. Both keep their frequencies in the model, which all runs share. So each run has a `RopeState` of its own, put
into the model for its forwards: its answer is that of transformers on a fresh model, whatever ran before or runs
between. Forwards of such a model take turns, since two threads would write each other's frequencies.

A longrope has two sets of frequencies, and keys of one do not fit queries of the other. Some models (Phi-3) therefore
drop their cache in `generate` when an answer crosses the border, and compute all of it again; others go on. Which of
the two a model does is asked of the model itself, once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from connectors.transformers.layout import is_sliding, model_device, new_cache
from connectors.transformers.positions import steady_tokens

# One for all models: those with such a rope are few, and several connectors may share one model.
_turn = threading.Lock()

RopeState = dict[tuple[int, str], Any]  # (place of the module, name) -> what it holds there


class Ropes:
    """The ropes of `model` that depend on the length. Any thread.

    border:   tokens up to which positions are encoded in one way.
    restarts: whether the model computes everything again when an answer crosses the border; None if it does not say.
    """

    def __init__(self, model: Any, border: int) -> None:
        self.border = border
        self.restarts = _restarts(model, border)
        self._modules = [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]

    def fresh(self) -> RopeState:
        """The state of a rope that has seen no long prompt."""
        with _turn:
            state = self._read()
        for (place, name), value in list(state.items()):
            if name.endswith("max_seq_len_cached"):
                module, prefix = self._modules[place], name.removesuffix("max_seq_len_cached")
                if int(value) > module.original_max_seq_len and (place, f"{prefix}inv_freq") in state:
                    state[place, f"{prefix}inv_freq"] = getattr(module, f"{prefix}original_inv_freq")
                state[place, name] = min(int(value), module.original_max_seq_len)
        return state

    @contextmanager
    def turn(self, state: RopeState) -> Iterator[None]:
        """Put `state` into the model for one forward, and take it back as the forward leaves it."""
        with _turn:
            for (place, name), value in state.items():
                module = self._modules[place]
                if name in module._buffers:
                    module._buffers[name] = value
                else:
                    setattr(module, name, value)
            yield
            state.update(self._read())

    def _read(self) -> RopeState:
        state: RopeState = {}
        for place, module in enumerate(self._modules):
            held = {**vars(module), **module._buffers}
            for name, value in held.items():
                moves = name.endswith(("inv_freq", "max_seq_len_cached")) and not name.endswith("original_inv_freq")
                if moves and value is not None:
                    state[place, name] = value
        return state


def ropes_of(model: Any) -> Ropes | None:
    """The ropes of a model that depend on the length; None if it has none."""
    border = steady_tokens(model.config)
    return None if border is None else Ropes(model, border)


def _restarts(model: Any, border: int) -> bool | None:
    """Ask the model what it would do with a cache of `border` tokens and one token more."""
    import torch

    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return False
    cache = new_cache(model)
    device = model_device(model)
    empty = torch.empty((1, 1, border, 1), device=device)
    for layer in cache.layers:
        if hasattr(layer, "lazy_initialization"):
            layer.lazy_initialization(empty, empty)
            layer.keys = layer.values = empty
            if is_sliding(layer):
                layer.cumulative_length = border
    ids = torch.zeros((1, border + 1), dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    for words in ({"next_sequence_length": 1}, {"cache_position": torch.tensor([border], device=device)}):
        try:
            inputs = prepare(ids, past_key_values=cache, attention_mask=mask, use_cache=True, **words)
        except Exception:  # whatever a model's own code makes of a question it does not expect: it does not say
            continue
        return inputs.get("past_key_values") is not cache
    return None

"""Does a model resume from a filled cache as it should? A check to run before trusting a model type not seen before.

Three runs over the same random ids: in one piece; in two with a live cache between them; in two with the cache taken
out into pages and put back in a fresh one. Pages must change nothing (bit-equal to the live cache), and going on from
a cache must not differ from one piece by more than rounding. The second finds upstream faults: positions that start
again at zero, state that is ignored when several tokens follow.

Models with a state are resumed in more ways, since each goes another way through their code: with several tokens and
with one, at a border of the scan's chunks and between two, and twice from the same pages. A state that is ignored may
make too little difference to be seen in a model of random weights, so that is asked outright: with another state in its
place, the logits must be others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np

from connectors.transformers.cache import CacheBridge, Recorder
from connectors.transformers.forward import Forward
from connectors.transformers.layout import cache_shapes, default_device, layout_of
from connectors.transformers.states import scan_chunk
from kvstore.base import SlotPages
from kvstore.devices.base import Device
from kvstore.errors import UnsupportedModel
from kvstore.layout import Layout
from radix.tokens import TokenArray

# Model types that this package's own tests run through the store or this check; others are checked once when they are
# opened.
PROVEN = frozenset(
    {
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
)

BLOCK_SIZE = 16
PREFIX_TOKENS = 64  # and more where a window or chunk is longer: what lies behind one is to be checked too
SUFFIX_TOKENS = 32
MAX_PREFIX_TOKENS = 16384  # a check of more would take minutes on a CPU
# Mean difference over the spread of the logits. Measured on random models of all types above: at most 1e-7 in fp32
# and 3e-4 in bf16, where a mixture of experts may take another one now and then; positions that start again: above 0.3.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_HALF = 0.1


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """The result of the check.

    pages_exact: a cache put together from pages gives the bits of the live one, at every border that was tried.
    uses_state: several tokens that follow a state depend on it; True of models without one.
    difference:  mean |difference| of the suffix logits from the run in one piece, over their standard deviation.
    """

    model_type: str
    pages_exact: bool
    difference: float
    tolerance: float
    seconds: float
    uses_state: bool = True

    @property
    def ok(self) -> bool:
        """True if prefixes of this model may be reused."""
        return self.pages_exact and self.uses_state and self.difference <= self.tolerance

    def require(self) -> None:
        """Raise UnsupportedModel unless `ok`."""
        if not self.uses_state:
            raise UnsupportedModel(
                f"model type {self.model_type!r} ignores the state in its cache when more than one token follows, in "
                f"transformers {version('transformers')}: what comes after a resume would be computed as if the prompt "
                "began there"
            )
        if not self.ok:
            raise UnsupportedModel(
                f"model type {self.model_type!r} does not resume from a cache as it should: pages "
                f"{'are' if self.pages_exact else 'are NOT'} bit-equal to the live cache, and the logits after a "
                f"resume differ from a run in one piece by {self.difference:.2g} of their spread (rounding is at most "
                f"{self.tolerance:g})"
            )


def is_proven(model: Any) -> bool:
    """True if models of this type were tested with this package, and nothing makes this one see tokens to come.

    Some types have a switch for attention to both sides (Gemma 3 as an encoder). Then pages depend on what follows, and
    the check finds it.
    """
    config = model.config.get_text_config(decoder=True)
    fields = {**vars(model.config), **vars(config)}
    both_sides = any("bidirectional" in name and value for name, value in fields.items())
    causal = all(vars(module).get("is_causal", True) is not False for module in model.modules())
    return model.config.model_type in PROVEN and not both_sides and causal and fields.get("is_causal") is not False


def check_engine(model: Any, device: Device | None = None, *, seed: int = 0) -> EngineCheck:
    """Run the check on `model` as it is; three forwards over 96 tokens, or over the longest window and 48 more.

    A model with a state: some eight more, over a chunk of its scan and 48 tokens more.

    Raises UnsupportedModel if the model's cache cannot be cut into pages at all, or its windows are too long to check.
    """
    import torch

    began = time.perf_counter()
    forward = Forward(model)
    shapes = cache_shapes(model)
    layout = layout_of(shapes, BLOCK_SIZE)
    owned = device is None
    device = default_device(model) if device is None else device
    try:
        bridge = CacheBridge(model, shapes, layout, device)
        length = _prefix_tokens(model, layout, forward)
        ids = np.random.default_rng(seed).integers(0, forward.vocab_size, length + SUFFIX_TOKENS)
        tokens = ids.astype(np.uint32)
        prefix, suffix = tokens[:length], tokens[length:]
        whole = forward(tokens, bridge.new_cache(), 0, last_only=False)[:, length:]
        live = bridge.new_cache()
        recorder = bridge.recorder(live, 0)
        recorder.before()
        forward(prefix, live, 0)
        recorder.finish(length)
        if bridge.has_states:
            recorder.keep_state(length)
        resumed = _Pages(bridge, recorder, length, layout).load()
        from_live = forward(suffix, live, length, last_only=False)
        from_pages = forward(suffix, resumed, length, last_only=False)
        exact, uses_state = torch.equal(from_live, from_pages), True
        if bridge.has_states:
            states = _States(forward, bridge, layout)
            exact = exact and all(states.resumes(tokens, at) for at in (length, length - BLOCK_SIZE))
            uses_state = states.are_used(tokens, length)
    finally:
        if owned:
            device.close()
    spread = float(whole.float().std()) or 1.0
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineCheck(
        model_type=model.config.model_type,
        pages_exact=exact,
        uses_state=uses_state,
        difference=float((whole.float() - from_live.float()).abs().mean()) / spread,
        tolerance=TOLERANCE.get(dtype, TOLERANCE_HALF),
        seconds=time.perf_counter() - began,
    )


def _prefix_tokens(model: Any, layout: Layout, forward: Forward) -> int:
    """Tokens before the resume: more than the longest window holds, as far as the model has positions for them."""
    window = max((group.window or 0 for group in layout.groups), default=0)
    length = max(PREFIX_TOKENS, -(-(window + BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE)
    if layout.state_bytes:
        unit = lcm(BLOCK_SIZE, scan_chunk(model.config))
        length = max(-(-length // unit) * unit, 2 * BLOCK_SIZE)
    limits = [forward.max_tokens, None if forward.ropes is None else forward.ropes.border - 1]
    known = [(limit - SUFFIX_TOKENS) // BLOCK_SIZE * BLOCK_SIZE for limit in limits if limit is not None]
    length = max(BLOCK_SIZE, min([length, *known]))
    if length > MAX_PREFIX_TOKENS:
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} has a window of {window} tokens and was not tested with this "
            f"package; the check at the opening reaches {MAX_PREFIX_TOKENS}. self_check=False takes it on trust"
        )
    return length


class _States:
    """Resumes of a model with a state, against a cache that was never put away."""

    def __init__(self, forward: Forward, bridge: CacheBridge, layout: Layout) -> None:
        self._forward = forward
        self._bridge = bridge
        self._layout = layout

    def resumes(self, tokens: TokenArray, at: int) -> bool:
        """True if resuming after `at` tokens gives the bits of going on: with all that follow, then with single ones.

        Twice from the same pages, as prompts that part there do: the first must leave nothing behind in them.
        """
        import torch

        pages = self._recorded(tokens[:at])
        return all(
            torch.equal(self._go_on(tokens, at, cuts, None), self._go_on(tokens, at, cuts, pages))
            for cuts in ([at, len(tokens)], [*range(at, at + 4), len(tokens)], [at, len(tokens)])
        )

    def are_used(self, tokens: TokenArray, at: int) -> bool:
        """True if the logits of all tokens that follow, at once, change with each kind of state."""
        import torch

        plain = self._go_on(tokens, at, [at, len(tokens)], None)
        for kind in dict.fromkeys(tensor.name for tensor in self._bridge.states):
            cache = self._computed(tokens[:at])
            with torch.inference_mode():
                for tensor in self._bridge.states:
                    if tensor.name == kind:
                        getattr(cache.layers[tensor.layer], kind)[tensor.index].mul_(-8).add_(1)
            if torch.equal(plain, self._forward(tokens[at:], cache, at, last_only=False)):
                return False
        return True

    def _computed(self, prefix: TokenArray) -> Any:
        cache = self._bridge.new_cache()
        self._forward(prefix, cache, 0)
        return cache

    def _recorded(self, prefix: TokenArray) -> _Pages:
        cache = self._bridge.new_cache()
        recorder = self._bridge.recorder(cache, 0)
        recorder.before()
        self._forward(prefix, cache, 0)
        recorder.finish(len(prefix))
        recorder.keep_state(len(prefix))
        return _Pages(self._bridge, recorder, len(prefix), self._layout)

    def _go_on(self, tokens: TokenArray, at: int, cuts: list[int], pages: _Pages | None) -> Any:
        import torch

        cache = self._computed(tokens[:at]) if pages is None else pages.load()
        pieces = pairwise(cuts)
        return torch.cat([self._forward(tokens[i:j], cache, i, last_only=False) for i, j in pieces], dim=1)


class _Pages:
    """What a recorder kept of a prefix, each page in a slot of its own."""

    def __init__(self, bridge: CacheBridge, recorder: Recorder, num_tokens: int, layout: Layout) -> None:
        num_groups = len(layout.groups)
        self._bridge = bridge
        self._num_blocks = num_tokens // BLOCK_SIZE
        numbers = np.arange(self._num_blocks * num_groups)
        blocks, groups = numbers // num_groups, numbers % num_groups
        there = (groups < layout.block_groups) | (blocks == self._num_blocks - 1)  # the last block alone has a state
        self._pages = SlotPages(blocks[there], groups[there], np.arange(int(there.sum())))
        self._slots = np.zeros((len(self._pages), layout.slot_bytes), dtype=np.uint8)
        states = recorder.take_states()
        filled = bridge.copy_out(recorder.take(num_tokens), self._pages, self._slots.__getitem__, states)
        assert all(filled)  # the recorder was there from the first token

    def load(self) -> Any:
        """A fresh cache from the slots. Of a window `load` takes what it needs, which is all that a real lease has."""
        return self._bridge.load(self._pages, self._num_blocks, self._slots.__getitem__)

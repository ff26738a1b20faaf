"""Does a model resume from a filled cache as it should? A check to run before trusting a model type not seen before.

Three runs over the same random ids: in one piece; in two with a live cache between them; in two with the cache taken
out into pages and put back in a fresh one. Pages must change nothing (bit-equal to the live cache), and going on from
a cache must not differ from one piece by more than rounding. The second finds upstream faults: positions that start
again at zero, state that is ignored when several tokens follow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from connectors.transformers.cache import CacheBridge, Span
from connectors.transformers.forward import Forward
from connectors.transformers.layout import cache_shapes, default_device, layout_of
from kvstore.base import SlotPages
from kvstore.devices.base import Device
from kvstore.errors import UnsupportedModel
from kvstore.layout import Layout

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

    pages_exact: a cache put together from pages gives the bits of the live one.
    difference:  mean |difference| of the suffix logits from the run in one piece, over their standard deviation.
    """

    model_type: str
    pages_exact: bool
    difference: float
    tolerance: float
    seconds: float

    @property
    def ok(self) -> bool:
        """True if prefixes of this model may be reused."""
        return self.pages_exact and self.difference <= self.tolerance

    def require(self) -> None:
        """Raise UnsupportedModel unless `ok`."""
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
        resumed = _through_pages(bridge, recorder.take(length), length, layout.slot_bytes, len(layout.groups))
        from_live = forward(suffix, live, length, last_only=False)
        from_pages = forward(suffix, resumed, length, last_only=False)
    finally:
        if owned:
            device.close()
    spread = float(whole.float().std()) or 1.0
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineCheck(
        model_type=model.config.model_type,
        pages_exact=torch.equal(from_live, from_pages),
        difference=float((whole.float() - from_live.float()).abs().mean()) / spread,
        tolerance=TOLERANCE.get(dtype, TOLERANCE_HALF),
        seconds=time.perf_counter() - began,
    )


def _prefix_tokens(model: Any, layout: Layout, forward: Forward) -> int:
    """Tokens before the resume: more than the longest window holds, as far as the model has positions for them."""
    window = max((group.window or 0 for group in layout.groups), default=0)
    length = max(PREFIX_TOKENS, -(-(window + BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE)
    limits = [forward.max_tokens, None if forward.ropes is None else forward.ropes.border - 1]
    known = [(limit - SUFFIX_TOKENS) // BLOCK_SIZE * BLOCK_SIZE for limit in limits if limit is not None]
    length = max(BLOCK_SIZE, min([length, *known]))
    if length > MAX_PREFIX_TOKENS:
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} has a window of {window} tokens and was not tested with this "
            f"package; the check at the opening reaches {MAX_PREFIX_TOKENS}. self_check=False takes it on trust"
        )
    return length


def _through_pages(
    bridge: CacheBridge, spans: Sequence[Span], num_tokens: int, slot_bytes: int, num_groups: int
) -> Any:
    """Copy every block into a slot of its own and build a fresh cache from the slots."""
    num_blocks = num_tokens // BLOCK_SIZE
    numbers = np.arange(num_blocks * num_groups)
    pages = SlotPages(numbers // num_groups, numbers % num_groups, numbers)
    slots = np.zeros((len(pages), slot_bytes), dtype=np.uint8)
    filled = bridge.copy_out(spans, pages, slots.__getitem__)
    assert all(filled)  # the recorder was there from the first token
    # A window has only its last blocks in a real lease; `load` takes what it needs.
    return bridge.load(pages, num_blocks, slots.__getitem__)

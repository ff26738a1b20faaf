"""The content of a transformers model's cache, and the layout of pages that follows from it.

Nothing is guessed from a config: the model's own `DynamicCache` is built and a forward of two tokens is run through
it, so that the number of heads, the widths of K and V (they differ for MLA) and the element types are those the model
really writes. A cache with any state that cannot be cut at a block boundary is refused by name, since its pages would
be silently wrong.

The hard thing: only the exact cache classes known here are accepted. A subclass may keep more than keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError, UnsupportedModel
from kvstore.layout import GroupKind, LayerSpec, Layout, balanced_groups

if TYPE_CHECKING:
    import torch

    from kvstore.devices.base import Device

FORMAT = "transformers:layer,kv,head,token,dim"
_WORKS = "full, multi-latent (MLA) and sliding-window attention work"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer's cache: keys [1, heads[0], tokens, dims[0]] and values [1, heads[1], tokens, dims[1]].

    window: tokens a sliding layer looks back on, itself included; the cache holds the last window - 1.
    """

    window: int | None
    heads: tuple[int, int]
    dims: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def kind(self) -> GroupKind:
        """The resume rule. MLA keeps a latent and a rotary part of different width, as if of one head."""
        if self.window is not None:
            return GroupKind.SLIDING
        return GroupKind.MLA if self.dims[0] != self.dims[1] and self.heads == (1, 1) else GroupKind.FULL

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer."""
        return sum(h * d * t.itemsize for h, d, t in zip(self.heads, self.dims, self.dtypes, strict=True))


def cache_shapes(model: Any) -> tuple[LayerShape | None, ...]:
    """Probe the model's cache with a forward of two tokens; None for layers that keep nothing of their own.

    Raises UnsupportedModel if any layer keeps what cannot be cut into pages.
    """
    import torch

    probe = new_cache(model)
    for index, layer in enumerate(probe.layers):
        _require_pageable(model, index, layer)
    ids = torch.zeros((1, 2), dtype=torch.long, device=model_device(model))
    # Not under a caller's autocast, which is no part of the model: it would give the pages another element type.
    with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
        try:
            output = model(input_ids=ids, past_key_values=probe, position_ids=torch.arange(2, device=ids.device)[None])
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{_name(model)} does not run with a DynamicCache ({error}); {_WORKS}") from error
    if not hasattr(output, "past_key_values") or output.past_key_values is not probe:
        raise UnsupportedModel(f"{_name(model)} replaces the DynamicCache it is given by its own cache; {_WORKS}")
    return tuple(_shape(model, index, layer) for index, layer in enumerate(probe.layers))


def model_layout(model: Any, block_size: int) -> Layout:
    """Derive the page layout of `model` for blocks of `block_size` tokens. Runs a forward of two tokens."""
    return layout_of(cache_shapes(model), block_size)


def layout_of(shapes: Sequence[LayerShape | None], block_size: int) -> Layout:
    """The layout of caches of these shapes; the format names the byte order and the distinct shapes."""
    if block_size < 1:
        raise ConfigError(f"block_size is {block_size}; it must be at least 1 token (64 is a good value on a CPU)")
    specs = [None if s is None else LayerSpec(s.kind, s.token_bytes, s.window) for s in shapes]
    known = [s for s in shapes if s is not None]
    dtypes = {_dtype_name(dtype) for s in known for dtype in s.dtypes}
    widths = dict.fromkeys(f"k{s.heads[0]}x{s.dims[0]},v{s.heads[1]}x{s.dims[1]}" for s in known)
    return Layout(
        block_size=block_size,
        groups=balanced_groups(specs, block_size),
        format=";".join([FORMAT, *widths]),
        dtype="+".join(sorted(dtypes)),
    )


def new_cache(model: Any) -> Any:
    """A fresh, empty `DynamicCache` with the layers that the model's config asks for.

    Built with the config: without it every layer would be a plain one, with neither window nor state.
    """
    from transformers import DynamicCache

    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{_name(model)} is an encoder-decoder; only decoder-only causal models work")
    return DynamicCache(config=model.config)


def model_device(model: Any) -> torch.device:
    """The one device that holds the model. Raises ConfigError if there are several or we cannot copy from it."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ConfigError(f"model: its parameters are on several devices ({names}); put it on one")
    device: torch.device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model: it is on {device.type!r}; cpu and cuda work")
    return device


def default_device(model: Any) -> Device:
    """The device that reaches the model's memory."""
    where = model_device(model)
    if where.type == "cuda":
        from kvstore.devices.cuda import CudaDevice

        return CudaDevice(where.index or 0)
    from kvstore.devices.cpu import CpuDevice

    return CpuDevice()


def is_sliding(layer: Any) -> bool:
    """True for a layer that forgets tokens outside its window."""
    return bool(getattr(layer, "is_sliding", False))


def _require_pageable(model: Any, index: int, layer: Any) -> None:
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
        raise UnsupportedModel(
            f"{_name(model)}: layer {index} caches in a {type(layer).__name__}, which has no pages; {_WORKS}"
        )
    if is_sliding(layer) and layer.sliding_window < 2:
        raise UnsupportedModel(
            f"{_name(model)}: layer {index} has a window of {layer.sliding_window}; at least 2 works"
        )


def _shape(model: Any, index: int, layer: Any) -> LayerShape | None:
    _require_pageable(model, index, layer)  # again: a forward may have replaced the layers
    if not layer.is_initialized or layer.keys is None:
        return None
    keys, values = layer.keys, layer.values
    for tensor in (keys, values):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != 2:
            raise UnsupportedModel(
                f"{_name(model)}: layer {index} cached {tuple(tensor.shape)} for 2 tokens; [1, heads, 2, dim] works"
            )
    return LayerShape(
        window=layer.sliding_window if is_sliding(layer) else None,
        heads=(keys.shape[1], values.shape[1]),
        dims=(keys.shape[3], values.shape[3]),
        dtypes=(keys.dtype, values.dtype),
    )


def _name(model: Any) -> str:
    return f"model type {getattr(model.config, 'model_type', type(model).__name__)!r}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

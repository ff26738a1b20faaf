"""The content of a transformers model's cache, and the layout of pages that follows from it.

Nothing is guessed from a config: the model's own `DynamicCache` is built and a forward of two tokens is run through
it, so that the number of heads, the widths of K and V (they differ for MLA) and the element types are those the model
really writes. What layers keep as a state after the last token, and no row for each, is taken as it is: tensors of
fixed shapes, each with its own element type (a recurrent state stays fp32 in a model of bf16).

The hard thing: only the exact cache classes known here are accepted. A subclass may keep more than what is known of
it, and its pages would be silently wrong.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError, UnsupportedModel
from kvstore.layout import GroupKind, LayerGroup, LayerSpec, Layout, TensorAxes, balanced_groups, groups_with_states

if TYPE_CHECKING:
    import torch

    from kvstore.devices.base import Device

FORMAT = "transformers:layer,kv,head,token,dim"
_WORKS = "full, multi-latent (MLA) and sliding-window attention, and linear attention with its state in the cache work"
_PROBE_TOKENS = 2
STATE_ALIGNMENT = 16  # bytes; of each tensor within a state, so that it can be seen as its element type


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


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state after a prompt: `getattr(cache.layers[layer], name)[index]`.

    start: its first byte among those of the whole state.
    """

    layer: int
    name: str  # "conv_states" or "recurrent_states"
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        """The byte behind its last one."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return self.start + size


@dataclass(frozen=True, slots=True)
class CacheShapes:
    """The content of a model's cache.

    layers: by layer, None where it keeps no keys and values of its own.
    states: tensors that are as they were after the last token.
    """

    layers: tuple[LayerShape | None, ...]
    states: tuple[StateTensor, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of a state, each tensor at its alignment."""
        return self.states[-1].stop if self.states else 0


def cache_shapes(model: Any) -> CacheShapes:
    """Probe the model's cache with a forward of two tokens.

    Raises UnsupportedModel if any layer keeps what is not known here.
    """
    import torch

    probe: Any = new_cache(model)
    for index, layer in enumerate(probe.layers):
        _require_pageable(model, index, layer)
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=model_device(model))
    name = cache_argument(model)
    # Not under a caller's autocast, which is no part of the model: it would give the pages another element type.
    with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
        try:
            positions = torch.arange(_PROBE_TOKENS, device=ids.device)[None]
            output = model(input_ids=ids, **{name: probe}, position_ids=positions, use_cache=True)
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{_name(model)} does not run with a DynamicCache ({error}); {_WORKS}") from error
    kept = list(probe.layers)
    if getattr(output, name, None) is not probe:
        raise UnsupportedModel(f"{_name(model)} replaces the DynamicCache it is given by its own cache; {_WORKS}")
    layers = tuple(_shape(model, index, layer) for index, layer in enumerate(kept))
    states = _states(kept)
    if not states and not any(layers):
        raise UnsupportedModel(f"{_name(model)} keeps nothing in its DynamicCache; {_WORKS}")
    return CacheShapes(layers, states)


def model_layout(model: Any, block_size: int) -> Layout:
    """Derive the page layout of `model` for blocks of `block_size` tokens. Runs a forward of two tokens."""
    return layout_of(cache_shapes(model), block_size)


def layout_of(shapes: CacheShapes, block_size: int) -> Layout:
    """The layout of caches of these shapes; the format names the byte order and the distinct shapes."""
    if block_size < 1:
        raise ConfigError(f"block_size is {block_size}; it must be at least 1 token (64 is a good value on a CPU)")
    specs = [None if s is None else LayerSpec(s.kind, s.token_bytes, s.window) for s in shapes.layers]
    known = [s for s in shapes.layers if s is not None]
    dtypes = {_dtype_name(dtype) for s in known for dtype in s.dtypes}
    dtypes |= {_dtype_name(tensor.dtype) for tensor in shapes.states}
    widths = dict.fromkeys(f"k{s.heads[0]}x{s.dims[0]},v{s.heads[1]}x{s.dims[1]}" for s in known)
    if shapes.states:
        layers = list(dict.fromkeys(tensor.layer for tensor in shapes.states))
        groups = groups_with_states(specs, block_size, layers, shapes.state_bytes)
        widths[f"state:{hashlib.sha256(repr(shapes.states).encode()).hexdigest()[:16]}"] = None
    else:
        groups = balanced_groups(specs, block_size)
    return Layout(
        block_size=block_size,
        groups=tuple(replace(group, axes=_axes(shapes.layers, group, block_size)) for group in groups),
        format=";".join([FORMAT, *widths]),
        dtype="+".join(sorted(dtypes)),
    )


def _axes(shapes: Sequence[LayerShape | None], group: LayerGroup, block_size: int) -> tuple[TensorAxes, ...]:
    """Where keys and values lie in a page: [head, token, dim] of each layer, keys first. Of bfloat16 attention only."""
    axes: list[TensorAxes] = []
    offset = 0
    for index in group.layers:
        shape = shapes[index]
        if shape is None or group.kind not in (GroupKind.FULL, GroupKind.SLIDING):
            return ()
        for is_key, heads, dims, dtype in zip((True, False), shape.heads, shape.dims, shape.dtypes, strict=True):
            if _dtype_name(dtype) != "bfloat16":
                return ()
            axes.append(TensorAxes(is_key, offset, heads, block_size * dims * 2, block_size, dims * 2, dims))
            offset += heads * block_size * dims * 2
    return tuple(axes) if offset == group.page_bytes else ()


def new_cache(model: Any) -> Any:
    """A fresh, empty `DynamicCache` with the layers that the model's config asks for.

    Built with the config: without it every layer would be a plain one, with neither window nor state.
    """
    from transformers import DynamicCache

    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{_name(model)} is an encoder-decoder; only decoder-only causal models work")
    return DynamicCache(config=model.config)


def cache_argument(model: Any) -> str:
    """The name by which the model's forward takes its cache, and gives it back."""
    get_base = getattr(model, "get_base_model", None)  # where PEFT has wrapped it
    parameters = inspect.signature((get_base() if get_base is not None else model).forward).parameters
    return "cache_params" if "cache_params" in parameters and "past_key_values" not in parameters else "past_key_values"


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
    from transformers import cache_utils

    if type(layer) not in (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.DummyLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
    ):
        raise UnsupportedModel(
            f"{_name(model)}: layer {index} caches in a {type(layer).__name__}, of which it is not known what it keeps "
            f"and how that is put back; {_WORKS}"
        )
    if is_sliding(layer) and layer.sliding_window < 2:
        raise UnsupportedModel(
            f"{_name(model)}: layer {index} has a window of {layer.sliding_window}; at least 2 works"
        )


def _shape(model: Any, index: int, layer: Any) -> LayerShape | None:
    _require_pageable(model, index, layer)  # again: a forward may have replaced the layers
    if not getattr(layer, "is_initialized", False) or layer.keys is None:
        return None
    keys, values = layer.keys, layer.values
    for tensor in (keys, values):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != _PROBE_TOKENS:
            raise UnsupportedModel(
                f"{_name(model)}: layer {index} cached {tuple(tensor.shape)} for 2 tokens; [1, heads, 2, dim] works"
            )
    return LayerShape(
        window=layer.sliding_window if is_sliding(layer) else None,
        heads=(keys.shape[1], values.shape[1]),
        dims=(keys.shape[3], values.shape[3]),
        dtypes=(keys.dtype, values.dtype),
    )


def _states(layers: Sequence[Any]) -> tuple[StateTensor, ...]:
    """The tensors of a state, one behind the other, each at its alignment."""
    found: list[StateTensor] = []
    at = 0
    for layer, kept in enumerate(layers):
        for name in ("conv_states", "recurrent_states"):
            for index, tensor in sorted(getattr(kept, name, {}).items()):
                if tensor is not None:
                    found.append(StateTensor(layer, name, index, tuple(tensor.shape), tensor.dtype, at))
                    at = -(-found[-1].stop // STATE_ALIGNMENT) * STATE_ALIGNMENT
    return tuple(found)


def _name(model: Any) -> str:
    return f"model type {getattr(model.config, 'model_type', type(model).__name__)!r}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Pages of keys and values with axes, for tests of codecs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.layout import GroupKind, LayerGroup, Layout, TensorAxes


def plain_axes(layers: int, heads: int, tokens: int, dims: int) -> tuple[TensorAxes, ...]:
    """[layer, keys or values, head, token, dim], as the transformers connector lays pages out."""
    size = heads * tokens * dims * 2
    return tuple(
        TensorAxes(index % 2 == 0, index * size, heads, tokens * dims * 2, tokens, dims * 2, dims)
        for index in range(2 * layers)
    )


def packed_axes(layers: int, heads: int, tokens: int, dims: int) -> tuple[TensorAxes, ...]:
    """[layer, head, token, keys then values], as vLLM does on CUDA."""
    row, size = 4 * dims, heads * tokens * dims * 4
    return tuple(
        TensorAxes(is_key, layer * size + (0 if is_key else 2 * dims), heads, tokens * row, tokens, row, dims)
        for layer in range(layers)
        for is_key in (True, False)
    )


def layout_with(axes: tuple[TensorAxes, ...], *, tokens: int = 16, shards: int = 1, dtype: str = "bfloat16") -> Layout:
    """A layout of one group whose page the axes cover."""
    page_bytes = sum(one.heads * one.tokens * one.dims * 2 for one in axes)
    layers = tuple(range(len(axes) // 2))
    return Layout(tokens, (LayerGroup(GroupKind.FULL, layers, page_bytes, axes=axes),), "test", dtype, shards)


def to_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Float32 to the bits of bfloat16, nearest, ties to even."""
    words = values.astype(np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def kv_page(num_bytes: int, seed: int = 0, *, channels: int = 64) -> bytes:
    """Normal values with a scale for each channel, a few of them large."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.8, channels))
    scale[::17] *= 12
    return to_bits((rng.normal(0, 1, (num_bytes // 2 // channels, channels)) * scale).astype(np.float32)).tobytes()

"""Makes page tables from an engine's tensors.

Works with numpy arrays and with torch tensors on any device; torch is not imported for it. What a table must promise
is checked here, once, because nobody can check it later: each piece is contiguous where it is copied as one run, and no
two pages overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.devices.base import PageTable


def paged_table(tensors: Sequence[Any]) -> PageTable:
    """The table of a paged engine: page i is `tensor[i]` of every tensor, in this order.

    tensors: each of shape [num_blocks, ...], a block being one dense piece of memory in whatever order of its
             dimensions. Keys and values that lie in one tensor [2, num_blocks, ...] are given as two.

    Raises ValueError if a block is not dense, blocks overlap, or the tensors have different numbers of blocks.
    """
    pieces = [_Strided.of(tensor, index, 2) for index, tensor in enumerate(tensors)]
    num_pages = _same([piece.shape[0] for piece in pieces], "blocks")
    for piece in pieces:
        if piece.bytes_of(1) == 0:
            raise ValueError(f"{piece}: its blocks are empty")
        piece.check_dense(first_dim=1)
        if num_pages > 1 and piece.strides[0] < piece.bytes_of(1):
            raise ValueError(f"{piece.name}: blocks of {piece.bytes_of(1)} bytes lie {piece.strides[0]} bytes apart")
    return PageTable(
        base=_int64s(piece.address for piece in pieces),
        page_stride=_int64s(piece.strides[0] for piece in pieces),
        num_runs=_int64s(1 for _ in pieces),
        run_stride=_int64s(piece.bytes_of(1) for piece in pieces),
        run_bytes=_int64s(piece.bytes_of(1) for piece in pieces),
        num_pages=num_pages,
        keep_alive=tuple(tensors),
    )


def token_table(tensors: Sequence[Any], block_size: int, *, offset_tokens: int = 0) -> PageTable:
    """The table of a contiguous cache: page i is tokens [offset + i * S, offset + (i + 1) * S) of every tensor.

    tensors:       each of shape [heads, tokens, dim], the inner two contiguous; heads may be strided, and heads and dim
                   differ between tensors. For example keys[0] and values[0] of a transformers layer, batch row 0.
    offset_tokens: where page 0 begins. Negative where a sliding window has dropped the first tokens of the prompt:
                   pages then keep the number they have in the prompt, and those that are not whole cannot be addressed.

    Only whole pages can be addressed; tokens after the last whole page belong to none. Raises ValueError if the inner
    two dimensions are not contiguous or the tensors have different numbers of tokens.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1 token")
    pieces = [_Strided.of(tensor, index, 3) for index, tensor in enumerate(tensors)]
    num_tokens = _same([piece.shape[1] for piece in pieces], "tokens")
    for piece in pieces:
        if len(piece.shape) != 3:
            raise ValueError(f"{piece.name} has shape {piece.shape}; [heads, tokens, dim] is needed")
        if 0 in (piece.shape[0], piece.shape[2]):
            raise ValueError(f"{piece}: its tokens are empty")
        piece.check_rows()
        if piece.shape[0] > 1 and piece.strides[0] < piece.bytes_of(1):
            raise ValueError(f"{piece.name}: heads of {piece.bytes_of(1)} bytes lie {piece.strides[0]} bytes apart")
    token_bytes = [piece.bytes_of(2) for piece in pieces]
    return PageTable(
        base=_int64s(p.address + offset_tokens * size for p, size in zip(pieces, token_bytes, strict=True)),
        page_stride=_int64s(block_size * size for size in token_bytes),
        num_runs=_int64s(piece.shape[0] for piece in pieces),
        run_stride=_int64s(piece.strides[0] if piece.shape[0] > 1 else piece.bytes_of(1) for piece in pieces),
        run_bytes=_int64s(block_size * size for size in token_bytes),
        num_pages=max(0, (num_tokens - offset_tokens) // block_size),
        keep_alive=tuple(tensors),
        first_page=max(0, -(offset_tokens // block_size)),
    )


@dataclass(frozen=True, slots=True)
class _Strided:
    """The attributes that an array and a tensor share; strides in bytes."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int

    @classmethod
    def of(cls, tensor: Any, index: int, min_dims: int) -> _Strided:
        name = f"tensor {index}"
        if isinstance(tensor, np.ndarray):
            if not tensor.flags.writeable:
                raise ValueError(f"{name} is read-only; pages are also copied into it")
            strided = cls(name, tensor.ctypes.data, tensor.shape, tensor.strides, tensor.itemsize)
        elif hasattr(tensor, "data_ptr"):
            size = int(tensor.element_size())
            strides = tuple(stride * size for stride in tensor.stride())
            strided = cls(name, int(tensor.data_ptr()), tuple(tensor.shape), strides, size)
        else:
            raise ValueError(f"{name} is a {type(tensor).__name__}; a numpy array or a torch tensor is needed")
        if len(strided.shape) < min_dims:
            raise ValueError(f"{name} has shape {strided.shape}; {min_dims} dimensions at least are needed")
        return strided

    def __str__(self) -> str:
        return f"{self.name} of shape {self.shape} with strides {self.strides} bytes"

    def bytes_of(self, first_dim: int) -> int:
        """Bytes of one element of the dimensions before `first_dim`, if it is dense."""
        return self.item_bytes * int(np.prod(self.shape[first_dim:], dtype=np.int64))

    def check_dense(self, first_dim: int) -> None:
        """Raise ValueError unless the dimensions from `first_dim` on fill one piece of memory, in any order."""
        expected = self.item_bytes
        for stride, size in sorted(zip(self.strides[first_dim:], self.shape[first_dim:], strict=True)):
            if size > 1 and stride != expected:
                raise ValueError(f"{self}: a block is not one contiguous run")
            expected *= size

    def check_rows(self) -> None:
        """Raise ValueError unless the inner two dimensions are contiguous, row by row."""
        _, tokens, dim = self.shape
        if tokens == 0:
            return
        if (dim > 1 and self.strides[2] != self.item_bytes) or (
            tokens > 1 and self.strides[1] != self.item_bytes * dim
        ):
            raise ValueError(f"{self}: tokens and dim are not contiguous; call .contiguous() on it before")


def _same(counts: list[int], what: str) -> int:
    if not counts:
        raise ValueError("no tensors: a table needs at least one")
    if len(set(counts)) > 1:
        raise ValueError(f"the tensors have different numbers of {what}: {sorted(set(counts))}")
    return counts[0]


def _int64s(values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter(values, np.int64)

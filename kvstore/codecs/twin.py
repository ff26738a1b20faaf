"""The codes of keys and values in Python: the same bytes as `_quant.c`, several times slower.

The functions are those of the extension, and its head describes them. Arrays are float32 throughout, and each value is
computed by the same operations in the same order, so nothing differs but the last digits of the error that `encode`
returns. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bits16 = npt.NDArray[np.uint16]
Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MAX_DIMS = 1024
MOST_BYTES = 1 << 30  # of a page; no group has more tokens or channels
HEAD_BYTES = 8
TINY = np.float32(2.0**-100)
LEAST_ENERGY = 1e-20  # sums of squares between which those of a tensor and of its errors are exact enough
MOST_ENERGY = 1e30
ROUND = np.float32(12582912.0)


@dataclass(frozen=True, slots=True)
class TwinTensor:
    """The place of one tensor in a page; strides are bytes."""

    is_key: int
    offset: int
    heads: int
    head_stride: int
    tokens: int
    token_stride: int
    dims: int

    def of(self, page: npt.NDArray[np.uint8]) -> Bits16:
        """The elements, shape (heads, tokens, dims), as they lie in the page."""
        shape = (self.heads, self.tokens, self.dims)
        elements: Bits16 = np.ndarray(shape, "<u2", page, self.offset, (self.head_stride, self.token_stride, 2))
        return elements


@dataclass(frozen=True, slots=True)
class TwinPlan:
    """A page's tensors, checked, and how they are coded."""

    tensors: tuple[TwinTensor, ...]
    page_bytes: int
    bits: int
    key_group: int
    value_group: int
    digest: int


def make_plan(
    tensors: npt.NDArray[np.int64], page_bytes: int, bits: int, key_group: int, value_group: int, digest: int
) -> TwinPlan:
    """Check where the tensors of a page lie. Raises ValueError unless they cover it, no byte twice."""
    if (
        not 2 <= page_bytes <= MOST_BYTES
        or page_bytes % 2
        or bits not in (8, 6, 4)
        or not 1 <= key_group <= MOST_BYTES
        or not 8 <= value_group <= MOST_BYTES
        or value_group % 8
    ):
        raise ValueError(
            f"page of {page_bytes} bytes, {bits} bits, groups of {key_group} and {value_group}: not to be coded"
        )
    if tensors.dtype != np.int64 or tensors.ndim != 2 or tensors.shape[1] != 7 or not len(tensors):
        raise ValueError(f"tensors: int64 of shape (n, 7) is needed, not {tensors.dtype} of shape {tensors.shape}")
    marks = np.zeros(page_bytes, np.uint8)
    rows = []
    for index, numbers in enumerate(tensors.tolist()):
        tensor = TwinTensor(*numbers)
        end = (
            tensor.offset
            + (tensor.heads - 1) * tensor.head_stride
            + (tensor.tokens - 1) * tensor.token_stride
            + tensor.dims * 2
        )
        if (
            tensor.is_key not in (0, 1)
            or min(tensor.heads, tensor.tokens) < 1
            or not 8 <= tensor.dims <= MAX_DIMS
            or tensor.dims % 8
            or min(tensor.offset, tensor.head_stride, tensor.token_stride) < 0
            or (tensor.offset | tensor.head_stride | tensor.token_stride) % 2
            or end > page_bytes
        ):
            raise ValueError(
                f"tensor {index} does not fit a page of {page_bytes} bytes, or its dims are no multiple of 8 "
                f"up to {MAX_DIMS}"
            )
        for head in range(tensor.heads):
            for token in range(tensor.tokens):
                first = tensor.offset + head * tensor.head_stride + token * tensor.token_stride
                if marks[first : first + 2 * tensor.dims].any():
                    raise ValueError(f"tensor {index} overlaps another, or itself")
                marks[first : first + 2 * tensor.dims] = 1
        rows.append(tensor)
    if not marks.all():
        raise ValueError(f"the tensors do not cover a page of {page_bytes} bytes")
    return TwinPlan(tuple(rows), page_bytes, bits, key_group, value_group, digest)


def coded_bytes(plan: TwinPlan, skip: int) -> int:
    """Bytes of a page's encoding."""
    if skip not in (0, 1):
        raise ValueError(f"skip is {skip}; it must be 0 or 1")
    return HEAD_BYTES + sum(
        t.heads * (skip * t.dims * 2 + _num_scales(plan, t, skip) * 2 + (t.tokens - skip) * t.dims * plan.bits // 8)
        for t in plan.tensors
    )


def encode(plan: TwinPlan, page: memoryview, out: memoryview, skip: int, portable: int = 0) -> float:
    """Encode a page; return the largest squared relative error of a tensor, infinite if it cannot be coded."""
    source, target = _buffers(page, out)
    if len(source) != plan.page_bytes or len(target) < coded_bytes(plan, skip):
        raise ValueError(
            f"a page has {plan.page_bytes} bytes and its encoding {coded_bytes(plan, skip)}, not {len(source)} and "
            f"{len(target)}"
        )
    rows, scales, codes, worst = [], [], [], 0.0
    with np.errstate(all="ignore"):
        for tensor in plan.tensors:
            x = tensor.of(source)
            rows.append(x[:, :skip].tobytes())
            error = energy = 0.0
            for part, axis in _groups(plan, tensor, x[:, skip:]):
                low, high = _extremes(part, axis, plan.bits)
                numbers = _Scales(low, high, plan.bits)
                scaled = (_wide(part) - numbers.low) * numbers.inverse + ROUND
                codes.append((scaled.view(np.uint32) & 0xFF).astype(np.uint8))
                scales.append((numbers.low_bits, numbers.high_bits))
                difference = _wide(part) - (numbers.low + (scaled - ROUND) * numbers.step)
                error += float(np.square(difference, dtype=np.float64).sum())
                energy += float(np.square(_wide(part), dtype=np.float64).sum())
            if LEAST_ENERGY <= energy <= MOST_ENERGY:
                worst = max(worst, error / energy)
            elif (x[:, skip:] & 0x7FFF).any():
                worst = float("inf")
    head = plan.digest.to_bytes(4, "little") + bytes([skip, 0, 0, 0])
    blob = b"".join((head, *rows, *_scale_bytes(plan, scales, skip), *_code_bytes(plan, codes, skip)))
    target[: len(blob)] = np.frombuffer(blob, np.uint8)
    return worst


def decode(plan: TwinPlan, blob: memoryview, out: memoryview, portable: int = 0) -> None:
    """Fill a page from its encoding. Raises ValueError for what is none of this plan."""
    source, target = _buffers(blob, out)
    if len(target) != plan.page_bytes:
        raise ValueError(f"a page has {plan.page_bytes} bytes, not {len(target)}")
    head = bytes(source[:HEAD_BYTES])
    if len(head) < HEAD_BYTES or head[:4] != plan.digest.to_bytes(4, "little") or head[4] > 1 or any(head[5:]):
        raise ValueError("the encoding is of another geometry or version")
    skip = head[4]
    if len(source) != coded_bytes(plan, skip):
        raise ValueError(f"the encoding has {len(source)} bytes, not {coded_bytes(plan, skip)}")
    num_rows = sum(t.heads * skip * t.dims for t in plan.tensors)
    num_scales = sum(t.heads * _num_scales(plan, t, skip) for t in plan.tensors)
    numbers = source[HEAD_BYTES : HEAD_BYTES + 2 * (num_rows + num_scales)].view("<u2")
    rows, scales = numbers[:num_rows], numbers[num_rows:]
    packed = source[HEAD_BYTES + 2 * (num_rows + num_scales) :]
    if (scales & 0x7F80 == 0x7F80).any() or (plan.bits == 8 and (scales & 0x8000).any()):
        raise ValueError("the encoding has scales that are no numbers")
    with np.errstate(all="ignore"):
        for tensor in plan.tensors:
            x = tensor.of(target)
            size = tensor.heads * skip * tensor.dims
            x[:, :skip] = rows[:size].reshape(tensor.heads, skip, tensor.dims)
            rows = rows[size:]
            count = tensor.heads * _num_scales(plan, tensor, skip)
            mine, scales = scales[:count], scales[count:]
            shape = tensor.heads, tensor.tokens - skip, tensor.dims * plan.bits // 8
            size = shape[0] * shape[1] * shape[2]
            codes = _unpack(packed[:size].reshape(shape), plan.bits)
            packed = packed[size:]
            _decode_tensor(plan, tensor, mine, codes, x[:, skip:])


class _Scales:
    """The numbers to code a group with, from its extremes (`bits` of bfloat16; broadcast over the group)."""

    def __init__(self, low: Bits16, high: Bits16, bits: int) -> None:
        levels = np.float32(127 if bits == 8 else (1 << bits) - 1)
        self.low_bits = np.where(low == 0x8000, np.uint16(0), low)
        self.high_bits = np.where(high == 0x8000, np.uint16(0), high)
        self.low = np.zeros(low.shape, np.float32) if bits == 8 else _wide(self.low_bits)
        span = _wide(self.high_bits) - self.low
        self.is_sound = bool(((span >= 0) & np.isfinite(span)).all())
        flat = span <= TINY
        self.high_bits = np.where(flat, np.uint16(0) if bits == 8 else self.low_bits, self.high_bits)
        self.step = np.where(flat, np.float32(0), span / levels)
        self.inverse = np.where(flat, np.float32(0), levels / span)


def _buffers(source: memoryview, target: memoryview) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    read, written = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
    if not written.flags.writeable:
        raise BufferError("the buffer to be written is read-only")
    if (read.ctypes.data | written.ctypes.data) & 1:
        raise ValueError("a page and its encoding cannot be at an odd address")
    if np.shares_memory(read, written):
        raise ValueError("a page and its encoding cannot be of overlapping memory")
    return read, written


def _num_scales(plan: TwinPlan, tensor: TwinTensor, skip: int) -> int:
    each, tokens = 1 if plan.bits == 8 else 2, tensor.tokens - skip
    if tensor.is_key:
        return each * tensor.dims * -(-tokens // plan.key_group)
    return each * tokens * -(-tensor.dims // plan.value_group)


def _groups(plan: TwinPlan, tensor: TwinTensor, x: Bits16) -> Iterator[tuple[Bits16, int]]:
    """The parts of a tensor whose groups lie along one axis each: the axis that a group runs along."""
    if tensor.is_key:
        for first in range(0, x.shape[1], plan.key_group):
            yield x[:, first : first + plan.key_group], 1
    elif x.shape[1]:
        for first in range(0, x.shape[2], plan.value_group):
            yield x[:, :, first : first + plan.value_group], 2


def _wide(bits: Bits16) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Floats) -> Bits16:
    words = values.astype(np.float32).view(np.uint32)
    rounded: Bits16 = ((words + np.uint32(0x7FFF) + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _ordered(bits: Bits16) -> npt.NDArray[np.int16]:
    signed = bits.view(np.int16)
    places: npt.NDArray[np.int16] = signed ^ ((signed >> 15) & np.int16(0x7FFF))
    return places


def _extremes(part: Bits16, axis: int, bits: int) -> tuple[Bits16, Bits16]:
    if bits == 8:
        high = (part & np.uint16(0x7FFF)).max(axis=axis, keepdims=True)
        return np.zeros_like(high), high
    places = _ordered(np.ascontiguousarray(part))
    low, high = places.min(axis=axis, keepdims=True), places.max(axis=axis, keepdims=True)
    return _ordered(low.view(np.uint16)).view(np.uint16), _ordered(high.view(np.uint16)).view(np.uint16)


def _scale_bytes(plan: TwinPlan, scales: list[tuple[Bits16, Bits16]], skip: int) -> Iterator[bytes]:
    """Scales as they are stored: by tensor, head, group (keys) or token (values); low before high."""
    left = iter(scales)
    for tensor in plan.tensors:
        mine = [next(left) for _ in range(_num_parts(plan, tensor, skip))]
        if not mine:
            continue
        kept = [[high] if plan.bits == 8 else [low, high] for low, high in mine]
        if tensor.is_key:  # (heads, 1, dims) each
            yield np.concatenate([bits for pair in kept for bits in pair], axis=1).tobytes()
        else:  # (heads, tokens, 1) each: all lows of a token, then all highs
            columns = [np.concatenate([pair[i] for pair in kept], axis=2) for i in range(len(kept[0]))]
            yield np.concatenate(columns, axis=2).tobytes()


def _code_bytes(plan: TwinPlan, codes: list[Codes], skip: int) -> Iterator[bytes]:
    left = iter(codes)
    for tensor in plan.tensors:
        mine = [next(left) for _ in range(_num_parts(plan, tensor, skip))]
        if mine:
            yield _pack(np.concatenate(mine, axis=1 if tensor.is_key else 2), plan.bits).tobytes()


def _num_parts(plan: TwinPlan, tensor: TwinTensor, skip: int) -> int:
    tokens = tensor.tokens - skip
    return -(-tokens // plan.key_group) if tensor.is_key else -(-tensor.dims // plan.value_group) if tokens else 0


def _pack(codes: Codes, bits: int) -> Codes:
    if bits == 8:
        return codes
    if bits == 4:
        first, second = np.split(codes, 2, axis=-1)
        return np.asarray(first | second << 4, np.uint8)
    a, b, c, last = np.split(codes, 4, axis=-1)
    return np.concatenate([a | last << 6, b | (last >> 2) << 6, c | (last >> 4) << 6], axis=-1)


def _unpack(packed: Codes, bits: int) -> Codes:
    if bits == 8:
        return packed
    if bits == 4:
        return np.concatenate([packed & 15, packed >> 4], axis=-1)
    a, b, c = np.split(packed, 3, axis=-1)
    return np.concatenate([a & 63, b & 63, c & 63, a >> 6 | (b >> 6) << 2 | (c >> 6) << 4], axis=-1)


def _decode_tensor(plan: TwinPlan, tensor: TwinTensor, scales: Bits16, codes: Codes, x: Bits16) -> None:
    each, dims = 1 if plan.bits == 8 else 2, tensor.dims
    if not x.shape[1]:
        return
    if tensor.is_key:
        table = scales.reshape(tensor.heads, -1, each, dims)
        for group, first in enumerate(range(0, x.shape[1], plan.key_group)):
            part = slice(first, first + plan.key_group)
            _fill(plan.bits, table[:, group, None, 0], table[:, group, None, -1], codes[:, part], x[:, part])
    else:
        table = scales.reshape(tensor.heads, x.shape[1], each, -1)
        for group, first in enumerate(range(0, dims, plan.value_group)):
            part = slice(first, first + plan.value_group)
            low, high = table[:, :, 0, group, None], table[:, :, -1, group, None]
            _fill(plan.bits, low, high, codes[:, :, part], x[:, :, part])


def _fill(bits: int, low: Bits16, high: Bits16, codes: Codes, x: Bits16) -> None:
    numbers = _Scales(low, high, bits)
    if not numbers.is_sound:
        raise ValueError("the encoding has scales that are no numbers")
    if bits == 8:
        x[...] = _narrow(codes.view(np.int8).astype(np.float32) * numbers.step)
    else:
        inside = _narrow(numbers.low + codes.astype(np.float32) * numbers.step)
        x[...] = np.where(codes == (1 << bits) - 1, numbers.high_bits, inside)

"""Codes of keys and values: compiled and twin give the same bytes, come back near, and come back to the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codecs import quant, twin
from kvstore.codecs.lossy import LOSSY, LossyCodec
from kvstore.codecs.quant import Quantizer, tensor_table
from kvstore.errors import CorruptPage
from kvstore.layout import TensorAxes
from tests.helpers.kv_pages import kv_page, packed_axes, plain_axes

WAYS = [
    pytest.param(True, id="compiled", marks=pytest.mark.skipif(not quant.is_compiled(), reason="no compiled codes")),
    pytest.param(False, id="twin"),
]
CODECS = [pytest.param(codec, id=codec.name) for codec in LOSSY]
SHAPES = [plain_axes(2, 3, 16, 64), packed_axes(2, 2, 16, 24), plain_axes(1, 1, 70, 40), plain_axes(1, 2, 1, 8)]


def quantizer(codec: LossyCodec, axes: tuple[TensorAxes, ...], *, compiled: bool) -> Quantizer:
    return Quantizer(axes, page_bytes(axes), codec.bits, codec.key_group, codec.value_group, compiled=compiled)


def page_bytes(axes: tuple[TensorAxes, ...]) -> int:
    return sum(one.heads * one.tokens * one.dims * 2 for one in axes)


def encoded(one: Quantizer, page: bytes, skip: int = 0) -> tuple[bytes, float]:
    out = bytearray(one.coded_bytes(skip))
    error = one.encode(memoryview(page), memoryview(out), skip)
    return bytes(out), error


def decoded(one: Quantizer, blob: bytes) -> bytes:
    out = bytearray(one.page_bytes)
    one.decode(memoryview(blob), memoryview(out))
    return bytes(out)


def values(page: bytes) -> Any:
    return (np.frombuffer(page, "<u2").astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compiled", WAYS)
def test_what_comes_back_is_near_and_its_error_is_told(
    compiled: bool, codec: LossyCodec, axes: tuple[TensorAxes, ...]
) -> None:
    one = quantizer(codec, axes, compiled=compiled)
    page = kv_page(one.page_bytes, channels=8)

    blob, error = encoded(one, page)
    there, back = values(page), values(decoded(one, blob))

    assert np.linalg.norm(back - there) / np.linalg.norm(there) <= 1.5 * error + 2**-9  # and bfloat16's own rounding
    assert error < 0.15


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compiled", WAYS)
def test_a_page_that_comes_back_is_encoded_to_the_same_bytes(compiled: bool, codec: LossyCodec) -> None:
    one = quantizer(codec, SHAPES[0], compiled=compiled)
    blob, _ = encoded(one, kv_page(one.page_bytes), 1)

    assert encoded(one, decoded(one, blob), 1)[0] == blob


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compiled", WAYS)
def test_a_first_token_that_is_kept_comes_back_as_it_was(compiled: bool, codec: LossyCodec) -> None:
    axes = SHAPES[0]
    one = quantizer(codec, axes, compiled=compiled)
    page = np.frombuffer(kv_page(one.page_bytes), "<u2").reshape(2 * 2, 3, 16, 64).copy()
    page[:, :, 0] = np.random.default_rng(1).integers(0, 0x7F80, (4, 3, 64))  # huge and tiny: no scale suits them

    blob, error = encoded(one, page.tobytes(), 1)

    back = np.frombuffer(decoded(one, blob), "<u2").reshape(page.shape)
    assert (back[:, :, 0] == page[:, :, 0]).all()
    assert error < 0.15


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("place", [5, -1])
def test_what_is_no_number_has_an_endless_error(codec: LossyCodec, bits: int, compiled: bool, place: int) -> None:
    one = quantizer(codec, SHAPES[0], compiled=compiled)
    page = np.frombuffer(kv_page(one.page_bytes), "<u2").copy()
    page[place] = bits

    assert encoded(one, page.tobytes())[1] == float("inf")


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("codec", CODECS)
def test_damaged_encodings_are_corrupt_or_some_page(codec: LossyCodec, compiled: bool) -> None:
    one = quantizer(codec, SHAPES[0], compiled=compiled)
    blob, _ = encoded(one, kv_page(one.page_bytes))

    for wrong in (b"", blob[:-1], blob + b"\0", b"\xff" * len(blob), blob[:4] + b"\2" + blob[5:], b"\0" + blob[1:]):
        with pytest.raises(CorruptPage):
            decoded(one, wrong)
    for scale in (0x7F80, 0xFFC0):
        with pytest.raises(CorruptPage, match="scales that are no numbers"):
            decoded(one, blob[:8] + scale.to_bytes(2, "little") + blob[10:])


def test_an_encoding_for_other_axes_is_corrupt() -> None:
    near = LOSSY[0]
    blob, _ = encoded(quantizer(near, plain_axes(1, 1, 16, 64), compiled=False), kv_page(4096))

    with pytest.raises(CorruptPage, match="another geometry"):
        decoded(quantizer(near, packed_axes(1, 1, 16, 64), compiled=False), blob)


@pytest.mark.parametrize("compiled", WAYS)
def test_axes_that_do_not_tell_every_byte_once_are_refused(compiled: bool) -> None:
    key, value = plain_axes(1, 2, 16, 64)
    wrong: list[tuple[tuple[TensorAxes, ...], int]] = [
        ((key,), 8192),  # values are not told
        ((key, key), 8192),
        ((key, value), 8190),  # the last row sticks out
        ((key, value), 8194),
        ((TensorAxes(True, 0, 2, 2048, 16, 126, 64), value), 8192),  # rows overlap
        ((TensorAxes(True, -2, 2, 2048, 16, 128, 64), value), 8192),
        ((TensorAxes(True, 1, 2, 2048, 16, 128, 64), value), 8192),
        ((TensorAxes(True, (1 << 63) - 2, 2, 2048, 16, 128, 64), value), 8192),  # sums of it would overflow
        ((TensorAxes(True, 0, 1 << 62, 2048, 16, 128, 64), value), 8192),
        ((TensorAxes(True, 0, 2, 1 << 62, 16, 128, 64), value), 8192),
        (plain_axes(1, 2, 16, 60), 7680),  # no multiple of 8
        (plain_axes(1, 1, 1, 1032), 4128),
        ((), 8192),
    ]

    for axes, num_bytes in wrong:
        with pytest.raises(ValueError, match=r"tensor|tensors"):
            Quantizer(axes, num_bytes, 8, 64, 64, compiled=compiled)
    endless = (1 << 63) - 8
    groups = ((7, 64, 64), (8, 0, 64), (8, 64, 4), (8, 64, 12), (4, endless, 32), (4, 32, endless))
    for bits, key_group, value_group in groups:
        with pytest.raises(ValueError, match="not to be coded"):
            Quantizer((key, value), 8192, bits, key_group, value_group, compiled=compiled)


@pytest.mark.parametrize("compiled", WAYS)
def test_buffers_of_another_kind_are_refused_before_a_byte_moves(compiled: bool) -> None:
    code: Any = quant._quant if compiled else twin
    axes = plain_axes(1, 2, 16, 64)
    plan = code.make_plan(tensor_table(axes), 8192, 8, 64, 1024, 1)
    page, out = bytearray(kv_page(8192)), bytearray(9000)

    for source, target, skip in (
        (page[:-2], out, 0),  # too short
        (page, out[:100], 0),
        (page, out, 2),
        (page, memoryview(page)[:4500], 0),  # the page itself
        (memoryview(page), memoryview(out)[1:], 0),  # an odd address
    ):
        with pytest.raises(ValueError, match=r"\w"):
            code.encode(plan, memoryview(source), memoryview(target), skip, 0)
    with pytest.raises((BufferError, ValueError)):
        code.encode(plan, memoryview(page), memoryview(bytes(9000)), 0, 0)
    with pytest.raises((BufferError, ValueError)):
        code.encode(plan, memoryview(bytearray(16384))[::2], memoryview(out), 0, 0)
    with pytest.raises(ValueError, match="int64 of shape"):
        code.make_plan(tensor_table(axes).astype(np.int32), 8192, 8, 64, 1024, 1)
    with pytest.raises(ValueError, match="int64 of shape"):
        code.make_plan(tensor_table(axes)[:, :6].copy(), 8192, 8, 64, 1024, 1)
    assert not any(out)


@st.composite
def pages(draw: st.DrawFn) -> tuple[tuple[TensorAxes, ...], bytes, int]:
    make = draw(st.sampled_from([plain_axes, packed_axes]))
    axes = make(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 70)),
        draw(st.sampled_from([8, 24, 32, 72])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    count = page_bytes(axes) // 2
    kind = draw(st.sampled_from(["bits", "finite", "narrow", "kv", "zeros", "offset"]))
    if kind == "bits":
        page = rng.integers(0, 1 << 16, count).astype("<u2").tobytes()
    elif kind == "finite":
        bits = rng.integers(0, 0x7F80, count) | rng.integers(0, 2, count) << 15
        page = bits.astype("<u2").tobytes()
    elif kind == "narrow":  # neighbours on bfloat16's own grid, also across a power of two
        page = (int(rng.integers(0x100, 0x7E00)) + rng.integers(0, 40, count)).astype("<u2").tobytes()
    elif kind == "offset":
        sign = rng.integers(0, 2) << 15
        page = (sign | int(rng.integers(0x3000, 0x5000)) + rng.integers(0, 200, count)).astype("<u2").tobytes()
    elif kind == "zeros":
        page = (rng.integers(0, 2, count) << 15).astype("<u2").tobytes()
    else:
        page = kv_page(page_bytes(axes), int(rng.integers(1 << 30)), channels=8)
    return axes, page, draw(st.integers(0, 1))


@pytest.mark.skipif(not quant.is_compiled(), reason="no compiled codes")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=pages(), codec=st.sampled_from(LOSSY))
def test_compiled_portable_and_twin_give_the_same_bytes(
    drawn: tuple[tuple[TensorAxes, ...], bytes, int], codec: LossyCodec
) -> None:
    axes, page, skip = drawn
    arguments = tensor_table(axes), len(page), codec.bits, codec.key_group, codec.value_group, 7
    blobs, errors, backs = [], [], []
    for code, portable in ((quant._quant, 0), (quant._quant, 1), (twin, 0)):
        plan: Any = code.make_plan(*arguments)  # type: ignore[attr-defined]
        blob = bytearray(code.coded_bytes(plan, skip))
        errors.append(code.encode(plan, memoryview(page), memoryview(blob), skip, portable))
        blobs.append(bytes(blob))
        back = bytearray(len(page))
        if errors[-1] < float("inf"):
            code.decode(plan, memoryview(blob), memoryview(back), portable)
            again = bytearray(len(blob))
            code.encode(plan, memoryview(back), memoryview(again), skip, portable)
            assert again == blob  # what travels up and down keeps its codes
        backs.append(bytes(back))

    assert np.isfinite(errors).all() or np.isinf(errors).all()
    if np.isfinite(errors).all():
        assert errors[0] == pytest.approx(errors[2], rel=1e-2, abs=1e-12)
        assert blobs[0] == blobs[1] == blobs[2]
        assert backs[0] == backs[1] == backs[2]

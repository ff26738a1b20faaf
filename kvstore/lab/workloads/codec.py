"""Encode and decode a page of 1 MiB of bfloat16, on one core. The ceiling is a copy; beside each codec its twin."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.codecs.lossy import LOSSY
from kvstore.codecs.quant import Quantizer, is_compiled
from kvstore.codecs.table import codec_by_name
from kvstore.errors import ConfigError
from kvstore.lab.bench import Case, Table, measure
from kvstore.layout import TensorAxes

LAYERS, HEADS, TOKENS, DIMS = 4, 8, 64, 128  # of one page: 1 MiB


def run(argument: str, quick: bool) -> list[Table]:
    """Measure every codec on normal values with a scale for each channel."""
    tensor_bytes = HEADS * TOKENS * DIMS * 2
    axes = [
        TensorAxes(index % 2 == 0, index * tensor_bytes, HEADS, TOKENS * DIMS * 2, TOKENS, DIMS * 2, DIMS)
        for index in range(2 * LAYERS)
    ]
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 0.8, DIMS)).astype(np.float32)
    values = rng.normal(0, 1, (2 * LAYERS * HEADS * TOKENS, DIMS)).astype(np.float32) * scale
    page = memoryview((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    target = memoryview(bytearray(page.nbytes))
    encode = [Case("copy", lambda: _copy(page, target), page.nbytes)]
    decode = [Case("copy", lambda: _copy(page, target), page.nbytes)]
    for name, coder in _coders(axes, page):
        blob = coder[0]()
        encode.append(Case(name, coder[0], page.nbytes))
        decode.append(Case(name, lambda coder=coder, blob=blob: coder[1](blob, target), page.nbytes))  # type: ignore[misc]
    return [
        measure(f"{what} 1 MiB", "bytes", cases, quick=quick)
        for what, cases in (("encode", encode), ("decode", decode))
    ]


def _coders(axes: list[TensorAxes], page: memoryview) -> list[tuple[str, tuple[Any, Any]]]:
    """Functions that encode the page and decode an encoding, by name."""
    coders: list[tuple[str, tuple[Any, Any]]] = []
    try:
        lossless = codec_by_name("lossless")
        room = memoryview(bytearray(lossless.max_bytes(page.nbytes)))
        coders.append(("lossless", (lambda: room[: lossless.encode(page, room)], lossless.decode)))
    except ConfigError:
        pass  # its package is not installed
    for codec in LOSSY:
        for way in ("", ", in Python") if is_compiled() else (", in Python",):
            one = Quantizer(axes, page.nbytes, codec.bits, codec.key_group, codec.value_group, compiled=not way)
            coders.append((codec.name + way, (_encoder(one, page), one.decode)))
    return coders


def _encoder(one: Quantizer, page: memoryview) -> Any:
    room = memoryview(bytearray(one.coded_bytes(0)))

    def encode() -> memoryview:
        one.encode(page, room, 0)
        return room

    return encode


def _copy(page: memoryview, target: memoryview) -> None:
    target[:] = page

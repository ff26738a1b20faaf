"""The promises of every codec (kvstore/codecs), as a suite to inherit: supply the fixture `codec`."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np
import pytest

from kvstore.codecs.base import Codec
from kvstore.errors import CorruptPage


def kv_like(num_elements: int, seed: int = 0) -> bytes:
    """bfloat16 bytes that look like real keys and values: a scale per channel and a few outlier channels."""
    rng = np.random.default_rng(seed)
    channels = 64
    scale = np.exp(rng.normal(0, 0.8, channels))
    scale[::17] *= 12
    values = rng.normal(0, 1, (-(-num_elements // channels), channels)) * scale
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()[: num_elements * 2]


PAGES = {
    "kv": kv_like(32_768),
    "zeros": bytes(4096),
    "random": random.Random(1).randbytes(4096),
    "odd": random.Random(2).randbytes(4097),
    "one byte": b"\x7f",
    "two bytes": b"\x80\xff",
    "every element": np.arange(65_536, dtype="<u2").tobytes(),
}


def encoded(codec: Codec, page: bytes) -> bytes:
    out = memoryview(bytearray(codec.max_bytes(len(page))))
    return bytes(out[: codec.encode(memoryview(page), out)])


def decoded(codec: Codec, blob: bytes, num_bytes: int) -> bytes:
    out = bytearray(num_bytes)
    codec.decode(memoryview(blob), memoryview(out))
    return bytes(out)


class CodecContract:
    """Inherit and override the fixture `codec`."""

    @pytest.fixture
    def codec(self) -> Codec:
        raise NotImplementedError

    @pytest.mark.parametrize("name", PAGES)
    def test_any_page_comes_back_bit_for_bit(self, codec: Codec, name: str) -> None:
        page = PAGES[name]

        blob = encoded(codec, page)

        assert len(blob) <= codec.max_bytes(len(page))
        assert decoded(codec, blob, len(page)) == page

    def test_encoding_touches_nothing_behind_its_end(self, codec: Codec) -> None:
        page = PAGES["kv"]
        out = bytearray(b"\xaa" * (codec.max_bytes(len(page)) + 64))

        codec.encode(memoryview(page), memoryview(out)[:-64])

        assert out[-64:] == b"\xaa" * 64

    @pytest.mark.parametrize("name", PAGES)
    def test_a_blob_of_another_length_is_corrupt(self, codec: Codec, name: str) -> None:
        page = PAGES[name]
        blob = encoded(codec, page)

        for wrong in (b"", blob[:-1], blob + b"\0"):
            with pytest.raises(CorruptPage):
                decoded(codec, wrong, len(page))
        with pytest.raises(CorruptPage):
            decoded(codec, blob, len(page) + 1)

    def test_a_damaged_blob_is_corrupt_or_some_page_but_never_another_error(self, codec: Codec) -> None:
        # The page's checksum, over the encoded bytes, is verified before: this is about what it might overlook.
        page = PAGES["kv"]
        blob = bytearray(encoded(codec, page))
        rng = random.Random(3)

        for position in [*range(24), *(rng.randrange(len(blob)) for _ in range(200))]:
            damaged = bytearray(blob)
            damaged[position] ^= 1 << rng.randrange(8)
            with contextlib.suppress(CorruptPage):
                decoded(codec, bytes(damaged), len(page))

    def test_threads_share_one_codec(self, codec: Codec) -> None:
        wrong: list[int] = []

        def work(seed: int) -> None:
            page = kv_like(20_000, seed)
            if any(decoded(codec, encoded(codec, page), len(page)) != page for _ in range(10)):
                wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert wrong == []

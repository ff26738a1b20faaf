"""Codecs keep the codec contract; lossless is worth its time on what looks like KV."""

from __future__ import annotations

import sys

import pytest

from kvstore.codecs.base import Codec
from kvstore.codecs.exact import ExactCodec
from kvstore.codecs.lossless import LosslessCodec
from kvstore.codecs.table import CODEC_NAMES, codec_by_id, codec_by_name
from kvstore.errors import ConfigError, CorruptPage
from kvstore.testing.contracts.codec import CodecContract, decoded, encoded, kv_like


class TestExactCodec(CodecContract):
    @pytest.fixture
    def codec(self) -> Codec:
        return ExactCodec()


class TestLosslessCodec(CodecContract):
    @pytest.fixture
    def codec(self) -> Codec:
        pytest.importorskip("zstandard")
        return LosslessCodec()


def test_lossless_shrinks_what_looks_like_kv_by_a_third() -> None:
    pytest.importorskip("zstandard")
    page = kv_like(262_144)

    assert len(page) / len(encoded(LosslessCodec(), page)) > 1.35


def test_lossless_costs_four_bytes_where_nothing_shrinks() -> None:
    pytest.importorskip("zstandard")
    import numpy as np

    page = np.random.default_rng(0).bytes(8192)
    blob = encoded(LosslessCodec(), page)

    assert len(blob) == len(page) + 4
    assert decoded(LosslessCodec(), blob, len(page)) == page


def test_a_frame_that_claims_another_size_is_not_believed() -> None:
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    blob = len(frame).to_bytes(4, "little") + frame + bytes(4096)

    with pytest.raises(CorruptPage, match="another length"):
        decoded(LosslessCodec(), blob, 8192)


def test_codecs_are_found_by_name_and_by_the_id_in_a_header() -> None:
    pytest.importorskip("zstandard")
    for name in CODEC_NAMES:
        codec = codec_by_name(name)
        assert codec.name == name
        assert type(codec_by_id(codec.id)) is type(codec)
    assert [codec_by_name(name).id for name in ("exact", "lossless")] == [
        0,
        1,
    ]  # written into headers: never renumbered


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="'zip'; it must be one of exact, lossless"):
        codec_by_name("zip")
    with pytest.raises(CorruptPage, match="codec 77"):
        codec_by_id(77)


def test_lossless_without_zstandard_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)

    with pytest.raises(ConfigError, match="zstandard"):
        codec_by_name("lossless")

"""What a tier stores under which key, and what it gives to whom."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from kvstore.codecs.coder import PageCoder, UnreadablePage
from kvstore.codecs.exact import ExactCodec
from kvstore.codecs.loss import Loss, loss_of, loss_of_codec, marked
from kvstore.codecs.lossy import LOSSY
from kvstore.errors import ConfigError, CorruptPage
from kvstore.layout import GroupKind, Layout
from kvstore.page import PageKey, PageMeta, page_key
from radix.hashing import hash_blocks
from tests.helpers.kv_pages import kv_page, layout_with, plain_axes

LAYOUT = layout_with(plain_axes(2, 2, 16, 64))
PAGE_BYTES = LAYOUT.stored_bytes(0)
PAGE = kv_page(PAGE_BYTES)
HASH = hash_blocks(range(16), 16, root=bytes(32))[0]  # type: ignore[arg-type]
IDS = {"exact": 0, "lossless": 1, "near": 2, "compact": 3, "small": 4}


def key_for(loss: Loss) -> PageKey:
    return page_key(marked([HASH], loss)[0])


def stored(coder: PageCoder, loss: Loss, page: bytes = PAGE, depth: int = 1) -> tuple[bytes, int]:
    blob, codec_id = coder.encode(key_for(loss), PageMeta(len(page), depth=depth), memoryview(page))
    return bytes(blob), codec_id


def read(coder: PageCoder, loss: Loss, blob: bytes, codec_id: int) -> bytes:
    out = bytearray(PAGE_BYTES)
    coder.decode(key_for(loss), codec_id, memoryview(blob), memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("codec", IDS)
@pytest.mark.parametrize("loss", Loss)
def test_a_page_loses_no_more_than_its_tier_and_its_readers_say(codec: str, loss: Loss) -> None:
    pytest.importorskip("zstandard")
    blob, codec_id = stored(PageCoder(codec, LAYOUT), loss)

    expected = min(loss_of_codec(codec), loss)
    plain = "exact" if codec == "exact" else "lossless"
    assert codec_id == IDS[expected.word if expected else plain]
    assert len(blob) < PAGE_BYTES or codec == "exact"


@pytest.mark.parametrize("codec", [codec.name for codec in LOSSY])
def test_an_exact_reader_never_receives_a_lossy_page(codec: str) -> None:
    coder = PageCoder(codec, LAYOUT)
    loss = loss_of_codec(codec)
    blob, codec_id = stored(coder, loss)

    assert read(coder, loss, blob, codec_id) != PAGE
    for below in [one for one in Loss if one < loss]:
        with pytest.raises(CorruptPage, match=f"readers take {below.word}"):
            read(coder, below, blob, codec_id)
    assert read(coder, Loss.EXACT, *stored(coder, Loss.EXACT)) == PAGE


@pytest.mark.parametrize("codec", [codec.name for codec in LOSSY])
def test_a_page_that_travels_up_and_down_keeps_its_codes(codec: str) -> None:
    coder = PageCoder(codec, LAYOUT)
    loss = loss_of_codec(codec)

    for depth in (0, 1):
        blob, codec_id = stored(coder, loss, depth=depth)
        assert stored(coder, loss, read(coder, loss, blob, codec_id), depth) == (blob, codec_id)


@pytest.mark.parametrize("codec", [codec.name for codec in LOSSY])
def test_a_page_that_a_codec_would_spoil_is_stored_without_loss_and_counted(codec: str) -> None:
    rng = np.random.default_rng(0)
    wild = (rng.integers(0x3000, 0x5000, PAGE_BYTES // 2)).astype("<u2").tobytes()  # over 64 powers of two
    coder, loss = PageCoder(codec, LAYOUT), loss_of_codec(codec)
    key_of_layout = layout_with(plain_axes(2, 2, 16, 64))
    values = np.frombuffer(PAGE, "<u2").copy()
    values[7] = 0x7FC0  # not a number

    for page in (values.tobytes(), wild):
        blob, codec_id = stored(coder, loss, page)
        if codec_id in (0, 1):
            assert read(PageCoder(codec, key_of_layout), loss, blob, codec_id) == page

    assert coder.counters["guarded"] >= 1
    assert coder.counters["guarded"] + coder.counters["lossy_stored"] == 2


def test_without_zstandard_what_a_codec_would_spoil_is_stored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)

    blob, codec_id = stored(PageCoder("near", LAYOUT), Loss.NEAR, b"\xff" * PAGE_BYTES)

    assert (blob, codec_id) == (b"\xff" * PAGE_BYTES, ExactCodec.id)


@pytest.mark.parametrize(("codec", "ratio"), [("near", 1.85), ("compact", 2.2), ("small", 2.7)])
def test_a_slot_is_as_small_as_the_codec_makes_pages(codec: str, ratio: float) -> None:
    layout = layout_with(plain_axes(8, 4, 64, 64), tokens=64)

    assert layout.slot_bytes / PageCoder(codec, layout).slot_bytes > ratio
    assert PageCoder("lossless", layout).slot_bytes == layout.slot_bytes


def test_pages_of_all_shards_are_coded() -> None:
    layout = replace(LAYOUT, shards=3)
    coder = PageCoder("near", layout)
    page = kv_page(3 * PAGE_BYTES)

    blob, codec_id = coder.encode(key_for(Loss.NEAR), PageMeta(len(page), depth=1), memoryview(page))

    assert (codec_id, len(blob) < len(page) / 1.75) == (2, True)


def test_layouts_that_do_not_tell_what_lies_where_are_refused_with_a_sentence() -> None:
    opaque = Layout(16, (replace(LAYOUT.groups[0], axes=()),), "vllm:layer,block", "bfloat16")
    latent = Layout(16, (replace(LAYOUT.groups[0], kind=GroupKind.MLA),), "test", "bfloat16")
    short = Layout(16, (replace(LAYOUT.groups[0], page_bytes=PAGE_BYTES + 2),), "test", "bfloat16")

    with pytest.raises(ConfigError, match=r"'near', but the layout does not tell .* group 0 \(vllm:layer,block, bf"):
        PageCoder("near", opaque)
    with pytest.raises(ConfigError, match="'small', but layer group 0 is of kind mla; exact and lossless take any"):
        PageCoder("small", latent)
    with pytest.raises(ConfigError, match="'compact', but pages of layer group 0 cannot be coded: the tensors do not"):
        PageCoder("compact", short)
    with pytest.raises(ConfigError, match="'near': it needs a layout"):
        PageCoder("near")
    with pytest.raises(ConfigError, match="'zip'; it must be one of exact, lossless, near, compact, small"):
        PageCoder("zip", LAYOUT)


def test_a_codec_that_is_not_to_be_had_here_is_unreadable_and_not_corrupt() -> None:
    near, codec_id = stored(PageCoder("near", LAYOUT), Loss.NEAR)

    with pytest.raises(UnreadablePage, match="codec 77"):
        read(PageCoder("near", LAYOUT), Loss.NEAR, near, 77)
    with pytest.raises(UnreadablePage, match="no layout of layer group 0"):
        read(PageCoder(), Loss.NEAR, near, codec_id)


def test_the_class_is_in_the_name_of_a_block_and_exact_names_are_as_ever() -> None:
    assert marked([HASH], Loss.EXACT) == [HASH]
    names = [marked([HASH], loss)[0] for loss in Loss]
    assert len(set(names)) == len(Loss)
    assert [loss_of(name) for name in names] == list(Loss)
    assert [loss_of(page_key(name, 3)) for name in names] == list(Loss)
    assert {len(name) for name in names} == {32}

"""A cache put together from pages is the live cache, bit for bit, at every boundary and for every kind of attention."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from connectors.transformers.cache import CacheBridge
from connectors.transformers.forward import Forward
from connectors.transformers.layout import cache_shapes, is_sliding, layout_of
from kvstore.devices.cpu import CpuDevice
from kvstore.plan.records import SlotPage, SlotPages
from tests.helpers.tiny_models import random_ids, tiny_model

ARCHITECTURES = ("llama_gqa", "llama_mha", "llama_mqa", "gemma3", "deepseek_v3", "deepseek_v2", "mistral")
LENGTH = 130


class Engine:
    """A model, its bridge and slots, and what a connector would do with them."""

    def __init__(self, model: Any, block_size: int) -> None:
        self.forward = Forward(model)
        shapes = cache_shapes(model)
        self.layout = layout_of(shapes, block_size)
        self.bridge = CacheBridge(model, shapes, self.layout, CpuDevice())
        self.slots: dict[int, Any] = {}

    def live(self, tokens: Any, *, chunk: int | None = None) -> tuple[Any, list[Any]]:
        """Compute `tokens` while recording; the cache and the spans of its whole blocks."""
        cache = self.bridge.new_cache()
        recorder = self.bridge.recorder(cache, 0)
        step = chunk or len(tokens)
        for start in range(0, len(tokens), step):
            recorder.before()
            self.forward(tokens[start : start + step], cache, start)
            recorder.after(min(start + step, len(tokens)))
        recorder.finish(len(tokens))
        return cache, recorder.take(len(tokens))

    def stored(self, spans: list[Any], num_blocks: int) -> SlotPages:
        """Copy the spans' blocks into slots; the pages that a load to `num_blocks` needs."""
        pages = SlotPages.of(
            SlotPage(block, group, slot)
            for slot, (block, group) in enumerate(
                (block, group) for block in range(num_blocks) for group in range(len(self.layout.groups))
            )
        )
        self.slots = {page.slot: np.full(self.layout.slot_bytes, 0xA5, np.uint8) for page in pages}
        assert self.bridge.copy_out(spans, pages, self.slots.__getitem__) == [True] * len(pages)
        return SlotPages.of(page for page in pages if page.block >= self.first_needed(page.group, num_blocks))

    def first_needed(self, group: int, num_blocks: int) -> int:
        window = self.layout.window_blocks(group)
        return 0 if window is None else max(0, num_blocks - window)


def boundaries() -> Iterator[Any]:
    """(architecture, window, block size, boundary): around 64, around each window, and one before the end."""
    for name in ARCHITECTURES:
        windows = [8, 16, 17, 40] if name in ("gemma3", "mistral") else [None]
        for window in windows:
            # Blocks of one token make every boundary a block boundary; 16 makes windows smaller, equal and larger.
            points = {1, 63, 64, 65, LENGTH - 1} | ({window - 1, window, window + 1} if window else set())
            yield from ((name, window, 1, point) for point in sorted(points))
            yield from ((name, window, 16, point) for point in (16, 48, 128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "window", "block_size", "boundary"), list(boundaries()))
def test_resuming_from_pages_equals_going_on_with_the_live_cache(
    name: str, window: int | None, block_size: int, boundary: int, dtype: str
) -> None:
    import torch

    model = tiny_model(name, dtype, **({"sliding_window": window} if window else {}))
    engine = Engine(model, block_size)
    ids = np.array(random_ids(LENGTH), np.uint32)

    live, spans = engine.live(ids[:boundary])
    pages = engine.stored(spans, boundary // block_size)
    loaded = engine.bridge.load(pages, boundary // block_size, engine.slots.__getitem__)

    for now, then in zip(loaded.layers, live.layers, strict=True):
        assert now.get_seq_length() == then.get_seq_length() == boundary
        assert torch.equal(now.keys, then.keys)
        assert torch.equal(now.values, then.values)
    resumed = engine.forward(ids[boundary:], loaded, boundary, last_only=False)
    went_on = engine.forward(ids[boundary:], live, boundary, last_only=False)
    assert torch.equal(resumed, went_on)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "window"), [("gemma3", 8), ("gemma3", 40), ("mistral", 17), ("llama_gqa", None)])
def test_recording_does_not_change_what_the_model_computes(name: str, window: int | None, dtype: str) -> None:
    import torch

    model = tiny_model(name, dtype, **({"sliding_window": window} if window else {}))
    engine = Engine(model, 16)
    ids = np.array(random_ids(LENGTH), np.uint32)
    plain = engine.bridge.new_cache()
    for start in range(0, 96, 32):
        engine.forward(ids[start : start + 32], plain, start)

    recorded, _ = engine.live(ids[:96], chunk=32)

    with_us, without_us = (engine.forward(ids[96:], cache, 96, last_only=False) for cache in (recorded, plain))
    assert torch.equal(with_us, without_us)
    for ours, theirs in zip(recorded.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert getattr(ours, "record_past", False) is False


@pytest.mark.parametrize("steps", [[130], [16, 16, 98], [7, 1, 1, 40, 3, 78], [1] * 130])
def test_spans_hold_the_same_pages_however_the_tokens_came(steps: list[int]) -> None:
    import torch

    model = tiny_model("gemma3", sliding_window=20)
    engine = Engine(model, 16)
    ids = np.array(random_ids(LENGTH), np.uint32)
    cache = engine.bridge.new_cache()
    recorder = engine.bridge.recorder(cache, 0)
    whole, _ = engine.live(ids)
    done = 0
    spans = []
    for step in steps:
        recorder.before()
        engine.forward(ids[done : done + step], cache, done)
        done += step
        recorder.after(done)
        spans += recorder.take(done)  # taken in pieces: nothing twice, nothing left out
    recorder.finish(done)
    spans += recorder.take(done)

    seen = sorted((span.group, block) for span in spans for block in range(span.first_block, span.last_block))
    assert seen == [(group, block) for group in range(len(engine.layout.groups)) for block in range(LENGTH // 16)]
    pages = engine.stored(spans, LENGTH // 16)
    loaded = engine.bridge.load(pages, LENGTH // 16, engine.slots.__getitem__)
    for mine, layer in zip(loaded.layers, whole.layers, strict=True):
        theirs = layer.keys[:, :, : layer.keys.shape[2] - 2]  # the two tokens after the last whole block
        mine = mine.keys[:, :, -theirs.shape[2] :] if is_sliding(layer) else mine.keys
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_missing_page_is_an_error_and_never_garbage() -> None:
    engine = Engine(tiny_model("gemma3"), 16)
    _, spans = engine.live(np.array(random_ids(64), np.uint32))
    pages = engine.stored(spans, 4)

    for missing in pages:
        rest = SlotPages.of(page for page in pages if page != missing)
        with pytest.raises(LookupError, match=f"group {missing.group} needs blocks"):
            engine.bridge.load(rest, 4, engine.slots.__getitem__)


def test_blocks_that_were_not_recorded_are_said_not_to_be_filled() -> None:
    engine = Engine(tiny_model("llama_gqa"), 16)
    _, spans = engine.live(np.array(random_ids(40), np.uint32))
    pages = SlotPages([1, 2], [0, 0], [0, 1])
    slots = np.zeros((2, engine.layout.slot_bytes), np.uint8)

    assert engine.bridge.copy_out(spans, pages, slots.__getitem__) == [True, False]
    assert slots[0].any()
    assert not slots[1].any()


def test_tensors_taken_before_a_decode_step_are_not_written_by_it() -> None:
    engine = Engine(tiny_model("llama_gqa"), 16)
    ids = np.array(random_ids(40), np.uint32)
    cache, spans = engine.live(ids)
    before = [tensor.clone() for span in spans for tensor in span.tensors]

    engine.forward(ids[:1], cache, 40)
    engine.forward(ids[1:2], cache, 41)
    cache.reset()

    after = [tensor for span in spans for tensor in span.tensors]
    assert all(bool((mine == theirs).all()) for mine, theirs in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["gemma3", "llama_gqa"])
def test_a_cache_that_someone_cropped_is_not_saved(name: str) -> None:
    engine = Engine(tiny_model(name), 16)
    ids = np.array(random_ids(64), np.uint32)
    cache = engine.bridge.new_cache()
    recorder = engine.bridge.recorder(cache, 0)
    recorder.before()
    engine.forward(ids, cache, 0)
    cache.crop(-20)

    def save() -> None:
        recorder.after(64)
        recorder.take(64)

    with pytest.raises(LookupError, match="save: "):
        save()

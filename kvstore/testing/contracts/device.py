"""The promises of every device (kvstore/devices/base.py), as a suite to inherit.

A subclass supplies a `device` fixture and two ways past the code under test into the engine's memory: `place` makes a
tensor of the device's kind from an array, `look` reads it back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.devices.base import Device, PageTable
from kvstore.devices.tables import paged_table, token_table

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

EMPTY = 0xEE  # what a slot holds before a copy


def slots_for(table: PageTable, count: int, spare: int = 0) -> list[Bytes]:
    return [np.full(table.page_bytes + spare, EMPTY, np.uint8) for _ in range(count)]


def numbers(shape: tuple[int, ...], dtype: str = "int16", seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def bytes_of(*arrays: Array) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


class DeviceContract:
    """Inherit, and override the fixture `device` and the hooks."""

    @pytest.fixture
    def device(self) -> Iterator[Device]:
        raise NotImplementedError

    def place(self, array: Array) -> Any:
        """A tensor in the engine's memory with these elements; strides are kept."""
        raise NotImplementedError

    def look(self, tensor: Any) -> Array:
        """The elements of such a tensor."""
        raise NotImplementedError

    # A paged engine.

    def test_a_slot_holds_the_pieces_of_its_page_end_to_end(self, device: Device) -> None:
        keys, values = numbers((6, 4, 2, 8)), numbers((6, 4, 2, 3), "float32", seed=1)
        table = paged_table([self.place(keys), self.place(values)])
        slots = slots_for(table, 3)

        device.copy_out(table, [4, 0, 5], slots).wait()

        assert [slot.tobytes() for slot in slots] == [bytes_of(keys[i], values[i]) for i in (4, 0, 5)]

    def test_scatter_writes_its_pages_and_nothing_else(self, device: Device) -> None:
        arrays = [numbers((5, 3, 7)), numbers((5, 16), "uint8", seed=1)]
        tensors = [self.place(array) for array in arrays]
        table = paged_table(tensors)
        new = [numbers((5, 3, 7), seed=2), numbers((5, 16), "uint8", seed=3)]
        slots = [np.frombuffer(bytes_of(new[0][i], new[1][i]), np.uint8) for i in (3, 1)]

        device.copy_in(table, [3, 1], slots).wait()

        for tensor, old, fresh in zip(tensors, arrays, new, strict=True):
            expected = old.copy()
            expected[[3, 1]] = fresh[[3, 1]]
            np.testing.assert_array_equal(self.look(tensor), expected)

    def test_a_block_is_copied_as_it_lies_in_memory_whatever_the_order_of_its_dimensions(self, device: Device) -> None:
        blocks = numbers((4, 2, 5, 3))
        table = paged_table([self.place(blocks).swapaxes(1, 3)])
        slots = slots_for(table, 1)

        device.copy_out(table, [2], slots).wait()

        assert slots[0].tobytes() == bytes_of(blocks[2])

    # A contiguous cache.

    @pytest.mark.parametrize("offset_tokens", [0, 3, -2, -4, -9])
    def test_page_i_is_block_size_tokens_of_every_head_from_the_offset_on(
        self, device: Device, offset_tokens: int
    ) -> None:
        keys, values = numbers((3, 21, 8)), numbers((1, 21, 2), "float32", seed=1)
        table = token_table([self.place(keys), self.place(values)], 4, offset_tokens=offset_tokens)
        pages = [i for i in range(20) if offset_tokens + 4 * i >= 0 and offset_tokens + 4 * (i + 1) <= 21]
        slots = slots_for(table, len(pages))

        device.copy_out(table, pages, slots).wait()

        assert (table.first_page, table.num_pages) == (pages[0], pages[-1] + 1)
        for page, slot in zip(pages, slots, strict=True):
            tokens = slice(offset_tokens + 4 * page, offset_tokens + 4 * (page + 1))
            assert slot.tobytes() == bytes_of(keys[:, tokens], values[:, tokens])

    def test_heads_of_a_larger_tensor_are_written_in_place(self, device: Device) -> None:
        whole = numbers((4, 12, 6))
        tensor = self.place(whole)
        table = token_table([tensor[1:3, 2:10]], 4)
        new = numbers((2, 4, 6), seed=1)

        device.copy_in(table, [1], [np.frombuffer(bytes_of(new), np.uint8)]).wait()

        whole[1:3, 6:10] = new
        np.testing.assert_array_equal(self.look(tensor), whole)

    # Any table.

    # One suite for several classes: an example that failed for one of them may well pass for another. The fixture is
    # shared by the examples of one test on purpose.
    @settings(
        deadline=None,
        max_examples=40,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_gather_then_scatter_into_an_empty_engine_is_the_identity(
        self, device: Device, data: st.DataObject
    ) -> None:
        draw = data.draw
        block_size, num_pages = draw(st.integers(1, 9), "block size"), draw(st.integers(1, 6), "pages")
        spare = draw(st.integers(0, block_size - 1), "tokens after the last page")
        shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 70)), min_size=1, max_size=4), "heads, dim")
        dtype = draw(st.sampled_from(["uint8", "int16", "float32", "float64"]))
        num_tokens = num_pages * block_size + spare
        arrays = [numbers((heads, num_tokens, dim), dtype, seed=i) for i, (heads, dim) in enumerate(shapes)]
        table = token_table([self.place(array) for array in arrays], block_size)
        pages = draw(st.permutations(range(num_pages)))
        slots = slots_for(table, num_pages, spare=5)

        device.copy_out(table, pages, slots).wait()
        emptied = [self.place(np.zeros_like(array)) for array in arrays]
        device.copy_in(token_table(emptied, block_size), pages, slots).wait()

        for array, tensor in zip(arrays, emptied, strict=True):
            whole = num_pages * block_size
            np.testing.assert_array_equal(self.look(tensor)[:, :whole], array[:, :whole])
            assert not self.look(tensor)[:, whole:].any()

    @pytest.mark.parametrize("dim", [16, 1024 + 3, 40_001])
    def test_batches_larger_than_a_cpu_cache_arrive_whole(self, device: Device, dim: int) -> None:
        num_pages = max(4, 3_000_000 // (2 * dim))
        array = numbers((num_pages, 2, dim), "uint8")
        tensor = self.place(array)
        table = paged_table([tensor[:, 0], tensor[:, 1]])
        pages = list(range(num_pages))[::-1]
        slots = slots_for(table, num_pages)

        device.copy_out(table, pages, slots).wait()
        tensor[:] = 0
        device.copy_in(table, pages, slots).wait()

        np.testing.assert_array_equal(self.look(tensor), array)

    @pytest.mark.parametrize("pages", [range(48), [*range(20), *range(22, 48)], [5, 6, 5, 6, 7], [47]])
    def test_the_pages_of_a_prompt_follow_each_other(self, device: Device, pages: Sequence[int]) -> None:
        keys, values = numbers((3, 48 * 16, 64)), numbers((2, 48 * 16, 33), "float32", seed=1)
        table = token_table([self.place(keys), self.place(values)], 16)
        slots = slots_for(table, len(pages), spare=3)

        device.copy_out(table, pages, slots).wait()

        for page, slot in zip(pages, slots, strict=True):
            tokens = slice(16 * page, 16 * (page + 1))
            assert slot.tobytes() == bytes_of(keys[:, tokens], values[:, tokens]) + bytes([EMPTY] * 3)

    def test_the_slot_behind_the_page_is_left_alone(self, device: Device) -> None:
        table = paged_table([self.place(numbers((2, 5), "uint8"))])
        (slot,) = slots_for(table, 1, spare=9)

        device.copy_out(table, [1], [slot]).wait()

        assert slot[5:].tolist() == [EMPTY] * 9

    def test_one_page_can_go_to_several_slots(self, device: Device) -> None:
        array = numbers((2, 5))
        table = paged_table([self.place(array)])
        slots = slots_for(table, 3)

        device.copy_out(table, [1, 1, 0], slots).wait()

        assert [slot.tobytes() for slot in slots] == [bytes_of(array[i]) for i in (1, 1, 0)]

    def test_an_empty_batch_is_done(self, device: Device) -> None:
        table = paged_table([self.place(numbers((2, 5)))])

        for event in (device.copy_out(table, [], []), device.copy_in(table, [], [])):
            event.wait()
            assert event.done()

    def test_an_event_is_done_after_wait(self, device: Device) -> None:
        table = paged_table([self.place(numbers((8, 1000)))])

        event = device.copy_out(table, range(8), slots_for(table, 8))
        event.wait()

        assert event.done()

    def test_slots_that_are_views_of_one_slab_are_filled(self, device: Device) -> None:
        array = numbers((3, 100), "uint8")
        table = paged_table([self.place(array)])
        slab = np.full(5 * 100, EMPTY, np.uint8)

        device.copy_out(table, [0, 1, 2], [slab[i * 100 : (i + 1) * 100] for i in (1, 2, 4)]).wait()

        rows = slab.reshape(5, 100)
        np.testing.assert_array_equal(rows[[1, 2, 4]], array)
        assert (rows[[0, 3]] == EMPTY).all()

    def test_two_threads_may_copy_at_once(self, device: Device) -> None:
        array = numbers((64, 5000))
        table = paged_table([self.place(array)])
        results: list[bool] = []

        def copy(seed: int) -> None:
            pages = np.random.default_rng(seed).permutation(64).tolist()
            slots = slots_for(table, 64)
            for _ in range(5):
                device.copy_out(table, pages, slots).wait()
            results.append(all(s.tobytes() == bytes_of(array[p]) for p, s in zip(pages, slots, strict=True)))

        threads = [threading.Thread(target=copy, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert results == [True, True]

    # Refusals, before anything is copied.

    @pytest.mark.parametrize("page", [-1, 1, 5, 2**40])
    def test_a_page_out_of_range_is_refused_before_any_byte_moves(self, device: Device, page: int) -> None:
        array = numbers((2, 24, 4))
        tensor = self.place(array)
        table = token_table([tensor], 4, offset_tokens=-5)  # pages 2 to 6 are whole; 7 begins at token 23
        assert (table.first_page, table.num_pages) == (2, 7)
        page = 7 if page == 5 else page
        slots = slots_for(table, 2)

        for copy in (device.copy_out, device.copy_in):
            with pytest.raises(ValueError, match=rf"page id {page} is outside of \[2, 7\)"):
                copy(table, [3, page], slots)

        assert all((slot == EMPTY).all() for slot in slots)
        np.testing.assert_array_equal(self.look(tensor), array)

    def test_a_slot_that_is_too_small_is_refused_before_any_byte_moves(self, device: Device) -> None:
        array = numbers((2, 8), "uint8")
        tensor = self.place(array)
        table = paged_table([tensor])
        slots = [np.full(8, EMPTY, np.uint8), np.full(7, EMPTY, np.uint8)]

        for copy in (device.copy_out, device.copy_in):
            with pytest.raises(ValueError, match="slot 1 of the call has 7 bytes, a page 8"):
                copy(table, [0, 1], slots)

        assert all((slot == EMPTY).all() for slot in slots)
        np.testing.assert_array_equal(self.look(tensor), array)

    def test_as_many_slots_as_pages_are_needed(self, device: Device) -> None:
        table = paged_table([self.place(numbers((2, 8)))])

        for copy in (device.copy_out, device.copy_in):
            with pytest.raises(ValueError, match="2 page ids and 1 slots"):
                copy(table, [0, 1], slots_for(table, 1))

    def test_a_read_only_slot_can_be_read_and_not_written(self, device: Device) -> None:
        array = numbers((2, 8), "uint8")
        tensor = self.place(array)
        table = paged_table([tensor])
        slot = np.full(8, 7, np.uint8)
        slot.flags.writeable = False

        with pytest.raises(ValueError, match="slot 0 of the call is not a contiguous, writable"):
            device.copy_out(table, [0], [slot])
        device.copy_in(table, [1], [slot]).wait()

        assert self.look(tensor).tolist() == [array[0].tolist(), [7] * 8]

    def test_a_strided_slot_is_refused(self, device: Device) -> None:
        table = paged_table([self.place(numbers((2, 8), "uint8"))])

        for copy in (device.copy_out, device.copy_in):
            with pytest.raises(ValueError, match="slot 0 of the call is not a contiguous"):
                copy(table, [0], [np.zeros(16, np.uint8)[::2]])

    def test_register_and_close_can_be_called_more_than_once(self, device: Device) -> None:
        slab = np.zeros(1 << 16, np.uint8)

        device.register(slab)

        device.close()
        device.close()

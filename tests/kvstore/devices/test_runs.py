"""The address arithmetic that the GPU kernel uses, checked against the CPU device."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.devices.cpu import CpuDevice
from kvstore.devices.runs import Runs, adjacent, memory_at
from kvstore.devices.tables import token_table
from kvstore.testing.contracts.device import numbers, slots_for


@pytest.mark.parametrize("offset_tokens", [0, 3, -6])
def test_the_runs_of_a_page_lie_where_the_device_finds_them(offset_tokens: int) -> None:
    tensors = [numbers((3, 30, 8)), numbers((1, 30, 5), "float32", seed=1), numbers((2, 30, 1), "uint8", seed=2)]
    table = token_table(tensors, 4, offset_tokens=offset_tokens)
    page = table.num_pages - 1
    (expected,) = slots = slots_for(table, 1)
    CpuDevice(native=False).copy_out(table, [page], slots)

    runs = Runs.of(table)

    slot = np.zeros_like(expected)
    for base, stride, size, offset in zip(
        runs.base.tolist(), runs.page_stride.tolist(), runs.num_bytes.tolist(), runs.slot_offset.tolist(), strict=True
    ):
        slot[offset : offset + size] = memory_at(base + page * stride, size)
    assert len(runs.base) == 6
    np.testing.assert_array_equal(slot, expected)


@pytest.mark.parametrize(("dim", "dtype", "unit"), [(8, "int16", 8), (6, "int16", 4), (5, "int16", 2), (5, "uint8", 1)])
def test_the_unit_divides_every_address_and_length(dim: int, dtype: str, unit: int) -> None:
    table = token_table([numbers((2, 9, dim), dtype)], 1)

    assert Runs.of(table).unit == unit


def test_one_odd_address_makes_the_unit_a_byte() -> None:
    memory = np.zeros(33, np.uint8)[1:].reshape(1, 4, 8)
    assert (memory.ctypes.data - 1) % 8 == 0

    assert Runs.of(token_table([memory], 1)).unit == 1


@given(st.lists(st.integers(0, 30), max_size=12))
def test_adjacent_ranges_cover_all_and_hold_only_neighbours(places: list[int]) -> None:
    addresses = [place * 16 for place in places]

    ranges = adjacent(addresses, 16)

    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(len(addresses)))
    for start, stop in ranges:
        assert addresses[start:stop] == [addresses[start] + 16 * i for i in range(stop - start)]
    for (_, stop), _ in itertools.pairwise(ranges):
        assert addresses[stop] != addresses[stop - 1] + 16


def test_memory_at_an_address_is_the_memory_itself() -> None:
    array: Any = np.arange(8, dtype=np.uint8)

    memory_at(array.ctypes.data + 2, 3)[:] = 9

    assert array.tolist() == [0, 1, 9, 9, 9, 5, 6, 7]

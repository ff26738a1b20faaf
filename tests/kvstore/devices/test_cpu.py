"""The CPU device, by its C extension and by its numpy twin."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.devices import cpu
from kvstore.devices.base import Device
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from kvstore.errors import ConfigError
from kvstore.testing.contracts.device import DeviceContract, numbers, slots_for

needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("kvstore.devices._copy") is None,
    reason="the C extension was not built: python setup.py build_ext --inplace",
)


class InProcessMemory:
    """Engine memory is numpy's."""

    def place(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.array(array)

    def look(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(tensor)


@needs_extension
class TestNativeCpuDevice(InProcessMemory, DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = CpuDevice(native=True)
        yield device
        device.close()


class TestNumpyCpuDevice(InProcessMemory, DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = CpuDevice(native=False)
        yield device
        device.close()


@needs_extension
def test_the_extension_is_used_where_it_was_built() -> None:
    assert CpuDevice().is_native


def test_without_the_extension_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_copy", None)

    assert not CpuDevice().is_native
    with pytest.raises(ConfigError, match="was not built"):
        CpuDevice(native=True)


def test_tensors_on_another_device_are_refused() -> None:
    class GpuTensor:
        is_cpu = False
        device = "cuda:0"
        shape = (2, 4)

        def data_ptr(self) -> int:
            return 4096

        def stride(self) -> tuple[int, int]:
            return 4, 1

        def element_size(self) -> int:
            return 1

    table = paged_table([GpuTensor()])

    for copy in (CpuDevice().copy_out, CpuDevice().copy_in):
        with pytest.raises(ValueError, match="tensors are on cuda:0"):
            copy(table, [0], slots_for(table, 1))


@needs_extension
class TestExtension:
    """What only a caller past CpuDevice could do wrong is refused all the same: the extension works on addresses."""

    def arguments(self) -> list[Any]:
        table = paged_table([numbers((4, 8), "uint8"), numbers((4, 8), "uint8")])
        columns = [table.base, table.page_stride, table.num_runs, table.run_stride, table.run_bytes]
        self.table = table  # keeps the memory alive
        return [*columns, np.array([1], np.int64), slots_for(table, 1), 0, 4, -1]

    def test_it_says_how_many_bytes_it_copied(self) -> None:
        assert cpu._copy.gather(*self.arguments()) == 16
        assert cpu._copy.scatter(*self.arguments()) == 16

    @pytest.mark.parametrize("stream", [-1, 0, 1])
    def test_streaming_changes_the_speed_and_not_the_bytes(self, stream: int) -> None:
        array = numbers((40, 40_001), "uint8")
        table = paged_table([array])
        slots = slots_for(table, 40)
        columns = [table.base, table.page_stride, table.num_runs, table.run_stride, table.run_bytes]

        cpu._copy.gather(*columns, np.arange(40), slots, 0, 40, stream)

        np.testing.assert_array_equal(np.stack(slots), array)

    @pytest.mark.parametrize("ahead", [0, 1, 16, 31, 63, 64, 65, 2048, 4095])
    @pytest.mark.parametrize("page_bytes", [1000, 1024, 1151, 4099, 300_000])
    @pytest.mark.parametrize("stream", [-1, 0])
    def test_where_memory_lies_in_a_page_changes_the_speed_and_not_the_bytes(
        self, stream: int, page_bytes: int, ahead: int
    ) -> None:
        raw = np.zeros(3 * page_bytes + 2 * 4096, np.uint8)
        start = -raw.ctypes.data % 4096 + ahead
        table = paged_table([raw[start : start + 3 * page_bytes].reshape(3, page_bytes)])
        columns = [table.base, table.page_stride, table.num_runs, table.run_stride, table.run_bytes]
        slots = [numbers((2 * 4096 + page_bytes,), "uint8") for _ in range(3)]
        slots = [slot[-slot.ctypes.data % 4096 :][:page_bytes] for slot in slots]
        back = slots_for(table, 3)

        cpu._copy.scatter(*columns, np.arange(3), slots, 0, 3, stream)
        cpu._copy.gather(*columns, np.arange(3), back, 0, 3, stream)

        assert raw[start : start + 3 * page_bytes].tobytes() == b"".join(slot.tobytes() for slot in slots)
        assert [slot[:page_bytes].tobytes() for slot in back] == [slot.tobytes() for slot in slots]
        assert not raw[:start].any()
        assert not raw[start + 3 * page_bytes :].any()

    @pytest.mark.parametrize("column", range(6))
    @pytest.mark.parametrize(
        "wrong", [np.zeros(2, np.int32), np.zeros(2), np.zeros((2, 1), np.int64), np.zeros(4, np.int64)[::2], None]
    )
    def test_arrays_of_another_kind_are_refused(self, column: int, wrong: Any) -> None:
        arguments = self.arguments()
        arguments[column] = wrong

        with pytest.raises((ValueError, TypeError, BufferError)):
            cpu._copy.gather(*arguments)

    @pytest.mark.parametrize("column", range(5))
    def test_columns_of_different_lengths_are_refused(self, column: int) -> None:
        arguments = self.arguments()
        arguments[column] = np.concatenate([arguments[column], [1]])

        with pytest.raises(ValueError, match="entries"):
            cpu._copy.gather(*arguments)

    @pytest.mark.parametrize(("column", "value"), [(2, 0), (2, -1), (4, 0), (4, -8), (4, 2**62)])
    def test_impossible_sizes_are_refused(self, column: int, value: int) -> None:
        arguments = self.arguments()
        arguments[column] = np.array([1, value])

        with pytest.raises(ValueError, match=r"piece 1|a page"):
            cpu._copy.scatter(*arguments)

    def test_the_number_of_arguments_is_checked(self) -> None:
        with pytest.raises(TypeError, match="10 arguments"):
            cpu._copy.gather(*self.arguments()[:-1])

    @pytest.mark.parametrize("slots", [None, 7, [b"0123456789abcdef"], ["text"], [None]])
    def test_slots_that_are_no_writable_buffers_are_refused(self, slots: Any) -> None:
        arguments = self.arguments()
        arguments[6] = slots

        with pytest.raises((TypeError, ValueError)):
            cpu._copy.gather(*arguments)

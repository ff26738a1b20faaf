"""The CUDA device: its contract where a GPU is at hand, and what of it needs none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.devices.base import Device, PageTable
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.cuda import CudaDevice, move_pieces
from kvstore.devices.runs import Runs
from kvstore.devices.tables import paged_table, token_table
from kvstore.errors import ConfigError
from tests.contracts.device import DeviceContract, numbers, slots_for

torch = pytest.importorskip("torch", reason="torch is not installed")
has_gpu = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not has_gpu, reason="torch finds no CUDA device")


@pytest.mark.gpu
@needs_gpu
class TestCudaDevice(DeviceContract):
    @pytest.fixture(params=["kernel", "torch operations", "small staging"])
    def device(self, request: pytest.FixtureRequest) -> Iterator[Device]:
        device = CudaDevice(0, staging_bytes=30_000 if request.param == "small staging" else 8 << 20)
        if request.param == "torch operations":
            device._kernel = None
        elif device._kernel is None:
            pytest.skip("triton is not installed")
        yield device
        device.close()

    def place(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(array).cuda()

    def look(self, tensor: Any) -> npt.NDArray[Any]:
        return np.asarray(tensor.cpu().numpy())

    def test_copies_wait_for_what_the_engine_was_computing(self, device: Device) -> None:
        tensor = torch.zeros(16, 1 << 20, dtype=torch.uint8, device="cuda")
        slots = slots_for(table := paged_table([tensor]), 16)
        for value in range(50):
            tensor.fill_(value)

        device.copy_out(table, range(16), slots).wait()

        assert all((slot == 49).all() for slot in slots)

    def test_the_engines_stream_can_be_held_back_without_stopping_the_cpu(self, device: Device) -> None:
        tensor = torch.zeros(16, 1 << 20, dtype=torch.uint8, device="cuda")
        table = paged_table([tensor])
        slots = [np.full(1 << 20, 7, np.uint8) for _ in range(16)]

        event: Any = device.copy_in(table, range(16), slots)
        event.hold_back(torch.cuda.current_stream())
        total = tensor.sum(dtype=torch.int64)

        assert int(total) == 7 * tensor.numel()

    def test_tensors_on_the_cpu_are_refused(self, device: Device) -> None:
        table = paged_table([torch.zeros(2, 8)])

        with pytest.raises(ValueError, match="a tensor on cpu"):
            device.copy_out(table, [0], slots_for(table, 1))

    def test_a_registered_slab_is_page_locked_until_close(self, device: Device) -> None:
        slab = np.zeros(1 << 20, np.uint8)

        device.register(slab)
        assert torch.from_numpy(slab).is_pinned()

        device.close()
        assert not torch.from_numpy(slab).is_pinned()


@pytest.mark.skipif(has_gpu, reason="there is a CUDA device")
def test_without_a_gpu_the_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        CudaDevice(0)


def torch_table(case: str) -> tuple[PageTable, list[Any]]:
    """A table over torch tensors on the CPU, and its tensors."""
    dtype = {"bytes": torch.uint8, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    shapes = [(3, 30, 8), (1, 30, 5), (2, 30, 1)]
    if case == "paged":
        tensors = [torch.from_numpy(numbers((9, 4, dim), "float32", seed=dim)) for dim in (8, 3)]
        return paged_table(tensors), tensors
    tensors = [torch.from_numpy(numbers(shape, "float32", seed=i)).to(dtype) for i, shape in enumerate(shapes)]
    views = [tensor[:, 1:] for tensor in tensors] if case == "views" else tensors
    return token_table(views, 4, offset_tokens=-6 if case == "window" else 0), tensors


CASES = ["paged", "float32", "bfloat16", "bytes", "views", "window"]


@pytest.fixture(params=["torch operations", "triton interpreter"])
def move(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways from pages to staging and back, run on the CPU: move(table, ids, staging, into_staging=...)."""
    if request.param == "torch operations":
        return lambda table, ids, staging, into_staging: move_pieces(
            table, torch.from_numpy(ids), staging, into_staging=into_staging
        )
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from kvstore.devices._triton import make_copy_runs

    copy_runs = make_copy_runs()

    def move_by_kernel(table: PageTable, ids: Any, staging: Any, into_staging: bool) -> None:
        runs = Runs.of(table)
        columns = [runs.base, runs.page_stride, runs.num_bytes // runs.unit, runs.slot_offset // runs.unit, ids]
        copy_runs(
            torch.from_numpy(np.concatenate(columns)),
            staging,
            num_runs=len(runs.base),
            num_pages=len(ids),
            page_bytes=table.page_bytes,
            run_bytes=int(runs.num_bytes.max()),
            unit=runs.unit,
            into_staging=into_staging,
        )

    return move_by_kernel


@pytest.mark.parametrize("case", CASES)
def test_staging_is_filled_as_slots_are(case: str, move: Any) -> None:
    table, _ = torch_table(case)
    ids = np.array([table.num_pages - 1, table.first_page, table.num_pages - 2])
    slots = slots_for(table, 3)
    CpuDevice().copy_out(table, ids.tolist(), slots)
    staging = torch.zeros(4 * table.page_bytes, dtype=torch.uint8)

    move(table, ids, staging, into_staging=True)

    filled = 3 * table.page_bytes
    assert staging[:filled].numpy().tobytes() == b"".join(slot.tobytes() for slot in slots)
    assert not staging[filled:].any()


@pytest.mark.parametrize("case", CASES)
def test_staging_is_scattered_as_slots_are(case: str, move: Any) -> None:
    table, tensors = torch_table(case)
    expected_table, expected = torch_table(case)
    ids = np.array([table.num_pages - 1, table.first_page])
    slots = [numbers((table.page_bytes,), "uint8", seed=i) for i in range(2)]
    CpuDevice().copy_in(expected_table, ids.tolist(), slots)

    move(table, ids, torch.from_numpy(np.concatenate(slots)), into_staging=False)

    for tensor, right in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8))

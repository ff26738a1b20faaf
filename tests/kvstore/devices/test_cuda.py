"""The CUDA device: its contract where a GPU is at hand, and what of it needs none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
from kvstore.testing.contracts.device import DeviceContract, numbers, slots_for

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


class PretendEvent:
    """A CUDA event that is reached when the test says so."""

    is_reached = True

    def query(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        self.is_reached = True


class PretendStream:
    """A CUDA stream whose work is done at once, on the CPU."""

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Any] = []
        self.events: list[PretendEvent] = []

    def wait_stream(self, stream: Any) -> None:
        self.waited_for.append(stream)

    def wait_event(self, event: Any) -> None:
        self.waited_for.append(event)

    def record_event(self) -> PretendEvent:
        self.events.append(PretendEvent())
        return self.events[-1]

    def synchronize(self) -> None:
        for event in self.events:
            event.synchronize()


class PretendRuntime:
    """The two calls of the CUDA runtime that page-lock memory."""

    def __init__(self) -> None:
        self.error = 0
        self.locked: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.locked += [] if self.error else [address]
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


class TestCudaDeviceOnThePretendGpu(DeviceContract):
    """Everything but the GPU itself: parts, order, references and page locks, with torch tensors on the CPU."""

    @pytest.fixture
    def runtime(self) -> PretendRuntime:
        return PretendRuntime()

    @pytest.fixture
    def engine_stream(self) -> PretendStream:
        return PretendStream()

    @pytest.fixture(params=[30_000, 8 << 20])
    def device(
        self,
        request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch,
        runtime: PretendRuntime,
        engine_stream: PretendStream,
    ) -> Iterator[CudaDevice]:
        pretended = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "Stream": PretendStream,
            "current_stream": lambda device: engine_stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "cudart": lambda: runtime,
        }
        for name, value in pretended.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        device = CudaDevice(0, staging_bytes=request.param)
        device._device = torch.device("cpu")
        device._kernel = None
        yield device
        device.close()

    def place(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(np.array(array))

    def look(self, tensor: Any) -> npt.NDArray[Any]:
        return np.asarray(tensor.numpy())

    def test_our_stream_waits_for_the_engines(self, device: CudaDevice, engine_stream: PretendStream) -> None:
        table = paged_table([self.place(numbers((2, 8)))])

        device.copy_out(table, [0], slots_for(table, 1))

        assert device._out_stream.waited_for == [engine_stream]
        assert device._in_stream.waited_for == []

    def test_the_engines_stream_can_wait_for_ours(self, device: CudaDevice, engine_stream: PretendStream) -> None:
        table = paged_table([self.place(numbers((2, 8)))])

        event: Any = device.copy_in(table, [0], slots_for(table, 1))
        event.hold_back(engine_stream)

        assert engine_stream.waited_for == device._in_stream.events

    def test_tables_and_slots_live_until_their_copy_is_done(
        self, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PretendEvent, "is_reached", False)
        table = paged_table([self.place(numbers((2, 8)))])
        events = [device.copy_out(table, [0], slots_for(table, 1)) for _ in range(3)]
        assert len(device._in_flight) == 3

        events[0].wait()
        device.copy_out(table, [0], slots_for(table, 1))
        assert len(device._in_flight) == 3

        device.close()
        assert not device._in_flight

    def test_a_slab_is_page_locked_until_close(self, device: CudaDevice, runtime: PretendRuntime) -> None:
        slab = np.zeros(4096, np.uint8)

        device.register(slab)
        assert runtime.locked == [slab.ctypes.data]

        device.close()
        assert runtime.locked == []

    def test_where_page_locking_is_refused_copies_go_on(
        self, device: CudaDevice, runtime: PretendRuntime, caplog: pytest.LogCaptureFixture
    ) -> None:
        runtime.error = 2
        device.register(np.zeros(4096, np.uint8))

        assert "CUDA error 2" in caplog.text
        self.test_a_slot_holds_the_pieces_of_its_page_end_to_end(device)

    def test_tensors_elsewhere_are_refused(self, device: CudaDevice) -> None:
        table = paged_table([numbers((2, 8))])

        with pytest.raises(ValueError, match="a tensor on cpu"):
            device.copy_out(table, [0], slots_for(table, 1))

    def test_a_device_that_is_not_there_is_refused(self, device: CudaDevice) -> None:
        with pytest.raises(ConfigError, match="index 1; there are 1 devices"):
            CudaDevice(1)


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

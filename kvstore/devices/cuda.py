"""Copies between pages on a GPU and slots of the pinned host slab, on streams of our own.

    copy_out:  engine pages --gather kernel--> staging, on the GPU --DMA--> slots
    copy_in:   slots --DMA--> staging --scatter kernel--> engine pages

A page is hundreds of short runs, and a DMA for each would be bound by its launch; a kernel gathers them at the GPU's
own memory speed, and one DMA then moves each page, or each row of pages whose slots lie side by side.

Order, without stopping the CPU: our stream first waits for what the engine's stream was given so far (the pages are
computed, or no longer read). The engine may go on at once; it must not overwrite pages under copy_out, nor read pages
under copy_in, before the event: `CudaEvent.wait` blocks the CPU, `CudaEvent.hold_back` only the engine's stream.

A batch larger than its staging buffer goes through it part by part: the stream itself keeps a kernel from touching it
before the DMA ahead has ended. GPU memory is tens of times faster than the bus, so a second buffer to overlap them
would win little. Every call takes its own buffer from torch's caching allocator, so that calls share nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.devices._triton import make_copy_runs
from kvstore.devices.base import CopyEvent, Int64s, PageTable
from kvstore.devices.runs import Runs, adjacent, memory_at
from kvstore.errors import ConfigError

log = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20  # a guess: long enough for the DMA to hide the launches
HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process


class CudaEvent:
    """Completion of a batch of copies on one of our streams."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """Block the CPU until the copies are finished; raises RuntimeError if CUDA failed."""
        self._event.synchronize()

    def done(self) -> bool:
        """True once the copies are finished."""
        return bool(self._event.query())

    def hold_back(self, stream: Any) -> None:
        """Make all later work on the CUDA stream `stream` wait for the copies; the CPU goes on."""
        stream.wait_event(self._event)


class CudaDevice:
    """Pages on one CUDA device. Any thread.

    device_index:  as in torch.device("cuda", index).
    engine_stream: the stream on which the engine computes; None means the current one of the calling thread. A thread
                   that is not the engine's own must name it if that is not the default stream.
    staging_bytes: GPU memory a call may take for its staging buffer; raised to one page where a page is bigger.
    """

    name = "cuda"

    def __init__(self, device_index: int = 0, *, engine_stream: Any = None, staging_bytes: int = STAGING_BYTES) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device")
        if not 0 <= device_index < torch.cuda.device_count():
            raise ConfigError(f"device cuda: index {device_index}; there are {torch.cuda.device_count()} devices")
        self._torch: Any = torch
        self._device = torch.device("cuda", device_index)
        self._engine_stream = engine_stream
        self._staging_bytes = staging_bytes
        self._out_stream = self._torch.cuda.Stream(self._device)
        self._in_stream = self._torch.cuda.Stream(self._device)
        # The GPU works on memory of tables and slots after the call has returned: they live until their event is done.
        self._in_flight: deque[tuple[CudaEvent, PageTable, tuple[Any, ...]]] = deque()
        self._kernel = _triton_kernel()
        self._registered: list[npt.NDArray[np.uint8]] = []

    def copy_out(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Gather engine pages into slots."""
        ids = table.check(page_ids, slots, writes_slots=True)
        return self._copy(self._out_stream, table, ids, slots, into_slots=True)

    def copy_in(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[npt.NDArray[np.uint8]]) -> CopyEvent:
        """Scatter slots into engine pages."""
        ids = table.check(page_ids, slots, writes_slots=False)
        return self._copy(self._in_stream, table, ids, slots, into_slots=False)

    def register(self, slab: npt.NDArray[np.uint8]) -> None:
        """Page-lock the host slab, so that the DMA engine reads and writes it directly and beside the CPU.

        Where the system refuses (a limit on locked memory), copies stay right and become slower; a warning says so.
        """
        torch = self._torch
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(slab.ctypes.data, slab.nbytes, HOST_REGISTER_PORTABLE))
            if code == 0:
                self._registered.append(slab)
                return
            log.warning("device cuda: cannot page-lock %d MiB of host memory (CUDA error %d)", slab.nbytes >> 20, code)
            # The error stays behind in the CUDA context, and the next launch would be blamed for it.
            with suppress(RuntimeError):
                torch.zeros(1, device=self._device).add_(1)

    def unregister(self, slab: npt.NDArray[np.uint8]) -> None:
        """Undo the page lock, if there is one; no copy from or to the slab is under way any more."""
        for index, known in enumerate(self._registered):
            if known is slab:
                with self._torch.cuda.device(self._device):
                    self._torch.cuda.cudart().cudaHostUnregister(slab.ctypes.data)
                del self._registered[index]
                return

    def close(self) -> None:
        """Wait for what is in flight and undo the page locks. Idempotent."""
        self._out_stream.synchronize()
        self._in_stream.synchronize()
        self._in_flight.clear()
        with self._torch.cuda.device(self._device):
            while self._registered:
                self._torch.cuda.cudart().cudaHostUnregister(self._registered.pop().ctypes.data)

    def _copy(
        self,
        stream: Any,
        table: PageTable,
        ids: Int64s,
        slots: Sequence[npt.NDArray[np.uint8]],
        *,
        into_slots: bool,
    ) -> CudaEvent:
        torch = self._torch
        for tensor in table.keep_alive:
            if getattr(tensor, "device", None) != self._device:
                raise ValueError(f"device {self._device}: the table has a tensor on {getattr(tensor, 'device', 'cpu')}")
        page_bytes = table.page_bytes
        addresses = [slot.ctypes.data for slot in slots]
        engine_stream = self._engine_stream or torch.cuda.current_stream(self._device)
        stream.wait_stream(engine_stream)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            pages_at_once = max(1, min(len(ids), self._staging_bytes // page_bytes))
            staging = torch.empty(pages_at_once * page_bytes, dtype=torch.uint8, device=self._device)
            for start in range(0, len(ids), pages_at_once):
                part = slice(start, start + pages_at_once)
                if into_slots:
                    self._move_runs(table, ids[part], staging, into_staging=True)
                    self._move_slots(addresses[part], staging, page_bytes, into_slots=True)
                else:
                    self._move_slots(addresses[part], staging, page_bytes, into_slots=False)
                    self._move_runs(table, ids[part], staging, into_staging=False)
            event = CudaEvent(stream.record_event())
        self._in_flight.append((event, table, tuple(slots)))
        self._forget_done()
        return event

    def _forget_done(self) -> None:
        # Popped before it is looked at, and put back: two threads may be here at once.
        with suppress(IndexError):
            while True:
                oldest = self._in_flight.popleft()
                if not oldest[0].done():
                    self._in_flight.appendleft(oldest)
                    return

    def _move_slots(self, addresses: list[int], staging: Any, page_bytes: int, *, into_slots: bool) -> None:
        """DMA between the head of staging and slots, those side by side in one transfer."""
        for start, stop in adjacent(addresses, page_bytes):
            on_host = self._torch.from_numpy(memory_at(addresses[start], (stop - start) * page_bytes))
            on_gpu = staging[start * page_bytes : stop * page_bytes]
            if into_slots:
                on_host.copy_(on_gpu, non_blocking=True)
            else:
                on_gpu.copy_(on_host, non_blocking=True)

    def _move_runs(self, table: PageTable, ids: Int64s, staging: Any, *, into_staging: bool) -> None:
        """Gather pages into the head of staging, or scatter it into them."""
        if self._kernel is None:
            move_pieces(table, self._on_device(ids), staging, into_staging=into_staging)
            return
        runs = Runs.of(table)
        unit = runs.unit
        columns = [runs.base, runs.page_stride, runs.num_bytes // unit, runs.slot_offset // unit, ids]
        self._kernel(
            self._on_device(np.concatenate(columns)),
            staging,
            num_runs=len(runs.base),
            num_pages=len(ids),
            page_bytes=table.page_bytes,
            run_bytes=int(runs.num_bytes.max()),
            unit=unit,
            into_staging=into_staging,
        )

    def _on_device(self, numbers: Int64s) -> Any:
        # Through pinned memory: an asynchronous copy from pageable memory may wait for all that is ahead on the stream.
        return self._torch.from_numpy(numbers).pin_memory().to(self._device, non_blocking=True)


def move_pieces(table: PageTable, ids: Any, staging: Any, *, into_staging: bool) -> None:
    """The kernel's work by torch operations, one per piece; on the current stream and any device.

    ids:     int64 tensor.
    staging: uint8 tensor, at least len(ids) pages long.
    table:   its `keep_alive` has one tensor per piece.
    """
    start = 0
    pages = staging[: len(ids) * table.page_bytes].view(len(ids), table.page_bytes)
    for index in range(len(table.base)):
        piece = _piece_view(table, index)
        stop = start + piece.shape[1] * piece.shape[2]
        staged = pages[:, start:stop].unflatten(1, piece.shape[1:])
        if into_staging:
            staged.copy_(piece.index_select(0, ids - table.first_page))
        else:
            piece.index_copy_(0, ids - table.first_page, staged)
        start = stop


def _piece_view(table: PageTable, index: int) -> Any:
    """A piece as a uint8 tensor [pages from first_page on, runs, run bytes] over the engine's storage."""
    tensor = table.keep_alive[index]
    storage = tensor.untyped_storage()
    page_stride = int(table.page_stride[index])
    address = int(table.base[index]) + table.first_page * page_stride
    shape = (table.num_pages - table.first_page, int(table.num_runs[index]), int(table.run_bytes[index]))
    strides = (page_stride, int(table.run_stride[index]), 1)
    return tensor.new_empty(0).byte().set_(storage, address - storage.data_ptr(), shape, strides)


def _triton_kernel() -> Callable[..., None] | None:
    try:
        return make_copy_runs()
    except ImportError:
        log.info("device cuda: triton is not installed; pages are gathered by torch, one operation per layer")
        return None

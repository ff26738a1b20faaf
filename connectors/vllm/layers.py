"""Loads beside the forward: pages are copied a few layers at a time, and each layer's attention waits for its own only.

Where the CPU runs the model, a copy before the forward is time that a request waits; beside the forward it hides behind
the layers above. It is right only if vLLM calls `wait_for_layer_load` before the attention of *every* layer, which it
does not promise for whole compiled graphs. So that is looked at: nothing is copied beside a forward before some forward
was seen to call it for all layers, and a load during which it was not called for all has failed, and is computed.

These waits have no deadline: the copy is memory to memory and ends, and one that was given up and came late would write
over blocks that are being computed. A copy that will not be made ends them as well, whatever kept it from being made.

The engine's thread, but for the copying itself.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from connectors.vllm.cpus import copy_cpus
from connectors.vllm.messages import LoadJob
from kvstore.devices.base import Device, PageTable
from kvstore.devices.spans import cut_layers
from kvstore.move.worker import Worker

MAX_JOBS = 64  # loads.py asks for one a step
CLOSE_TIMEOUT_S = 5.0

Slots = Sequence[npt.NDArray[np.uint8]]


@dataclass(slots=True)
class _Copying:
    """A load under way; ready[i] is set when span i has come, or will not."""

    job: LoadJob
    num_bytes: int
    ready: list[threading.Event]
    seconds: float = 0.0
    error: str = ""

    def lose(self) -> None:
        """It will not be copied, or not wholly."""
        self.error = self.error or "the copying thread was interrupted, or closed"
        for ready in self.ready:
            ready.set()


@dataclass(frozen=True, slots=True)
class LayeredLoad:
    """A load that has ended. error: why it failed, "" if it did not."""

    job: LoadJob
    num_bytes: int
    seconds: float
    error: str


class LayeredLoads:
    """The loads beside one forward.

    device: that copies.
    names:  vLLM's names of the layers, in the order of the table's pieces.
    table:  where the engine keeps their blocks.
    """

    def __init__(self, device: Device, names: Sequence[str], table: PageTable) -> None:
        self.is_proven = False  # the last forward has waited for each of the layers
        self._device = device
        self._spans = cut_layers(table)
        last = [span.last for span in self._spans]
        self._span_of = {name: bisect_left(last, index) for index, name in enumerate(names)}
        self._seen: set[str] = set()
        self._copying: list[_Copying] = []
        self._worker = Worker("vllm-layers", MAX_JOBS, cpus=copy_cpus())

    def start(self, job: LoadJob, slots: Callable[[], Slots]) -> bool:
        """Begin the copies of a job of one layer group; False if it is not taken.

        slots: gives the pages' places, in the order of the job's slots.
        """
        size = self._spans[-1].stop
        copying = _Copying(job, size * len(job.copies[0].slots), [threading.Event() for _ in self._spans])
        if not self._worker.submit(lambda: self._copy(copying, slots), lost=copying.lose):
            return False
        self._copying.append(copying)
        return True

    def wait(self, layer: str) -> None:
        """The engine is about to read the blocks of a layer: wait until they have come."""
        for copying in self._copying:
            copying.ready[self._span_of.get(layer, -1)].wait()  # one that we do not know may read any
        self._seen.add(layer)

    def finish(self, num_tokens: int) -> list[LayeredLoad]:
        """The forward, of `num_tokens`, is over: what became of the loads beside it."""
        missing = [name for name in self._span_of if name not in self._seen] if num_tokens else []
        if num_tokens:
            self.is_proven = not missing
        self._seen.clear()
        copying, self._copying = self._copying, []
        ended: list[LayeredLoad] = []
        for load in copying:
            load.ready[-1].wait()
            if missing and not load.error:
                load.error = f"the engine did not wait for {len(missing)} layers, {missing[0]} the first"
            ended.append(LayeredLoad(load.job, load.num_bytes, load.seconds, load.error))
        return ended

    def close(self) -> None:
        """Stop; what is being copied comes to its end. Idempotent."""
        self._worker.close(CLOSE_TIMEOUT_S)

    def _copy(self, copying: _Copying, slots: Callable[[], Slots]) -> None:
        started = time.perf_counter()
        try:
            pages, blocks = slots(), copying.job.copies[0].blocks
            for span, ready in zip(self._spans, copying.ready, strict=True):
                self._device.copy_in(span.table, blocks, [page[span.start : span.stop] for page in pages]).wait()
                ready.set()
        except Exception as error:  # a device may fail in its own ways; the engine must not
            copying.error = f"{type(error).__name__}: {error}"
        finally:
            copying.seconds = time.perf_counter() - started
            for ready in copying.ready:
                ready.set()

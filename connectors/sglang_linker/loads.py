"""Loads into SGLang's pools: queued while a batch is put together, copied a few layers at a time once it starts.

A layer is told to be there when its bytes are written, never before: the forward of the batch waits for each layer
(`LayerWiseLoadCounter`), and SGLang aborts the requests of the batch if one did not come. The last layer is told only
after all leases were found open: had a daemon taken one back, its slots might hold other pages by now.

Loads are queued, cancelled and started by the scheduler's thread; a thread of ours copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from connectors.sglang_linker.promises import Promise
from kvstore.base import KVStore, LeaseState
from kvstore.devices.base import Device
from kvstore.devices.spans import LayerSpan
from kvstore.errors import KVStoreError
from kvstore.move.worker import Worker

log = logging.getLogger("sglang.kvstore")

MAX_BATCHES = 64  # SGLang finishes each before the one after the next
QUIET_LOG_S = 10.0
CLOSE_TIMEOUT_S = 5.0
NOTHING = -1  # the number of a batch without loads, as SGLang has it
COUNTERS = ("loaded_pages", "loaded_bytes", "failed_loads", "cancelled_loads")


class LayerCounter(Protocol):
    """SGLang's `LayerWiseLoadCounter`."""

    def update_producer(self) -> int:
        """Begin a batch; returns its number."""

    def complete(self, index: int, layer: int) -> None:
        """A layer has come."""

    def fail(self, index: int, error: BaseException) -> None:
        """The layers that have not come will not."""

    def finish(self, index: int) -> bool:
        """Wait for all layers; whether all have come."""

    def reset(self) -> None:
        """Forget all batches."""


@dataclass(frozen=True, slots=True)
class _Load:
    """The pages of one request: SGLang's page ids and the slots, in the same order."""

    promise: Promise
    pages: npt.NDArray[np.int64]
    slots: list[npt.NDArray[np.uint8]]


class PoolLoads:
    """The loads of one rank.

    device:    that copies; what it orders its copies after has been waited for.
    spans:     the table of the pools, cut into layers.
    give_back: ends a promise; any thread.
    counters:  those of COUNTERS.
    """

    def __init__(
        self,
        store: KVStore,
        device: Device,
        spans: Sequence[LayerSpan],
        counter: LayerCounter,
        give_back: Callable[..., None],
        counters: dict[str, float],
    ) -> None:
        self._store = store
        self._device = device
        self._spans = spans
        self.counter = counter
        self._give_back = give_back
        self._counters = counters
        self._queued: dict[str, _Load] = {}
        self._worker = Worker("sglang-load", MAX_BATCHES)

    def queue(self, promise: Promise, pages: npt.NDArray[np.int64]) -> bool:
        """Queue the copy of a promise into SGLang's pages; False if it cannot be: the promise is the caller's then."""
        lease, first = promise.lease, promise.first
        if lease is None or promise.rid in self._queued:
            return False
        slot_of = np.full(lease.num_blocks, -1, np.int64)
        slot_of[lease.pages.blocks] = lease.pages.slots
        wanted = slot_of[first : first + len(pages)]
        if len(wanted) < len(pages) or (wanted < 0).any():
            return False
        slots = [self._store.slots.array(slot) for slot in wanted.tolist()]
        self._queued[promise.rid] = _Load(promise, pages, slots)
        return True

    def cancel(self, rid: str) -> bool:
        """Cancel a load that has not started; False if there is none."""
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        self._counters["cancelled_loads"] += 1
        self._give_back(load.promise)
        return True

    def start(self, ready: Sequence[Any]) -> int:
        """Start what is queued; returns the number of the batch, NOTHING without one.

        ready: SGLang's events, before which nobody may write to the pages.
        """
        if not self._queued:
            return NOTHING
        batch, self._queued = list(self._queued.values()), {}
        index = self.counter.update_producer()

        def lose() -> None:
            self._end(index, batch, KVStoreError("the copying thread was interrupted, or closed"))

        if not self._worker.submit(lambda: self._copy(index, batch, ready), lost=lose):
            self._end(index, batch, KVStoreError("too many batches are being copied"))
        return index

    def finish(self, index: int) -> bool:
        """Wait until a batch writes no more; whether all of it has come."""
        return self.counter.finish(index)

    def quiesce(self) -> None:
        """Forget what is queued, and return when nothing is written any more."""
        for rid in list(self._queued):
            self.cancel(rid)
        while not self._worker.flush(QUIET_LOG_S):
            log.warning("kvstore: copies into SGLang's pools are under way for %.0f s", QUIET_LOG_S)
        self.counter.reset()

    def close(self) -> None:
        """Stop. Idempotent."""
        for rid in list(self._queued):
            self.cancel(rid)
        self._worker.close(CLOSE_TIMEOUT_S)

    @property
    def is_idle(self) -> bool:
        """True if no copy is under way."""
        return self._worker.flush(0.0)

    def __len__(self) -> int:
        """Loads that have not started."""
        return len(self._queued)

    def _copy(self, index: int, batch: Sequence[_Load], ready: Sequence[Any]) -> None:
        try:
            for event in ready:
                event.synchronize()
            pages = [page for load in batch for page in load.pages.tolist()]
            slots = [slot for load in batch for slot in load.slots]
            layer = 0
            for span in self._spans:
                self._device.copy_in(span.table, pages, [slot[span.start : span.stop] for slot in slots]).wait()
                if span is self._spans[-1]:
                    self._check_leases(batch)
                for done in range(layer, span.last + 1):
                    self.counter.complete(index, done)
                layer = span.last + 1
        except Exception as error:  # a device may fail in its own ways; SGLang aborts the requests
            log.warning("kvstore: a load of %d requests failed: %s: %s", len(batch), type(error).__name__, error)
            self._end(index, batch, error)
        else:
            self._end(index, batch, None)

    def _check_leases(self, batch: Sequence[_Load]) -> None:
        for load in batch:
            lease = load.promise.lease
            if lease is None or self._store.poll(lease).state is LeaseState.CLOSED:
                raise KVStoreError(f"the lease of request {load.promise.rid} was taken back while it was copied")

    def _end(self, index: int, batch: Sequence[_Load], error: BaseException | None) -> None:
        if error is not None:
            self._counters["failed_loads"] += len(batch)
            self.counter.fail(index, error)
        for load in batch:
            self._give_back(load.promise, was_used=error is None)
            if error is None:
                self._counters["loaded_pages"] += len(load.pages)
                self._counters["loaded_bytes"] += len(load.pages) * self._spans[-1].stop

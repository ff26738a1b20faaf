"""Offloads: pages that SGLang has just put into its tree, copied into host memory and published there.

SGLang holds the pages of an offload until it is told of its end, and takes ends in the order in which it began them, as
many as every rank has. So each one ends, well or not, and every rank begins the same: an offload is never refused.

`add`, `num_ended` and `pop` are the scheduler's thread's; a thread of ours asks the store for slots and copies.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.base import KVStore
from kvstore.devices.base import Device, PageTable
from kvstore.move.worker import Worker

log = logging.getLogger("sglang.kvstore")

MAX_OFFLOADS = 4096  # waiting; one for each node that SGLang inserts
QUIET_LOG_S = 10.0
CLOSE_TIMEOUT_S = 5.0
COUNTERS = ("saved_pages", "known_pages", "skipped_pages", "failed_offloads")


@dataclass(slots=True, eq=False)
class _Offload:
    """path: the hashes of all pages up to the last of it; indices: SGLang's token slots of the last `num_pages`."""

    path: Sequence[bytes]
    num_pages: int
    indices: Any
    ready: Sequence[Any]
    result: bool | None = None


class Offloads:
    """The offloads of one rank.

    table:    where the pools have their pages.
    page_ids: makes page ids of SGLang's token slots, and raises if they are not so many whole pages.
    counters: those of COUNTERS.
    """

    def __init__(
        self,
        store: KVStore,
        device: Device,
        table: PageTable,
        page_ids: Callable[[Any, int], npt.NDArray[np.int64]],
        counters: dict[str, float],
    ) -> None:
        self._store = store
        self._device = device
        self._table = table
        self._page_ids = page_ids
        self._counters = counters
        self._begun: deque[_Offload] = deque()
        self._worker = Worker("sglang-offload", MAX_OFFLOADS)

    def add(self, path: Sequence[bytes] | None, num_pages: int, indices: Any, ready: Sequence[Any]) -> None:
        """Begin to save SGLang's pages, the last ones of `path`. Never raises.

        path:  None if it is not known: this ends badly.
        ready: SGLang's events, after which `indices` and the pages may be read.
        """
        offload = _Offload(path or (), num_pages, indices, ready)
        self._begun.append(offload)
        if (
            path is None
            or len(path) < num_pages
            or not self._worker.submit(lambda: self._run(offload), lost=lambda: self._fail(offload))
        ):
            self._fail(offload)

    def num_ended(self) -> int:
        """Ends that can be taken, in order."""
        num = 0
        for offload in self._begun:
            if offload.result is None:
                break
            num += 1
        return num

    def pop(self) -> bool:
        """Take the oldest end: whether the store has all its pages."""
        return bool(self._begun.popleft().result)

    @property
    def is_idle(self) -> bool:
        """True if no copy is under way."""
        return self._worker.flush(0.0)

    def quiesce(self) -> None:
        """Return when nothing is read from the pools any more; ends that were not taken are forgotten."""
        while not self._worker.flush(QUIET_LOG_S):
            log.warning("kvstore: copies out of SGLang's pools are under way for %.0f s", QUIET_LOG_S)
        self._begun.clear()

    def close(self) -> None:
        """Stop. Idempotent."""
        self._worker.close(CLOSE_TIMEOUT_S)

    def _run(self, offload: _Offload) -> None:
        try:
            for event in offload.ready:
                event.synchronize()
            offload.result = self._save(offload)
        except Exception:  # a device or a store that closes; SGLang must hear of the end
            log.exception("kvstore: an offload of %d pages failed", offload.num_pages)
            self._fail(offload)

    def _save(self, offload: _Offload) -> bool:
        store = self._store
        ids = self._page_ids(offload.indices, offload.num_pages)
        first = len(offload.path) - offload.num_pages
        request = store.request_from_hashes(offload.path, len(offload.path) * store.layout.block_size)
        lease = store.prepare_save(request, first, offload.num_pages)
        try:
            pages = lease.pages
            if pages:
                slots = [store.slots.array(slot)[: self._table.page_bytes] for slot in pages.slots.tolist()]
                self._device.copy_out(self._table, ids[pages.blocks - first].tolist(), slots).wait()
        except BaseException:
            store.release(lease)
            raise
        store.complete(lease)
        store.keep.finished(request)
        self._counters["saved_pages"] += len(pages)
        self._counters["known_pages"] += offload.num_pages - len(pages) - lease.skipped
        self._counters["skipped_pages"] += lease.skipped
        return not lease.skipped

    def _fail(self, offload: _Offload) -> None:
        self._counters["failed_offloads"] += 1
        offload.result = False

"""The linker without SGLang: lookups, loads and offloads over a store, by the hashes of pages.

Every method is the scheduler's thread's and never raises but for `quiesce` and `close`: errors are logged, counted, and
answered as a miss, a refused load, an offload that ended badly. After `close` that is the answer to everything.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.sglang_linker import loads, offloads, promises
from connectors.sglang_linker.loads import LayerCounter, PoolLoads
from connectors.sglang_linker.offloads import Offloads
from connectors.sglang_linker.pools import DevicePages
from connectors.sglang_linker.promises import Promise, Promises
from connectors.sglang_linker.ranks import Ranks
from kvstore.base import KVStore
from kvstore.devices.base import Device
from kvstore.devices.spans import cut_layers

log = logging.getLogger("sglang.kvstore")

COUNTERS = (*promises.COUNTERS, *loads.COUNTERS, *offloads.COUNTERS, "refused_loads", "unknown_paths", "errors")
_MAX_LOGGED = 10


class LinkerCore:
    """One rank's linker. Owns the store and the devices.

    load_device, save_device: copy into the pools and out of them; each orders its copies by a stream of its own.
    counter: SGLang's, of the layers that have come.
    mark: what names of pages have beside the hash since weights were updated (`Updates.mark`); None: there are none.
    """

    def __init__(
        self,
        store: KVStore,
        pages: DevicePages,
        load_device: Device,
        save_device: Device,
        counter: LayerCounter,
        ranks: Ranks,
        mark: Callable[[], bytes | None] = lambda: b"",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self._page_size = pages.layout.block_size
        self._ranks = ranks
        self._mark = mark
        self._devices = (load_device, save_device)
        self._registered: npt.NDArray[np.uint8] | None = None
        self.promises = Promises(store, self.counters, now)
        spans = cut_layers(pages.table, pages.pieces_per_layer)
        self.loads = PoolLoads(store, load_device, spans, counter, self.promises.give_back, self.counters)
        self.offloads = Offloads(store, save_device, pages.table, self._page_ids, self.counters)
        self._is_open = True
        self._lock_pages()

    # ---- lookups and loads ----------------------------------------------------------------------------------------

    def lookup(self, rid: str, before: Sequence[str] | None, hashes: Sequence[str]) -> list[int]:
        """The lengths, in pages, that can be loaded of `hashes`, which continue the pages `before`."""
        try:
            if before is None or not hashes or not self._is_open:
                self.counters["unknown_paths"] += before is None
                return []
            path = self._named([*before, *hashes])
            if path is None:
                return []
            return list(range(1, self.promises.lookup(rid, path, len(before)) + 1))
        except Exception:
            self._note_error("lookup")
            return []

    def load(self, rid: str, hashes: Sequence[str], indices: Any) -> bool:
        """Queue a load of pages into SGLang's token slots; False on every rank if it cannot be kept on one.

        indices: SGLang's tensor, `page_size` token slots a page, which lie together.
        """
        promise = None
        try:
            pages = self._page_ids(indices, len(hashes))
            if self._is_open:
                promise = self.promises.take(rid, self._named(hashes) or ())
            is_queued = promise is not None and self.loads.queue(promise, pages)
        except Exception:
            self._note_error("load")
            is_queued = False
        if self._ranks.agree(is_queued):
            return True
        self.counters["refused_loads"] += 1
        if is_queued:
            self.loads.cancel(rid)
        elif promise is not None:
            self._give_back(promise)
        return False

    # ---- offloads -------------------------------------------------------------------------------------------------

    def offload(self, before: Sequence[str] | None, hashes: Sequence[str], indices: Any, ready: Sequence[Any]) -> None:
        """Begin to save pages that continue the pages `before`. Every rank begins the same."""
        path: list[bytes] | None = None
        try:
            self.counters["unknown_paths"] += before is None
            path = None if before is None or not self._is_open else self._named([*before, *hashes])
        except Exception:
            self._note_error("offload")
        self.offloads.add(path, len(hashes), indices, ready)

    # ---- the linker as a whole ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Once in a scheduler's step: end what nobody asks for any more."""
        try:
            if self._is_open:
                self._lock_pages()
                self.promises.tick()
        except Exception:
            self._note_error("tick")

    def quiesce(self) -> None:
        """Return when no copy is under way and no lease is held. What is stored stays."""
        self.loads.quiesce()
        self.offloads.quiesce()
        self.promises.clear()

    def close(self) -> None:
        """Finish what is under way, write behind what is left, close the store. Idempotent."""
        if not self._is_open:
            return
        self.quiesce()
        self._is_open = False
        self.loads.close()
        self.offloads.close()
        for device in self._devices:
            device.close()
        self.store.close()
        log.info("kvstore linker: %s", {name: int(count) for name, count in self.counters.items() if count})

    def _lock_pages(self) -> None:
        """Have the devices page-lock the slab; there is another one after a daemon has started again."""
        slab, before = self.store.slots.buffer, self._registered
        if slab is before or not (self.loads.is_idle and self.offloads.is_idle):
            return  # a copy that is under way may be in the one before
        self._registered = slab
        for device in self._devices:
            if before is not None:
                device.unregister(before)
            if slab is not None:
                device.register(slab)

    def _give_back(self, promise: Promise) -> None:
        try:
            self.promises.give_back(promise)
        except Exception:
            self._note_error("give_back")

    def _named(self, hashes: Sequence[str]) -> list[bytes] | None:
        """SGLang's hashes as names of pages; None while there is no name for what the weights compute."""
        mark = self._mark()
        if not mark:
            return None if mark is None else [bytes.fromhex(one) for one in hashes]
        start = hashlib.sha256(mark).digest()
        return [hashlib.sha256(start + bytes.fromhex(one)).digest() for one in hashes]

    def _page_ids(self, indices: Any, num_pages: int) -> npt.NDArray[np.int64]:
        """SGLang's page ids. Raises ValueError unless the slots are whole pages, as many as there are hashes."""
        slots: npt.NDArray[np.int64] = (
            indices.detach().to("cpu").numpy().astype(np.int64, copy=False).reshape(-1, self._page_size)
        )
        ids: npt.NDArray[np.int64] = slots[:, 0] // self._page_size
        if len(slots) != num_pages or not np.array_equal(
            slots, ids[:, None] * self._page_size + np.arange(self._page_size)
        ):
            raise ValueError(f"{slots.size} token slots are not {num_pages} whole pages of {self._page_size}")
        return ids

    def _note_error(self, name: str) -> None:
        self.counters["errors"] += 1
        if self.counters["errors"] <= _MAX_LOGGED or self.counters["errors"] % 1000 == 0:
            log.exception("kvstore linker: %s failed (%d errors so far)", name, self.counters["errors"])

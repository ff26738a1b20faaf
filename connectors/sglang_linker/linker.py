"""The linker that SGLang makes, one in each rank's scheduler: its device pools against a store, with no L2 of SGLang's.

    sglang.launch_server ... --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
        --unified-cache-external-linker-config '{"linker": "KVStoreLinker", ...}'        (see config.py)

SGLang's rules, and where they are kept:
* `lookup` runs on the scheduler's thread, and what it names must come: promises.py;
* `load` only queues, bytes move after `start_layer_wise_loading`, layer by layer: loads.py;
* each offload ends, in the order in which it began, alike on all ranks: offloads.py, ranks.py.

The scheduler's thread. Nothing is raised after the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sglang
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
)

from connectors.sglang.versions import check_version
from connectors.sglang_linker.paths import TreePaths
from connectors.sglang_linker.start import open_core


class KVStoreLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang's classes are untyped here
    """SGLang's device pools and a store. Raises ConfigError (or LayoutMismatch) at the start only."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Collection[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
        **_: Any,  # what later releases hand over beside it
    ) -> None:
        """Open the store that `extra_config` asks for.

        params: SGLang's CacheInitParams; components: those of its cache.
        """
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: params.token_to_kv_pool_allocator.get_kvcache()}
        check_version(sglang.__version__)
        self._paths = TreePaths(UnifiedCacheLinkerWrapper)
        self.core = open_core(
            server_args, params, components, extra_config or {}, LayerWiseLoadCounter, sglang.__version__
        )
        self.layer_done_counter = self.core.loads.counter

    def lookup(self, rid: str, transfers: Sequence[Any]) -> list[int]:
        """Every length, in pages, that can be loaded now; SGLang takes the longest one that every rank has."""
        kv = _kv(transfers)
        return [] if kv is None else self.core.lookup(rid, self._paths.before_lookup(), kv.keys)

    def load(self, rid: str, transfers: Sequence[Any]) -> bool:
        """Queue a load; False on all ranks, so that the pages are computed, if one of them cannot keep it."""
        kv = _kv(transfers)
        return self.core.load(rid, () if kv is None else kv.keys, None if kv is None else kv.device_indices)

    def start_layer_wise_loading(self) -> int:
        """Start what is queued; the number of the batch, -1 if there is nothing."""
        return self.core.loads.start(self.record_offload_ready() if len(self.core.loads) else ())

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until a batch writes no more; whether all of it has come."""
        return self.core.loads.finish(counter_index)

    def cancel_queued_load(self, rid: str) -> bool:
        """Cancel a load that has not started."""
        return self.core.loads.cancel(rid)

    def offload(self, transfers: Sequence[Any], session_id: str | None = None) -> bool:
        """Begin to save the pages of a node; on every rank, whatever becomes of it."""
        kv = _kv(transfers)
        if kv is None:
            return False  # as the transfers are the same on every rank
        self.core.offload(self._paths.before_offload(), kv.keys, kv.device_indices, self.record_offload_ready())
        return True

    def num_completed_offloads(self) -> int:
        """Ends that can be taken. Called in each of the scheduler's steps."""
        self.core.tick()
        return self.core.offloads.num_ended()

    def pop_completed_offload(self) -> bool:
        """Take the oldest end."""
        return self.core.offloads.pop()

    def reset(self) -> None:
        """Return when no copy is under way and no lease is held; what is stored stays."""
        self.core.quiesce()

    def close(self) -> None:
        """Finish what is under way and close the store. Idempotent."""
        self.core.close()


def _kv(transfers: Sequence[Any]) -> Any:
    """The transfer of the pool that the linker has; None if there is nothing of it."""
    return next((one for one in transfers if one.name == PoolName.KV and one.keys), None)

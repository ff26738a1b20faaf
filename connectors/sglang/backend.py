"""The backend that SGLang makes, one in each rank's scheduler: disk and Redis below SGLang's own host memory.

    sglang.launch_server ... --enable-hierarchical-cache --hicache-storage-backend dynamic
        --hicache-storage-backend-extra-config '{"backend_name": "kvstore", ...}'        (see config.py)

SGLang names a page by a hash of tokens that is the same for every model, and asks for it by that hash alone; what else
its bytes depend on comes from the pools, which are told after the constructor (`register_*`). So the tiers are opened
in `on_host_pools_registered`: what is wrong is raised there or in the constructor, which fails SGLang's attach with a
sentence. Nothing is raised after it, and every call ends at its deadline: what does not come is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import sglang
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from connectors.sglang.config import parse_backend_config
from connectors.sglang.core import BackendCore
from connectors.sglang.hits import PoolRule, Share, leading, restorable
from connectors.sglang.metrics import Bandwidths
from connectors.sglang.pools import HostPool
from connectors.sglang.start import check_storage, open_core, pool_namespace
from connectors.sglang.versions import check_version
from kvstore.errors import ConfigError

log = logging.getLogger("sglang.kvstore")

KV = str(PoolName.KV)


class KVStoreBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang's classes are untyped here
    """Disk and Redis below SGLang's host memory. Raises ConfigError (or LayoutMismatch) at the start only."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        """Check the configuration. kwargs: what SGLang hands over beside it, nothing so far."""
        check_version(sglang.__version__)
        self._storage = storage_config
        self._config = parse_backend_config(storage_config.extra_config)
        check_storage(storage_config)
        # SGLang reads it after this constructor; without it, pages would go through one more copy.
        if isinstance(storage_config.extra_config, dict):
            storage_config.extra_config.setdefault("interface_v1", 1)
        self._pools: dict[str, HostPool] = {}
        self._bandwidths = Bandwidths()
        self.core: BackendCore | None = None

    # ---- start and end --------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool of keys and values. Raises ConfigError for one whose pages cannot be stored."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[KV] = HostPool(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a pool that goes with it. One that comes after the start, and does not fit, is never stored."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = str(host_pool_name)
        if name == KV:
            return  # the same pool as before, or the group that holds it
        if self.core is None:
            self._pools[name] = HostPool(host_pool, name)
        else:
            self._add_pool(self.core, name, host_pool)

    def on_host_pools_registered(self) -> None:
        """Open the tiers. Raises ConfigError, or LayoutMismatch if the directory holds pages of another size."""
        if self.core is None:
            self.core = open_core(self._config, self._storage, self._pools, sglang.__version__)

    def close(self) -> None:
        """Finish what is under way, within `close_timeout_s`, and close the tiers. Idempotent."""
        if self.core is not None:
            num_cut = self.core.close(self._config.fields.close_timeout_s)
            if num_cut:
                log.warning("kvstore backend: %d transfers were cut off at the close", num_cut)

    def clear(self) -> None:
        """Delete what is stored: the whole directory, and what this rank has on a server."""
        if self.core is not None:
            self.core.clear()

    # ---- keys and values ------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """True if a tier has this page of keys and values."""
        return self._find(KV, [key])[0]

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of the pages a tier has, up to the first that none has."""
        return leading(self._find(KV, keys))

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Fill pages of the pool; False for what did not come by the deadline, whole and as it was stored."""
        return self._load(KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the pool; False for what no tier has taken by the deadline."""
        if not self._storage.is_storage_writer:
            return [True] * len(keys)  # all ranks hold the same bytes, and one of them writes
        return self._save(KV, keys, host_indices)

    # ---- with other pools -----------------------------------------------------------------------------------------

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """The prefixes that can be restored, with what each other pool needs for them."""
        kv = self._find(KV, keys)
        most = keys[: leading(kv)]
        shares = [self._share(transfer, most) for transfer in pool_transfers or []] if most else []
        found = restorable(kv, shares, KV)
        return PoolTransferResult(found.longest, found.by_pool, found.lengths)

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        """Fill pages of several pools."""
        return {one.name: self._load(str(one.name), one.keys or [], one.host_indices) for one in transfers}

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        """Store pages of several pools; which of them this rank writes is SGLang's to say."""
        return {one.name: self._save(str(one.name), one.keys or [], one.host_indices) for one in transfers}

    # ---- older calls, which SGLang does not make of a backend with `interface_v1` ---------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """A miss."""

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[None]:
        """Misses."""
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Not stored."""
        return False

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Not stored."""
        return False

    # ---- what operators see ---------------------------------------------------------------------------------------

    def get_stats(self) -> Any:
        """Pages and speeds since the last call, for SGLang's metrics; None where it keeps none."""
        if not self._storage.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        taken = self._bandwidths.take()
        return StorageMetrics(taken.loads, taken.saves, taken.load_speeds, taken.save_speeds)

    # ---- private --------------------------------------------------------------------------------------------------

    def _add_pool(self, core: BackendCore, name: str, host_pool: Any) -> None:
        """Take a pool while SGLang runs, when nothing may be raised: that of a model that drafts comes last."""
        try:
            pool = HostPool(host_pool, name)
            root = pool_namespace(self._config, self._storage, pool, sglang.__version__).root()
            if core.add_pool(name, pool, root):
                return
            reason = f"its pages of {pool.page_bytes} bytes are longer than those that the tiers were opened for"
        except ConfigError as error:
            reason = str(error)
        log.warning("kvstore backend: pool %s is not stored, nor is what needs it: %s", name, reason)

    def _find(self, pool: str, keys: Sequence[str]) -> list[bool]:
        return self.core.find(pool, keys) if self.core is not None and keys else [False] * len(keys)

    def _load(self, pool: str, keys: Sequence[str], indices: Any) -> list[bool]:
        if self.core is None or not keys:
            return [False] * len(keys)
        with self._bandwidths.of_load(self.core.counters):
            return self.core.load(pool, keys, indices)

    def _save(self, pool: str, keys: Sequence[str], indices: Any) -> list[bool]:
        if self.core is None or not keys:
            return [False] * len(keys)
        with self._bandwidths.of_save(self.core.counters):
            return self.core.save(pool, keys, indices)

    def _share(self, transfer: PoolTransfer, keys: list[str]) -> Share:
        rule, own = PoolRule(transfer.hit_policy.value), transfer.keys or []
        has = self._find(str(transfer.name), own if rule is PoolRule.GROUPS else keys)
        return Share(str(transfer.name), rule, has, len(own), transfer.block_pages, transfer.group_pages)

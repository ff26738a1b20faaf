"""The start of the backend: from SGLang's configuration and pools to tiers that are open.

Here everything may raise ConfigError, for nothing runs yet: what could not work later is said now.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

from connectors.sglang.config import WHERE, BackendConfig
from connectors.sglang.core import FIND_S, BackendCore, BackendDeadlines
from connectors.sglang.identity import device_name, page_namespace
from connectors.sglang.pools import HostPool, geometry
from connectors.sglang.updates import watch
from kvstore.build import open_exchange
from kvstore.errors import ConfigError
from radix.namespace import Namespace

log = logging.getLogger("sglang.kvstore")


def check_storage(storage: Any) -> None:
    """Raise ConfigError for what SGLang's HiCacheStorageConfig asks that the backend cannot do."""
    if storage.should_split_heads:
        raise ConfigError(
            f"{WHERE}: tp_lcm_size is {storage.tp_lcm_size}; pages of another number of ranks are misses here, and "
            "heads are not split: leave it out"
        )
    asked = (storage.extra_config or {}).get("interface_v1", 1)
    if not asked:
        raise ConfigError(
            f"{WHERE}: interface_v1 is {asked!r}; the backend has SGLang's zero-copy calls only: leave it out"
        )


def open_core(config: BackendConfig, storage: Any, pools: Mapping[str, HostPool], version: str) -> BackendCore:
    """Open the tiers for these pools. version: SGLang's. Raises ConfigError, or LayoutMismatch."""
    if not pools:
        raise ConfigError("kvstore backend: SGLang has registered no host pool; turn on --enable-hierarchical-cache")
    namespaces = {name: pool_namespace(config, storage, pool, version) for name, pool in pools.items()}
    store = config.store.store
    ttl_s = {kind.name: kind.value(section, "ttl_s", 0.0) for kind, section in config.store.tiers()}

    def expires_at(tier: str) -> float:
        seconds = ttl_s.get(tier, 0.0)
        return time.time() + seconds if seconds else 0.0

    first = next(iter(namespaces.values()))
    exchange = open_exchange(config.store, geometry(list(pools.values())), first, expires_at=expires_at)
    given = store.model_fields_set
    deadlines = BackendDeadlines(
        store.lookup_deadline_s if "lookup_deadline_s" in given else FIND_S,
        store.load_deadline_s,
        config.fields.save_deadline_s,
    )
    core = BackendCore(
        exchange,
        pools,
        {name: namespace.root() for name, namespace in namespaces.items()},
        deadlines,
        store.touch_interval_s,
        functools.partial(watch().mark, by_name=config.fields.updates_by_name),
    )
    log.info(
        "kvstore backend: pages of %s, namespace %s, on %s",
        " and ".join(f"{pool.page_bytes >> 10} KiB ({name})" for name, pool in pools.items()),
        first.root().hex()[:12],
        " and ".join(exchange.tiers),
    )
    return core


def pool_namespace(config: BackendConfig, storage: Any, pool: HostPool, version: str) -> Namespace:
    """The root of the names of a pool's pages. Raises ConfigError for what cannot be identified."""
    return page_namespace(
        find_server_args(),
        pool.layout,
        rank_name(storage, pool),
        seat="hicache",
        where=WHERE,
        weights=config.fields.weights,
        version=version,
        device=_device(pool),
        adapters_by_name=config.fields.adapters_by_name,
        has_draft=pool.has_draft,
    )


def rank_name(storage: Any, pool: HostPool) -> str:
    """This rank's share of a pool's bytes, "" where every rank holds the same."""
    parts = []
    if storage.tp_size > 1 and (pool.is_by_head or not storage.is_mla_model):
        parts.append(f"tp{storage.tp_rank}/{storage.tp_size}")
    for name, rank, size in (
        ("pp", storage.pp_rank, storage.pp_size),
        ("cp", storage.attn_cp_rank, storage.attn_cp_size),
        ("dcp", storage.dcp_rank, storage.dcp_size),
    ):
        if size > 1:
            parts.append(f"{name}{rank}/{size}")
    return " ".join(["mla" if storage.is_mla_model else "heads", *parts])


def find_server_args() -> Any:
    """SGLang's arguments of this process. Raises ConfigError where there are none."""
    from sglang.srt.runtime_context import get_server_args

    try:
        server_args = get_server_args()
    except Exception as error:
        raise ConfigError(
            f"kvstore backend: SGLang's arguments are not known in this process ({error}), so the model cannot be "
            "identified; the backend must be made by a server's scheduler"
        ) from error
    if server_args is None:
        raise ConfigError("kvstore backend: SGLang's arguments are not known in this process")
    return server_args


def _device(pool: HostPool) -> str:
    import torch

    device = getattr(pool.pool, "_transfer_device", None)  # of the device pool that this one is the host's part of
    return device_name(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))

"""Our backend as SGLang makes it: by its factory, over a real host pool."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.runtime_context import get_context

from tests.engines.sglang.pools import PAGE

MiB = 1 << 20
NUM = 6  # pages that a test stores


def storage_config(extra: dict[str, Any], **other: Any) -> HiCacheStorageConfig:
    """What SGLang tells of a rank; one rank without more ado."""
    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(**values | other, extra_config=extra)


def on_disk(path: Path, **other: Any) -> dict[str, Any]:
    """Extra config of a backend with a small directory."""
    return {
        "backend_name": "kvstore",
        "module_path": "connectors.sglang",
        "class_name": "KVStoreBackend",
        "disk": {"path": str(path), "capacity_bytes": 16 * MiB},
        "weights": "tiny v1",
        "store": {"lookup_deadline_s": 20, "load_deadline_s": 20},
        **other,
    }


@contextmanager
def attached(pool: Any, extra: dict[str, Any], others: dict[str, Any] | None = None, **storage: Any) -> Iterator[Any]:
    """A backend over `pool`, and over `others` by their names, attached as SGLang's controller does it."""
    with get_context().override_server_args(model_path="tiny"):
        backend = StorageBackendFactory.create_backend("dynamic", storage_config(extra, **storage), pool)
        try:
            backend.register_mem_pool_host(pool)
            for name, other in (others or {}).items():
                backend.register_mem_host_pool_v2(other, PoolName(name))
            backend.on_host_pools_registered()
            yield backend
        finally:
            backend.close()


def chain(num_pages: int, seed: int = 0) -> list[str]:
    """Page hashes as SGLang's: hexadecimal SHA-256."""
    return [hashlib.sha256(f"{seed} {page}".encode()).hexdigest() for page in range(num_pages)]


def tokens(first: int, num_pages: int, page: int = PAGE) -> torch.Tensor:
    """Indices of the tokens of `num_pages` pages from page `first` of a pool on."""
    return torch.arange(first * page, (first + num_pages) * page)


def page_bytes(pool: Any, first: int, num_pages: int) -> list[bytes]:
    """The pages of a pool, read by SGLang's own function."""
    return [
        pool.get_data_page(page * pool.page_size, flat=True).contiguous().view(torch.uint8).numpy().tobytes()
        for page in range(first, first + num_pages)
    ]


def store(pool: Any, extra: dict[str, Any], num_pages: int = NUM, **storage: Any) -> None:
    """Store the first pages of a pool, and end."""
    with attached(pool, extra, **storage) as backend:
        assert backend.batch_set_v1(chain(num_pages), tokens(0, num_pages)) == [True] * num_pages


def restored(pool: Any, extra: dict[str, Any], num_pages: int = NUM, **storage: Any) -> tuple[int, list[bool]]:
    """How many of the first pages there are, and which of them come when they are loaded to page 20 on."""
    with attached(pool, extra, **storage) as backend:
        keys = chain(num_pages)
        return backend.batch_exists(keys), backend.batch_get_v1(keys, tokens(20, num_pages))

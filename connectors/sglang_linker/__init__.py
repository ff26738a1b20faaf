"""SGLang's second seat: `KVStoreLinker`, between its device pools and a store.

For `"linker_module_path": "connectors.sglang_linker"`:

    linker    the class that SGLang makes, one for each rank; config: its settings
    paths     where the pages that SGLang asks about hang: all the hashes before them
    promises  lookups, answered with pages whose bytes are leased in host memory
    loads     pages into the pools, a layer after the other; offloads: pages out of them
    pools     the pools as tables of pages; ranks: what all ranks have to answer alike

It is imported when it is asked for, since its base class is SGLang's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.sglang_linker.linker import KVStoreLinker

__all__ = ["KVStoreLinker"]


def __getattr__(name: str) -> Any:
    if name != "KVStoreLinker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("connectors.sglang_linker.linker"), name)

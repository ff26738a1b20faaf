"""vLLM's seat: `KVStoreConnector`, for `kv_connector_module_path: connectors.vllm`.

It is imported when it is asked for, since its base class is vLLM's own: the folder's other modules need no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]

_HOMES = {"KVStoreConnector": "connectors.vllm.connector"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)

"""SGLang's HiCache with our tiers below it: `KVStoreBackend`, for `"module_path": "connectors.sglang"`.

It is imported when it is asked for, since its base class is SGLang's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.sglang.backend import KVStoreBackend

__all__ = ["KVStoreBackend"]

_HOMES = {"KVStoreBackend": "connectors.sglang.backend"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)

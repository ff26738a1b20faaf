"""vLLM's second seat: `KVStoreTier`, below vLLM's own offloading, for `module_path: connectors.vllm_tier`.

`CpuTieringSpec` is the same seat for vLLM's CPU build. Both are imported when they are asked for, since their base
classes are vLLM's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.vllm_tier.cpu_spec import CpuTieringSpec
    from connectors.vllm_tier.tier import KVStoreTier

__all__ = ["CpuTieringSpec", "KVStoreTier"]

_HOMES = {"KVStoreTier": "connectors.vllm_tier.tier", "CpuTieringSpec": "connectors.vllm_tier.cpu_spec"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)

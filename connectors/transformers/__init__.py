"""transformers with a store behind it: `from connectors.transformers import KVCacheModel`.

The names are imported when they are asked for: torch and transformers are loaded then and not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.transformers.model import (
        Found,
        Generation,
        GenerationRun,
        KVCacheModel,
        Piece,
        Prefill,
        Report,
        Reuse,
        Sampling,
        TransformersConnector,
        UnsupportedModel,
        check_engine,
        model_layout,
        model_namespace,
        open_store_for,
    )

__all__ = [
    "Found",
    "Generation",
    "GenerationRun",
    "KVCacheModel",
    "Piece",
    "Prefill",
    "Report",
    "Reuse",
    "Sampling",
    "TransformersConnector",
    "UnsupportedModel",
    "check_engine",
    "model_layout",
    "model_namespace",
    "open_store_for",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("connectors.transformers.model"), name)

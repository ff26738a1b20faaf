"""Who computed a chunk, as far as a secondary tier of vLLM can know, and what a chunk looks like.

vLLM hands a tier a summary of its configuration: sizes, group names, parallel sizes, the model's path. That is not
enough to name the bytes (it lacks revision, quantization, overrides, adapters, attention backend), and vLLM has no way
to ask for more. The full configuration is an argument of the connector's constructor, which is running while tiers are
made, so it is taken from there; where it cannot be found, the tier refuses to start rather than guess.

A chunk is one row of vLLM's host memory: the blocks of one layer group of all ranks, as they lie there. What decides
the order of bytes in it is in the layout's name; what decides their values is in the namespace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from connectors.vllm_identity import engine_namespace
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout
from radix.namespace import Namespace


def chunk_layout(config: Any, row_bytes: int) -> Layout:
    """The layout of rows of `row_bytes`, from vLLM's OffloadingConfig."""
    cache, parallel = config.cache, config.parallel
    order = [
        f"layout {config.kv_cache_layout}",
        f"blocks {cache.blocks_per_chunk}",
        "canonical" if config.canonical_layout else "by rank",
        "replicated" if config.replicated_layout else "sharded",
        *(f"{name} {getattr(parallel, f'{name}_size')}" for name in ("tp", "pp", "pcp", "dcp")),
        *(f"group {group.group_id}: {' '.join(group.layer_names)}" for group in config.groups),
    ]
    tokens = {int(group.tokens_per_block) for group in config.groups}
    position = 0
    groups = []
    for group in config.groups:
        layers = tuple(range(position, position + len(group.layer_names)))
        position += len(layers)
        # Which blocks of a group a resume needs is vLLM's business; here every chunk stands for itself.
        groups.append(LayerGroup(GroupKind.FULL, layers, row_bytes))
    return Layout(
        max(tokens) * int(cache.blocks_per_chunk),
        tuple(groups),
        "vllm chunk|" + "|".join(order),
        str(config.model.dtype).removeprefix("torch."),
    )


def chunk_namespace(
    vllm_config: Any, layout: Layout, *, weights: str, vllm_version: str, adapters_by_name: bool
) -> Namespace:
    """The root of all chunk names of this engine. Raises ConfigError for what cannot be told apart."""
    if getattr(vllm_config, "lora_config", None) is not None and not adapters_by_name:
        raise ConfigError(
            "KVStoreTier: LoRA is on, and vLLM tells a secondary tier only an adapter's name, so two adapters of one "
            'name would share pages; set "adapters_by_name": true if a name always means the same adapter, or use '
            "connectors.vllm.KVStoreConnector, which reads the adapters' files"
        )
    return engine_namespace(vllm_config, layout, weights=weights, vllm_version=vllm_version)


def find_engine_config(frame: FrameType | None = None) -> Any:
    """vLLM's full configuration, from whoever is making the tier. Raises ConfigError where it is nowhere."""
    for caller in _callers(frame or sys._getframe()):
        found = caller.f_locals.get("vllm_config")
        if type(found).__name__ == "VllmConfig":
            return found
    raise ConfigError(
        "KVStoreTier: vLLM's configuration was not found, so the model cannot be identified; the tier must be made by "
        "vLLM's OffloadingConnector (kv_connector='OffloadingConnector')"
    )


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

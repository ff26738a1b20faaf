"""From vLLM's KV cache configuration to our layout: which layers share a page, how long it is, what a resume needs.

vLLM sorts layers into groups with a block table each; each becomes one of our layer groups, in vLLM's order. A block of
a layer is copied as it lies in memory, without looking inside: on CPU it is packed for the instruction set, elsewhere
its order is the backend's. So everything that decides the order of bytes is in the namespace (identity.py), and
here only sizes count.

`engine_layout` is for both halves of the connector, each with its own copy of the configuration; the fingerprint of the
layout travels with every plan, and a worker that comes to another one copies nothing. `chunk_layout` is for the tier
below vLLM's own offloading: a chunk is one row of vLLM's host memory, the blocks of one layer group of all ranks as
they lie there. What decides the order of bytes in it is in the layout's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout, TensorAxes

FORMAT = "vllm:layer,block"  # layers of the group in vLLM's order, each one whole block as it lies in the engine


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """Our layout, and how it maps to the engine.

    group_ids:   vLLM's number of each of our groups.
    layer_names: vLLM's layers of each of our groups.
    layer_bytes: bytes of one block of one layer, per layer, per group.
    hashes_per_block: vLLM's block hashes per block; the last of them names the block.
    """

    layout: Layout
    group_ids: tuple[int, ...]
    layer_names: tuple[tuple[str, ...], ...]
    layer_bytes: tuple[tuple[int, ...], ...]
    hashes_per_block: int = 1


def engine_layout(vllm_config: Any, kv_cache_config: Any) -> EngineLayout:
    """Read the layout. Raises ConfigError for what the connector cannot store correctly, saying what would work."""
    parallel = vllm_config.parallel_config
    _check_parallel(parallel)
    shards = int(parallel.tensor_parallel_size)
    if shards > 1 and getattr(kv_cache_config, "kv_tp_replicas", 1) == shards:
        shards = 1  # MLA: every rank holds the same bytes
    groups: list[LayerGroup] = []
    ids: list[int] = []
    names: list[tuple[str, ...]] = []
    sizes: list[tuple[int, ...]] = []
    block_sizes: set[int] = set()
    position = 0
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if not getattr(group, "enable_kv_transfer", True):
            continue
        specs = _layer_specs(group)
        kind, window = _kind(specs, index)
        block_sizes |= {int(spec.block_size) for spec in specs}
        bytes_of = tuple(int(spec.page_size_bytes) for spec in specs)
        layers = tuple(range(position, position + len(specs)))
        position += len(specs)
        axes = _axes(vllm_config, specs, kind)
        groups.append(LayerGroup(kind, layers, sum(bytes_of), window, axes))
        ids.append(index)
        names.append(tuple(group.layer_names))
        sizes.append(bytes_of)
    if not groups:
        raise ConfigError("vLLM: the model has no layer that keeps keys and values; there is nothing to store")
    if len(block_sizes) != 1:
        raise ConfigError(
            f"vLLM: layer groups have blocks of {sorted(block_sizes)} tokens; the connector needs one size"
        )
    block_size = block_sizes.pop()
    hash_size = getattr(kv_cache_config, "hash_block_size", None) or block_size
    if block_size % hash_size:
        raise ConfigError(f"vLLM: blocks of {block_size} tokens are hashed by {hash_size}; that does not divide evenly")
    layout = Layout(block_size, tuple(groups), FORMAT, _dtype_name(kv_cache_config), shards)
    return EngineLayout(layout, tuple(ids), tuple(names), tuple(sizes), block_size // hash_size)


def chunk_layout(config: Any, row_bytes: int) -> Layout:
    """The layout of chunks of `row_bytes`, from vLLM's OffloadingConfig."""
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


def _check_parallel(parallel: Any) -> None:
    for field, flag in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
    ):
        size = getattr(parallel, field, 1)
        if size != 1:
            raise ConfigError(f"vLLM: {flag} is {size}; the connector supports tensor parallelism only, so 1")
    nodes = getattr(parallel, "nnodes_within_dp", 1)
    if nodes != 1:
        raise ConfigError(f"vLLM: the ranks of one engine are on {nodes} machines; the connector needs them on one")


def _layer_specs(group: Any) -> list[Any]:
    per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    if per_layer is None:
        return [group.kv_cache_spec] * len(group.layer_names)
    return [per_layer[name] for name in group.layer_names]


def _kind(specs: list[Any], index: int) -> tuple[GroupKind, int | None]:
    """The resume rule of a group, from the names of its specs' classes."""
    kinds: set[tuple[GroupKind, int | None]] = set()
    for spec in specs:
        names = {cls.__name__ for cls in type(spec).__mro__}
        own = type(spec).__name__
        if "MambaSpec" in names:
            raise ConfigError(
                f"vLLM: layer group {index} keeps recurrent state ({own}), which cannot be cut into blocks; models of "
                "this kind are not supported, run them without the connector"
            )
        if own in ("SlidingWindowSpec", "SlidingWindowMLASpec"):
            window = int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0))
            kinds.add((GroupKind.SLIDING, window))
        elif own == "FullAttentionSpec":
            kinds.add((GroupKind.FULL, None))
        elif own == "MLAAttentionSpec":
            kinds.add((GroupKind.MLA, None))
        else:
            raise ConfigError(f"vLLM: layer group {index} is of a kind the connector does not know ({own})")
        if not getattr(spec, "prefix_cacheable", True):
            raise ConfigError(f"vLLM: layer group {index} ({own}) cannot be cached by prefix")
    if len(kinds) != 1:
        raise ConfigError(f"vLLM: layer group {index} mixes rules {sorted(str(kind) for kind in kinds)}")
    return kinds.pop()


def _axes(vllm_config: Any, specs: list[Any], kind: GroupKind) -> tuple[TensorAxes, ...]:
    """What lies where in a page, on CUDA from vLLM 0.26 on; nothing on other devices, for other types and paddings.

    A block of a layer is [kv_heads, block_tokens, 2 * head_dim] there, keys before values in a row. A worker compares
    that with what it gets (`odd_blocks`).
    """
    if _device(vllm_config) != "cuda" or kind not in (GroupKind.FULL, GroupKind.SLIDING):
        return ()
    axes: list[TensorAxes] = []
    offset = 0
    for spec in specs:
        heads, dims, tokens = (int(getattr(spec, name, 0)) for name in ("num_kv_heads", "head_size", "block_size"))
        dtype = str(getattr(spec, "dtype", "")).removeprefix("torch.")
        values = int(getattr(spec, "head_size_v", dims) or dims)
        if dtype != "bfloat16" or values != dims or int(spec.page_size_bytes) != heads * tokens * dims * 4:
            return ()
        row = 4 * dims
        for is_key in (True, False):
            first = offset + (0 if is_key else 2 * dims)
            axes.append(TensorAxes(is_key, first, heads, tokens * row, tokens, row, dims))
        offset += int(spec.page_size_bytes)
    return tuple(axes)


def odd_blocks(axes: Sequence[TensorAxes], shape: Sequence[int], strides: Sequence[int]) -> str:
    """The reason why a layer's blocks, [num_blocks, ...] in the engine, do not lie as its axes say; "" if they do.

    strides: in elements. In what order a view names its dimensions does not matter. Pages that are stored as they are,
    or without loss, do not depend on it.
    """
    if not axes:
        return ""
    one = axes[0]
    expected = _by_stride((one.heads, one.tokens, 2 * one.dims), (one.tokens * 2 * one.dims, 2 * one.dims, 1))
    found = _by_stride(shape[1:], strides[1:])
    return "" if found == expected else f"its blocks have sizes and strides {found}, not {expected}"


def _by_stride(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Size and stride of each dimension of more than one element, the widest first."""
    pairs = [(int(size), int(stride)) for size, stride in zip(shape, strides, strict=True) if size != 1]
    return sorted(pairs, key=lambda pair: -pair[1])


def _device(vllm_config: Any) -> str:
    return str(getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu"))


def _dtype_name(kv_cache_config: Any) -> str:
    names: list[str] = []
    for group in kv_cache_config.kv_cache_groups:
        for spec in _layer_specs(group):
            name = str(getattr(spec, "dtype", "unknown")).removeprefix("torch.")
            if name not in names:
                names.append(name)
    return "+".join(names)

"""vLLM's KV cache configuration becomes our layout; stand-ins have the names and fields of vLLM's classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.vllm.layout import engine_layout, odd_blocks
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(FullAttentionSpec):
    pass


class MambaSpec(SimpleNamespace):
    pass


class RSWASpec(FullAttentionSpec):
    pass


def spec(kind: type = FullAttentionSpec, **changes: Any) -> Any:
    return kind(**{"block_size": 32, "page_size_bytes": 4096, "dtype": "torch.bfloat16", **changes})


def group(kv_cache_spec: Any, *names: str) -> Any:
    return SimpleNamespace(kv_cache_spec=kv_cache_spec, layer_names=list(names), enable_kv_transfer=True)


def layout_of(*groups: Any, tensor_parallel: int = 1, **changes: Any) -> Any:
    parallel = SimpleNamespace(**{"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": 1, **changes})
    replicas = changes.pop("kv_tp_replicas", 1)
    cache = SimpleNamespace(kv_cache_groups=list(groups), hash_block_size=None, kv_tp_replicas=replicas)
    return engine_layout(SimpleNamespace(parallel_config=parallel), cache)


def test_layers_of_a_group_share_a_page() -> None:
    engine = layout_of(group(spec(), "a", "b", "c"))

    assert engine.layout.block_size == 32
    assert engine.layout.groups[0].page_bytes == 3 * 4096
    assert engine.layer_names == (("a", "b", "c"),)
    assert engine.layout.dtype == "bfloat16"


def test_a_sliding_group_keeps_its_window() -> None:
    window = spec(SlidingWindowSpec, sliding_window=128, extra_retained_tokens=2)

    engine = layout_of(group(spec(), "a"), group(window, "b"))

    assert [(g.kind, g.window) for g in engine.layout.groups] == [(GroupKind.FULL, None), (GroupKind.SLIDING, 130)]


def test_every_rank_is_a_shard_unless_all_hold_the_same() -> None:
    full, mla = group(spec(), "a"), group(spec(MLAAttentionSpec), "a")

    assert layout_of(full, tensor_parallel=2).layout.shards == 2
    assert layout_of(mla, tensor_parallel=2, kv_tp_replicas=2).layout.shards == 1


def test_other_sizes_and_kinds_are_other_layouts() -> None:
    layouts = [
        layout_of(group(spec(), "a")),
        layout_of(group(spec(page_size_bytes=8192), "a")),
        layout_of(group(spec(MLAAttentionSpec), "a")),
        layout_of(group(spec(), "a"), tensor_parallel=2),
        layout_of(group(spec(dtype="torch.float16"), "a")),
    ]

    assert len({engine.layout.fingerprint for engine in layouts}) == len(layouts)


def test_groups_that_are_not_transferred_are_left_out() -> None:
    scratch = group(spec(), "x")
    scratch.enable_kv_transfer = False

    engine = layout_of(scratch, group(spec(), "a"))

    assert engine.group_ids == (1,)


@pytest.mark.parametrize(
    ("groups", "changes", "message"),
    [
        ([group(spec(MambaSpec), "a")], {}, "recurrent state"),
        ([group(spec(RSWASpec), "a")], {}, "does not know"),
        ([group(spec(), "a"), group(spec(block_size=64), "b")], {}, "one size"),
        ([], {}, "nothing to store"),
        ([group(spec(), "a")], {"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2"),
        ([group(spec(), "a")], {"decode_context_parallel_size": 2}, "--decode-context-parallel-size is 2"),
        ([group(spec(), "a")], {"nnodes_within_dp": 2}, "2 machines"),
    ],
)
def test_what_cannot_be_stored_correctly_is_refused(groups: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(*groups, **changes)


def axes_of(device: str, kind: type = FullAttentionSpec, **changes: Any) -> Any:
    """Two kv heads, 32 tokens, 64 dims: 16,384 bytes a layer."""
    shape = {"num_kv_heads": 2, "head_size": 64, "page_size_bytes": 16384, **changes}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        device_config=SimpleNamespace(device_type=device),
    )
    groups = [group(spec(kind, **shape), "a", "b")]
    cache = SimpleNamespace(kv_cache_groups=groups, hash_block_size=None, kv_tp_replicas=1)
    return engine_layout(config, cache).layout.groups[0].axes


def test_what_lies_where_is_told_of_bfloat16_blocks_on_cuda() -> None:
    key, value, *others = axes_of("cuda")

    assert (key.is_key, key.offset, key.heads, key.head_stride) == (True, 0, 2, 8192)
    assert (value.is_key, value.offset, value.tokens, value.token_stride, value.dims) == (False, 128, 32, 256, 64)
    assert [one.offset for one in others] == [16384, 16384 + 128]
    assert len(axes_of("cuda", SlidingWindowSpec, sliding_window=64)) == 4


@pytest.mark.parametrize(
    ("device", "kind", "changes"),
    [
        ("cpu", FullAttentionSpec, {}),
        ("cuda", MLAAttentionSpec, {}),
        ("cuda", FullAttentionSpec, {"dtype": "torch.float16"}),
        ("cuda", FullAttentionSpec, {"dtype": "torch.float8_e4m3fn", "page_size_bytes": 8192}),
        ("cuda", FullAttentionSpec, {"page_size_bytes": 20480}),  # padded
        ("cuda", FullAttentionSpec, {"head_size_v": 128}),
    ],
)
def test_what_lies_where_in_other_blocks_is_the_engines_own_affair(device: str, kind: type, changes: Any) -> None:
    assert axes_of(device, kind, **changes) == ()


@pytest.mark.parametrize(
    ("shape", "strides", "is_odd"),
    [
        ((9, 2, 32, 128), (8192, 4096, 128, 1), False),
        ((9, 32, 2, 128), (8192, 128, 4096, 1), False),  # the same bytes, in a view of another order
        ((9, 32, 2, 128), (8192, 256, 128, 1), True),
        ((9, 2, 32, 2, 64), (8192, 4096, 128, 64, 1), True),
        ((18, 2, 16, 128), (4096, 2048, 128, 1), True),
    ],
)
def test_blocks_that_lie_otherwise_are_seen(shape: Any, strides: Any, is_odd: bool) -> None:
    assert bool(odd_blocks(axes_of("cuda")[:2], shape, strides)) is is_odd
    assert odd_blocks((), shape, strides) == ""

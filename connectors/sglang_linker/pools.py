"""SGLang's device pools as pages: which there are, how long a page is, and where it lies.

A page in a slot is layer after layer, of each the keys of all its tokens and then the values (of MLA the latent rows
alone), each token's heads end to end: `sglang:layer,kv,token,head,dim`. So the layers of a load come one after the
other out of one piece of memory.

Only what was tried is taken: the plain pools of full attention. A pool of another class keeps more than its rows
(scales, windows, states, another order), and what is left behind would come back as wrong bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kvstore.devices.base import PageTable
from kvstore.devices.tables import paged_table
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout

FORMAT = "sglang:layer,kv,token,head,dim"
MHA, MLA = "MHATokenToKVPool", "MLATokenToKVPool"
SCALES = ("k_scale_buffer", "v_scale_buffer", "native_k_scale_buffer", "native_v_scale_buffer", "kv_scale_buffer")
DRAFTS = ("mtp_draft_device_pools", "sidecar_draft_device_pools", "mtp_draft_mamba_pools")
COMPONENTS = ("FULL",)


@dataclass(frozen=True, slots=True)
class DevicePages:
    """The pages of one rank's pool.

    pieces_per_layer: of the table: keys and values, or latent rows.
    is_replicated:    every rank has the same bytes.
    """

    layout: Layout
    table: PageTable
    num_layers: int
    pieces_per_layer: int
    is_replicated: bool


def check_components(components: Collection[Any]) -> None:
    """Raise ConfigError unless a cache has full attention alone."""
    names = sorted(getattr(one, "name", str(one)).upper() for one in components)
    if names != list(COMPONENTS):
        told = " + ".join(names) or "none"
        raise ConfigError(
            f"components: SGLang's cache has {told}; the linker stores FULL alone. For a model with sliding windows or "
            "recurrent states leave --enable-unified-cache-external-linker out, and use --enable-hierarchical-cache "
            "with connectors.sglang below it"
        )


def device_pages(params: Any, page_size: int) -> DevicePages:
    """The pages of SGLang's pool. Raises ConfigError for a pool that is not known to be its rows alone.

    params: SGLang's CacheInitParams.
    """
    drafts = [name for name in DRAFTS if getattr(params, name, ())]
    if drafts or getattr(params, "is_eagle", False):
        raise ConfigError(
            f"speculative decoding keeps draft KV of its own ({', '.join(drafts) or 'is_eagle'}), which the linker "
            "does not store; leave --speculative-algorithm out, or --enable-unified-cache-external-linker"
        )
    if getattr(params, "pp_size", 1) > 1:
        raise ConfigError(
            f"--pp-size is {params.pp_size}; the ranks of a pipeline do not agree on what a linker has, so the linker "
            "takes one stage: use --tp-size"
        )
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    kind = type(pool).__name__
    if kind not in (MHA, MLA):
        raise ConfigError(f"SGLang's pool is a {kind}; the linker knows the bytes of {MHA} and {MLA} alone")
    scales = [name for name in SCALES if getattr(pool, name, None) is not None]
    layout_name = getattr(pool, "kv_cache_layout", "nhd")
    if scales or getattr(pool, "is_quantized_kv_cache", False):
        raise ConfigError(
            f"SGLang's pool keeps scales beside its rows ({', '.join(scales) or 'quantized'}), which the linker does "
            "not store; choose another --kv-cache-dtype"
        )
    if layout_name != "nhd" or getattr(pool, "use_dsa", False):
        what = "has sparse attention's index keys" if getattr(pool, "use_dsa", False) else f"is {layout_name!r}"
        raise ConfigError(f"the layout of SGLang's pool {what}; the linker knows 'nhd' (unset SGLANG_USE_HND_KVCACHE)")
    if kind == MLA:
        pieces = list(pool.kv_buffer)
    else:
        pieces = [piece for pair in zip(pool.k_buffer, pool.v_buffer, strict=True) for piece in pair]
    num_layers = len(pool.kv_buffer if kind == MLA else pool.k_buffer)
    try:
        table = paged_table([_by_page(piece, page_size) for piece in pieces])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the rows of SGLang's pool are no pages of {page_size} tokens: {error}") from error
    first = int(getattr(pool, "start_layer", 0) or 0)
    group = LayerGroup(
        GroupKind.MLA if kind == MLA else GroupKind.FULL, tuple(range(first, first + num_layers)), table.page_bytes
    )
    shape = "x".join(str(size) for size in pieces[0].shape[1:])
    return DevicePages(
        layout=Layout(page_size, (group,), f"{FORMAT}:{shape}", str(pool.dtype).removeprefix("torch.")),
        table=table,
        num_layers=num_layers,
        pieces_per_layer=len(pieces) // num_layers,
        is_replicated=kind == MLA,
    )


def _by_page(rows: Any, page_size: int) -> Any:
    """Rows of tokens, [tokens, ...], as pages [pages, page_size, ...]; rows after the last whole page are no page."""
    num_pages = rows.shape[0] // page_size
    if not num_pages:
        raise ValueError(f"there are {rows.shape[0]} rows")
    return rows[: num_pages * page_size].view(num_pages, page_size, *rows.shape[1:])

"""SGLang's host pools as pages in pieces: where each page of a pool lies, and what its bytes mean.

A pool tells the address and the length of every piece of a page (`get_page_buffer_meta`): keys and values in the
layouts that keep a page together, 2 x layers pieces in `layer_first`. The pieces of a page, one after the other, are
its bytes in our tiers. Equal sizes do not mean equal meaning, so what decides the order is in the pool's layout, and
with it in the name of each page.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
# Attributes of pools that tell what their bytes mean; those that a pool lacks are told as absent.
_MEANING = (
    "layout",
    "page_size",
    "layer_num",
    "target_layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "index_head_dim",
    "indexer_dtype",
    "quant_block_size",
    "temporal_dtype",
    "conv_dtype",
    "head_group_num",
    "dcp_size",
    "storage_format_tag",
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of some pages of a pool, the same number for each.

    places: addresses, page after page. lengths: in bytes, of the pieces of one page.
    """

    places: Sequence[int]
    lengths: tuple[int, ...]

    def copy_out(self, page: int, target: memoryview) -> None:
        """Copy a page from the pool into memory of ours."""
        at = ctypes.addressof(ctypes.c_char.from_buffer(target))
        first = page * len(self.lengths)
        for place, length in zip(self.places[first : first + len(self.lengths)], self.lengths, strict=True):
            ctypes.memmove(at, place, length)
            at += length

    def copy_in(self, page: int, source: memoryview) -> None:
        """Copy a page from memory of ours into the pool."""
        at = ctypes.addressof(ctypes.c_char.from_buffer(source))
        first = page * len(self.lengths)
        for place, length in zip(self.places[first : first + len(self.lengths)], self.lengths, strict=True):
            ctypes.memmove(place, at, length)
            at += length


class HostPool:
    """One of SGLang's host pools. Raises ConfigError for one whose pages cannot be had."""

    def __init__(self, pool: Any, name: str) -> None:
        self.pool = pool
        self.name = name
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        layout = str(getattr(pool, "layout", None))
        if layout not in LAYOUTS:
            raise ConfigError(
                f"--hicache-mem-layout: the pool {name!r} has layout {layout!r}; the kvstore backend knows "
                f"{', '.join(LAYOUTS)}: choose one of them, page_first where there is no reason for another"
            )
        if self.page_tokens > int(pool.size):
            raise ConfigError(f"--hicache-size: the pool {name!r} holds no whole page of {self.page_tokens} tokens")
        import torch

        self._of_page = torch.arange(self.page_tokens)
        try:
            self.lengths = self._lengths(self._of_page)
        except Exception as error:  # not implemented, or a pool without memory of its own
            raise ConfigError(
                f"--hicache-mem-layout: the pool {name!r} ({type(pool).__name__}) gives no addresses of its pages in "
                f"layout {layout!r} ({error}); choose page_first"
            ) from error
        self.page_bytes = sum(self.lengths)

    def pieces(self, indices: Any, num_pages: int) -> Pieces:
        """The pieces of the pages whose tokens have these indices. Raises ValueError where they do not fit."""
        if indices is None or indices.numel() != num_pages * self.page_tokens:
            count = 0 if indices is None else indices.numel()
            raise ValueError(f"pool {self.name}: {count} indices for {num_pages} pages of {self.page_tokens} tokens")
        tokens = indices.cpu().reshape(num_pages, self.page_tokens)
        firsts = tokens[:, :1]
        if (firsts % self.page_tokens).any() or (tokens - firsts != self._of_page).any():
            raise ValueError(f"pool {self.name}: the indices are not those of whole pages")  # it looks at firsts alone
        places, sizes = self.pool.get_page_buffer_meta(indices)
        per_page = len(self.lengths)
        if len(places) != num_pages * per_page or tuple(sizes[:per_page]) != self.lengths[: len(sizes)]:
            raise ValueError(f"pool {self.name}: {len(places)} pieces for {num_pages} pages of {per_page}")
        return Pieces(places, self.lengths)

    @property
    def layout(self) -> Layout:
        """The meaning of a page's bytes; two pools share pages only where it is the same."""
        means = [f"{name} {getattr(self.pool, name, None)}" for name in _MEANING]
        return Layout(
            self.page_tokens,
            (LayerGroup(GroupKind.FULL, (0,), self.page_bytes),),
            "|".join(["sglang", self.name, type(self.pool).__name__, *means, f"pieces {self.lengths}"]),
            str(getattr(self.pool, "dtype", None)).removeprefix("torch."),
        )

    @property
    def is_by_head(self) -> bool:
        """True if the ranks of a tensor-parallel engine hold different heads of it."""
        return hasattr(self.pool, "head_num") or self.name == "mamba"

    @property
    def has_draft(self) -> bool:
        """True if its pages have KV of the model that drafts: a pool of its own, or layers after the model's."""
        layers = getattr(self.pool, "layer_num", None)
        return self.name.startswith("draft") or getattr(self.pool, "target_layer_num", layers) != layers

    def _lengths(self, indices: Any) -> tuple[int, ...]:
        _, sizes = self.pool.get_page_buffer_meta(indices)
        return tuple(int(size) for size in sizes)


def geometry(pools: Sequence[HostPool]) -> Layout:
    """The layout of the slots that hold pages of all these pools: sizes only, for the meaning is in the names."""
    most = max(pool.page_bytes for pool in pools)
    return Layout(1, (LayerGroup(GroupKind.FULL, (0,), most),), "sglang pages by name", "bytes")

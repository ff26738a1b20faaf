from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from connectors.sglang_linker.pools import check_components, device_pages
from kvstore.devices.cpu import CpuDevice
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind

PAGE = 4


class Component(Enum):
    FULL = 0
    SWA = 1
    MAMBA = 2


class MHATokenToKVPool:
    """Named and laid out as SGLang's."""

    def __init__(self, tokens: int = 22, **more: Any) -> None:
        self.k_buffer = [torch.arange(tokens * 6, dtype=torch.int16).view(tokens, 2, 3) + 1000 * i for i in range(3)]
        self.v_buffer = [-rows for rows in self.k_buffer]
        self.dtype = torch.int16
        self.kv_cache_layout = "nhd"
        self.start_layer = 0
        self.__dict__.update(more)


class MLATokenToKVPool:
    def __init__(self) -> None:
        self.kv_buffer = [torch.zeros(22, 1, 5, dtype=torch.bfloat16) for _ in range(3)]
        self.dtype = torch.bfloat16


class HybridLinearKVPool(MHATokenToKVPool): ...


def params(pool: Any, **more: Any) -> Any:
    return SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool), pp_size=1, **more)


def test_a_page_is_layer_after_layer_keys_before_values() -> None:
    pool = MHATokenToKVPool()
    pages = device_pages(params(pool), PAGE)
    slot = torch.zeros(pages.table.page_bytes, dtype=torch.uint8).numpy()

    CpuDevice().copy_out(pages.table, [2], [slot]).wait()

    rows = slice(2 * PAGE, 3 * PAGE)
    pairs = zip(pool.k_buffer, pool.v_buffer, strict=True)
    expected = torch.cat([piece[rows].flatten() for pair in pairs for piece in pair])
    assert torch.equal(torch.from_numpy(slot).view(torch.int16), expected)
    assert (pages.num_layers, pages.pieces_per_layer, pages.is_replicated) == (3, 2, False)
    assert pages.table.num_pages == 5  # of 22 rows; the last two are no page


def test_latent_rows_are_one_piece_a_layer_and_the_same_on_every_rank() -> None:
    pages = device_pages(params(MLATokenToKVPool()), PAGE)

    assert (pages.num_layers, pages.pieces_per_layer, pages.is_replicated) == (3, 1, True)
    assert pages.layout.groups[0].kind is GroupKind.MLA


def test_other_shapes_of_equal_size_are_another_layout() -> None:
    pool = MHATokenToKVPool()
    other = MHATokenToKVPool()
    other.k_buffer = [rows.view(22, 3, 2) for rows in other.k_buffer]
    other.v_buffer = [rows.view(22, 3, 2) for rows in other.v_buffer]

    pages, others = device_pages(params(pool), PAGE), device_pages(params(other), PAGE)

    assert pages.table.page_bytes == others.table.page_bytes
    assert pages.layout.fingerprint != others.layout.fingerprint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (params(MHATokenToKVPool(), mtp_draft_device_pools=(1,)), "leave --speculative-algorithm out"),
        (params(MHATokenToKVPool(), is_eagle=True), "speculative decoding keeps draft KV of its own (is_eagle)"),
        (params(MHATokenToKVPool()).__class__(**{**vars(params(MHATokenToKVPool())), "pp_size": 2}), "--pp-size is 2"),
        (params(HybridLinearKVPool()), "SGLang's pool is a HybridLinearKVPool; the linker knows"),
        (params(MHATokenToKVPool(k_scale_buffer=[1])), "keeps scales beside its rows (k_scale_buffer)"),
        (params(MHATokenToKVPool(kv_cache_layout="hnd")), "is 'hnd'; the linker knows 'nhd'"),
        (params(MHATokenToKVPool(tokens=1)), "are no pages of 4 tokens"),
    ],
)
def test_a_pool_that_is_more_than_its_rows_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        device_pages(given, PAGE)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("components", "told"),
    [({Component.FULL, Component.SWA}, "FULL + SWA"), ({Component.MAMBA}, "MAMBA"), (set(), "none")],
)
def test_a_cache_of_other_components_is_refused(components: set[Component], told: str) -> None:
    check_components({Component.FULL})
    with pytest.raises(
        ConfigError, match=f"components: SGLang's cache has {told.replace('+', '.')}; the linker stores"
    ):
        check_components(components)

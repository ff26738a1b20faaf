"""Pieces of pages, over pools that have no more of SGLang's than the addresses that they give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from connectors.sglang.pools import HostPool, geometry
from kvstore.errors import ConfigError

torch = pytest.importorskip("torch")

PAGE, PAGES = 4, 8


class FakePool:
    """Keys and values of two bytes a token, in two arrays."""

    def __init__(self, layout: str = "page_first", **attributes: Any) -> None:
        self.layout, self.page_size, self.size = layout, PAGE, PAGE * PAGES
        self.dtype, self.head_num = "torch.bfloat16", 2
        self.keys, self.values = (np.arange(2 * self.size, dtype=np.uint8) + 100 * i for i in range(2))
        self.__dict__.update(attributes)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        firsts = indices.tolist()[::PAGE]
        places = [array.ctypes.data + 2 * first for first in firsts for array in (self.keys, self.values)]
        return places, [2 * PAGE] * len(places)


def test_a_page_is_its_pieces_one_after_the_other() -> None:
    pool = FakePool()
    pieces, page = HostPool(pool, "kv").pieces(torch.arange(PAGE, 3 * PAGE), 2), bytearray(64)

    pieces.copy_out(1, memoryview(page))

    at = slice(2 * 2 * PAGE, 2 * 3 * PAGE)
    assert bytes(page[: 4 * PAGE]) == pool.keys[at].tobytes() + pool.values[at].tobytes()
    assert not any(page[4 * PAGE :])


def test_what_was_copied_out_is_copied_in_elsewhere() -> None:
    pool, page = FakePool(), bytearray(64)
    host = HostPool(pool, "kv")
    host.pieces(torch.arange(PAGE), 1).copy_out(0, memoryview(page))

    host.pieces(torch.arange(5 * PAGE, 6 * PAGE), 1).copy_in(0, memoryview(page))

    assert pool.keys[2 * 5 * PAGE : 2 * 6 * PAGE].tolist() == pool.keys[: 2 * PAGE].tolist()


@pytest.mark.parametrize(
    "indices", [[1, 2, 3, 4], [0, 1, 3, 2], [0, 1, 2, 7]], ids=["between pages", "out of order", "of two pages"]
)
def test_indices_that_are_not_those_of_whole_pages_are_an_error(indices: list[int]) -> None:
    host = HostPool(FakePool(), "kv")

    with pytest.raises(ValueError, match="not those of whole pages"):
        host.pieces(torch.tensor(indices), 1)


def test_indices_of_another_number_of_tokens_are_an_error() -> None:
    host = HostPool(FakePool(), "kv")

    with pytest.raises(ValueError, match="3 indices for 1 pages"):
        host.pieces(torch.arange(3), 1)


@pytest.mark.parametrize("other", [{"dtype": "torch.float16"}, {"layout": "page_head"}, {"head_num": 4}])
def test_pages_that_mean_something_else_have_another_layout(other: dict[str, Any]) -> None:
    assert HostPool(FakePool(**other), "kv").layout != HostPool(FakePool(), "kv").layout


def test_pools_of_the_same_sizes_may_have_a_directory_together() -> None:
    first, second = HostPool(FakePool(), "kv"), HostPool(FakePool("page_head"), "kv")

    assert geometry([first]).fingerprint == geometry([second]).fingerprint


def test_an_unknown_layout_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"page_first_kv_split.*layer_first, page_first, page_first_direct, page_head"
    ):
        HostPool(FakePool("page_first_kv_split"), "kv")


def test_a_pool_without_addresses_is_refused_with_a_sentence() -> None:
    def none(indices: Any) -> None:
        raise NotImplementedError("zero-copy does not carry it")

    with pytest.raises(ConfigError, match=r"gives no addresses of its pages.*choose page_first"):
        HostPool(SimpleNamespace(layout="layer_first", page_size=4, size=32, get_page_buffer_meta=none), "mamba")

"""What a page table promises is checked when it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.devices.base import PageTable
from kvstore.devices.tables import paged_table, token_table


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


class LikeTorch:
    """The four names of a torch tensor that a table needs."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = array.shape

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self._array.itemsize for stride in self._array.strides)

    def element_size(self) -> int:
        return int(self._array.itemsize)


def test_a_paged_table_has_one_run_a_piece() -> None:
    keys, values = zeros(7, 4, 2, 8), zeros(7, 4, 2, 3)

    table = paged_table([keys, values])

    assert table.base.tolist() == [keys.ctypes.data, values.ctypes.data]
    assert table.page_stride.tolist() == [256, 96]
    assert table.num_runs.tolist() == [1, 1]
    assert table.run_bytes.tolist() == [256, 96]
    assert (table.first_page, table.num_pages, table.page_bytes) == (0, 7, 352)
    assert table.keep_alive[0] is keys


def test_keys_and_values_in_one_tensor_are_given_as_two() -> None:
    layer = zeros(2, 7, 4, 8)

    table = paged_table([layer[0], layer[1]])

    assert table.base[1] - table.base[0] == 7 * 128
    assert table.page_stride.tolist() == [128, 128]


def test_blocks_may_lie_apart() -> None:
    layer = zeros(7, 2, 4, 8)

    table = paged_table([layer[:, 0], layer[:, 1]])

    assert table.page_stride.tolist() == [256, 256]
    assert table.run_bytes.tolist() == [128, 128]


def test_a_token_table_has_one_run_a_head() -> None:
    keys = zeros(3, 40, 8)

    table = token_table([keys], 16)

    assert table.num_runs.tolist() == [3]
    assert table.run_stride.tolist() == [40 * 32]
    assert table.run_bytes.tolist() == table.page_stride.tolist() == [16 * 32]
    assert (table.first_page, table.num_pages, table.page_bytes) == (0, 2, 3 * 16 * 32)


@pytest.mark.parametrize(
    ("num_tokens", "offset_tokens", "first_page", "num_pages"),
    [
        (40, 0, 0, 2),
        (40, 8, 0, 2),
        (40, 9, 0, 1),
        (40, 40, 0, 0),
        (40, 100, 0, 0),
        (40, -16, 1, 3),
        (40, -1, 1, 2),
        (15, -1, 1, 1),
        (0, 0, 0, 0),
    ],
)
def test_only_whole_pages_can_be_addressed(
    num_tokens: int, offset_tokens: int, first_page: int, num_pages: int
) -> None:
    table = token_table([zeros(2, num_tokens, 8)], 16, offset_tokens=offset_tokens)

    assert (table.first_page, table.num_pages) == (first_page, num_pages)


def test_a_table_of_torch_tensors_is_the_same() -> None:
    whole = zeros(4, 40, 8)
    tensor = whole[1:3, 5:37]

    as_numpy, as_torch = token_table([tensor], 16), token_table([LikeTorch(tensor)], 16)

    for name in ("base", "page_stride", "num_runs", "run_stride", "run_bytes"):
        assert getattr(as_numpy, name).tolist() == getattr(as_torch, name).tolist()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors"),
        ([zeros(4, 8), zeros(5, 8)], r"different numbers of blocks: \[4, 5\]"),
        ([zeros(4)], "2 dimensions at least"),
        ([zeros(4, 0)], "blocks are empty"),
        ([zeros(4, 8)[:, ::2]], "not one contiguous run"),
        ([zeros(4, 8)[:, ::-1]], "not one contiguous run"),
        ([zeros(4, 6, 8)[:, :, :5]], "not one contiguous run"),
        ([np.lib.stride_tricks.as_strided(zeros(8), (4, 8), (0, 4))], "lie 0 bytes apart"),
        ([zeros(4, 8)[::-1]], "lie -32 bytes apart"),
        ([np.lib.stride_tricks.as_strided(zeros(40), (4, 8), (16, 4))], "blocks of 32 bytes lie 16 bytes apart"),
        ([[1, 2]], "a numpy array or a torch tensor"),
    ],
)
def test_paged_tensors_that_cannot_be_copied_as_runs_are_refused(tensors: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_table(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors"),
        ([zeros(2, 8, 4), zeros(2, 9, 4)], r"different numbers of tokens: \[8, 9\]"),
        ([zeros(8, 4)], "3 dimensions at least"),
        ([zeros(1, 2, 8, 4)], "heads, tokens, dim"),
        ([zeros(0, 8, 4)], "empty"),
        ([zeros(8, 2, 4).swapaxes(0, 1)], "tokens and dim are not contiguous"),
        ([zeros(2, 8, 4)[:, :, :3]], "tokens and dim are not contiguous"),
        ([zeros(2, 4, 8).swapaxes(1, 2)], "tokens and dim are not contiguous"),
        ([np.broadcast_to(zeros(1, 8, 4), (2, 8, 4))], "read-only"),
        ([LikeTorch(np.broadcast_to(zeros(1, 8, 4), (2, 8, 4)))], "lie 0 bytes apart"),
    ],
)
def test_caches_whose_pages_are_no_runs_are_refused(tensors: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_table(tensors, 4)


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        token_table([zeros(2, 8, 4)], 0)


def table_with(**columns: Any) -> PageTable:
    fitting: dict[str, Any] = {"base": [0], "page_stride": [8], "num_runs": [1], "run_stride": [8], "run_bytes": [8]}
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in (fitting | columns).items()}
    return PageTable(**arrays, num_pages=1)


@pytest.mark.parametrize(
    "columns",
    [
        {"page_stride": [8, 8]},
        {"num_runs": [0]},
        {"run_bytes": [0]},
        {"run_stride": [-8]},
        {"page_stride": [-1]},
        {"base": [0.5]},
        {"base": [[0]]},
    ],
)
def test_a_table_of_impossible_columns_is_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="page table"):
        table_with(**columns)

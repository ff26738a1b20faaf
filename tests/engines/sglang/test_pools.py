"""What our seats take for granted of SGLang's host pools."""

from __future__ import annotations

import pytest
import torch

from tests.engines.sglang.pools import HEAD_DIM, HEADS, LAYERS, LAYOUTS, PAGE, host_pool


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pieces_of_a_page_are_all_its_bytes(layout: str) -> None:
    pool = host_pool(layout)

    pointers, sizes = pool.get_page_buffer_meta(torch.arange(3 * PAGE, 4 * PAGE))

    assert len(pointers) == len(sizes) == (2 * LAYERS if layout == "layer_first" else 2)
    assert sum(sizes) == 2 * LAYERS * PAGE * HEADS * HEAD_DIM * pool.dtype.itemsize

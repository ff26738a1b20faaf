"""KVStoreBackend below SGLang's real host pools: what one attach has stored, another loads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.sglang.backends import attached, chain, on_disk, page_bytes, tokens
from tests.engines.sglang.pools import LAYOUTS, host_pool


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_bit_for_bit_after_a_restart(layout: str, tmp_path: Path) -> None:
    pool, keys = host_pool(layout), chain(6)
    with attached(pool, on_disk(tmp_path)) as backend:
        assert backend.batch_set_v1(keys, tokens(0, 6)) == [True] * 6
    before = page_bytes(pool, 0, 6)

    with attached(pool, on_disk(tmp_path)) as backend:
        assert backend.batch_exists(keys) == 6
        assert backend.batch_get_v1(keys, tokens(20, 6)) == [True] * 6

    assert page_bytes(pool, 20, 6) == before
    assert page_bytes(pool, 0, 6) == before

"""Sleep mode, as vLLM 0.33 tells connectors of it: the KV tensors lose their memory and get other memory later.

vLLM sleeps on GPUs only, so the test calls the hooks in a worker's place and moves the tensors itself.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)


def test_after_a_sleep_an_engine_loads_and_saves_where_its_tensors_are_now(
    open_engine: Callable[..., Engine], reference: Reference
) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine = open_engine({})
    before, after = make_prompt(500, 31), make_prompt(500, 32)
    engine.ask(before)
    engine.forget_own_cache()

    connector = get_kv_transfer_group()
    connector.unregister_kv_caches()
    for tensor in connector._kv_caches.values():
        old = tensor.data_ptr()
        tensor.data = tensor.clone().zero_()
        assert tensor.data_ptr() != old
    connector.restore_kv_caches()

    loaded = engine.ask(before)
    engine.ask(after)
    engine.forget_own_cache()
    saved = engine.ask(after)
    reference.check([loaded, saved], [before, after])
    assert [loaded["cached"], saved["cached"]] == [499 // BLOCK * BLOCK] * 2
    assert engine.half.counters["load_failures"] == 0

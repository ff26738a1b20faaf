"""An exclusive disk tier, and a bound on what is written to it, below a real model: the same tokens as without a store,
and what is lost or kept back is counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from connectors.transformers.layout import model_layout
from kvstore.config.sections import Config
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK, CHUNK = 16, 32
PROMPT = 161  # ten blocks, and one token that is always computed
HOST_PAGES = 24  # two prompts of ten blocks, and a margin of three pages that are written ahead
DAY = 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama_gqa")


@contextmanager
def opened(model: Any, path: Path, **disk: Any) -> Iterator[KVCacheModel]:
    page_bytes = model_layout(model, BLOCK).slot_bytes
    if "max_writes_per_day" in disk:
        disk["max_writes_per_day"] *= page_bytes
    config = Config(
        store={"block_size": BLOCK, "load_or_recompute": False, "lookup_deadline_s": 10, "load_deadline_s": 30},
        host={"capacity_bytes": HOST_PAGES * page_bytes, "huge_pages": False},
        disk={"path": path, "capacity_bytes": 256 * page_bytes, "shared": False, "exclusive": True, **disk},
    )
    with KVCacheModel.open(model, config, prefill_chunk=CHUNK) as kv:
        yield kv


def stats(kv: KVCacheModel) -> dict[str, Any]:
    assert kv.connector is not None
    found: dict[str, Any] = kv.connector._store.stats()
    return found


def ask(kv: KVCacheModel, seed: int, expected: KVCacheModel) -> dict[str, int]:
    """Ask a prompt, whose answer must be the one without a store; returns its hit tokens by tier."""
    ids = random_ids(PROMPT, seed=seed)
    answer = kv.generate(ids, 4)
    assert kv.flush(WAIT_S)  # into host memory; a flush of the store would write all to disk
    assert answer.tokens == expected.generate(ids, 4).tokens
    return answer.report.by_tier


def test_what_left_host_memory_comes_back_from_an_exclusive_disk_or_is_counted_as_lost(
    model: Any, tmp_path: Path
) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    with opened(model, tmp_path) as kv:
        for seed in range(8):
            ask(kv, seed, cold)
        kept = stats(kv)
        back = [ask(kv, seed, cold) for seed in (0, 3, 7)]
        told = stats(kv)

    assert kept["pages"]["host"] <= HOST_PAGES
    assert kept["spilled_pages"]["disk"] > 0, "what is about to leave is written"
    assert kept["spilled_pages"]["disk"] + kept["spill_lost"]["disk"] >= 8 * 10 - HOST_PAGES
    assert back[2]["host"] > 0, "the newest is still there"
    assert sum(told["hit_tokens"].values()) == sum(sum(by_tier.values()) for by_tier in back)


def test_after_a_close_all_is_on_disk_and_the_next_start_has_it(model: Any, tmp_path: Path) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    with opened(model, tmp_path) as kv:
        ask(kv, 1, cold)
        assert stats(kv)["spilled_pages"]["disk"] < 10
    with opened(model, tmp_path) as kv:
        assert ask(kv, 1, cold)["disk"] == 160


def test_a_write_budget_that_is_spent_keeps_pages_back_and_costs_no_answer(model: Any, tmp_path: Path) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    with opened(model, tmp_path, exclusive=False, max_writes_per_day=DAY * 12) as kv:  # an hour's share: 12 pages
        for seed in range(6):
            ask(kv, seed, cold)
        assert kv.connector is not None
        told_of = kv.connector._store.flush(WAIT_S)
        told = stats(kv)
        ask(kv, 0, cold)

    assert told["write_budget"]["disk"] <= 0
    assert told["write_budget_spent"]["disk"] == 1
    assert 12 <= told["spilled_pages"]["disk"] < 12 + 32, "a batch may go beyond it"
    assert told["spill_lost"]["disk"] > 0, "and what left host memory meanwhile is lost to the disk"
    assert not told_of
    assert told_of.missing["disk"].get("budget", 0) > 0

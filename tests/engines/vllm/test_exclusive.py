"""An exclusive disk tier, and a bound on what is written to it: every answer is vLLM's own, what is lost is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, PAGE_BYTES, STORE, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)
LENGTH = 10 * BLOCK + 1
HOST_PAGES = 24  # two prompts, and a margin of three pages that are written ahead
SEEDS = range(70, 76)
HOUR_PAGES = 12  # that may be written at once


def played(engine: Engine, reference: Reference, seeds: list[int]) -> list[int]:
    """Ask prompts, whose answers must be vLLM's own; returns the tokens of each that were not computed."""
    cached = []
    for seed in seeds:
        answer = engine.ask(make_prompt(LENGTH, seed))
        reference.check([answer], [make_prompt(LENGTH, seed)])
        cached.append(answer["cached"])
    return cached


@pytest.mark.parametrize("max_writes_per_day", [None, 24 * HOUR_PAGES * PAGE_BYTES])
def test_answers_are_right_and_what_is_lost_or_kept_back_is_counted(
    open_engine: Callable[..., Engine], reference: Reference, tmp_path: Path, max_writes_per_day: int | None
) -> None:
    disk: dict[str, Any] = {"path": str(tmp_path), "capacity_bytes": 256 * PAGE_BYTES, "shared": False}
    disk |= {"exclusive": True, "max_writes_per_day": max_writes_per_day}
    host = {"capacity_bytes": HOST_PAGES * PAGE_BYTES, "huge_pages": False}
    engine = open_engine({"disk": disk, "host": host, "store": STORE})

    assert played(engine, reference, list(SEEDS)) == [0] * len(SEEDS)
    store = engine.half.store
    flushed = store.flush(5.0)
    told = store.stats()
    while not engine.llm.reset_prefix_cache():
        pass
    played(engine, reference, [SEEDS[0], SEEDS[-1]])

    assert told["pages"]["host"] <= HOST_PAGES
    assert told["spilled_pages"]["disk"] > 0
    assert told["spilled_pages"]["disk"] + told["spill_lost"]["disk"] >= 10 * len(SEEDS) - HOST_PAGES
    if max_writes_per_day is not None:
        assert told["write_budget_spent"]["disk"] == 1
        assert told["spilled_pages"]["disk"] < HOUR_PAGES + 32, "a batch may go beyond it"
        assert flushed.missing["disk"].get("budget", 0) > 0
    assert engine.scheduler.connector._hook_errors == 0

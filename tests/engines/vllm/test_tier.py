"""vLLM's own offloading with KVStoreTier below it, in real engines: what one process stored, another loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import vllm

from connectors.vllm_tier.cpu_spec import HostCopyWorker
from kvstore.testing.redis_server import LocalRedis
from tests.engines.vllm.engine import BLOCK, ENVIRONMENT, make_prompt
from tests.engines.vllm.tier_engine import TierEngine
from tests.helpers.redis_server import NEEDS_REDIS

MiB = 1 << 20
PROMPT = make_prompt(1000, seed=11)
FULL = 1000 // BLOCK * BLOCK
DEVICE, DISK = "vllm:prompt_tokens_cached_by_source.device", "vllm:prompt_tokens_cached_by_source.disk"
COMPUTED = "vllm:prompt_tokens_by_source.local_compute"


def on_disk(path: Path) -> dict[str, Any]:
    return {"disk": {"path": str(path), "capacity_bytes": 32 * MiB}}


def in_new_process(model: str, entries: Sequence[dict[str, Any]], steps: Sequence[Any]) -> list[Any]:
    """Run steps in an engine of each entry, where no prompt has ever been seen, and return all their answers."""
    script = json.dumps({"model": model, "entries": list(entries), "steps": list(steps)})
    run = subprocess.run(
        [sys.executable, "-m", "tests.engines.vllm.tier_engine", script],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parents[3],
    )
    lines = run.stdout.splitlines()
    assert "CLOSED" in lines, run.stderr[-4000:]
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines if line.startswith("ANSWER ")]


@pytest.fixture(autouse=True)
def no_file_is_left() -> None:
    """vLLM keeps sockets and pipes of its own; what is ours is looked at by `open_tier_engine`."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> None:
    """The same for threads."""


@pytest.fixture
def open_tier_engine(model_of: Callable[[str], str], tmp_path: Path) -> Iterator[Callable[..., TierEngine]]:
    """Make an engine in this process; closed at the end, and then nothing of ours is left."""
    current: list[TierEngine] = []

    def make(entry: dict[str, Any], *, kind: str = "gqa", **values: Any) -> TierEngine:
        current.append(TierEngine(model_of(kind), entry, **values))
        return current[-1]

    yield make
    for engine in current:
        engine.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-")] == []
    descriptors = Path("/proc/self/fd").iterdir()
    assert [file for one in descriptors if (file := os.path.realpath(one)).startswith(str(tmp_path))] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("_", [pytest.param("", marks=NEEDS_REDIS)])
def test_a_new_process_takes_a_prompt_from_disk_and_from_redis_only(
    open_tier_engine: Callable[..., TierEngine], model_of: Callable[[str], str], reference: Any, tmp_path: Path, _: str
) -> None:
    with LocalRedis() as server:
        redis = {"redis": {"url": server.url}}
        first = open_tier_engine({**on_disk(tmp_path / "pages"), **redis})
        reference.check([first.ask(PROMPT)], [PROMPT])
        first.settle()
        first.close()

        entries = [on_disk(tmp_path / "pages"), redis]
        answers = in_new_process(model_of("gqa"), entries, ["metrics", PROMPT, "metrics"])

    for before, answer, after in (answers[:3], answers[3:]):
        added = {name: after.get(name, 0) - before.get(name, 0) for name in after}
        reference.check([answer], [PROMPT])
        assert answer["cached"] == FULL
        assert added[COMPUTED] == len(PROMPT) - FULL
        assert added[DISK] == FULL
        assert added["vllm:kvstore_tier_loaded_chunks"] == FULL // BLOCK


def test_after_everything_above_is_forgotten_the_disk_helps(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    forked = [*PROMPT[:600], *make_prompt(60, seed=12)]
    stranger = make_prompt(300, seed=13)
    engine = open_tier_engine(on_disk(tmp_path / "pages"))
    engine.ask(PROMPT)
    engine.forget()

    answers = [engine.ask(prompt) for prompt in (PROMPT, forked, stranger)]

    reference.check(answers, [PROMPT, forked, stranger])
    assert [answer["cached"] for answer in answers] == [FULL, 600 // BLOCK * BLOCK, 0]


def test_a_load_that_vllm_waits_for_within_its_step_brings_the_same_tokens(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.33 has such loads, by sync_load_budget_bytes; 0.32 takes no notice of it."""
    engine = open_tier_engine(on_disk(tmp_path / "pages"), offloading={"sync_load_budget_bytes": 1 << 30})
    asked: list[bool] = []
    submit_load = HostCopyWorker.submit_load
    monkeypatch.setattr(
        HostCopyWorker,
        "submit_load",
        lambda *arguments, expedited=False: [asked.append(expedited), submit_load(*arguments)][1],
    )
    engine.ask(PROMPT)
    engine.forget()

    answer = engine.ask(PROMPT)

    reference.check([answer], [PROMPT])
    assert answer["cached"] == FULL
    assert asked == [not vllm.__version__.startswith("0.32.")]


def test_a_flipped_byte_on_disk_is_computed_again(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    engine = open_tier_engine(on_disk(tmp_path / "pages"))
    engine.ask(PROMPT)
    engine.forget()
    row_bytes = engine.tier.block_size_bytes
    with (tmp_path / "pages" / "pages.slab").open("r+b") as slab:
        slots = [slot for slot in range(FULL // BLOCK) if slab.seek(slot * row_bytes) >= 0 and any(slab.read(64))]
        slab.seek(slots[len(slots) // 2] * row_bytes + 1000)
        byte = slab.read(1)[0]
        slab.seek(-1, os.SEEK_CUR)
        slab.write(bytes([byte ^ 1]))

    answer = engine.ask(PROMPT)

    reference.check([answer], [PROMPT])
    assert answer["cached"] < FULL
    assert engine.tier.core.mover.tier_counters("disk").corrupt_pages == 1
    engine.forget()  # what was computed again is stored again
    assert engine.ask(PROMPT)["cached"] == FULL


@pytest.mark.parametrize("_", [pytest.param("", marks=NEEDS_REDIS)])
def test_a_redis_that_dies_is_a_miss(open_tier_engine: Callable[..., TierEngine], reference: Any, _: str) -> None:
    other = make_prompt(200, seed=14)
    with LocalRedis() as server:
        engine = open_tier_engine({"redis": {"url": server.url, "timeout_s": 2.0}})
        engine.ask(PROMPT)
        engine.forget()
        assert engine.ask(PROMPT)["cached"] == FULL
        engine.forget()
    for _number in range(2):
        answers = [engine.ask(PROMPT), engine.ask(other)]

        reference.check(answers, [PROMPT, other])
        assert [answer["cached"] for answer in answers] == [0, 0]
        engine.forget()


@pytest.mark.parametrize("_", [pytest.param("", marks=NEEDS_REDIS)])
def test_what_came_from_redis_is_on_the_disk_afterwards(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path, _: str
) -> None:
    with LocalRedis() as server:
        redis = {"redis": {"url": server.url}}
        writer = open_tier_engine(redis)
        writer.ask(PROMPT)
        writer.settle()
        writer.close()
        reader = open_tier_engine({**on_disk(tmp_path / "pages"), **redis})
        from_redis = reader.ask(PROMPT)
        reader.forget()
        disk = reader.tier.core.counters.by_tier["disk"]
        assert (disk.loaded_chunks, disk.stored_chunks) == (0, FULL // BLOCK)

        from_disk = reader.ask(PROMPT)

    reference.check([from_redis, from_disk], [PROMPT, PROMPT])
    assert from_redis["cached"] == from_disk["cached"] == FULL
    assert disk.loaded_chunks == FULL // BLOCK


def test_a_model_with_sliding_windows_stores_and_loads_what_the_windows_need(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    engine = open_tier_engine(on_disk(tmp_path / "pages"), kind="sliding")
    first = engine.ask(PROMPT)
    engine.forget()

    second = engine.ask(PROMPT)

    reference.check([first, second], [PROMPT, PROMPT], kind="sliding")
    assert first["cached"] == 0
    assert second["cached"] == FULL
    groups = len(engine.tier._offloading_spec.config.groups)
    loaded = engine.tier.core.counters.by_tier["disk"].loaded_chunks
    assert FULL // BLOCK < loaded < groups * (FULL // BLOCK)


def test_chunks_of_several_blocks_are_copied_to_their_places(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    engine = open_tier_engine(on_disk(tmp_path / "pages"), offloading={"blocks_per_chunk": 4})
    forked = [*PROMPT[: 5 * BLOCK + 7], *make_prompt(90, seed=15)]
    engine.ask(PROMPT)
    engine.forget()
    engine.ask(PROMPT[: 2 * BLOCK + 1])  # vLLM's own cache then begins in the middle of a chunk

    answers = [engine.ask(PROMPT), engine.ask(forked)]

    reference.check(answers, [PROMPT, forked])
    assert answers[0]["cached"] == FULL // (4 * BLOCK) * 4 * BLOCK


def test_many_requests_at_once_give_the_same_tokens(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    prompts = [[*PROMPT[: 100 * number], *make_prompt(40, seed=20 + number)] for number in range(1, 7)]
    engine = open_tier_engine(on_disk(tmp_path / "pages"), offloading={"cpu_bytes_to_use": 8 * MiB})
    engine.generate(prompts)
    engine.forget()

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert sum(answer["cached"] for answer in answers) > 0


def test_an_unknown_key_stops_the_engine_at_its_start(open_tier_engine: Callable[..., TierEngine]) -> None:
    with pytest.raises(Exception, match="unknown key 'dsk'; did you mean 'disk'"):
        open_tier_engine({"dsk": {"path": "/tmp/x"}})

"""Steps of the secondary tier: lookups, the end of a step, drain and close. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from connectors.vllm_tier import core
from connectors.vllm_tier.lookup import LookupAnswer
from tests.helpers.rows import ROW_BYTES
from tests.helpers.tier_world import KEYS, TierWorld, key, tier_worlds


@pytest.fixture
def world() -> Iterator[TierWorld]:
    yield from tier_worlds()


def test_what_was_saved_is_a_hit_and_is_loaded(world: TierWorld) -> None:
    saved = world.save(KEYS, [0, 1, 2, 3])
    assert saved.success
    assert saved.num_bytes == 2 * 4 * ROW_BYTES

    assert world.look([*KEYS, key("x")]) == [LookupAnswer.HIT] * 4 + [LookupAnswer.MISS]
    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert loaded.success
    assert loaded.ok == tuple(KEYS)
    assert loaded.num_bytes == 4 * ROW_BYTES
    assert all(world.rows.has(10 + i, i + 1) for i in range(4))


def test_one_step_asks_each_tier_once_whatever_it_wants_to_know(world: TierWorld) -> None:
    keys = [key(str(number)) for number in range(50)]

    world.look(keys)

    assert world.disk.calls["contains"] == 1
    assert world.redis.calls["contains"] == 1


def test_a_lookup_does_not_wait_for_a_tier_that_hangs(world: TierWorld) -> None:
    world.redis.hang(only=("contains",))

    assert world.core.lookup(KEYS[0]) is LookupAnswer.ASK_AGAIN
    world.core.end_step()
    world.redis.wait_for_hanging()

    assert world.core.lookup(KEYS[0]) is LookupAnswer.ASK_AGAIN


def test_a_disk_hit_does_not_wait_for_redis(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.redis.hang(only=("contains",))

    assert world.look(KEYS) == [LookupAnswer.HIT] * 4


def test_with_every_tier_down_lookups_miss_and_jobs_end(world: TierWorld) -> None:
    for tier in (world.disk, world.redis):
        tier.fail()
    for name in "efgh":
        assert not world.save([key(name)], [0]).success

    assert world.core.lookup(KEYS[0]) is LookupAnswer.MISS
    assert not world.load(KEYS, [10, 11, 12, 13]).success
    assert not world.save(KEYS, [0, 1, 2, 3]).success


def test_drain_returns_when_all_jobs_have_ended(world: TierWorld) -> None:
    world.core.jobs.save(1, KEYS, [0, 1, 2, 3])
    world.core.jobs.load(2, KEYS, [10, 11, 12, 13])

    world.core.drain()

    assert {done.job_id for done in world.core.take_done()} == {1, 2}
    assert not world.core.jobs.has_any


def test_closing_stores_what_is_under_way(world: TierWorld) -> None:
    world.disk.slow_down(0.05)
    world.core.jobs.save(1, KEYS, [0, 1, 2, 3])

    assert world.core.close(20.0) == 0

    assert [world.core.counters.by_tier[tier].stored_chunks for tier in ("disk", "redis")] == [4, 4]


def test_an_engine_that_only_asks_again_waits_for_the_answer(world: TierWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "IDLE_STEP_S", 60.0)
    monkeypatch.setattr(core, "IDLE_WAIT_S", 20.0)
    world.save(KEYS[:1], [0])

    first = world.core.lookup(KEYS[0])
    world.core.end_step()  # the step before may have computed
    world.core.end_step()

    assert (first, world.core.lookup(KEYS[0])) == (LookupAnswer.ASK_AGAIN, LookupAnswer.HIT)

"""Loads, saves and fills over two tiers that fail on command. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from connectors.vllm_tier import jobs
from connectors.vllm_tier.lookup import LookupAnswer
from kvstore.page import PageKey
from tests.helpers.rows import ROW_BYTES
from tests.helpers.tier_world import KEYS, TierWorld, key, tier_worlds
from tests.helpers.waiting import wait_until


@pytest.fixture
def world() -> Iterator[TierWorld]:
    yield from tier_worlds()


def test_saves_go_to_both_tiers_and_loads_come_from_disk(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)

    world.load(KEYS, [10, 11, 12, 13])

    assert world.disk.calls["read_into"] == 2  # batches of two
    assert world.redis.calls["read_into"] == 0
    assert world.core.counters.by_tier["redis"].stored_chunks == 4


def test_what_the_disk_lost_comes_from_redis_in_the_same_job(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)
    world.disk.corrupt_next(1)
    world.disk.lose_next(1)

    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert loaded.success
    assert all(world.rows.has(10 + i, i + 1) for i in range(4))
    assert world.core.counters.by_tier["redis"].loaded_chunks == 2
    assert world.core.counters.by_tier["disk"].failed_chunks == 2


def test_what_redis_alone_had_is_offered_to_the_disk_once(world: TierWorld) -> None:
    world.save(KEYS[:2], [0, 1])
    world.disk.inner.delete([world.core._chunks.name(KEYS[0])], timeout_s=1.0)
    core = world.open()
    assert world.look(KEYS[:2], core) == [LookupAnswer.HIT] * 2
    wait_until(lambda: (core.take_done(), not core.mover.num_open)[1], "the disk, too, has answered")

    assert world.load(KEYS[:2], [10, 11], core).success
    assert core.jobs.take_fills() == [KEYS[0]]
    assert core.jobs.take_fills() == []

    core.jobs.fill(99, KEYS[:1], [10])
    assert world.job(core).success
    assert world.disk.inner.contains([core._chunks.name(KEYS[0])], timeout_s=1.0) == [True]
    assert core.counters.by_tier["redis"].stored_chunks == 0
    core.mover._mover.close(5.0)  # the tiers are the world's


def test_a_disk_that_is_down_is_not_filled(world: TierWorld) -> None:
    world.save(KEYS[:1], [0])
    world.disk.fail()
    for name in "efgh":
        world.save([key(name)], [0])
    world.core.lookups.stored("redis", KEYS[:1])
    world.look(KEYS[:1])

    assert world.load(KEYS[:1], [10]).success
    assert world.core.jobs.take_fills() == []


def test_a_chunk_no_tier_gives_is_reported_and_not_offered_again(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)
    for tier in (world.disk, world.redis):
        tier.inner.delete([world.core._chunks.name(KEYS[1])], timeout_s=1.0)

    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert not loaded.success
    assert loaded.ok == (KEYS[0], KEYS[2], KEYS[3])
    assert world.rows.has(11, 0)
    assert world.look(KEYS) == [LookupAnswer.HIT, LookupAnswer.MISS, LookupAnswer.HIT, LookupAnswer.HIT]
    assert world.core.counters.lost_loads == 1


def test_a_chunk_that_failed_and_was_computed_and_stored_again_is_offered(world: TierWorld) -> None:
    world.core.lookups.failed([KEYS[0]])
    assert world.core.lookup(KEYS[0]) is LookupAnswer.MISS

    world.save(KEYS[:1], [0])

    assert world.look(KEYS[:1]) == [LookupAnswer.HIT]


def test_a_tier_that_fails_is_taken_out_and_the_other_goes_on(world: TierWorld) -> None:
    world.redis.fail()
    for name in "efgh":
        assert world.save([key(name)], [0]).success

    assert not world.core.mover.is_up("redis")
    assert world.look([key("e")]) == [LookupAnswer.HIT]
    assert world.load([key("e")], [12]).success


def test_a_load_that_hangs_ends_at_its_deadline_and_its_rows_are_safe(
    world: TierWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    monkeypatch.setattr(jobs, "GRACE_S", 0.05)
    core = world.open(load_deadline_s=0.2)
    world.disk.hang(honour_timeout=False, only=("read_into",))
    world.look(KEYS, core)

    done = world.load(KEYS[:2], [10, 11], core)
    world.rows[10] = world.rows[11] = 88
    world.disk.recover()
    while core.mover.num_open:
        core.mover.poll(1.0)

    assert not done.success
    assert done.ok == ()
    assert world.rows.has(10, 88)
    assert world.rows.has(11, 88)
    assert core.counters.given_up == 1
    assert core.lookup(KEYS[0]) is LookupAnswer.MISS
    core.mover._mover.close(5.0)


def test_saves_hold_a_bounded_number_of_rows(world: TierWorld) -> None:
    world.disk.hang(only=("write_from",))
    keys = [key(str(number)) for number in range(12)]
    world.core.jobs.save(1, keys[:6], list(range(6)))
    world.core.jobs.save(2, keys[6:], list(range(6)))
    world.disk.wait_for_hanging()

    assert world.core.counters.skipped_chunks == 4

    world.disk.recover()
    world.core.drain()
    first, second = world.core.take_done()
    assert first.success
    assert not second.success
    assert second.ok == tuple(keys[6:8])
    world.core.jobs.save(3, keys[:6], list(range(6)))  # their rows are free again
    assert world.core.counters.skipped_chunks == 4
    world.core.drain()


def test_events_are_kept_only_where_somebody_takes_them(world: TierWorld) -> None:
    world.save(KEYS[:1], [0])
    assert world.core.jobs.stored == []

    world.core.jobs.keeps_events = True
    world.save(KEYS[1:2], [1])
    world.load([key("x")], [12])

    assert world.core.jobs.stored == [KEYS[1]]
    assert world.core.jobs.lost == [key("x")]


def test_a_job_that_could_not_begin_is_reported_once(world: TierWorld) -> None:
    world.core.jobs.fail(7, True, 3)
    world.core.jobs.fail(7, True, 3)

    (done,) = world.core.take_done()
    assert (done.job_id, done.success, done.ok) == (7, False, ())


def test_a_load_of_large_chunks_goes_in_calls_of_few(world: TierWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOAD_BATCH_BYTES", ROW_BYTES + 1)
    core, calls = world.open(), []
    world.save(KEYS, [0, 1, 2, 3])
    read_into = world.disk.read_into

    def counted(keys: Sequence[PageKey], *given: object, **named: object) -> list[bool]:
        calls.append(len(keys))
        return read_into(keys, *given, **named)  # type: ignore[arg-type]

    world.disk.read_into = counted  # type: ignore[method-assign]
    try:
        assert world.load(KEYS, [4, 5, 6, 7], core).success
    finally:
        core.close(1.0)

    assert calls == [1, 1, 1, 1]

"""Lookups and jobs over two tiers that fail on command; no vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from connectors import vllm_tier_core
from connectors.vllm_tier_core import JobDone, TierCore, TierSettings
from connectors.vllm_tier_lookup import Answer
from connectors.vllm_tier_metrics import TierSamples, definitions
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.pages import FakeClock
from tests.helpers.rows import ROW_BYTES, Rows, faulty, open_mover


def key(name: str, group: int = 0) -> bytes:
    """As vLLM makes them: block hash and group."""
    return name.encode().ljust(32, b"-") + group.to_bytes(4, "big")


KEYS = [key(name) for name in "abcd"]


@dataclass
class World:
    """A core, its rows and its tiers."""

    rows: Rows = field(default_factory=Rows)
    disk: FaultyTier = field(default_factory=lambda: faulty("disk"))
    redis: FaultyTier = field(default_factory=lambda: faulty("redis"))
    wall: FakeClock = field(default_factory=lambda: FakeClock(4e9))  # later than the tiers' own clock
    jobs: int = 0

    def __post_init__(self) -> None:
        self.core = self.open()

    def open(self, root: bytes = b"model", **changes: object) -> TierCore:
        values: dict[str, object] = {
            "root": root,
            "batch_pages": 2,
            "max_saving_rows": 8,
            "lookup_deadline_s": 5.0,
            "load_deadline_s": 20.0,
            "touch_interval_s": 60.0,
            "ttl_s": {"redis": 100.0},
        }
        settings = TierSettings(**{**values, **changes})  # type: ignore[arg-type]
        mover = open_mover(self.rows, [self.disk, self.redis])
        return TierCore(mover, settings, wall=self.wall)

    def job(self, core: TierCore | None = None) -> JobDone:
        """The next job that ends."""
        core = core or self.core
        until = time.monotonic() + 20
        while time.monotonic() < until:
            done = core.take_done()
            if done:
                (one,) = done
                return one
            time.sleep(0.001)
        raise AssertionError("no job ended")

    def save(self, keys: list[bytes], rows: list[int]) -> JobDone:
        self.jobs += 1
        self.core.save(self.jobs, keys, rows)
        return self.job()

    def load(self, keys: list[bytes], rows: list[int], core: TierCore | None = None) -> JobDone:
        self.jobs += 1
        (core or self.core).load(self.jobs, keys, rows)
        return self.job(core)

    def look(self, keys: list[bytes], core: TierCore | None = None) -> list[Answer]:
        """Lookups as in vLLM: again in every step until all are answered."""
        core = core or self.core
        until = time.monotonic() + 20
        while time.monotonic() < until:
            answers = [core.lookup(one) for one in keys]
            core.end_step()
            if Answer.ASK_AGAIN not in answers:
                return answers
            time.sleep(0.001)
        raise AssertionError("no answer")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    for row in range(4):
        world.rows[row] = row + 1
    yield world
    for tier in (world.disk, world.redis):
        tier.recover()
    world.core.close(20.0)


def test_what_was_saved_is_a_hit_and_is_loaded(world: World) -> None:
    saved = world.save(KEYS, [0, 1, 2, 3])
    assert saved.success
    assert saved.num_bytes == 2 * 4 * ROW_BYTES

    assert world.look([*KEYS, key("x")]) == [Answer.HIT] * 4 + [Answer.MISS]
    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert loaded.success
    assert loaded.ok == tuple(KEYS)
    assert loaded.num_bytes == 4 * ROW_BYTES
    assert all(world.rows.has(10 + i, i + 1) for i in range(4))


def test_saves_go_to_both_tiers_and_loads_come_from_disk(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)

    world.load(KEYS, [10, 11, 12, 13])

    assert world.disk.calls["read_into"] == 2  # batches of two
    assert world.redis.calls["read_into"] == 0
    assert world.core.counters.by_tier["redis"].stored_chunks == 4


def test_one_step_asks_each_tier_once_whatever_it_wants_to_know(world: World) -> None:
    keys = [key(str(number)) for number in range(50)]

    world.look(keys)

    assert world.disk.calls["contains"] == 1
    assert world.redis.calls["contains"] == 1


def test_a_lookup_does_not_wait_for_a_tier_that_hangs(world: World) -> None:
    world.redis.hang(only=("contains",))

    assert world.core.lookup(KEYS[0]) is Answer.ASK_AGAIN
    world.core.end_step()
    world.redis.wait_for_hanging()

    assert world.core.lookup(KEYS[0]) is Answer.ASK_AGAIN


def test_a_disk_hit_does_not_wait_for_redis(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.redis.hang(only=("contains",))

    assert world.look(KEYS) == [Answer.HIT] * 4


def test_what_the_disk_lost_comes_from_redis_in_the_same_job(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)
    world.disk.corrupt_next(1)
    world.disk.lose_next(1)

    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert loaded.success
    assert all(world.rows.has(10 + i, i + 1) for i in range(4))
    assert world.core.counters.by_tier["redis"].loaded_chunks == 2
    assert world.core.counters.by_tier["disk"].failed_chunks == 2


def test_what_redis_alone_had_is_offered_to_the_disk_once(world: World) -> None:
    world.save(KEYS[:2], [0, 1])
    world.disk.inner.delete([world.core._name(KEYS[0])], timeout_s=1.0)
    core = world.open()
    assert world.look(KEYS[:2], core) == [Answer.HIT] * 2
    while core.mover.num_open:  # the disk, too, has answered
        core.take_done()
        time.sleep(0.001)

    assert world.load(KEYS[:2], [10, 11], core).success
    assert core.take_fills() == [KEYS[0]]
    assert core.take_fills() == []

    core.fill(99, KEYS[:1], [10])
    assert world.job(core).success
    assert world.disk.inner.contains([core._name(KEYS[0])], timeout_s=1.0) == [True]
    assert core.counters.by_tier["redis"].stored_chunks == 0
    core.mover._mover.close(5.0)  # the tiers are the world's


def test_a_disk_that_is_down_is_not_filled(world: World) -> None:
    world.save(KEYS[:1], [0])
    world.disk.fail()
    for name in "efgh":
        world.save([key(name)], [0])
    world.core.lookups.stored("redis", KEYS[:1])
    world.look(KEYS[:1])

    assert world.load(KEYS[:1], [10]).success
    assert world.core.take_fills() == []


def test_a_chunk_no_tier_gives_is_reported_and_not_offered_again(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)
    for tier in (world.disk, world.redis):
        tier.inner.delete([world.core._name(KEYS[1])], timeout_s=1.0)

    loaded = world.load(KEYS, [10, 11, 12, 13])

    assert not loaded.success
    assert loaded.ok == (KEYS[0], KEYS[2], KEYS[3])
    assert world.rows.has(11, 0)
    assert world.look(KEYS) == [Answer.HIT, Answer.MISS, Answer.HIT, Answer.HIT]
    assert world.core.counters.lost_loads == 1


def test_a_chunk_that_failed_and_was_computed_and_stored_again_is_offered(world: World) -> None:
    world.core.lookups.failed([KEYS[0]])
    assert world.core.lookup(KEYS[0]) is Answer.MISS

    world.save(KEYS[:1], [0])

    assert world.look(KEYS[:1]) == [Answer.HIT]


def test_another_namespace_shares_no_chunk(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    other = world.open(root=b"other model")

    assert world.look(KEYS, other) == [Answer.MISS] * 4
    other.mover.poll()
    other.mover._mover.close(5.0)  # the tiers are the world's


def test_groups_of_one_block_are_chunks_of_their_own(world: World) -> None:
    world.save([key("a", 0)], [0])

    assert world.look([key("a", 0), key("a", 1)]) == [Answer.HIT, Answer.MISS]


def test_a_tier_that_fails_is_taken_out_and_the_other_goes_on(world: World) -> None:
    world.redis.fail()
    for name in "efgh":
        assert world.save([key(name)], [0]).success

    assert not world.core.mover.is_up("redis")
    assert world.look([key("e")]) == [Answer.HIT]
    assert world.load([key("e")], [12]).success


def test_with_every_tier_down_lookups_miss_and_jobs_end(world: World) -> None:
    for tier in (world.disk, world.redis):
        tier.fail()
    for name in "efgh":
        assert not world.save([key(name)], [0]).success

    assert world.core.lookup(KEYS[0]) is Answer.MISS
    assert not world.load(KEYS, [10, 11, 12, 13]).success
    assert not world.save(KEYS, [0, 1, 2, 3]).success


def test_a_load_that_hangs_ends_at_its_deadline_and_its_rows_are_safe(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    monkeypatch.setattr(vllm_tier_core, "GRACE_S", 0.05)
    core = world.open(load_deadline_s=0.2)
    world.look(KEYS, core)
    world.disk.hang(honour_timeout=False, only=("read_into",))

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
    assert core.lookup(KEYS[0]) is Answer.MISS
    core.mover._mover.close(5.0)


def test_saves_hold_a_bounded_number_of_rows(world: World) -> None:
    world.disk.hang(only=("write_from",))
    keys = [key(str(number)) for number in range(12)]
    world.core.save(1, keys[:6], list(range(6)))
    world.core.save(2, keys[6:], list(range(6)))
    world.disk.wait_for_hanging()

    assert world.core.counters.skipped_chunks == 4

    world.disk.recover()
    world.core.drain()
    first, second = world.core.take_done()
    assert first.success
    assert not second.success
    assert second.ok == tuple(keys[6:8])
    world.core.save(3, keys[:6], list(range(6)))  # their rows are free again
    assert world.core.counters.skipped_chunks == 4
    world.core.drain()


def test_drain_returns_when_all_jobs_have_ended(world: World) -> None:
    world.core.save(1, KEYS, [0, 1, 2, 3])
    world.core.load(2, KEYS, [10, 11, 12, 13])

    world.core.drain()

    assert {done.job_id for done in world.core.take_done()} == {1, 2}
    assert not world.core.has_jobs


def test_closing_stores_what_is_under_way(world: World) -> None:
    world.disk.slow_down(0.05)
    world.core.save(1, KEYS, [0, 1, 2, 3])

    assert world.core.close(20.0) == 0

    assert [world.core.counters.by_tier[tier].stored_chunks for tier in ("disk", "redis")] == [4, 4]


def test_pages_are_stored_with_the_time_to_live_of_their_tier(world: World) -> None:
    world.save(KEYS[:1], [0])

    (on_disk,), (on_redis,) = list(world.disk.inner.scan()), list(world.redis.inner.scan())
    assert on_disk.meta.expires_at == 0
    assert on_redis.meta.expires_at == world.wall() + 100.0


def test_a_loaded_chunk_is_touched_tail_first_and_once_in_an_interval(world: World) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)

    for _ in range(3):
        world.load(KEYS[:2], [10, 11])
        world.core.end_step()
    world.look([key("x")])  # lanes are first come, first served: the touch went before
    while world.core.mover.num_open:
        world.core.take_done()
        time.sleep(0.001)

    assert world.disk.calls["touch"] == 1
    order = [page.key for page in world.disk.inner.scan()]
    assert order == [world.core._name(one) for one in (KEYS[2], KEYS[3], KEYS[1], KEYS[0])]


def test_events_are_kept_only_where_somebody_takes_them(world: World) -> None:
    world.save(KEYS[:1], [0])
    assert world.core.stored == []

    world.core.keeps_events = True
    world.save(KEYS[1:2], [1])
    world.load([key("x")], [12])

    assert world.core.stored == [KEYS[1]]
    assert world.core.lost == [key("x")]


def test_a_job_that_could_not_begin_is_reported_once(world: World) -> None:
    world.core.fail(7, True, 3)
    world.core.fail(7, True, 3)

    (done,) = world.core.take_done()
    assert (done.job_id, done.success, done.ok) == (7, False, ())


def test_samples_are_what_was_added_since_the_last_ones(world: World) -> None:
    samples = TierSamples(world.core)
    world.save(KEYS, [0, 1, 2, 3])

    first = {(sample.name, sample.labels): sample.value for sample in samples.take()}

    assert first["vllm:kvstore_tier_stored_chunks", ("disk",)] == 4
    assert first["vllm:kvstore_tier_stored_bytes", ("redis",)] == 4 * ROW_BYTES
    assert first["vllm:kvstore_tier_breaker_open", ("disk",)] == 0
    assert samples.take() == []
    world.save(KEYS[:1], [0])
    assert ("vllm:kvstore_tier_stored_chunks", 1) in {(one.name, one.value) for one in samples.take()}
    assert {name for name, _ in first} <= {metric.name for metric in definitions()}

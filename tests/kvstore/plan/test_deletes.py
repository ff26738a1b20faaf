"""Deletes are owed like writes: sent, sent again, never overtaken by a write of the same key, and told of."""

from __future__ import annotations

import pytest

from eviction.registry import make_policy
from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.page import page_key
from kvstore.plan import deletes as module
from kvstore.plan.deletes import MAX_BACKOFF_S, MAX_CLEAR_TRIES, Deletes
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Request, Transfer
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.transfers import TransferBook
from tests.helpers.planners import LAYOUT, land, make, path, publish, save

REDIS = TierPlan("redis", None, None, is_indexed=False, is_shared=True, can_clear=True)


class Medium:
    """A planner over a disk and a Redis of sets, whose lanes the test turns."""

    def __init__(self, num_slots: int = 16) -> None:
        disk = TierPlan("disk", 64, make_policy("lru"), is_indexed=True, is_shared=False)
        settings = PlanSettings(num_slots, load_or_recompute=False)
        self.planner = Planner(LAYOUT, settings, make_policy("lru"), [disk, REDIS])
        self.has: dict[str, set[bytes]] = {"disk": set(), "redis": set()}
        self.waiting: list[Transfer] = []

    def collect(self) -> list[Transfer]:
        """What the lanes have to do."""
        self.waiting += self.planner.take_transfers()
        return self.waiting

    def carry(self, transfer: Transfer, *, error: str | None = None) -> None:
        """Have a lane do it, or fail."""
        self.waiting.remove(transfer)
        has = self.has[transfer.tier]
        if error is None:
            if transfer.op is Op.SPILL:
                has.update(transfer.keys)
            elif transfer.op is Op.DELETE:
                has.difference_update(transfer.keys)
            elif transfer.op is Op.CLEAR:
                has.clear()
        ok = (error is None,) * len(transfer.keys)
        self.planner.outcome(Outcome(transfer.id, ok, 0.001, 1, error), 0.0)
        self.planner.check()

    def carry_all(self, *, but: tuple[Op, ...] = ()) -> None:
        """Have the lanes do all but some kinds."""
        while transfers := [t for t in self.collect() if t.op not in but]:
            self.carry(transfers[0])

    def next(self, op: Op, tier: str) -> Transfer:
        (transfer,) = [t for t in self.collect() if t.op is op and t.tier == tier]
        return transfer

    def save(self, request: Request) -> None:
        publish(self.planner, request)
        self.carry_all()


def keys_of(request: Request) -> set[bytes]:
    return {page_key(key) for key in request.keys}


@pytest.fixture
def world() -> Medium:
    return Medium()


def test_a_delete_that_failed_is_owed_and_sent_again_after_a_while(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry(world.next(Op.DELETE, "disk"), error="timed out")
    world.carry_all()

    told = world.planner.flush_result(world.planner.told())
    assert not told
    assert told.undeleted == {"disk": {"waiting": 2}}
    world.planner.tick(0.1)
    assert world.collect() == []  # not at once

    world.planner.tick(1.0)
    world.carry_all()
    assert world.has == {"disk": set(), "redis": set()}
    assert world.planner.flush_result(world.planner.told())


def test_what_a_tier_that_is_out_is_owed_is_deleted_when_it_is_back(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.set_tier_up("redis", False, 0.0)
    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry_all()
    assert world.has["redis"] == keys_of(path(0, 2))
    assert world.planner.flush_result(world.planner.told()).undeleted == {"redis": {"out": 2}}

    world.planner.set_tier_up("redis", True, 1.0)
    world.carry_all()

    assert world.has["redis"] == set()
    assert world.planner.flush_result(world.planner.told())


def test_a_tier_that_refuses_deletes_is_owed_them_and_takes_writes_meanwhile(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.set_tier_up("redis", False, 0.0, {Direction.DELETE})
    world.planner.forget(path(0, 2), 0, 0.0)
    world.save(path(1, 2))

    assert world.has["redis"] >= keys_of(path(1, 2))
    assert world.planner.flush_result(world.planner.told()).undeleted == {"redis": {"out": 2}}


def test_a_save_after_a_delete_is_written_after_it_and_stays(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.forget(path(0, 2), 0, 0.0)
    deletes = [world.next(Op.DELETE, tier) for tier in ("disk", "redis")]

    publish(world.planner, path(0, 2))
    assert [t.op for t in world.collect()] == [Op.DELETE, Op.DELETE]  # the writes wait
    assert not world.planner.flush_result(world.planner.told())
    for delete in deletes:
        world.carry(delete)
    world.carry_all()

    assert world.has == {"disk": keys_of(path(0, 2)), "redis": keys_of(path(0, 2))}
    assert world.planner.flush_result(world.planner.told())


def test_a_save_after_a_delete_that_fails_waits_for_the_next_try(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.forget(path(0, 2), 0, 0.0)
    publish(world.planner, path(0, 2))
    world.carry(world.next(Op.DELETE, "disk"), error="timed out")
    world.carry_all()
    assert [t.op for t in world.collect()] == []

    world.planner.tick(60.0)
    world.carry_all()

    assert world.has["disk"] == keys_of(path(0, 2))


def test_a_delete_after_a_write_that_is_under_way_wins(world: Medium) -> None:
    publish(world.planner, path(0, 2))
    spills = [t for t in world.collect() if t.op is Op.SPILL]

    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry_all(but=(Op.SPILL,))
    for spill in spills:
        world.carry(spill)
    world.carry_all()

    assert world.has == {"disk": set(), "redis": set()}
    assert world.planner.books.host.pool.num_free == 16


def test_a_write_that_failed_may_have_been_done_and_is_deleted_all_the_same(world: Medium) -> None:
    publish(world.planner, path(0, 2))
    spill = world.next(Op.SPILL, "disk")
    world.planner.forget(path(0, 2), 0, 0.0)
    world.has["disk"].update(spill.keys)

    world.carry(spill, error="timed out")
    world.carry_all()

    assert world.has["disk"] == set()


def test_a_write_that_had_failed_before_is_deleted_all_the_same(world: Medium) -> None:
    publish(world.planner, path(0, 2))
    spill = world.next(Op.SPILL, "disk")
    world.has["disk"].update(spill.keys)
    world.carry(spill, error="timed out")

    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry_all()

    assert world.has["disk"] == set()


def test_write_delete_and_write_of_one_key_keep_their_order(world: Medium) -> None:
    publish(world.planner, path(0, 2))
    first = world.next(Op.SPILL, "disk")
    world.planner.forget(path(0, 2), 0, 0.0)
    publish(world.planner, path(0, 2))
    world.carry_all(but=(Op.SPILL,))

    assert world.next(Op.SPILL, "disk") is first  # the second waits
    world.carry(first)
    assert [t.op for t in world.collect() if t.tier == "disk"] == [Op.DELETE]
    world.carry_all()

    assert world.has["disk"] == keys_of(path(0, 2))
    world.planner.lookup(path(0, 2), 0.0)
    assert world.planner.flush_result(world.planner.told())


def test_what_is_to_be_deleted_is_not_found_there(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.set_tier_up("redis", False, 0.0, {Direction.DELETE})
    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry_all()

    request = path(0, 3)
    assert world.planner.lookup(request, 0.0).pending
    probe = world.next(Op.PROBE, "redis")
    world.waiting.remove(probe)
    world.planner.outcome(Outcome(probe.id, (True,) * len(probe.keys), 0.001, 0), 0.0)

    assert world.planner.lookup(request, 0.0).num_blocks == 0


def test_a_clear_of_a_tier_that_knows_itself_what_it_has_is_one_debt(world: Medium) -> None:
    world.save(path(0, 2))
    world.has["redis"].add(b"what only Redis has")
    world.planner.set_tier_up("redis", False, 0.0)

    assert world.planner.clear(0.0) == 2
    world.carry_all()
    assert world.planner.flush_result(world.planner.told()).undeleted == {"redis": {"out": 1}}
    world.planner.set_tier_up("redis", True, 0.0)
    clear = world.next(Op.CLEAR, "redis")
    assert clear.keys == ()
    world.carry_all()

    assert world.has == {"disk": set(), "redis": set()}
    assert world.planner.flush_result(world.planner.told())


def test_what_is_saved_after_a_clear_is_written_after_it_and_stays(world: Medium) -> None:
    world.save(path(0, 2))
    publish(world.planner, path(1, 2))
    spill = world.next(Op.SPILL, "redis")
    world.planner.clear(0.0)
    publish(world.planner, path(2, 2))
    world.carry_all(but=(Op.SPILL, Op.CLEAR))
    assert [t.op for t in world.collect() if t.tier == "redis"] == [Op.SPILL]  # the clear waits for it

    world.carry(spill)
    assert [t.op for t in world.collect() if t.tier == "redis"] == [Op.CLEAR]  # and the next write for the clear
    world.carry_all()

    assert world.has == {"disk": keys_of(path(2, 2)), "redis": keys_of(path(2, 2))}


def test_a_clear_that_comes_while_one_is_under_way_is_another_one(world: Medium) -> None:
    world.save(path(0, 2))
    world.planner.clear(0.0)
    first = world.next(Op.CLEAR, "redis")
    world.planner.clear(0.0)

    world.carry(first)

    assert world.next(Op.CLEAR, "redis") is not first
    world.carry_all()
    assert world.planner.flush_result(world.planner.told())


def test_a_clear_that_is_refused_by_a_tier_that_takes_writes_is_given_up_and_told(
    world: Medium, caplog: pytest.LogCaptureFixture
) -> None:
    world.save(path(0, 2))
    told = world.planner.told()
    world.planner.clear(0.0)
    for num_tries in range(MAX_CLEAR_TRIES):
        world.carry(world.next(Op.CLEAR, "redis"), error="no permission for SCAN")
        world.planner.tick((1 + num_tries) * MAX_BACKOFF_S)
    publish(world.planner, path(1, 2))
    world.carry_all()

    assert world.has["redis"] == keys_of(path(0, 2)) | keys_of(path(1, 2))
    assert world.planner.flush_result(told).undeleted == {"redis": {"dropped": 1}}
    assert world.planner.flush_result(told)  # told once
    assert "tier redis: it could not be cleared" in caplog.text


def test_a_million_keys_that_a_tier_cannot_be_told_to_delete_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    deletes = Deletes("redis", TransferBook(), max_owed=1000)

    deletes.owe(page_key(key) for key in path(0, 1500).keys)

    assert len(deletes) == 1000
    assert deletes.num_dropped == 500


def test_pages_that_made_room_are_no_deletes_of_a_caller_and_are_not_owed_in_a_flush() -> None:
    planner, _ = make(num_slots=16, disk_pages=4)
    for seed in range(4):
        save(planner, path(seed, 4))

    result = planner.flush_result(planner.told())

    assert result
    assert result.undeleted == {}


def test_a_tier_that_is_taken_away_is_owed_no_deletes_and_that_is_told(world: Medium) -> None:
    world.save(path(0, 2))
    told = world.planner.told()
    world.planner.set_tier_up("redis", False, 0.0, ALL_DIRECTIONS)
    world.planner.forget(path(0, 2), 0, 0.0)
    world.carry_all()

    world.planner.detach_tier("redis")

    assert world.planner.flush_result(told).undeleted == {"redis": {"dropped": 2}}
    assert world.planner.flush_result(told)


def test_deletes_go_in_batches_and_few_at_once() -> None:
    flights = TransferBook()
    deletes = Deletes("disk", flights, max_owed=100_000)
    deletes.owe(page_key(key) for key in path(0, 10 * module.DELETE_BATCH).keys)

    deletes.pump(0.0, may_clear=True)

    assert [len(t.keys) for t in flights.take()] == [module.DELETE_BATCH] * module.MAX_UNDER_WAY


def test_a_delete_that_a_write_waits_for_goes_first() -> None:
    flights = TransferBook()
    deletes = Deletes("disk", flights, max_owed=100_000)
    keys = [page_key(key) for key in path(0, 10 * module.DELETE_BATCH).keys]
    deletes.owe(keys)

    deletes.hurry(keys[-1])
    deletes.pump(0.0, may_clear=True)

    assert flights.take()[0].keys[0] == keys[-1]


def test_nothing_is_left_over_when_all_is_deleted(world: Medium) -> None:
    for seed in range(3):
        world.save(path(seed, 4))
        world.planner.forget(path(seed, 4), 1, 0.0)
    world.planner.clear(0.0)
    world.carry_all()
    land(world.planner)

    assert not any(tier.deletes.is_any or len(tier.deletes) for tier in world.planner.books.tiers)
    assert world.has == {"disk": set(), "redis": set()}

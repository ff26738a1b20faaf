"""Times to live when clocks are set, machines sleep and ticks are late."""

from __future__ import annotations

import pytest

from kvstore.page import PageMeta, page_key
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, Request, RequestOptions, Transfer
from tests.helpers.clocks import Clocks
from tests.helpers.planners import land, make, path, publish, save

DAY = 86_400.0
STEPS = [-3 * DAY, -DAY, -120.0, 120.0, DAY, 3 * DAY]


def found(planner: Planner, request: Request) -> dict[str, int]:
    """Blocks of a match by tier."""
    return planner.lookup(request, 0.0).by_tier


def carry(planner: Planner, *ops: Op) -> list[Transfer]:
    """Have all transfers succeed; those of `ops` return."""
    carried: list[Transfer] = []
    while transfers := planner.take_transfers():
        for transfer in transfers:
            carried += [transfer] if transfer.op in ops else []
            planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 1), 0.0)
    return carried


@pytest.mark.parametrize("step", STEPS)
def test_what_is_written_after_a_step_of_the_clock_has_its_whole_time_from_then_on(step: float) -> None:
    clocks = Clocks()
    planner, _ = make(4, 64, clock=clocks, disk_ttl_s=3600.0)
    save(planner, path(0, 4))

    clocks.set_by(step)
    publish(planner, path(1, 4))
    (spill,) = carry(planner, Op.SPILL)
    save(planner, path(2, 4))

    assert {meta.expires_at for meta in spill.metas} == {clocks.unix + 3600.0}
    clocks.advance(3599.0)
    assert found(planner, path(1, 4)) == {"disk": 4}
    clocks.advance(2.0)
    assert found(planner, path(1, 4)) == {}
    planner.check()


@pytest.mark.parametrize("step", STEPS)
def test_a_use_after_a_step_of_the_clock_moves_the_deadline_on_the_medium_to_the_whole_time_from_then_on(
    step: float,
) -> None:
    clocks = Clocks()
    planner, _ = make(8, 64, clock=clocks, disk_ttl_s=4 * DAY)
    save(planner, path(0, 4))

    clocks.set_by(step)
    planner.finished(path(0, 4), 1000.0)

    (touch,) = carry(planner, Op.TOUCH)
    assert touch.expires_at == clocks.unix + 4 * DAY


def test_old_pages_on_disk_are_over_when_the_wall_clock_says_so() -> None:
    clocks = Clocks()
    planner, _ = make(4, 64, clock=clocks, disk_ttl_s=3600.0)
    save(planner, path(0, 4))
    save(planner, path(1, 4))

    clocks.set_by(3000.0)
    assert found(planner, path(0, 4)) == {"disk": 4}
    clocks.set_by(601.0)
    assert found(planner, path(0, 4)) == {}
    planner.check()


def test_a_page_has_never_more_left_than_its_time_to_live_though_the_clock_was_ahead() -> None:
    clocks = Clocks()
    planner, _ = make(4, 64, clock=clocks, disk_ttl_s=3600.0)
    clocks.set_by(365 * DAY)
    save(planner, path(0, 4))
    save(planner, path(1, 4))

    clocks.set_by(-365 * DAY)
    assert found(planner, path(0, 4)) == {"disk": 4}
    planner.tick(0.0)
    clocks.advance(3601.0)

    assert found(planner, path(0, 4)) == {}
    planner.tick(0.0)
    assert {key for t in carry(planner, Op.DELETE) for key in t.keys} >= {page_key(key) for key in path(0, 4).keys}


@pytest.mark.parametrize("step", STEPS)
def test_host_memory_does_not_mind_a_step_of_the_wall_clock(step: float) -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, host_ttl_s=60.0)
    save(planner, path(0, 4))

    clocks.set_by(step)
    planner.tick(0.0)
    assert found(planner, path(0, 4)) == {"host": 4}
    clocks.advance(61.0)
    assert found(planner, path(0, 4)) == {}


def test_what_is_in_host_memory_of_a_machine_that_sleeps_grows_old() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, host_ttl_s=60.0)
    save(planner, path(0, 4))

    clocks.sleep(61.0)

    assert found(planner, path(0, 4)) == {}


def test_a_tick_is_not_needed_for_a_page_to_be_over() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, host_ttl_s=60.0)
    request = path(0, 4)
    save(planner, request)
    match = planner.lookup(request, 0.0)
    assert match.num_blocks == 4

    clocks.advance(61.0)

    assert planner.prepare_load(request, match.num_blocks, 61.0).num_blocks == 0
    assert planner.explain(request).match.num_blocks == 0
    assert planner.pin(request, 61.0) == 0
    planner.check()


def test_a_page_past_its_time_is_saved_again_and_does_not_count_as_stored() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, host_ttl_s=60.0)
    save(planner, path(0, 4))

    clocks.advance(61.0)
    lease = planner.prepare_save(path(0, 4), 0, 4, 61.0)

    assert len(lease.pages) == 4


def test_a_page_that_is_being_written_behind_past_its_time_is_not_served() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, disk_pages=8, host_ttl_s=60.0)
    request = path(0, 2)
    publish(planner, request)
    (spill,) = planner.take_transfers()

    clocks.advance(61.0)

    assert planner.lookup(request, 61.0).num_blocks == 0
    assert planner.prepare_load(request, 2, 61.0).num_blocks == 0
    planner.check()
    assert planner.books.host.expired_pages == 2

    planner.outcome(Outcome(spill.id, (True, False), 0.001, 1), 61.0)

    planner.check()
    assert planner.books.host.pool.num_free == 8
    assert found(planner, path(0, 2)) == {"disk": 1}


def test_a_page_whose_writing_takes_longer_than_it_may_live_there_is_deleted_when_it_is_there() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, disk_pages=8, disk_ttl_s=60.0)
    request = path(0, 2)
    publish(planner, request)
    (spill,) = planner.take_transfers()
    clocks.advance(61.0)

    planner.outcome(Outcome(spill.id, (True, True), 0.001, 1), 61.0)
    planner.tick(61.0)

    (delete,) = carry(planner, Op.DELETE)
    assert set(delete.keys) == {page_key(key) for key in request.keys}
    planner.check()


def test_a_page_that_was_expired_while_it_was_written_behind_can_be_forgotten() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, disk_pages=8, host_ttl_s=60.0)
    request = path(0, 2)
    publish(planner, request)
    (spill,) = planner.take_transfers()
    clocks.advance(61.0)
    planner.tick(61.0)

    planner.forget(request, 0, 61.0)
    planner.check()
    planner.outcome(Outcome(spill.id, (True, True), 0.001, 1), 61.0)

    assert {key for t in carry(planner, Op.DELETE) for key in t.keys} == {page_key(key) for key in request.keys}
    planner.check()
    assert planner.books.host.pool.num_free == 8


@pytest.mark.parametrize("step", [0.0, *STEPS])
def test_what_a_disk_held_when_it_was_opened_lives_for_the_rest_of_its_time(step: float) -> None:
    clocks = Clocks()
    clocks.set_by(step)
    planner, _ = make(clock=clocks, disk_pages=8, disk_ttl_s=3600.0)
    request = path(0, 2)
    planner.restore("disk", [(page_key(request.keys[0]), PageMeta(4096, b"", 0, clocks.unix + 30.0))])

    clocks.advance(29.0)
    assert found(planner, path(0, 2)) == {"disk": 1}
    clocks.advance(2.0)
    assert found(planner, path(0, 2)) == {}


def test_what_a_disk_held_when_it_was_opened_has_its_whole_time_after_a_use() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks, disk_pages=8, disk_ttl_s=3600.0)
    request = path(0, 1)
    planner.restore("disk", [(page_key(request.keys[0]), PageMeta(4096, b"", 0, clocks.unix + 30.0))])
    planner.finished(request, 1000.0)
    land(planner)

    clocks.advance(3599.0)
    assert found(planner, path(0, 1)) == {"disk": 1}
    clocks.advance(2.0)
    assert found(planner, path(0, 1)) == {}


@pytest.mark.parametrize("step", STEPS)
def test_a_promise_until_a_unix_time_ends_then_and_no_step_shifts_it(step: float) -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks)
    until = clocks.unix + step + 100.0
    request = path(0, 4)
    request.options = RequestOptions(retain_until=until)
    clocks.set_by(step)
    save(planner, request)

    clocks.advance(99.0)
    planner.tick(0.0)
    assert len(planner.retention.keeper) == 4
    clocks.advance(2.0)
    planner.tick(0.0)
    assert len(planner.retention.keeper) == 0


def test_a_promise_that_the_clock_has_stepped_over_is_over() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks)
    request = path(0, 4)
    request.options = RequestOptions(retain_until=clocks.unix + 3600.0)
    save(planner, request)

    clocks.set_by(DAY)
    planner.tick(0.0)

    assert len(planner.retention.keeper) == 0
    planner.check()


def test_a_wait_does_not_end_because_somebody_set_the_clock() -> None:
    clocks = Clocks()
    planner, _ = make(4, 8, clock=clocks)
    save(planner, path(0, 4))
    save(planner, path(1, 4))
    planner.prepare_load(path(0, 4), 4, clocks.steady())

    clocks.set_by(DAY)
    planner.tick(clocks.steady())

    assert {t.deadline for t in planner.take_transfers() if t.op is Op.FETCH} == {clocks.steady() + 2.0}

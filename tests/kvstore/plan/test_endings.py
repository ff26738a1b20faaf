"""How replies end, and how long pages live after that (`store.ttl_after`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eviction.registry import make_policy
from kvstore.plan.endings import TURN_ENDS, one_word
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Request, RequestOptions, Transfer
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.clocks import Clocks
from tests.helpers.planners import LAYOUT, land, path, publish, save

MINUTE, HOUR = 60.0, 3600.0


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def make(clocks: Clocks, *, ttl_s: float = 24 * HOUR, num_slots: int = 64) -> Planner:
    disk = TierPlan("disk", 64, make_policy("lru", ttl_s), is_indexed=True, is_shared=False, ttl_s=ttl_s)
    settings = PlanSettings(
        num_slots, load_or_recompute=False, ttl_after={"tool_use": 5 * MINUTE, "end_turn": HOUR}, touch_interval_s=60.0
    )
    return Planner(LAYOUT, settings, make_policy("lru", ttl_s), [disk], clocks)


def turn(seed: int, num_blocks: int, session: str = "chat", number: int = 0) -> Request:
    request = path(seed, num_blocks)
    return replace(request, id=100 * (seed + 1) + number, options=RequestOptions(session=session))


def touches(planner: Planner) -> list[Transfer]:
    """Have all transfers succeed; the touches return."""
    carried: list[Transfer] = []
    while transfers := planner.take_transfers():
        for transfer in transfers:
            carried += [transfer] if transfer.op is Op.TOUCH else []
            planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 1), 0.0)
    planner.check()
    return carried


def pages(planner: Planner, clocks: Clocks) -> tuple[int, int]:
    """Pages in host memory and on disk, once what is over has gone."""
    planner.tick(clocks.now)
    land(planner)
    (disk,) = planner.books.tiers
    return planner.books.host.num_resident, disk.used_pages


@pytest.mark.parametrize(
    ("theirs", "word"),
    [
        ("tool_calls", "tool_use"),
        ("STOP", "end_turn"),
        ("stopped", "end_turn"),
        ("max_tokens", "length"),
        ("x", "x"),
        ("please tell me more", "other"),
        ("z" * 33, "other"),
        ("", ""),
    ],
)
def test_whoevers_word_it_is_a_reason_has_one(theirs: str, word: str) -> None:
    assert one_word(theirs) == word


def test_no_word_stands_for_two_reasons() -> None:
    words = [word for reason, others in TURN_ENDS.items() for word in (reason, *others)]

    assert len(words) == len(set(words))


@pytest.mark.parametrize(("reason", "lives_s"), [("tool_calls", 5 * MINUTE), ("stop", HOUR), ("length", 24 * HOUR)])
def test_after_a_reply_its_pages_live_as_long_as_its_end_says_on_every_tier(
    clocks: Clocks, reason: str, lives_s: float
) -> None:
    planner = make(clocks)
    save(planner, turn(0, 3))

    planner.finished(turn(0, 3), clocks.now, finish_reason=reason)
    (touch,) = touches(planner)

    assert touch.expires_at == clocks.unix + lives_s
    clocks.advance(lives_s - 1.0)
    assert pages(planner, clocks) == (3, 3)
    clocks.advance(2.0)
    assert pages(planner, clocks) == (0, 0)


def test_a_use_that_ends_otherwise_gives_pages_their_own_time_again_on_every_tier(clocks: Clocks) -> None:
    planner = make(clocks)
    save(planner, turn(0, 3))
    planner.finished(turn(0, 3), clocks.now, finish_reason="tool_use")
    touches(planner)

    clocks.advance(10.0)  # well within the interval of touches
    planner.finished(turn(0, 3, number=1), clocks.now, finish_reason="length")
    (touch,) = touches(planner)

    assert touch.expires_at == clocks.unix + 24 * HOUR
    clocks.advance(10 * MINUTE)
    assert pages(planner, clocks) == (3, 3)


def test_pages_without_a_time_to_live_have_none_again_after_such_a_use(clocks: Clocks) -> None:
    planner = make(clocks, ttl_s=0.0)
    save(planner, turn(0, 2))
    planner.finished(turn(0, 2), clocks.now, finish_reason="tool_use")
    touches(planner)

    clocks.advance(10.0)
    planner.finished(turn(0, 2, number=1), clocks.now)
    (touch,) = touches(planner)

    assert touch.expires_at > clocks.unix + 365 * 24 * HOUR
    clocks.advance(30 * 24 * HOUR)
    assert pages(planner, clocks) == (2, 2)


def test_blocks_that_another_session_has_used_keep_their_time(clocks: Clocks) -> None:
    planner = make(clocks)
    long = turn(0, 4)
    shared = replace(long, id=7, keys=long.keys[:2], options=RequestOptions(session="other"))
    save(planner, long)
    save(planner, shared)
    planner.finished(shared, clocks.now)

    planner.finished(long, clocks.now, finish_reason="tool_use")
    touches(planner)

    clocks.advance(6 * MINUTE)
    assert pages(planner, clocks) == (2, 2)


def test_the_end_of_a_reply_never_prolongs_a_life(clocks: Clocks) -> None:
    planner = make(clocks, ttl_s=MINUTE)
    save(planner, turn(0, 2))

    planner.finished(turn(0, 2), clocks.now, finish_reason="end_turn")
    (touch,) = touches(planner)

    assert touch.expires_at == clocks.unix + MINUTE
    clocks.advance(61.0)
    assert pages(planner, clocks) == (0, 0)


def test_what_is_still_being_saved_at_the_end_of_its_request_lives_as_long_as_that_says(clocks: Clocks) -> None:
    planner = make(clocks)
    request = turn(0, 3)
    lease = planner.prepare_save(request, 0, 3, clocks.now)
    planner.finished(request, clocks.now, finish_reason="tool_use")

    planner.complete(lease.id, clocks.now)
    land(planner)

    clocks.advance(6 * MINUTE)
    assert pages(planner, clocks) == (0, 0)


def test_what_is_written_after_the_end_of_a_reply_expires_on_the_medium_as_that_says(clocks: Clocks) -> None:
    planner = make(clocks)
    planner.set_tier_up("disk", False, clocks.now)
    publish(planner, turn(0, 2))
    planner.finished(turn(0, 2), clocks.now, finish_reason="tool_use")

    planner.set_tier_up("disk", True, clocks.now)
    (spill,) = (transfer for transfer in planner.take_transfers() if transfer.op is Op.SPILL)

    assert {meta.expires_at for meta in spill.metas} == {clocks.unix + 5 * MINUTE}


def test_the_last_turn_of_a_request_that_is_still_being_saved_is_the_first_to_make_room(clocks: Clocks) -> None:
    planner = make(clocks, num_slots=4)
    save(planner, turn(1, 2, "other"))
    request = turn(0, 2)
    lease = planner.prepare_save(request, 0, 2, clocks.now)
    planner.finished(request, clocks.now, last_turn=True)
    planner.complete(lease.id, clocks.now)
    land(planner)

    save(planner, turn(2, 2, "third"))

    assert planner.lookup(turn(1, 3, "other", 9), clocks.now).by_tier == {"host": 2}


def test_a_request_may_say_beforehand_that_no_turn_will_follow(clocks: Clocks) -> None:
    planner = make(clocks, num_slots=4)
    save(planner, turn(1, 2, "other"))
    request = turn(0, 2)
    request.options = replace(request.options, last_turn=True)
    save(planner, request)
    planner.finished(request, clocks.now, finish_reason="stop")

    save(planner, turn(2, 2, "third"))

    assert planner.lookup(turn(1, 3, "other", 9), clocks.now).by_tier == {"host": 2}

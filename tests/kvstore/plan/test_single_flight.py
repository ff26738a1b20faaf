"""Single flight of computing, under a clock of the test's own: who computes, who waits, and for how long."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.planner import Planner
from kvstore.plan.records import CutReason, Match, Op, Outcome, PlanSettings, Request, RequestOptions, Transfer
from kvstore.plan.single_flight import PATIENCE, POLL_S
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

BLOCK = 4
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")
LEASE_S = 10.0
REDIS = TierPlan("redis", None, None, is_indexed=False, is_shared=True, window_pages=64, can_claim=True)


class SharedRedis:
    """What several machines see of one server: pages, and claims with their deadlines."""

    def __init__(self) -> None:
        self.pages: set[bytes] = set()
        self.claims: dict[bytes, tuple[bytes, float]] = {}
        self.is_well = True
        self.asked: list[Op] = []

    def carry(self, transfer: Transfer, now: float) -> Outcome:
        self.asked.append(transfer.op)
        if not self.is_well:
            return Outcome(transfer.id, (False,) * len(transfer.keys), error="it does not answer")
        ok = [True] * len(transfer.keys)
        if transfer.op is Op.PROBE:
            ok = [key in self.pages for key in transfer.keys]
        elif transfer.op is Op.SPILL:
            self.pages.update(transfer.keys)
        elif transfer.op is Op.CLAIM:
            ok = [self._claim(key, transfer, now) for key in transfer.keys]
        elif transfer.op is Op.UNCLAIM:
            for key in transfer.keys:
                if self.claims.get(key, (b"", 0.0))[0] == transfer.token:
                    del self.claims[key]
        return Outcome(transfer.id, tuple(ok), 0.001, 4096 * len(ok))

    def _claim(self, key: bytes, transfer: Transfer, now: float) -> bool:
        token, until = self.claims.get(key, (b"", 0.0))
        if until > now and token != transfer.token:
            return False
        self.claims[key] = (transfer.token, now + transfer.lease_s)
        return True


class Machine:
    """A planner and its lanes: whatever it sends is carried at once."""

    def __init__(self, name: str = "a", redis: SharedRedis | None = None, **settings: float) -> None:
        self.redis = redis
        plan = PlanSettings(256, claimer=name.encode(), compute_wait_s=LEASE_S, load_or_recompute=False)
        self.planner = Planner(LAYOUT, plan, make_policy("lru"), [] if redis is None else [REDIS])
        self._ids = iter(range(1, 1000))

    def request(self, path: str, step_blocks: int = 1, tail: int = 1, *, single_flight: bool = True) -> Request:
        """One block for each letter; a block is named by all letters up to it."""
        keys = [BlockHash(path[: i + 1].encode().ljust(32, b"\0")) for i in range(len(path))]
        options = RequestOptions(single_flight=single_flight, step_blocks=step_blocks)
        return Request(next(self._ids), keys, len(keys) * BLOCK + tail, options)

    def lookup(self, request: Request, now: float) -> Match:
        """Until the tiers have answered."""
        while True:
            match = self.planner.lookup(request, now)
            if not self.carry(now):
                return match

    def save(self, request: Request, blocks: Iterable[int], now: float) -> None:
        for block in blocks:
            self.planner.complete(self.planner.prepare_save(request, block, 1, now).id, now)
        self.carry(now)

    def tick(self, now: float) -> bool:
        is_due = self.planner.tick(now)
        return self.carry(now) or is_due

    def carry(self, now: float) -> bool:
        has_carried = False
        while transfers := self.planner.take_transfers():
            has_carried = True
            for transfer in transfers:
                assert self.redis is not None
                self.planner.outcome(self.redis.carry(transfer, now), now)
        self.planner.check()
        return has_carried


def waits(match: Match) -> bool:
    assert match.pending == (match.cut is CutReason.COMPUTING)
    return match.pending


@pytest.fixture
def one() -> Machine:
    return Machine()


def test_of_two_that_miss_at_the_same_moment_the_first_computes(one: Machine) -> None:
    a, b = one.request("system"), one.request("system")

    assert not waits(one.lookup(a, 0.0))
    assert waits(one.lookup(b, 0.0))
    one.save(a, range(6), 1.0)
    match = one.lookup(b, 1.0)

    assert not match.pending
    assert match.num_blocks == 6
    assert match.compute_wait_s == 1.0
    assert one.planner.single_flight.counters == {"compute_claims": 1, "compute_waits": 1, "compute_waits_given_up": 0}


def test_a_request_that_did_not_ask_for_it_neither_waits_nor_is_waited_for(one: Machine) -> None:
    plain, other = one.request("system", single_flight=False), one.request("system")

    assert not waits(one.lookup(plain, 0.0))
    assert not waits(one.lookup(other, 0.0))
    assert not waits(one.lookup(one.request("system", single_flight=False), 0.0))


def test_who_computes_never_waits_however_often_it_asks(one: Machine) -> None:
    a, b = one.request("system"), one.request("system")
    one.lookup(a, 0.0)
    one.lookup(b, 0.0)

    assert not any(waits(one.lookup(a, now)) for now in (0.1, 5.0, 9.0))


def test_tails_that_differ_are_not_waited_for(one: Machine) -> None:
    a, b = one.request("headAAAA"), one.request("headBB")
    one.lookup(a, 0.0)
    assert waits(one.lookup(b, 0.0))

    one.save(a, range(4), 1.0)
    match = one.lookup(b, 1.0)

    assert not waits(match)
    assert match.num_blocks == 4


def test_a_prompt_with_nothing_in_common_does_not_wait(one: Machine) -> None:
    one.lookup(one.request("system"), 0.0)

    assert not waits(one.lookup(one.request("other"), 0.0))


def test_after_the_head_one_computes_the_tail_and_a_third_waits_for_it(one: Machine) -> None:
    a, b, c = one.request("headA"), one.request("headTTT"), one.request("headTTTu")
    one.lookup(a, 0.0)
    assert waits(one.lookup(b, 0.0))
    assert waits(one.lookup(c, 0.0))

    one.save(a, range(4), 1.0)

    assert not waits(one.lookup(b, 1.0))
    assert waits(one.lookup(c, 1.0))
    one.save(b, range(4, 7), 2.0)
    assert one.lookup(c, 2.0).num_blocks == 7


def test_prompts_that_fork_inside_a_step_do_not_wait_for_each_other_there(one: Machine) -> None:
    one.lookup(one.request("AAAAxxxx", step_blocks=4), 0.0)

    assert not waits(one.lookup(one.request("AAABxxxx", step_blocks=4), 0.0))
    assert waits(one.lookup(one.request("AAAAyyyy", step_blocks=4), 0.0))


def test_what_is_shorter_than_a_step_is_never_saved_and_never_waited_for(one: Machine) -> None:
    one.lookup(one.request("AAAAxx", step_blocks=4), 0.0)
    b = one.request("AAAAxx", step_blocks=4)
    assert waits(one.lookup(b, 0.0))

    one.save(one.request("AAAA"), range(4), 1.0)

    assert not waits(one.lookup(b, 1.0))


def test_the_last_token_is_computed_by_everyone_so_its_step_is_not_waited_for(one: Machine) -> None:
    one.lookup(one.request("AAAA", step_blocks=4, tail=0), 0.0)

    assert not waits(one.lookup(one.request("AAAA", step_blocks=4, tail=0), 0.0))
    assert waits(one.lookup(one.request("AAAA", step_blocks=4, tail=1), 0.0))


@pytest.mark.parametrize("end", ["finished", "abandon", "forget", "release", "release_owner", "filled", "skipped"])
def test_when_who_computes_ends_without_publishing_the_next_one_does(end: str) -> None:
    one = Machine()
    a, b, c = (one.request("system") for _ in range(3))
    one.lookup(a, 0.0)
    assert waits(one.lookup(b, 0.0))
    assert waits(one.lookup(c, 0.0))

    planner = one.planner
    if end in ("finished", "abandon"):
        getattr(planner, end)(a, 1.0)
    elif end == "forget":
        planner.forget(a, 0, 1.0)
    elif end == "skipped":
        one.planner.resize_host(2)
        planner.complete(planner.prepare_save(a, 0, 6, 1.0).id, 1.0)
    else:
        lease = planner.prepare_save(a, 0, 6, 1.0, owner="engine")
        if end == "release":
            planner.release(lease.id, 1.0)
        elif end == "release_owner":
            planner.release_owner("engine", 1.0)
        else:
            planner.complete(lease.id, 1.0, [True, True, False, True, True, True])

    assert not waits(one.lookup(b, 1.0))
    assert waits(one.lookup(c, 1.0))


def test_a_request_that_ends_while_its_last_save_is_open_is_waited_for_until_then(one: Machine) -> None:
    a, b = one.request("system"), one.request("system")
    one.lookup(a, 0.0)
    lease = one.planner.prepare_save(a, 0, 6, 1.0)
    one.planner.finished(a, 1.0)

    assert waits(one.lookup(b, 1.0))
    one.planner.complete(lease.id, 2.0)
    assert one.lookup(b, 2.0).num_blocks == 6
    assert len(one.planner.single_flight.claims) == 0


def test_who_dies_without_a_word_is_waited_for_no_longer_than_the_lease(one: Machine) -> None:
    b = one.request("system")
    one.lookup(one.request("system"), 0.0)

    assert waits(one.lookup(b, 1.0))
    assert not one.tick(LEASE_S - 0.1)
    assert one.tick(LEASE_S)
    assert not waits(one.lookup(b, LEASE_S))


def test_a_wait_is_bounded_by_the_time_that_computing_takes(one: Machine) -> None:
    one.planner.observe_prefill(240, 10.0)  # the 24 tokens take one second
    b = one.request("system")
    one.lookup(one.request("system"), 0.0)

    assert waits(one.lookup(b, 0.0))
    assert not one.tick(PATIENCE - 0.1)
    assert one.tick(PATIENCE)
    match = one.lookup(b, PATIENCE)
    assert not waits(match)
    assert match.compute_wait_s == PATIENCE
    assert one.planner.single_flight.counters["compute_waits_given_up"] == 1


def test_who_gives_up_waiting_is_waited_for_by_the_others(one: Machine) -> None:
    one.planner.observe_prefill(240, 10.0)
    a, b, c = (one.request("system") for _ in range(3))
    one.lookup(a, 0.0)
    one.lookup(b, 0.0)
    one.lookup(c, 1.0)

    assert not waits(one.lookup(b, PATIENCE))
    assert waits(one.lookup(c, PATIENCE + 1.0))
    one.save(a, range(6), PATIENCE + 1.5)  # late, and as good as any
    assert one.lookup(c, PATIENCE + 1.5).num_blocks == 6


def test_progress_prolongs_the_wait_and_the_claim(one: Machine) -> None:
    a, b = one.request("sixteen_blocks__"), one.request("sixteen_blocks__")
    one.lookup(a, 0.0)

    for block in range(16):
        now = 8.0 * (block + 1)
        assert waits(one.lookup(b, now - 0.1))
        one.save(a, [block], now)
        one.tick(now)

    assert one.lookup(b, 128.0).num_blocks == 16


def test_a_wait_ends_when_progress_does(one: Machine) -> None:
    one.planner.observe_prefill(160, 10.0)  # a block in a quarter of a second
    a, b = one.request("eightblk"), one.request("eightblk")
    one.lookup(a, 0.0)
    one.lookup(b, 0.0)
    one.save(a, range(4), 3.0)

    assert waits(one.lookup(b, 3.0))
    assert waits(one.lookup(b, 4.9))
    match = one.lookup(b, 5.0)  # twice the second that four blocks take

    assert not waits(match)
    assert match.num_blocks == 4


def test_what_is_found_again_in_between_is_a_hit_and_no_wait(one: Machine) -> None:
    a = one.request("system")
    one.lookup(a, 0.0)
    one.save(a, range(6), 1.0)
    one.planner.finished(a, 1.0)

    match = one.lookup(one.request("system"), 2.0)

    assert (match.num_blocks, match.pending, match.compute_wait_s) == (6, False, 0.0)


def test_a_lease_of_nothing_turns_it_off() -> None:
    planner = Planner(LAYOUT, PlanSettings(16, compute_wait_s=0.0), make_policy("lru"))
    one = Machine()

    for _ in range(2):
        assert not planner.lookup(one.request("system"), 0.0).pending


def test_a_waiting_lookup_is_counted_once_it_has_its_answer(one: Machine) -> None:
    a, b = one.request("system"), one.request("system")
    one.lookup(a, 0.0)
    one.lookup(b, 0.0)
    one.save(a, range(6), 1.0)
    one.lookup(b, 1.0)

    counters = one.planner.lookups.counters
    assert (counters["lookups"], counters["matched_tokens"], counters["missed_tokens"]) == (2, 24, 26)


# ---- several machines on one Redis ----------------------------------------------------------------------------------


def two_machines() -> tuple[Machine, Machine, SharedRedis]:
    redis = SharedRedis()
    return Machine("a", redis), Machine("b", redis), redis


def test_of_two_machines_that_miss_at_the_same_moment_one_computes() -> None:
    here, there, _ = two_machines()
    a, b = here.request("system"), there.request("system")

    assert not waits(here.lookup(a, 0.0))
    assert waits(there.lookup(b, 0.0))
    here.save(a, range(6), 1.0)
    there.tick(1.0)
    match = there.lookup(b, 1.0)

    assert match.by_tier == {"redis": 6}
    assert match.compute_wait_s == 1.0


def test_a_hit_asks_a_shared_tier_nothing_more() -> None:
    here, there, redis = two_machines()
    a = here.request("system")
    here.lookup(a, 0.0)
    here.save(a, range(6), 1.0)
    redis.asked.clear()

    assert there.lookup(there.request("system"), 2.0).num_blocks == 6
    assert redis.asked == [Op.PROBE]


def test_a_machine_that_dies_is_waited_for_as_long_as_its_key_lives() -> None:
    here, there, _ = two_machines()
    here.lookup(here.request("system"), 0.0)
    b = there.request("system")
    assert waits(there.lookup(b, 5.0))

    there.tick(LEASE_S - 0.05)
    assert waits(there.lookup(b, LEASE_S - 0.05))
    there.tick(LEASE_S + POLL_S)

    assert not waits(there.lookup(b, LEASE_S + POLL_S))


def test_what_a_request_did_not_compute_is_taken_back_at_its_end() -> None:
    here, there, redis = two_machines()
    a, b = here.request("system"), there.request("system")
    here.lookup(a, 0.0)
    there.lookup(b, 0.0)
    here.save(a, range(2), 1.0)
    here.planner.finished(a, 1.0)
    here.carry(1.0)

    there.tick(1.0)
    match = there.lookup(b, 1.0)

    assert not waits(match)
    assert match.num_blocks == 2
    assert {token[:1] for token, _ in list(redis.claims.values())[2:]} == {b"b"}


def test_a_slow_machine_that_saves_piece_by_piece_keeps_its_claim() -> None:
    here, there, _ = two_machines()
    a, b = here.request("eightblk"), there.request("eightblk")
    here.lookup(a, 0.0)
    assert waits(there.lookup(b, 0.0))

    for block in range(7):
        now = 8.0 * (block + 1)
        here.save(a, [block], now)
        there.tick(now)
        assert waits(there.lookup(b, now))

    here.save(a, [7], 64.0)
    there.tick(64.0)
    assert there.lookup(b, 64.0).num_blocks == 8


def test_tails_that_differ_are_not_waited_for_between_machines() -> None:
    here, there, _ = two_machines()
    a, b = here.request("headAAAA"), there.request("headBBBB")
    here.lookup(a, 0.0)
    assert waits(there.lookup(b, 0.0))

    here.save(a, range(4), 1.0)
    there.tick(1.0)
    match = there.lookup(b, 1.0)

    assert not waits(match)
    assert match.by_tier == {"redis": 4}


def test_requests_behind_one_that_waits_for_another_machine_find_the_blocks_too() -> None:
    here, there, _ = two_machines()
    a, b, c = here.request("system"), there.request("system"), there.request("system")
    here.lookup(a, 0.0)
    assert waits(there.lookup(b, 0.0))
    assert waits(there.lookup(c, 0.0))

    here.save(a, range(6), 1.0)
    there.tick(1.0)

    assert there.lookup(b, 1.0).by_tier == {"redis": 6}
    assert there.lookup(c, 1.0).by_tier == {"redis": 6}


def test_a_long_prompt_that_is_there_at_once_is_found_at_once() -> None:
    here, there, _ = two_machines()
    a = here.request("x")
    a.keys[:] = [BlockHash(i.to_bytes(32, "big")) for i in range(200)]
    a.num_tokens = 200 * BLOCK + 1
    b = there.request("x")
    b.keys[:], b.num_tokens = a.keys, a.num_tokens
    here.lookup(a, 0.0)
    there.lookup(b, 0.0)
    here.save(a, range(200), 1.0)

    there.tick(1.0)

    assert there.lookup(b, 1.0).num_blocks == 200


def test_polls_are_bounded_in_rate_and_size() -> None:
    here, there, redis = two_machines()
    here.lookup(here.request("system"), 0.0)
    b = there.request("system")
    there.lookup(b, 0.0)
    redis.asked.clear()

    for step in range(1, 200):
        there.tick(step * 0.005)
        there.lookup(b, step * 0.005)

    assert redis.asked.count(Op.PROBE) <= 10
    assert redis.asked.count(Op.CLAIM) <= 10


@pytest.mark.parametrize("breaks", ["from the start", "while it waits", "breaker"])
def test_a_redis_that_fails_knows_of_no_claims_and_nobody_waits_for_it(breaks: str) -> None:
    here, there, redis = two_machines()
    redis.is_well = breaks != "from the start"
    here.lookup(here.request("system"), 0.0)
    b = there.request("system")
    match = there.lookup(b, 0.0)
    assert waits(match) == (breaks != "from the start")

    redis.is_well = False
    if breaks == "breaker":
        there.planner.set_tier_up("redis", False, 0.5)
    there.tick(0.5)

    assert not waits(there.lookup(b, 0.5))


def test_a_claim_that_is_granted_after_its_request_ended_is_taken_back() -> None:
    redis = SharedRedis()
    here = Machine("a", redis)
    a = here.request("system")
    here.planner.lookup(a, 0.0)
    (probe,) = here.planner.take_transfers()
    here.planner.outcome(redis.carry(probe, 0.0), 0.0)
    here.planner.lookup(a, 0.0)
    (claim,) = here.planner.take_transfers()
    here.planner.finished(a, 0.0)

    here.planner.outcome(redis.carry(claim, 0.0), 0.0)
    here.carry(0.0)

    assert redis.claims == {}


def test_a_request_does_not_wait_for_blocks_that_its_engine_holds(one: Machine) -> None:
    a, b = one.request("systemA"), one.request("systemB")
    assert not waits(one.lookup(a, 0.0))
    b.held = len("system")

    assert not waits(one.lookup(b, 0.0))

    b2, c = one.request("systemB"), one.request("systemC")
    b2.held = c.held = len("syst")
    assert waits(one.lookup(b2, 0.0))  # what comes after its own is being computed
    assert waits(one.lookup(c, 0.0))

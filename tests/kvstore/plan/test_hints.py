"""What each action of a hint becomes, in host memory and below."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eviction.registry import make_policy
from kvstore.base import HintOutcome, HintStatus
from kvstore.hints.actions import HintKind
from kvstore.hints.limits import HintLimits
from kvstore.plan import fetches
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Request, RequestOptions, Transfer
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.wishes import MAX_WISHES, Wish
from radix.hashing import BlockHash
from tests.helpers.clocks import Clocks
from tests.helpers.planners import BLOCK, LAYOUT

ACCEPTED, CLIPPED, DEFERRED, REJECTED = (
    HintStatus.ACCEPTED,
    HintStatus.CLIPPED,
    HintStatus.DEFERRED,
    HintStatus.REJECTED,
)


class Desk:
    """A planner of ten slots, of which five may be kept, over a disk of forty pages whose transfers end on command."""

    def __init__(
        self, disk_pages: int | None = 40, *, is_shared: bool = False, limits: HintLimits | None = None
    ) -> None:
        self.clocks = Clocks()
        settings = PlanSettings(
            10, load_or_recompute=False, max_prefetch_slots=8, hints=limits or HintLimits(max_ttl_s=100.0)
        )
        policy = None if is_shared else make_policy("lru")
        plans = [TierPlan("disk", disk_pages, policy, not is_shared, is_shared)] if disk_pages else []
        self.planner = Planner(LAYOUT, settings, make_policy("lru"), plans, self.clocks)
        self.stored: set[bytes] = set()
        self._count = 0

    def path(self, num_blocks: int, after: Request | None = None, **options: object) -> Request:
        """A prompt of new blocks, behind those of another."""
        self._count += 1
        keys = [] if after is None else list(after.keys)
        keys += [BlockHash(bytes([self._count, index]) + bytes(30)) for index in range(num_blocks)]
        return Request(self._count, keys, len(keys) * BLOCK + 1, RequestOptions(**options))  # type: ignore[arg-type]

    def save(self, request: Request, *, lands: bool = True) -> Request:
        """Save a prompt as an engine would, and finish it."""
        lease = self.planner.prepare_save(request, 0, len(request.keys), self.clocks.now)
        self.planner.complete(lease.id, self.clocks.now)
        self.planner.finished(request, self.clocks.now)
        if lands:
            self.land()
        return request

    def land(self, does: Callable[[Transfer], bool] = lambda _: True) -> None:
        """End all transfers, well where `does` says so."""
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                ok = [does(transfer)] * len(transfer.keys)
                if transfer.op is Op.SPILL and ok[0]:
                    self.stored.update(transfer.keys)
                    self.stored.difference_update(transfer.evict)
                elif transfer.op is Op.DELETE:
                    self.stored.difference_update(transfer.keys)
                elif transfer.op in (Op.PROBE, Op.FETCH):
                    ok = [key in self.stored and ok[0] for key in transfer.keys]
                self.planner.outcome(Outcome(transfer.id, tuple(ok), 0.001, 1), self.clocks.now)
        self.planner.check()

    def hint(self, request: Request, kind: HintKind, **fields: object) -> HintOutcome:
        """One action about a request."""
        wish = Wish("a", kind, **({"ttl_s": 50.0, "priority": 50} | fields))  # type: ignore[arg-type]
        outcome = self.planner.obey(request, wish, self.clocks.now)
        self.planner.check()
        return outcome

    def crowd(self, num_blocks: int = 12) -> None:
        """Others come until host memory has been filled with them."""
        for _ in range(num_blocks):
            self.save(self.path(1))

    def num_here(self, request: Request) -> int:
        """Blocks of a prompt that are in host memory."""
        known = self.planner.books.catalog.match(request.keys)
        return sum(page.slot >= 0 for block in known for page in block.pages)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what it makes due happen."""
        self.clocks.advance(seconds)
        self.planner.tick(self.clocks.now)
        self.planner.check()

    @property
    def num_kept(self) -> int:
        return self.planner.retention.keeper.num_pages


@pytest.fixture
def desk() -> Desk:
    return Desk()


# ---- pin ---------------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_stays_until_its_lease_ends_and_gives_its_slots_back(desk: Desk) -> None:
    pinned = desk.save(desk.path(4))

    outcome = desk.hint(pinned, HintKind.PIN)
    desk.crowd()

    assert (outcome.status, outcome.tokens) == (ACCEPTED, 4 * BLOCK)
    assert outcome.until == pytest.approx(desk.clocks.unix + 50.0)
    assert desk.num_here(pinned) == 4
    desk.pass_time(50.0)
    assert desk.num_kept == 0
    desk.crowd()
    assert desk.num_here(pinned) == 0


def test_a_wall_clock_that_is_set_moves_no_lease_and_costs_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.hint(desk.save(desk.path(4)), HintKind.PIN)
    rebuilt: list[object] = []
    monkeypatch.setattr(desk.planner.retention.keeper._ends, "rebuild", rebuilt.append)

    for seconds in (1e6, -2e6):
        desk.clocks.set_by(seconds)
        desk.pass_time(20.0)
        assert desk.num_kept == 4

    desk.pass_time(10.0)
    assert desk.num_kept == 0
    assert rebuilt == []


def test_of_a_pin_beyond_the_budget_the_deepest_prefix_that_fits_is_granted(desk: Desk) -> None:
    outcome = desk.hint(desk.save(desk.path(8)), HintKind.PIN)

    assert (outcome.status, outcome.tokens) == (CLIPPED, 5 * BLOCK)
    assert "budget" in outcome.reason
    assert desk.num_kept == 5
    rejected = desk.hint(desk.save(desk.path(2)), HintKind.PIN)
    assert (rejected.status, rejected.tokens, rejected.until) == (REJECTED, 0, None)
    assert "budget" in rejected.reason


def test_a_pin_means_its_range_only(desk: Desk) -> None:
    request = desk.save(desk.path(6))

    outcome = desk.hint(request, HintKind.PIN, first=2, end=4)

    assert (outcome.status, outcome.tokens, desk.num_kept) == (ACCEPTED, 2 * BLOCK, 2)


def test_a_longer_lease_than_there_is_becomes_the_longest(desk: Desk) -> None:
    outcome = desk.hint(desk.save(desk.path(2)), HintKind.PIN, ttl_s=1e6)

    assert outcome.status is CLIPPED
    assert outcome.until == pytest.approx(desk.clocks.unix + 100.0)


def test_a_pin_of_what_is_not_stored_is_rejected(desk: Desk) -> None:
    outcome = desk.hint(desk.path(3), HintKind.PIN)

    assert (outcome.status, outcome.reason) == (REJECTED, "nothing of it is stored here")


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_pin_brings_what_lies_below_and_holds_it_when_it_is_there(is_shared: bool) -> None:
    desk = Desk(is_shared=is_shared)
    request = desk.save(desk.path(4))
    desk.crowd()
    assert desk.num_here(request) == 0

    outcome = desk.hint(request, HintKind.PIN)
    desk.land()

    assert (outcome.status, outcome.tokens) == (DEFERRED, 0)
    assert (desk.num_here(request), desk.num_kept) == (4, 4)
    desk.crowd()
    assert desk.num_here(request) == 4
    desk.pass_time(50.0)
    assert desk.num_kept == 0


def test_what_is_on_its_way_counts_against_the_budget_and_is_given_back_if_it_does_not_come(desk: Desk) -> None:
    below, here = desk.save(desk.path(4)), desk.path(4)
    desk.crowd()
    desk.save(here)
    desk.hint(below, HintKind.PIN)

    assert desk.hint(here, HintKind.PIN).tokens == BLOCK
    desk.land(lambda transfer: transfer.op is not Op.FETCH)

    assert desk.hint(here, HintKind.PIN).tokens == 4 * BLOCK
    assert desk.num_kept == 4


def test_a_pin_of_its_own_prompt_is_kept_for_what_is_saved_later_and_begins_when_the_request_ends(desk: Desk) -> None:
    request = desk.path(4)

    outcome = desk.hint(request, HintKind.PIN, is_own=True)
    assert (outcome.status, outcome.tokens) == (DEFERRED, 0)
    desk.pass_time(60.0)
    desk.save(request)

    assert desk.num_kept == 4
    desk.pass_time(49.0)
    assert desk.num_kept == 4
    desk.pass_time(1.0)
    assert desk.num_kept == 0


def test_two_sessions_pin_the_same_and_each_release_takes_back_its_own(desk: Desk) -> None:
    shared = desk.save(desk.path(4))
    desk.hint(shared, HintKind.PIN, session="a", ttl_s=20.0)
    desk.hint(shared, HintKind.PIN, session="b", ttl_s=40.0)

    assert desk.hint(shared, HintKind.RELEASE, session="b").tokens == 4 * BLOCK
    assert desk.num_kept == 4
    assert desk.hint(shared, HintKind.RELEASE, session="b").status is REJECTED
    desk.pass_time(20.0)

    assert desk.num_kept == 0


def test_a_release_without_a_session_ends_all(desk: Desk) -> None:
    shared = desk.save(desk.path(4))
    desk.hint(shared, HintKind.PIN, session="a")
    desk.hint(shared, HintKind.PIN, session="b")

    assert desk.hint(shared, HintKind.RELEASE).status is ACCEPTED

    assert desk.num_kept == 0


def test_a_release_takes_back_what_is_still_on_its_way(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    desk.crowd()
    desk.hint(request, HintKind.PIN)

    desk.hint(request, HintKind.RELEASE)
    desk.land()

    assert (desk.num_here(request), desk.num_kept) == (4, 0)


def test_sessions_that_pin_what_is_on_its_way_each_have_a_lease_of_their_own(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    desk.crowd()
    for session, ttl_s in (("a", 10.0), ("b", 40.0), ("b", 20.0), ("c", 30.0)):
        assert desk.hint(request, HintKind.PIN, session=session, ttl_s=ttl_s).status is DEFERRED
    desk.hint(request, HintKind.RELEASE, session="c")

    desk.pass_time(10.0)
    desk.land()

    assert [(kept.holder, kept.num_pages) for kept in desk.planner.retention.keeper.holders] == [("session b", 4)]
    desk.pass_time(29.0)
    assert desk.num_kept == 4
    desk.pass_time(1.0)
    assert desk.num_kept == 0


def test_a_release_without_a_session_is_that_of_its_request(desk: Desk) -> None:
    shared = desk.save(desk.path(4))
    ours = desk.path(2, shared, session="a")
    desk.hint(shared, HintKind.PIN, session="b")
    desk.hint(ours, HintKind.PIN, is_own=True)

    assert desk.hint(ours, HintKind.RELEASE, is_own=True).status is ACCEPTED
    desk.save(ours)

    assert [(kept.holder, kept.num_pages) for kept in desk.planner.retention.keeper.holders] == [("session b", 4)]


def test_tenants_have_budgets_of_their_own(desk: Desk) -> None:
    ours, theirs = desk.save(desk.path(4)), desk.save(desk.path(4))
    ours.payer, theirs.payer = "ours", "theirs"

    assert desk.hint(ours, HintKind.PIN).tokens == 2 * BLOCK  # a quarter of ten slots
    assert desk.hint(theirs, HintKind.PIN).tokens == 2 * BLOCK

    assert desk.planner.retention.keeper.payers == {"ours": 2, "theirs": 2}


# ---- retain ------------------------------------------------------------------------------------------------------


def test_a_retained_prefix_outlives_others_until_its_time_ends_and_holds_no_memory(desk: Desk) -> None:
    retained = desk.save(desk.path(4))

    outcome = desk.hint(retained, HintKind.RETAIN)
    desk.crowd()

    assert (outcome.status, outcome.tokens) == (ACCEPTED, 4 * BLOCK)
    assert desk.num_here(retained) == 4
    assert desk.num_kept == 0
    desk.save(desk.path(10))  # more than all others have
    assert desk.num_here(retained) == 0


def test_after_its_time_a_retained_prefix_leaves_like_any_other(desk: Desk) -> None:
    retained = desk.save(desk.path(4))
    desk.hint(retained, HintKind.RETAIN)

    desk.pass_time(50.0)
    desk.crowd()

    assert len(desk.planner.retention.raises) == 0
    assert desk.num_here(retained) == 0


def test_what_is_retained_is_bounded_and_a_priority_of_nothing_ends_it(desk: Desk) -> None:
    request = desk.save(desk.path(8))

    assert (desk.hint(request, HintKind.RETAIN)).tokens == 5 * BLOCK
    assert desk.hint(request, HintKind.RETAIN, priority=0).tokens == 5 * BLOCK

    assert len(desk.planner.retention.raises) == 0


def test_a_retain_of_no_priority_ends_no_pin(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    desk.hint(request, HintKind.PIN)
    desk.hint(request, HintKind.RETAIN)

    desk.hint(request, HintKind.RETAIN, priority=0)

    assert (desk.num_kept, len(desk.planner.retention.raises)) == (4, 0)


def test_a_retained_block_that_is_forgotten_takes_no_budget(desk: Desk) -> None:
    for _ in range(8):
        request = desk.save(desk.path(4))
        assert desk.hint(request, HintKind.RETAIN).tokens == 4 * BLOCK
        desk.planner.forget(request, 0, desk.clocks.now)
        desk.land()

    assert len(desk.planner.retention.raises) == 0


def test_a_retained_block_that_leaves_all_tiers_takes_no_budget() -> None:
    desk = Desk(disk_pages=None)
    for _ in range(8):
        request = desk.save(desk.path(5))
        assert desk.hint(request, HintKind.RETAIN).tokens == 5 * BLOCK
        desk.save(desk.path(10))

    assert len(desk.planner.retention.raises) == 0


def test_the_options_priority_comes_back_after_a_retain(desk: Desk) -> None:
    request = desk.save(desk.path(2, priority=1))
    desk.hint(request, HintKind.RETAIN, priority=100)
    blocks = desk.planner.books.catalog.match(request.keys)
    assert {block.hint.priority for block in blocks} == {4}

    desk.pass_time(50.0)

    assert {block.hint.priority for block in blocks} == {1}


# ---- prefetch, demote, forget, share -----------------------------------------------------------------------------


def test_a_prefetch_brings_what_lies_below(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    desk.crowd()

    outcome = desk.hint(request, HintKind.PREFETCH)
    desk.land()

    assert (outcome.status, outcome.tokens, desk.num_here(request)) == (ACCEPTED, 4 * BLOCK, 4)
    assert desk.planner.lookups.requests == {}
    assert desk.planner.lookups.counters["lookups"] == 0


def test_a_prefetch_that_has_to_ask_a_shared_tier_is_deferred_and_leaves_no_note() -> None:
    desk = Desk(is_shared=True)
    request = desk.save(desk.path(4))
    desk.crowd()

    outcome = desk.hint(request, HintKind.PREFETCH)
    desk.land()

    assert (outcome.status, desk.num_here(request)) == (DEFERRED, 4)
    assert desk.planner.lookups.requests == {}


def test_an_answer_is_looked_at_by_the_prefetch_that_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetches, "MAX_TICKETS", 30)
    desk = Desk(is_shared=True)
    requests = [desk.save(desk.path(4)) for _ in range(40)]
    for request in requests[:32]:
        desk.hint(request, HintKind.PREFETCH)
    probes = [transfer for transfer in desk.planner.take_transfers() if transfer.op is Op.PROBE]
    lookups = desk.planner.lookups
    looked: list[Request] = []
    survey = lookups.survey
    monkeypatch.setattr(lookups, "survey", lambda request: (looked.append(request), survey(request))[1])

    for probe in probes[:3]:  # the first two are not waited for any more
        desk.planner.outcome(Outcome(probe.id, (True,) * len(probe.keys), 0.001, 1), desk.clocks.now)

    assert {tuple(request.keys) for request in looked} == {tuple(requests[2].keys)}
    desk.land()
    assert desk.num_here(requests[2]) == 4


def test_a_prefetch_of_a_long_prompt_lets_others_in() -> None:
    planner = Planner(LAYOUT, PlanSettings(4096, load_or_recompute=False), make_policy("lru"))
    keys = [BlockHash(index.to_bytes(32, "big")) for index in range(3000)]
    request = Request(1, keys, len(keys) * BLOCK + 1)
    planner.complete(planner.prepare_save(request, 0, len(keys), 0.0).id, 0.0)

    steps = planner.hints.obey(5, request, Wish("a", HintKind.PREFETCH), 0.0)

    num_steps = 0
    while (outcome := next(steps, "over")) is None:
        num_steps += 1
    assert (outcome, num_steps) == ("over", 4)
    assert planner.hints.counters == {"prefetch": {"accepted": 1}}


def test_a_prefetch_of_more_than_its_bound_is_clipped(desk: Desk) -> None:
    request = desk.save(desk.path(9))
    desk.crowd()

    outcome = desk.hint(request, HintKind.PREFETCH)

    assert (outcome.status, outcome.tokens) == (CLIPPED, 8 * BLOCK)


def test_what_is_written_already_leaves_host_memory_at_once_when_demoted(desk: Desk) -> None:
    request = desk.save(desk.path(4))

    outcome = desk.hint(request, HintKind.DEMOTE)

    assert (outcome.status, outcome.tokens, desk.num_here(request)) == (ACCEPTED, 4 * BLOCK, 0)
    assert desk.planner.lookup(request, desk.clocks.now).num_blocks == 4


def test_what_is_not_written_yet_leaves_as_soon_as_it_is(desk: Desk) -> None:
    request = desk.save(desk.path(4), lands=False)

    outcome = desk.hint(request, HintKind.DEMOTE)
    assert (outcome.status, desk.num_here(request)) == (DEFERRED, 4)
    desk.land()

    assert desk.num_here(request) == 0
    assert desk.planner.lookup(request, desk.clocks.now).num_blocks == 4


def test_what_a_tier_refuses_stays_and_is_evicted_first(desk: Desk) -> None:
    request = desk.save(desk.path(4), lands=False)
    desk.hint(request, HintKind.DEMOTE)
    desk.land(lambda transfer: transfer.op is not Op.SPILL)
    assert desk.num_here(request) == 4

    younger = desk.save(desk.path(6))
    desk.save(desk.path(4))

    assert (desk.num_here(request), desk.num_here(younger)) == (0, 6)
    desk.pass_time(60.0)
    assert not desk.planner.retention.demotions.leaving


def test_without_a_tier_below_a_demoted_prefix_is_evicted_first() -> None:
    desk = Desk(disk_pages=None)
    first, second = desk.save(desk.path(4)), desk.save(desk.path(6))

    outcome = desk.hint(second, HintKind.DEMOTE)
    desk.save(desk.path(6))

    assert (outcome.status, outcome.tokens) == (CLIPPED, 0)
    assert (desk.num_here(first), desk.num_here(second)) == (4, 0)


def test_what_is_pinned_or_leased_is_not_demoted(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    desk.hint(request, HintKind.PIN, end=3)

    outcome = desk.hint(request, HintKind.DEMOTE)

    assert (outcome.status, outcome.tokens, desk.num_here(request)) == (CLIPPED, BLOCK, 3)


def test_a_demote_of_its_own_prompt_waits_for_the_end_of_the_request(desk: Desk) -> None:
    request = desk.path(4)

    assert desk.hint(request, HintKind.DEMOTE, is_own=True).status is DEFERRED
    desk.save(request)

    assert desk.num_here(request) == 0
    assert desk.planner.lookup(request, desk.clocks.now).num_blocks == 4


def test_what_is_forgotten_is_gone_everywhere_with_all_that_continues_it(desk: Desk) -> None:
    request = desk.save(desk.path(4))
    longer = desk.save(desk.path(2, after=request))

    outcome = desk.hint(request, HintKind.FORGET, first=2)
    desk.land()

    assert (outcome.status, outcome.tokens) == (ACCEPTED, 4 * BLOCK)
    assert desk.planner.lookup(longer, desk.clocks.now).num_blocks == 2
    assert len(desk.stored) == 2


def test_a_request_that_is_to_be_forgotten_leaves_nothing_when_it_is_finished(desk: Desk) -> None:
    request = desk.path(4)

    assert desk.hint(request, HintKind.FORGET, is_own=True).status is DEFERRED
    desk.save(request)

    assert desk.planner.lookup(request, desk.clocks.now).num_blocks == 0
    assert desk.stored == set()


def test_sharing_is_accepted(desk: Desk) -> None:
    assert desk.hint(desk.path(1), HintKind.SHARE).status is ACCEPTED


# ---- all of them -------------------------------------------------------------------------------------------------


def test_a_request_bears_so_many_wishes_and_no_more(desk: Desk) -> None:
    request = desk.path(4)
    for _ in range(MAX_WISHES):
        desk.hint(request, HintKind.PIN, is_own=True)

    assert desk.hint(request, HintKind.RETAIN, is_own=True).status is REJECTED
    assert desk.hint(request, HintKind.RELEASE, is_own=True).status is ACCEPTED
    desk.save(request)

    assert desk.num_kept == 0


def test_hints_that_are_off_are_rejected_and_counted() -> None:
    desk = Desk(limits=HintLimits(enabled=False))
    request = desk.save(desk.path(4))

    outcomes = [desk.hint(request, kind) for kind in HintKind]

    assert {outcome.status for outcome in outcomes} == {REJECTED}
    assert desk.planner.hints.counters == {kind.value: {"rejected": 1} for kind in HintKind}
    assert (desk.num_here(request), desk.num_kept) == (4, 0)


def test_words_that_a_client_makes_up_are_counted_as_one(desk: Desk) -> None:
    desk.planner.hints.count(HintOutcome("a", f"word {number}", REJECTED) for number in range(100))

    assert desk.planner.hints.counters == {"unknown": {"rejected": 100}}


def test_what_hints_left_survives_the_mending_of_the_books(desk: Desk) -> None:
    pinned, raised, below = desk.save(desk.path(2)), desk.save(desk.path(2)), desk.save(desk.path(2))
    desk.crowd()
    for request, kind in ((pinned, HintKind.PIN), (raised, HintKind.PREFETCH), (below, HintKind.PIN)):
        desk.hint(request, kind)
        if request is not below:
            desk.land()
    desk.hint(raised, HintKind.RETAIN)

    desk.planner.mend(desk.planner.in_steps.last_lease, desk.clocks.now)
    desk.planner.check()
    desk.land()

    assert desk.num_kept == 4
    assert len(desk.planner.retention.raises) == 2
    desk.pass_time(50.0)
    assert (desk.num_kept, len(desk.planner.retention.raises)) == (0, 0)

"""Pages and states as pairs: hits end where both are, and neither takes room without the other."""

from __future__ import annotations

import random

import pytest

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.page import page_key
from kvstore.plan.planner import Planner
from kvstore.plan.records import CutReason, Op, Outcome, PlanSettings, Request
from kvstore.plan.state import PageState
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import BLOCK, land, path

PIECE = LayerGroup(GroupKind.RECURRENT, (1,), 4096)
PAIRS = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096), PIECE, PIECE), "test", "uint8")
STATES = Layout(BLOCK, (PIECE, PIECE), "test", "uint8")
DISK = ("disk", True, False)  # name, indexed, shared
REDIS = ("redis", False, True)


def make(
    num_slots: int = 32, *tiers: tuple[str, bool, bool], layout: Layout = PAIRS, tier_pages: int | None = None
) -> Planner:
    plans = [
        TierPlan(name, tier_pages, make_policy("lru", 0.0), is_indexed=indexed, is_shared=shared)
        for name, indexed, shared in tiers
    ]
    return Planner(layout, PlanSettings(num_slots, load_or_recompute=False), make_policy("lru", None), plans)


def save(planner: Planner, request: Request, *states: int) -> None:
    """Save all blocks of a request, and states after so many blocks; all is written behind."""
    lease = planner.prepare_save(request, 0, len(request.keys), 0.0, states=[after - 1 for after in states])
    planner.complete(lease.id, 0.0)
    planner.finished(request, 0.0)
    land(planner)


def hit(planner: Planner, request: Request) -> int:
    planner.lookup(request, 0.0)
    land(planner)
    return planner.lookup(request, 0.0).num_blocks


def load(planner: Planner, request: Request, num_blocks: int) -> list[tuple[int, int]]:
    """Load, and return (block, group) of every page that came."""
    lease = planner.prepare_load(request, num_blocks, 0.0)
    land(planner)
    status = planner.poll(lease.id)
    planner.complete(lease.id, 0.0)
    assert status.num_blocks == lease.num_blocks == num_blocks
    return [(page.block, page.group) for page in lease.pages]


def test_a_hit_ends_at_the_deepest_state_that_has_its_pages() -> None:
    planner, request = make(), path(0, 6)
    save(planner, request, 2, 5)

    assert hit(planner, request) == 5
    assert load(planner, request, 5) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2)]
    assert load(planner, request, 2) == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_pages_without_a_state_are_no_hit_and_are_counted_and_explained() -> None:
    planner, request = make(), path(0, 6)
    save(planner, request, 2)

    match = planner.lookup(request, 0.0)

    assert (match.num_blocks, match.without_state, match.cut) == (2, 6, CutReason.NO_STATE)
    assert planner.lookups.counters["stateless_tokens"] == 4 * BLOCK
    assert planner.explain(request).block == 2


def test_a_state_without_its_pages_is_no_hit() -> None:
    planner, request = make(), path(0, 4)
    lease = planner.prepare_save(request, 2, 2, 0.0, states=[3])
    planner.complete(lease.id, 0.0)

    assert hit(planner, request) == 0


def test_a_state_is_saved_only_where_it_is_asked_for_and_not_twice() -> None:
    planner, request = make(), path(0, 4)
    lease = planner.prepare_save(request, 0, 4, 0.0, states=[1])

    assert [(page.block, page.group) for page in lease.pages if page.group] == [(1, 1), (1, 2)]
    planner.complete(lease.id, 0.0)
    assert not planner.prepare_save(request, 0, 4, 0.0, states=[1]).pages
    assert [page.block for page in planner.prepare_save(request, 0, 4, 0.0, states=[3]).pages] == [3, 3]


def test_a_state_finds_room_for_all_of_its_pieces_or_for_none() -> None:
    planner, request = make(num_slots=5), path(0, 4)

    lease = planner.prepare_save(request, 0, 4, 0.0, states=[3])

    assert [(page.block, page.group) for page in lease.pages] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert lease.skipped == 2
    planner.check()


def test_a_state_leaves_host_memory_whole_and_its_pages_leave_next() -> None:
    planner = make(num_slots=12)
    old, new = path(0, 4), path(1, 4)
    save(planner, old, 4)
    save(planner, new, 4)  # full: 6 pages each
    planner.finished(new, 1.0)
    planner.finished(old, 2.0)  # both have been used since; `new` is the older now

    lease = planner.prepare_save(path(2, 1), 0, 1, 3.0)

    states = [planner.books.catalog.get(request.keys[3]).pages[1:] for request in (old, new)]  # type: ignore[union-attr]
    assert [page.state for page in states[0]] == [PageState.READY] * 2
    assert [page.state for page in states[1]] == [PageState.ABSENT] * 2
    assert planner.books.host.stranded_blocks == 4
    victims = planner.books.host.policy.victims(4)
    assert [page.block.key for page in victims] == new.keys[::-1]
    planner.release(lease.id, 3.0)
    planner.check()


def test_pages_before_another_state_or_a_fork_are_not_given_up_with_a_state() -> None:
    planner, request, other = make(), path(0, 6), path(1, 6)
    other.keys[:3] = request.keys[:3]  # they part after 3 blocks
    save(planner, request, 1, 6)
    save(planner, other, 6)
    block = planner.books.catalog.get(request.keys[5])
    assert block is not None

    planner.books.host.drop(block.pages[1:])
    planner._lower_tiers._part_pairs([block.pages[1]])

    first = planner.books.host.policy.victims(3)
    assert [page.block.key for page in first] == request.keys[5:2:-1]
    assert planner.books.host.stranded_blocks == 3


def test_what_lies_behind_an_evicted_page_leaves_next() -> None:
    planner, request, other = make(), path(0, 4), path(1, 2)
    save(planner, other, 2)
    save(planner, request, 4)
    block = planner.books.catalog.get(request.keys[0])
    assert block is not None

    planner.books.host.drop(block.pages[:1])
    planner._lower_tiers._part_pairs([block.pages[0]])

    leaving = planner.books.host.policy.victims(5)
    assert [page.block.key for page in leaving] == [request.keys[at] for at in (3, 3, 3, 2, 1)]


def test_a_state_that_a_conversation_has_passed_ages_and_one_that_is_loaded_does_not() -> None:
    planner, request = make(num_slots=9), path(0, 3)
    save(planner, request, 1, 2, 3)  # all 9 slots
    load(planner, request, 1)
    planner.finished(request, 1.0)

    lease = planner.prepare_save(path(1, 1), 0, 1, 2.0)

    assert len(lease.pages) == 1
    assert [planner.lookup(Request(9, request.keys[:n], n * BLOCK + 1), 2.0).num_blocks for n in (1, 2, 3)] == [1, 1, 3]


@pytest.mark.parametrize("tier", [DISK, REDIS])
@pytest.mark.parametrize("layout", [PAIRS, STATES])
def test_pages_and_state_are_found_where_one_tier_is_the_only_holder(
    tier: tuple[str, bool, bool], layout: Layout
) -> None:
    planner, request = make(32, tier, layout=layout), path(0, 6)
    save(planner, request, 2, 5)
    host = planner.books.host
    held = [page for page in planner.books.catalog.pages() if page.state is PageState.READY]
    host.drop(held)
    for page in held:
        planner.books.catalog.prune(page.block)

    if tier is REDIS:
        ask(planner, request, {2, 5})
        assert planner.lookup(request, 0.0).num_blocks == 5
    assert len(load(planner, request, 5)) == 5 * layout.block_groups + 2


def test_what_a_disk_holds_of_nothing_but_states_is_found_after_a_restart() -> None:
    request = path(0, 6)
    before, after = make(32, DISK, layout=STATES), make(32, DISK, layout=STATES)
    lease = before.prepare_save(request, 0, 6, 0.0, states=[1, 4])
    before.complete(lease.id, 0.0)
    stored = [
        (key, meta)
        for transfer in before.take_transfers()
        if transfer.op is Op.SPILL
        for key, meta in zip(transfer.keys, transfer.metas, strict=True)
    ]

    assert after.restore("disk", stored) == 4
    assert hit(after, request) == 5
    assert load(after, request, 5) == [(4, 0), (4, 1)]


def test_of_a_model_without_pages_nothing_is_remembered_of_blocks_behind_the_last_state() -> None:
    planner = make(layout=STATES)

    save(planner, path(0, 6))
    save(planner, path(1, 6), 4)

    assert [block.depth for block in planner.books.catalog.blocks()] == [0, 1, 2, 3]
    assert hit(planner, path(1, 6)) == 4


def ask(planner: Planner, request: Request, states: set[int]) -> None:
    """A lookup whose probe says: all pages, and the first piece of these states."""
    planner.lookup(request, 0.0)
    for transfer in planner.take_transfers():
        assert transfer.op is Op.PROBE
        num_asked = planner.lookups.probes.num_asked
        ok = [at % num_asked < num_asked - 1 or at // num_asked + 1 in states for at in range(len(transfer.keys))]
        planner.outcome(Outcome(transfer.id, tuple(ok), 0.001, 1), 0.0)


def test_a_state_of_which_a_shared_tier_lost_a_piece_is_not_tried_twice_by_one_request() -> None:
    """Redis evicts keys one by one, and is asked for the first piece of a state only."""
    planner, request = make(64, REDIS), path(0, 6)
    gone = page_key(request.keys[5], 2)
    ask(planner, request, {3, 6})
    lease = planner.prepare_load(request, 6, 0.0)

    for transfer in planner.take_transfers():
        planner.outcome(Outcome(transfer.id, tuple(key != gone for key in transfer.keys), 0.001, 1), 0.0)

    assert planner.poll(lease.id).num_blocks == 0
    planner.release(lease.id, 0.0)
    assert planner.lookup(request, 0.0).num_blocks == 3
    assert load(planner, request, 3)[-2:] == [(2, 1), (2, 2)]


@pytest.mark.parametrize("seed", range(30))
def test_in_random_histories_a_hit_is_what_the_definition_says(seed: int) -> None:
    """hit(N): the pages of [0, N) and both pieces of a state at N, on a tier that is up; the deepest N with both."""
    chance = random.Random(seed)
    planner = make(chance.randint(6, 24), DISK, tier_pages=chance.randint(4, 30))
    prompts = [path(number, 6) for number in range(4)]
    for number, other in enumerate(prompts[1:]):
        shared = chance.randint(0, 5)
        other.keys[:shared] = prompts[number].keys[:shared]

    for turn in range(60):
        request = chance.choice(prompts)
        request = Request(100 + turn, request.keys, 6 * BLOCK + 1)
        found = planner.lookup(request, float(turn))
        assert found.num_blocks == by_definition(planner, request)
        match chance.randrange(3):
            case 0:
                lease = planner.prepare_load(request, found.num_blocks, float(turn))
                land(planner)
                planner.complete(lease.id, float(turn))
            case 1:
                states = [block for block in range(6) if chance.random() < 0.3]
                lease = planner.prepare_save(request, 0, chance.randint(1, 6), float(turn), states=states)
                planner.complete(lease.id, float(turn), [chance.random() < 0.9 for _ in lease.pages])
            case 2:
                planner.set_tier_up("disk", chance.random() < 0.7, float(turn))
        planner.finished(request, float(turn))
        land(planner)
        planner.check()


def by_definition(planner: Planner, request: Request) -> int:
    is_up = planner.books.tiers[0].is_up
    best, pages_are_there = 0, True
    for depth, key in enumerate(request.keys):
        block = planner.books.catalog.get(key)
        there = [] if block is None else [p.state is PageState.READY or bool(p.homes and is_up) for p in block.pages]
        pages_are_there = pages_are_there and there[:1] == [True]
        if pages_are_there and there[1:] == [True, True]:
            best = depth + 1
    return best

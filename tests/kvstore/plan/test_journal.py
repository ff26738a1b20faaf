"""What the planner remembers of blocks that came and went, and how it explains a match."""

from kvstore.page import PageMeta, page_key
from kvstore.plan.journal import BlockEvent, Event, Journal, Left
from kvstore.plan.records import CutReason, Op, Outcome
from tests.helpers.clocks import Clocks
from tests.helpers.planners import land, make, path, save


def test_a_block_never_seen_is_explained_as_never_stored() -> None:
    planner, _ = make()
    save(planner, path(0, 2))

    explained = planner.explain(path(1, 3))

    assert explained.match.cut is CutReason.NEVER_STORED
    assert (explained.block, explained.left, explained.tiers) == (0, None, {})


def test_a_whole_match_needs_no_explanation() -> None:
    planner, _ = make()
    request = path(0, 2)
    save(planner, request)

    explained = planner.explain(request)

    assert (explained.match.num_blocks, explained.block) == (2, None)


def test_an_evicted_block_is_explained_with_time_tier_and_reason() -> None:
    planner, _ = make(num_slots=4)
    first = path(0, 4)
    save(planner, first)
    save(planner, path(1, 2))

    explained = planner.explain(first)

    assert (explained.match.num_blocks, explained.block) == (2, 2)
    assert explained.left == (1000.0, "host", "evicted")


def test_an_expired_and_a_deleted_block_are_told_apart() -> None:
    clocks = Clocks()
    planner, _ = make(clock=clocks)
    first, second = path(0, 2), path(1, 2)
    save(planner, first)
    save(planner, second)

    assert planner.set_ttl(first, 5.0, 0.0) == 2
    planner.forget(second, 0, 1.0)
    clocks.advance(6.0)
    planner.tick(6.0)

    assert planner.explain(first).left == (1000.0, "host", "expired")
    assert planner.explain(second).left == (1000.0, "host", "deleted")


def test_a_block_deleted_while_it_is_being_written_behind_is_explained_as_deleted_at_once() -> None:
    planner, journal = make(disk_pages=8)
    request = path(0, 2)
    planner.complete(planner.prepare_save(request, 0, 2, 0.0).id, 0.0)
    spills = planner.take_transfers()
    assert [transfer.op for transfer in spills] == [Op.SPILL]

    assert planner.forget(request, 0, 1.0) == 2

    assert planner.explain(request).left == (1000.0, "host", "deleted")
    assert Event.REMOVED not in [event.event for event in journal.take_events()]
    for transfer in spills:
        planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 1), 2.0)
    land(planner)
    assert "host" in [event.tier for event in journal.take_events() if event.event is Event.REMOVED]


def test_a_block_on_a_tier_that_is_down_is_explained_so() -> None:
    planner, _ = make(num_slots=2, disk_pages=8)
    first = path(0, 2)
    save(planner, first)
    save(planner, path(1, 2))
    planner.set_tier_up("disk", False, 0.0)

    explained = planner.explain(first)

    assert explained.match.cut is CutReason.TIER_DOWN
    assert explained.tiers == {"disk": False}


def test_events_tell_what_came_and_went_where() -> None:
    planner, journal = make(num_slots=2, disk_pages=8)
    first = path(0, 2)
    save(planner, first)
    save(planner, path(1, 1))

    events = journal.take_events()

    assert BlockEvent(Event.STORED, 1000.0, "host", 0, tuple(first.keys), (None, first.keys[0])) in events
    assert BlockEvent(Event.STORED, 1000.0, "disk", 0, (first.keys[1],), (first.keys[0],)) in events
    assert BlockEvent(Event.REMOVED, 1000.0, "host", 0, (first.keys[1],), (first.keys[0],)) in events
    assert journal.take_events() == []


def test_clear_deletes_everything_and_says_so() -> None:
    planner, journal = make(num_slots=4, disk_pages=8)
    save(planner, path(0, 3))
    stray = page_key(path(5, 1).keys[0])
    planner.restore("disk", [(stray, PageMeta(4096, b"\1" * 32, 7))])
    journal.take_events()

    assert planner.clear(0.0) == 4
    deletes = [t for t in planner.take_transfers() if t.op is Op.DELETE]

    assert sum(len(t.keys) for t in deletes) == 4
    assert journal.take_events()[-1].event is Event.CLEARED
    assert planner.books.host.pool.num_free == 4
    for transfer in deletes:
        planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys)), 0.0)
    planner.check()


def test_both_memories_are_bounded() -> None:
    planner, _ = make()
    journal = Journal(lambda: 0.0, max_departures=3, max_events=5)
    journal.wants_events = True
    save(planner, path(0, 4))
    pages = list(planner.books.catalog.pages())

    for page in pages:
        journal.removed("host", [page], Left.LOST)
        journal.stored("disk", [page])

    assert sum(journal.departure(page.block.key) is not None for page in pages) == 3
    told = [event.event for event in journal.take_events()]
    assert told[0] is Event.DROPPED  # who believed what was told before hears that some is missing
    assert Event.DROPPED not in told[1:]
    assert len(told) == 1 + 5
    assert journal.num_dropped == 3
    assert journal.take_events() == []

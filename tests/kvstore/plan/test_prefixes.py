"""A walk over what is stored, step by step, while it changes."""

from kvstore.plan.journal import Journal
from kvstore.plan.prefixes import Tour
from kvstore.plan.records import CutReason, RequestOptions
from kvstore.store import LocalStore
from tests.helpers.stores import BLOCK, open_small, prompt, use


def fork(shared: int, tail: int, seed: int) -> list[int]:
    """A prompt whose first `shared` blocks are those of every fork."""
    return [*prompt(shared, 1, tail=0).tolist(), *prompt(tail, 100 + seed).tolist()]


def walk(store: LocalStore, max_blocks: int) -> Tour:
    tour = Tour()
    while not store.admin.guide(tour, max_blocks):
        pass
    return tour


def shape(tour: Tour) -> list[tuple[int, int, int]]:
    return sorted((prefix.depth, prefix.num_blocks, prefix.num_children) for prefix in tour.prefixes)


def test_prefixes_are_told_with_their_place_and_size_whatever_the_steps() -> None:
    with open_small() as store:
        for seed in range(3):
            use(store, fork(6, 2 + seed, seed))

        for max_blocks in (1, 2, 5, 1000):
            tour = walk(store, max_blocks)
            assert shape(tour) == [(0, 6, 3), (6, 2, 0), (6, 3, 0), (6, 4, 0)]
            trunk = tour.prefixes[0]
            assert trunk.parent is None
            assert {prefix.parent for prefix in tour.prefixes[1:]} == {trunk.key}
            assert sum(prefix.pages["host"] for prefix in tour.prefixes) == 15


def test_a_step_visits_no_more_blocks_than_it_may() -> None:
    with open_small() as store:
        use(store, prompt(40))
        tour = Tour()

        assert not store.admin.guide(tour, 8)
        assert tour.prefixes[0].num_blocks == 8
        assert not store.admin.guide(tour, 8)
        assert tour.prefixes[0].num_blocks == 16


def test_a_load_counts_where_it_ended_and_moves_up_when_that_is_evicted() -> None:
    with open_small() as store:
        use(store, fork(6, 4, 0))
        use(store, fork(6, 4, 0))  # loads all ten blocks
        use(store, fork(6, 4, 1))  # loads the shared six

        loads = sorted((p.depth, p.num_blocks, p.num_loads) for p in walk(store, 100).prefixes)
        assert loads == [(0, 6, 1), (6, 4, 0), (6, 4, 1)]

        for seed in range(10, 15):
            use(store, prompt(11, seed))  # 55 of 64 slots: 5 of the forks' 14 blocks make room, the oldest tail first
        left = [(p.depth, p.num_blocks, p.num_loads) for p in walk(store, 100).prefixes if p.num_loads]
        assert left == [(0, 9, 2)]


def test_what_goes_between_two_steps_is_left_out() -> None:
    with open_small() as store:
        use(store, fork(4, 3, 0))
        use(store, fork(4, 3, 1))
        tour = Tour()
        assert not store.admin.guide(tour, 4)

        store.admin.clear()

        assert store.admin.guide(tour, 100)
        assert [(prefix.depth, prefix.num_blocks) for prefix in tour.prefixes] == [(0, 4)]


def test_a_run_that_is_cut_between_two_steps_is_seen_whole() -> None:
    with open_small() as store:
        use(store, fork(8, 2, 0))
        tour = Tour()
        assert not store.admin.guide(tour, 3)

        use(store, fork(8, 2, 1))

        while not store.admin.guide(tour, 3):
            pass
        assert shape(tour) == [(0, 8, 2), (8, 2, 0), (8, 2, 0)]


def test_more_prefixes_than_fit_are_said_to_be_more() -> None:
    with open_small() as store:
        for seed in range(5):
            use(store, prompt(2, seed))
        tour = Tour(max_prefixes=3)

        assert store.admin.guide(tour, 1000)

        assert tour.is_cut
        assert len(tour.prefixes) == 3


def test_lookups_that_fall_short_are_remembered_with_their_reason_then() -> None:
    with open_small() as store:
        assert store.admin.shortfalls() == []
        store.keep_journal(Journal(lambda: 12.0, max_shortfalls=3))
        use(store, prompt(4))
        use(store, prompt(4))  # whole: nothing to tell
        use(store, fork(4, 2, 0))

        told = store.admin.shortfalls()

        assert [(s.at, s.num_tokens, s.told.block, s.told.match.cut) for s in told] == [
            (12.0, 4 * BLOCK + 1, 0, CutReason.NEVER_STORED),
            (12.0, 6 * BLOCK + 1, 0, CutReason.NEVER_STORED),
        ]
        for seed in range(5):
            use(store, prompt(3, 50 + seed))
        assert len(store.admin.shortfalls()) == 3


def test_a_prefix_tells_the_session_that_used_it() -> None:
    with open_small() as store:
        use(store, prompt(3), RequestOptions(session="chat 7"))

        assert walk(store, 10).prefixes[0].session == "chat 7"

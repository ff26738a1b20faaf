"""Verbs of long prompts let go of the lock: others use the store between two steps, and what they do is taken in.

`Turnstile` stands in for the store's lock and calls `between` whenever it was let go of, as another thread would. So
each test says exactly what comes between two steps, and how much a step may do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from kvstore.errors import StoreClosed
from kvstore.plan.records import LeaseState, Request
from kvstore.store import LocalStore
from tests.helpers.stores import load, memory_tier, prompt, store_over, use

# What a step may do at most; stated here, since a larger one is a longer hold of the lock.
ROOM = 512  # blocks that need room, or leave
PAGES = 1024  # that are only booked

BLOCKS = 3000
SLOTS = 4096
LONG = prompt(BLOCKS)


class Turnstile:
    """A lock that lets somebody in whenever it is let go of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_holds = 0
        self.between: Callable[[], object] | None = None

    def acquire(self, *args: Any) -> bool:
        return self._lock.acquire(*args)

    def release(self) -> None:
        self._lock.release()
        self.num_holds += 1
        between, self.between = self.between, None
        if between is not None and threading.current_thread() is threading.main_thread():
            try:
                between()
            finally:
                self.between = between

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextlib.contextmanager
    def letting_in(self, between: Callable[[], object]) -> Iterator[Turnstile]:
        """Have `between` called; counts the holds of the verb alone."""
        self.num_holds, self.between = 0, between
        try:
            yield self
        finally:
            self.between = None


def turnstile(store: LocalStore) -> Turnstile:
    """Put one into a store, whose housekeeper stops: no tick comes in between but those of the test."""
    store._dispatcher.mover.close(5.0)
    lock = Turnstile()
    store._dispatcher.lock = store._lock = store.admin._lock = lock  # type: ignore[assignment]
    store._dispatcher._changed = threading.Condition(lock)  # type: ignore[arg-type]
    return lock


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with store_over([], num_slots=SLOTS, ttl_s=3600.0) as store:
        yield store


@pytest.fixture
def long(store: LocalStore) -> Request:
    """A long prompt that is stored."""
    request = store.request(LONG)
    store.complete(store.prepare_save(request, 0, BLOCKS))
    return request


VERBS: dict[str, tuple[int, Callable[[LocalStore, Request], Any]]] = {
    "prepare_save": (ROOM, lambda s, r: s.prepare_save(s.request(prompt(1000, seed=9)), 0, 1000)),
    "prepare_load": (PAGES, lambda s, r: s.prepare_load(r, BLOCKS)),
    "prefetch": (BLOCKS // 2, lambda s, r: s.prefetch(r)),
    "finished": (2 * PAGES, lambda s, r: s.keep.finished(r)),
    "finished for good": (PAGES, lambda s, r: s.keep.finished(r, last_turn=True)),
    "pin": (ROOM, lambda s, r: s.keep.pin(r)),
    "unpin": (PAGES, lambda s, r: s.keep.unpin(r)),
    "set_ttl": (ROOM, lambda s, r: s.keep.set_ttl(r, 60.0)),
    "forget": (ROOM, lambda s, r: s.keep.forget(r)),
    "clear": (ROOM, lambda s, r: s.admin.clear()),
    "resize_host": (ROOM, lambda s, r: s.admin.resize_host(1)),
}


@pytest.mark.parametrize("name", VERBS)
def test_others_use_the_store_between_two_steps_of_a_verb(store: LocalStore, long: Request, name: str) -> None:
    step, verb = VERBS[name]
    num_blocks = 1000 if name == "prepare_save" else BLOCKS
    other = store.request(prompt(3, seed=1))
    lock = turnstile(store)

    def between() -> None:
        store.lookup(other)
        store.check()

    with lock.letting_in(between):
        verb(store, long)

    num_holds = lock.num_holds // 3  # the verb's own, and those of two that came in between
    assert num_holds >= -(-num_blocks // step)
    store.check()


@pytest.mark.parametrize("end", ["complete", "release"])
@pytest.mark.parametrize("kind", ["load", "save"])
def test_others_use_the_store_while_a_long_lease_ends(store: LocalStore, long: Request, kind: str, end: str) -> None:
    request = long
    if kind == "load":
        lease: Any = store.prepare_load(request, BLOCKS)
    else:
        store.keep.forget(long)
        lease = store.prepare_save(request, 0, BLOCKS)
    lock = turnstile(store)

    with lock.letting_in(store.check):
        getattr(store, end)(lease)

    assert lock.num_holds // 2 >= BLOCKS // PAGES
    assert store.stats()["leases"] == 0
    assert store.lookup(request).num_blocks == (0 if (kind, end) == ("save", "release") else BLOCKS)


def test_others_use_the_store_while_the_leases_of_a_dead_engine_end(store: LocalStore, long: Request) -> None:
    for _ in range(3):
        store.prepare_load(long, BLOCKS, owner="engine")
    lock = turnstile(store)

    with lock.letting_in(store.check):
        assert store.release_owner("engine") == 3

    assert lock.num_holds // 2 >= 3 * BLOCKS // PAGES
    assert store.stats()["leases"] == 0


@pytest.fixture
def expired(store: LocalStore, long: Request) -> Request:
    """A long prompt all of whose times to live are over, and no tick has come since, nor will one."""
    store._dispatcher.mover.close(5.0)
    store._planner.books.host._boot = lambda: 1e9
    return long


def test_many_times_to_live_that_end_at_once_end_in_steps(store: LocalStore, expired: Request) -> None:
    lock = turnstile(store)

    with lock.letting_in(store.check):
        store._dispatcher._on_tick()

    assert lock.num_holds // 2 > BLOCKS // ROOM
    assert store.stats()["slots"]["free"] == SLOTS


def test_no_lookup_finds_what_is_past_its_time_and_has_not_left(store: LocalStore, expired: Request) -> None:
    turnstile(store)

    assert store.lookup(expired).num_blocks == 0
    assert store.stats()["slots"]["free"] < SLOTS
    store.check()


def test_a_save_saves_anew_what_is_past_its_time_and_has_not_left(store: LocalStore, expired: Request) -> None:
    turnstile(store)

    lease = store.prepare_save(expired, 0, BLOCKS)

    assert len(lease.pages) == BLOCKS


def test_short_prompts_take_one_step(store: LocalStore) -> None:
    request = store.request(prompt(ROOM))
    lock = turnstile(store)

    def holds(verb: Callable[[], Any]) -> int:
        lock.num_holds = 0
        verb()
        return lock.num_holds

    lease = store.prepare_save(request, 0, ROOM)
    assert lock.num_holds == 1
    assert holds(lambda: store.complete(lease)) == 1
    loads: list[Any] = []
    assert holds(lambda: loads.append(store.prepare_load(request, ROOM))) == 1
    assert holds(lambda: store.complete(loads[0])) == 1
    assert holds(lambda: store.keep.finished(request)) == 1
    assert holds(lambda: store.keep.pin(request)) == 1
    assert holds(lambda: store.keep.unpin(request)) == 1
    assert holds(lambda: store.keep.set_ttl(request, 60.0)) == 1
    assert holds(lambda: store.keep.forget(request)) <= 2  # it is not known before that nothing else is left


def test_an_engine_that_dies_while_its_lease_is_prepared_leaves_none(store: LocalStore, long: Request) -> None:
    lock = turnstile(store)
    other = store.request(prompt(1000, seed=5))

    with lock.letting_in(lambda: store.release_owner("engine")):
        loading = store.prepare_load(long, BLOCKS, owner="engine")
        saving = store.prepare_save(other, 0, 1000, owner="engine")

    assert not loading.pages
    assert not saving.pages
    assert store.stats()["leases"] == 0
    assert store.stats()["slots"]["filling"] == 0
    store.check()


def test_a_prompt_that_is_forgotten_while_it_is_loaded_is_cut(store: LocalStore, long: Request) -> None:
    lock = turnstile(store)
    comes = iter([lambda: None, lambda: store.keep.forget(long)])

    with lock.letting_in(lambda: next(comes, lambda: None)()):
        lease = store.prepare_load(long, BLOCKS)

    assert lease.num_blocks < BLOCKS
    store.check()
    store.release(lease)
    store.check()
    assert store.stats()["slots"]["free"] == SLOTS


def test_what_is_saved_while_all_is_cleared_is_whole_or_gone(store: LocalStore, long: Request) -> None:
    lock = turnstile(store)
    seeds = iter(range(100, 200))

    with lock.letting_in(lambda: use(store, prompt(3, seed=next(seeds)))):
        store.admin.clear()

    for seed in range(100, next(seeds)):
        assert load(store, store.request(prompt(3, seed=seed)))[0] in (0, 3)
    assert store.lookup(long).num_blocks == 0
    store.check()


def test_a_call_that_is_interrupted_between_two_steps_of_an_end_is_ended_by_the_next_tick(
    store: LocalStore, long: Request
) -> None:
    loading = store.prepare_load(long, BLOCKS)
    saving = store.prepare_save(store.request(prompt(600, seed=4)), 0, 600)
    bare = store.prepare_save(store.request(prompt(400, seed=6)), 0, 400)
    lock = turnstile(store)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for lease in (loading, saving):
        with pytest.raises(KeyboardInterrupt), lock.letting_in(interrupt):
            store.complete(lease)  # type: ignore[arg-type]
    store._dispatcher._on_tick()

    assert store.poll(loading).state is LeaseState.CLOSED
    assert store.stats()["leases"] == 1  # the one that nobody has ended
    store.release(bare)
    store.check()
    assert store._dispatcher.num_mended == 0


def test_a_call_that_is_interrupted_while_it_prepares_leaves_nothing(store: LocalStore, long: Request) -> None:
    lock = turnstile(store)
    num_steps = count(1)

    def interrupt() -> None:
        if next(num_steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lock.letting_in(interrupt):
        store.prepare_load(long, BLOCKS)

    assert store.stats()["leases"] == 0
    store.check()


def test_a_store_that_closes_between_two_steps_ends_the_call(store: LocalStore, long: Request) -> None:
    loading = store.prepare_load(long, BLOCKS)
    lock = turnstile(store)

    with lock.letting_in(store._dispatcher.close):
        with pytest.raises(StoreClosed):
            store.keep.forget(long)
        store.complete(loading)  # silent, as any end after close


def test_a_long_prompt_comes_from_below_in_steps_and_is_right() -> None:
    with store_over([memory_tier(SLOTS)], num_slots=2048) as store:
        for seed in (0, 1):
            use(store, prompt(1500, seed=seed))
            assert store.flush(60.0)

        assert load(store, store.request(prompt(1500)), 60.0)[0] == 1500
        assert load(store, store.request(prompt(1500, seed=1)), 60.0)[0] == 1500
        store.check()


def test_a_long_load_that_finds_room_for_a_part_keeps_its_head() -> None:
    with store_over([memory_tier(SLOTS)], num_slots=1600) as store:
        use(store, prompt(1500))
        assert store.flush(60.0)
        lease = store.prepare_save(store.request(prompt(900, seed=1)), 0, 900)

        num_loaded, _ = load(store, store.request(prompt(1500)), 60.0)

        assert num_loaded == 700
        store.release(lease)
        store.check()


def test_a_long_save_that_is_whole_in_part_keeps_what_is(store: LocalStore) -> None:
    request = store.request(LONG)
    lease = store.prepare_save(request, 0, BLOCKS)

    store.complete(lease, filled=[page.block != 2000 for page in lease.pages])

    assert store.lookup(request).num_blocks == 2000
    assert store.stats()["slots"]["filling"] == 0
    store.check()

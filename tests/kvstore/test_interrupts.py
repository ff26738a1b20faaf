"""An exception from outside in the middle of a call of the store: no lease, slot or pin is left over, and it works on.

kvstore/plan/test_mend.py goes through every line of the planner; here are the lines around it, with lanes that carry.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvstore.errors import RequestError
from kvstore.store import LocalStore
from tests.helpers.daemons import wait_until
from tests.helpers.interrupts import interrupted_at
from tests.helpers.stores import load, memory_tier, prompt, redis_like, save, store_over, use

SLOTS = 12
STEP = 13  # every so many lines


@pytest.fixture
def store() -> Iterator[LocalStore]:
    shared, plan = redis_like()
    tiers = [memory_tier(24), (shared, replace(plan, capacity_pages=None, policy=None))]
    with store_over(tiers, num_slots=SLOTS) as store:
        use(store, prompt(5, seed=1))
        use(store, prompt(5))
        yield store


def look(store: LocalStore, where: list[str]) -> None:
    """What must hold after an interrupt, once what is under way has landed."""
    store.check()
    assert store.flush(10.0), where
    wait_until(lambda: store.stats()["slots"]["filling"] == 0)
    store.check()
    assert store.stats()["leases"] == 0, where


VERBS: dict[str, Callable[[LocalStore], Any]] = {
    "lookup": lambda store: store.wait_lookup(store.request(prompt(5, seed=9)), 0.1),
    "prepare_save": lambda store: store.prepare_save(store.request(prompt(4, seed=8)), 0, 4),
    "prepare_load": lambda store: store.prepare_load(store.request(prompt(5, seed=1)), 5),
    "forget": lambda store: store.keep.forget(store.request(prompt(5)), 2),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_call_that_is_interrupted_anywhere_leaves_nothing_behind(store: LocalStore, name: str) -> None:
    for n in range(1, 100_000, STEP):
        done = None
        with interrupted_at(n) as where:
            done = VERBS[name](store)
        if hasattr(done, "pages"):
            store.release(done)

        look(store, where)
        if not where:
            break
    assert use(store, prompt(3, seed=50)) == 0
    assert use(store, prompt(3, seed=50)) == 3


@pytest.mark.parametrize("end", ["complete", "release"])
@pytest.mark.parametrize("prepare", ["prepare_save", "prepare_load"])
def test_the_end_of_a_lease_that_is_interrupted_can_be_said_again(store: LocalStore, prepare: str, end: str) -> None:
    for n in range(1, 100_000, STEP):
        lease = VERBS[prepare](store)
        if prepare == "prepare_load":
            store.wait(lease, 10.0)
        with interrupted_at(n) as where:
            getattr(store, end)(lease)
        getattr(store, end)(lease)

        look(store, where)
        if not where:
            break


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may come in a finalizer, too
def test_an_exception_that_another_thread_sets_again_and_again_leaves_the_store_whole(store: LocalStore) -> None:
    class Stop(Exception):
        pass

    is_over = threading.Event()

    def work() -> None:
        for seed in range(150):
            with contextlib.suppress(Stop):
                request = store.request(prompt(4, seed=seed % 5))
                lease = store.prepare_save(request, 0, 4)
                store.release(lease)
            with contextlib.suppress(Stop):
                store.keep.finished(store.request(prompt(3, seed=seed % 7)))
        with contextlib.suppress(Stop):
            is_over.set()
        is_over.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not is_over.is_set():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stop))
        is_over.wait(0.001)
    thread.join()

    store.check()
    store.release_owner("")  # leases whose caller was interrupted between the call and its own next line
    look(store, [])
    assert load(store, store.request(prompt(5)))[0] in range(6)


def test_a_wrong_call_costs_no_mending(store: LocalStore) -> None:
    lease = store.prepare_save(store.request(prompt(4, seed=3)), 0, 4)

    with pytest.raises(RequestError):
        store.complete(lease, filled=[True])
    store.release(lease)

    assert store._dispatcher.num_mended == 0


def test_what_was_stored_before_an_interrupt_is_still_there(store: LocalStore) -> None:
    for n in range(1, 400, 67):  # few enough that nothing has to leave the lower tier
        with interrupted_at(n):
            save(store, store.request(prompt(2, seed=n)))

        assert load(store, store.request(prompt(5)))[0] == 5
    assert store._dispatcher.num_mended > 0

"""A client's tie to a daemon process that is frozen, killed and restarted: who calls it, and how often."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.plan.records import LeaseState
from kvstore.service.client.store import MISS, RemoteStore
from tests.helpers.daemons import SEEKER, DaemonProcess, attach, counted_calls
from tests.helpers.stores import prompt, save
from tests.helpers.waiting import wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "kv.sock")
    yield daemon
    daemon.kill()


@pytest.fixture
def calls() -> Iterator[Counter[str]]:
    with counted_calls() as counted:
        yield counted


def everything(store: RemoteStore, number: int) -> None:
    """One of each call that an engine's step makes."""
    request = store.request(prompt(3, number))
    assert store.lookup(request) == MISS
    assert store.prepare_load(request, 3).num_blocks == 0
    assert not store.prepare_save(request, 0, 3).pages
    assert store.prefetch(request) == 0
    store.observe_prefill(100, 1.0)
    store.keep.finished(request)


def test_a_frozen_daemon_costs_one_call_per_thread_and_releases_what_it_granted(
    daemon: DaemonProcess, calls: Counter[str]
) -> None:
    with attach(daemon.socket, call_timeout_s=0.3, retry_max_s=0.1) as store:
        stored = store.request(prompt(5))
        save(store, stored)
        lease = store.prepare_load(stored, 5)
        daemon.signal(signal.SIGSTOP)
        calls.clear()
        start = threading.Barrier(4)

        def engine(number: int) -> None:
            start.wait()
            for step in range(50):
                everything(store, 100 * number + step)

        threads = [threading.Thread(target=engine, args=(n,), name=f"engine {n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.complete(lease)

        by_engine = {name: num for name, num in calls.items() if name != SEEKER}
        assert set(by_engine.values()) == {1}  # those that were under way before it was known to be frozen
        assert set(by_engine) <= {thread.name for thread in threads}
        assert calls[SEEKER] <= 1  # it waits for the daemon, it does not ask again and again
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: store.lookup(stored).num_blocks == 5)
        stats = store.stats()
        assert store.num_attached == 1
        assert stats["leases"] == stats["slots"]["filling"] == 0


def test_a_load_under_way_when_the_daemon_freezes_is_given_up_at_once(
    daemon: DaemonProcess, calls: Counter[str]
) -> None:
    with attach(daemon.socket, call_timeout_s=0.2, retry_max_s=0.1) as store:
        leases = [store.prepare_save(store.request(prompt(2, seed)), 0, 2) for seed in range(10)]
        daemon.signal(signal.SIGSTOP)
        calls.clear()

        for lease in leases:
            store.complete(lease)

        assert calls[threading.current_thread().name] == 1
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: store.stats().get("leases") == 0)


def test_a_call_that_could_wait_long_ends_when_the_daemon_does_not_answer(
    daemon: DaemonProcess, calls: Counter[str]
) -> None:
    with attach(daemon.socket, call_timeout_s=0.2, retry_max_s=0.1) as store:
        save(store, store.request(prompt(2)))
        lease = store.prepare_load(store.request(prompt(2)), 2)
        daemon.signal(signal.SIGSTOP)
        assert store.lookup(store.request(prompt(2))) == MISS
        calls.clear()

        assert store.wait_lookup(store.request(prompt(2)), 60.0) == MISS
        assert not store.flush(60.0)
        assert store.wait(lease, 60.0).state is LeaseState.READY  # known before

        assert calls[threading.current_thread().name] == 0
        daemon.signal(signal.SIGCONT)
        store.release(lease)


def test_a_new_daemon_is_attached_to_without_a_call(daemon: DaemonProcess, calls: Counter[str]) -> None:
    with attach(daemon.socket, retry_max_s=0.1) as store:
        daemon.kill()
        assert store.lookup(store.request(prompt(2))) == MISS
        calls.clear()

        daemon.start()

        wait_until(lambda: store.num_attached == 2)
        assert set(calls) == {SEEKER}
        wait_until(lambda: save(store, store.request(prompt(2))) == 2)


def test_a_daemon_that_starts_late_is_attached_to_without_a_call(tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock", retry_max_s=0.1) as store:
        assert not store.is_attached
        daemon = DaemonProcess(tmp_path / "kv.sock")
        try:
            wait_until(lambda: store.is_attached)
        finally:
            daemon.kill()


def test_the_memory_of_a_dead_daemon_is_let_go_when_its_loss_is_seen_unless_it_is_leased(daemon: DaemonProcess) -> None:
    with attach(daemon.socket) as store:
        request = store.request(prompt(2))
        save(store, request)
        lease = store.prepare_load(request, 2)
        daemon.kill()

        assert store.lookup(request) == MISS
        slabs = [store.slots.slabs]
        store.release(lease)
        slabs.append(store.slots.slabs)
        assert [len(some) for some in slabs] == [1, 0]


def test_a_store_is_closed_at_once_while_its_daemon_is_frozen(daemon: DaemonProcess) -> None:
    store = attach(daemon.socket, call_timeout_s=0.1, retry_max_s=0.1)
    daemon.signal(signal.SIGSTOP)
    assert store.lookup(store.request(prompt(2))) == MISS
    (seeker,) = [thread for thread in threading.enumerate() if thread.name == SEEKER]

    store.close()

    assert not seeker.is_alive()


def test_a_child_that_is_forked_while_the_daemon_is_sought_finds_it_by_itself(daemon: DaemonProcess) -> None:
    with attach(daemon.socket, retry_max_s=0.1) as store:
        daemon.kill()
        assert store.lookup(store.request(prompt(2))) == MISS
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert store.lookup(store.request(prompt(2))) == MISS
                daemon.start()
                wait_until(lambda: save(store, store.request(prompt(2))) == 2)
                code = 0
            finally:
                daemon.process.kill()
                os._exit(code)

        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0

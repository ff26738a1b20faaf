"""Daemons and clients that die, freeze and come back, as processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.plan.records import LeaseState
from kvstore.service.client.store import MISS
from tests.helpers.daemons import DaemonProcess, attach
from tests.helpers.stores import load, page_of, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

DYING_CLIENT = """
import os, signal, sys
from pathlib import Path
from tests.helpers.daemons import attach
from tests.helpers.stores import load, prompt, save

store = attach(Path(sys.argv[1]))
save(store, store.request(prompt(4, seed=7)))
reading = store.prepare_load(store.request(prompt(4, seed=7)), 4)
writing = store.prepare_save(store.request(prompt(8, seed=8)), 0, 8)
store.slots.array(writing.pages[0].slot)[:] = 255
print(len(reading.pages), len(writing.pages), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk")
    yield daemon
    daemon.kill()


def test_a_client_killed_in_the_middle_of_its_leases_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    with attach(daemon.socket) as store:
        done = subprocess.run(
            [sys.executable, "-c", DYING_CLIENT, str(daemon.socket)],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            timeout=60,
        )
        assert done.returncode == -signal.SIGKILL
        assert done.stdout.split() == [b"4", b"8"]

        wait_until(lambda: store.stats()["leases"] == 0)

        stats = store.stats()
        assert stats["slots"] == {"free": 60, "filling": 0, "resident": 4}
        assert stats["pinned_pages"] == 0
        assert store.lookup(store.request(prompt(8, seed=8))).num_blocks == 0
        assert load(store, store.request(prompt(4, seed=7)))[0] == 4


def test_restart_keeps_what_is_on_disk(daemon: DaemonProcess) -> None:
    with attach(daemon.socket) as store:
        use(store, prompt(10))

        assert daemon.terminate() == 0
        daemon.start()
        wait_until(lambda: store.wait_lookup(store.request(prompt(10))).num_blocks == 10)

        loaded, match = load(store, store.request(prompt(10)))
        assert (loaded, match.by_tier) == (10, {"disk": 10})


def test_pages_written_to_disk_survive_a_killed_daemon(daemon: DaemonProcess) -> None:
    with attach(daemon.socket) as store:
        use(store, prompt(10))
        assert store.flush(WAIT_S)

        daemon.kill()
        assert store.lookup(store.request(prompt(10))) == MISS
        daemon.start()
        wait_until(lambda: store.wait_lookup(store.request(prompt(10))).num_blocks == 10)

        assert load(store, store.request(prompt(10)))[0] == 10


def test_a_lease_of_a_daemon_that_died_can_still_be_copied_and_harms_nobody(daemon: DaemonProcess) -> None:
    with attach(daemon.socket) as store:
        request = store.request(prompt(6))
        save(store, request)
        reading = store.prepare_load(request, 6)
        writing = store.prepare_save(store.request(prompt(3, seed=1)), 0, 3)
        unread = store.prepare_load(request, 6)
        assert store.wait(reading).state is LeaseState.READY
        daemon.kill()
        daemon.start()
        wait_until(lambda: store.num_attached == 2 or store.lookup(request) is None)
        save(store, store.request(prompt(64, seed=3)))  # every slot of the new slab

        for page in reading.pages:
            assert np.array_equal(store.slots.array(page.slot), page_of(request.keys[page.block], 0, 8192))
        for page in writing.pages:
            store.slots.array(page.slot)[:] = 1
        store.complete(writing)
        store.complete(reading)
        store.release(unread)

        assert load(store, store.request(prompt(64, seed=3)))[0] == 64
        assert store.lookup(store.request(prompt(3, seed=1))).num_blocks == 0
        assert store.stats()["leases"] == 0
        assert len(store.slots.slabs) == 1


def test_a_frozen_daemon_costs_each_client_one_deadline_and_is_used_again_afterwards(daemon: DaemonProcess) -> None:
    with attach(daemon.socket, call_timeout_s=0.3, retry_max_s=0.4) as store:
        request = store.request(prompt(5))
        save(store, request)
        lease = store.prepare_load(request, 5)

        daemon.signal(signal.SIGSTOP)
        began = time.monotonic()
        assert store.lookup(request) == MISS
        assert time.monotonic() - began < 20.0  # a call without a deadline would wait for ever
        answered = [store.lookup(request) for _ in range(1000)]
        assert answered == [MISS] * 1000
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: store.lookup(request).num_blocks == 5)

        assert store.num_attached == 1  # the session, and with it the lease, was never given up
        assert np.array_equal(store.slots.array(lease.pages[0].slot), page_of(request.keys[0], 0, 8192))
        store.complete(lease)
        assert store.stats()["leases"] == 0


def test_a_lease_granted_in_an_answer_that_came_too_late_is_given_back(daemon: DaemonProcess) -> None:
    with attach(daemon.socket, call_timeout_s=0.2, retry_max_s=0.1) as store, attach(daemon.socket) as watcher:
        request = store.request(prompt(5))
        daemon.signal(signal.SIGSTOP)
        lease = store.prepare_save(request, 0, 5)
        assert (len(lease.pages), lease.skipped) == (0, 5)
        store.release(lease)
        daemon.signal(signal.SIGCONT)

        wait_until(lambda: store.lookup(request) is not MISS and watcher.stats()["leases"] == 0)

        assert watcher.stats()["slots"]["filling"] == 0


def test_sigterm_lets_open_leases_end_and_grants_no_new_ones(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", "service.drain_s=20")
    try:
        with attach(daemon.socket) as store:
            request = store.request(prompt(4))
            save(store, store.request(prompt(2, seed=5)))
            lease = store.prepare_save(request, 0, 4)
            daemon.process.terminate()
            wait_until(lambda: store.lookup(store.request(prompt(2, seed=5))).num_blocks == 0)
            for page in lease.pages:
                np.copyto(store.slots.array(page.slot), page_of(request.keys[page.block], 0, 8192))
            assert not store.prepare_save(store.request(prompt(4, seed=6)), 0, 4).pages
            store.complete(lease)
            assert daemon.process.wait(WAIT_S) == 0

            daemon.start()
            wait_until(lambda: store.wait_lookup(store.request(prompt(4))).num_blocks == 4)
            assert load(store, store.request(prompt(4)))[0] == 4
    finally:
        daemon.kill()


def test_a_second_daemon_on_the_socket_is_refused_and_a_stale_socket_is_taken_over(daemon: DaemonProcess) -> None:
    command = [sys.executable, "-m", "kvstore", "serve", "--socket", str(daemon.socket), *_small()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)

    assert done.returncode == 2
    assert "another daemon listens" in done.stderr

    daemon.kill()
    assert daemon.socket.exists()
    daemon.start()
    with attach(daemon.socket) as store:
        assert store.is_attached


def test_the_socket_is_its_owners_alone(daemon: DaemonProcess) -> None:
    assert daemon.socket.stat().st_mode & 0o777 == 0o600


def test_many_threads_share_a_client_while_the_daemon_is_killed_again_and_again(daemon: DaemonProcess) -> None:
    failures: list[BaseException] = []
    loaded = [0] * 4
    over = threading.Event()

    def engine(number: int) -> None:
        try:
            seed = 0
            while not over.is_set():
                seed += 1
                loaded[number] += use(store, prompt(1 + seed % 6, number % 2 * 10 + seed % 5))
        except BaseException as error:
            failures.append(error)

    with attach(daemon.socket, retry_max_s=0.1) as store:
        threads = [threading.Thread(target=engine, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            time.sleep(0.4)
            daemon.kill()
            time.sleep(0.2)
            attached = store.num_attached  # before the start: the client may be back before `start` returns
            daemon.start()

            def is_back(attached: int = attached) -> bool:
                return bool(failures) or (store.is_attached and store.num_attached > attached)

            wait_until(is_back)
        before = sum(loaded)
        wait_until(lambda: sum(loaded) > before + 20 or bool(failures))
        over.set()
        for thread in threads:
            thread.join(WAIT_S)

        assert failures == []
        wait_until(lambda: store.stats().get("leases") == 0)
        slots = store.stats()["slots"]
        assert slots["filling"] == 0
        assert sum(slots.values()) == 64


def test_connections_that_say_nothing_or_nonsense_leave_the_daemon_as_it_was(daemon: DaemonProcess) -> None:
    rng = np.random.default_rng(0)
    with attach(daemon.socket) as store:
        save(store, store.request(prompt(3)))
        before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.settimeout(5)
                raw.connect(str(daemon.socket))
                raw.sendall(rng.bytes(int(rng.integers(0, 300))))

        wait_until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= before)
        assert load(store, store.request(prompt(3)))[0] == 3


def _small() -> list[str]:
    return ["--set", "host.capacity_bytes=1MiB"]

"""`service.isolate`: no client can write what another one loads, and everything else is as without."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import RequestError
from kvstore.plan.records import LeaseState
from kvstore.service.client.slab import SlabShare, attach_slab
from kvstore.service.client.store import RemoteStore
from kvstore.service.protocol.messages import STAGING
from tests.helpers.daemons import DaemonProcess, Http, LocalDaemon, attach, local_daemon, wait_until
from tests.helpers.stores import PAGE_BYTES, load, page_of, prompt, save, use
from tests.service.test_hostile_clients import Raw

SAVER = """
import sys
from pathlib import Path
import numpy as np
from tests.helpers.daemons import attach
from tests.helpers.stores import load, page_of, prompt, save

store = attach(Path(sys.argv[1]), client="saver")
save(store, store.request(prompt(4, seed=7)))
reading = store.prepare_load(store.request(prompt(4, seed=7)), 4)
request = store.request(prompt(8, seed=8))
writing = store.prepare_save(request, 0, 8)
for page in writing.pages[:5]:
    np.copyto(store.slots.array(page.slot), page_of(request.keys[page.block], 0, 8192))
print(len(writing.pages), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture
def daemon(path: Path, tmp_path: Path) -> Iterator[LocalDaemon]:
    service = {"isolate": True, "isolate_bytes": 16 * PAGE_BYTES, "http_port": 0}
    with local_daemon(path, tmp_path / "disk", service=service) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


@pytest.fixture
def store(daemon: LocalDaemon, path: Path) -> Iterator[RemoteStore]:
    with attach(path) as store:
        yield store
        stats = store.stats()
        assert stats["leases"] == stats["slots"]["filling"] == 0


def test_what_one_client_saves_another_loads(store: RemoteStore, path: Path) -> None:
    assert save(store, store.request(prompt(10))) == 10

    with attach(path) as other:
        loaded, match = load(other, other.request(prompt(10)))

    assert (loaded, match.by_tier) == (10, {"host": 10})


def test_pages_come_from_disk_too(store: RemoteStore) -> None:
    for seed in range(12):
        assert use(store, prompt(10, seed)) == 0
        assert store.flush(10.0)

    assert load(store, store.request(prompt(10, 1)))[0] == 10


def test_a_client_that_maps_the_slab_cannot_alter_what_others_load(store: RemoteStore, path: Path) -> None:
    save(store, store.request(prompt(8, seed=1)))
    with Raw(path) as raw:
        size = raw.greeting["num_slots"] * raw.greeting["slot_bytes"]
        with pytest.raises(PermissionError):
            mmap.mmap(raw.fd, size)
        with pytest.raises(PermissionError):
            os.pwrite(raw.fd, b"\xee" * 4096, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(raw.fd, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(raw.fd, fcntl.F_ADD_SEALS, 0)
        again = os.open(f"/proc/self/fd/{raw.fd}", os.O_RDWR)  # the same user may, and gains nothing
        with pytest.raises(PermissionError):
            mmap.mmap(again, size)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"\xee" * 4096, 0)
        os.close(again)
        reading = mmap.mmap(raw.fd, size, prot=mmap.PROT_READ)
        assert len(reading) == size
        reading.close()

        assert load(store, store.request(prompt(8, seed=1)))[0] == 8


def test_what_a_client_writes_after_it_has_completed_reaches_nobody(store: RemoteStore) -> None:
    request = store.request(prompt(8, seed=1))
    lease = store.prepare_save(request, 0, 8)
    for page in lease.pages:
        np.copyto(store.slots.array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))
    store.complete(lease)

    for page in lease.pages:
        store.slots.array(page.slot)[:] = 0xEE

    assert load(store, request)[0] == 8


def test_pages_of_a_load_are_read_only_and_of_a_save_are_the_clients_own(store: RemoteStore) -> None:
    request = store.request(prompt(2))
    writing = store.prepare_save(request, 0, 2)
    assert all((page.slot & 0xFFFFFFFF) >= STAGING for page in writing.pages)
    store.release(writing)
    save(store, request)

    reading = store.prepare_load(request, 2)
    page = store.slots.array(reading.pages[0].slot)

    with pytest.raises(ValueError, match="read-only"):
        page[:] = 1
    assert store.slots.view(reading.pages[0].slot).readonly
    store.complete(reading)


def test_a_page_that_was_not_filled_is_no_hit(store: RemoteStore) -> None:
    request = store.request(prompt(3))
    lease = store.prepare_save(request, 0, 3)
    assert store.lookup(store.request(prompt(3))).num_blocks == 0

    store.complete(lease, filled=[True, False, True])

    assert store.lookup(store.request(prompt(3))).num_blocks == 1


def test_staging_is_bounded_and_what_finds_no_room_is_told(store: RemoteStore, daemon: LocalDaemon, path: Path) -> None:
    request = store.request(prompt(20))
    first = store.prepare_save(request, 0, 20)
    second = store.prepare_save(store.request(prompt(5, seed=1)), 0, 5)
    assert (len(first.pages), first.skipped) == (16, 4)
    assert (len(second.pages), second.skipped) == (0, 5)
    http = Http(daemon.daemon.app.port)
    (client,) = http.get("/v1/clients")["clients"]
    assert (client["staging_slots"], client["staging_free"]) == (16, 0)
    with attach(path) as other:  # which has its own
        assert save(other, other.request(prompt(6, seed=2))) == 6
    store.release(second)

    for page in first.pages:
        np.copyto(store.slots.array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))
    store.complete(first)

    assert load(store, request)[0] == 16
    assert save(store, request, 16) == 4  # staging is free again
    (client,) = http.get("/v1/clients")["clients"]
    assert (client["staging_slots"], client["staging_free"]) == (16, 16)


def test_flags_of_another_length_are_refused_and_the_lease_stays(store: RemoteStore) -> None:
    lease = store.prepare_save(store.request(prompt(3)), 0, 3)
    with pytest.raises(RequestError, match="filled has"):
        store.complete(lease, filled=[True])

    store.complete(lease)

    assert store.lookup(store.request(prompt(3))).num_blocks == 3


def test_a_rank_maps_both_and_saves_and_loads_by_the_leases_numbers(store: RemoteStore) -> None:
    share = store.slots.slabs[-1]
    assert isinstance(share, SlabShare)
    assert share.num_staging == 16
    rank = attach_slab(share)
    request = store.request(prompt(4))
    lease = store.prepare_save(request, 0, 4)
    for page in lease.pages:
        np.copyto(rank.array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))
    store.complete(lease)

    reading = store.prepare_load(request, 4)
    assert store.wait(reading).state is LeaseState.READY
    for page in reading.pages:
        assert np.array_equal(rank.array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))
    store.complete(reading)
    assert all(share.holds(page.slot) for page in [*lease.pages, *reading.pages])
    for slot in (64, STAGING - 1, STAGING + 16):
        assert not share.holds(slot)
        with pytest.raises(IndexError):
            rank.array(slot)
    rank.close()


def test_a_session_that_ends_while_its_pages_are_copied_gives_their_slots_to_nobody_before(
    daemon: LocalDaemon, store: RemoteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from kvstore.service.daemon import isolation

    may_copy, copy_all = threading.Event(), isolation._copy_all

    def slow(pairs: list[tuple[object, object]]) -> None:
        may_copy.wait(30)
        copy_all(pairs)  # type: ignore[arg-type]

    monkeypatch.setattr(isolation, "_copy_all", slow)
    leaving = attach(path, client="leaving", call_timeout_s=30.0)
    request = leaving.request(prompt(8, seed=3))
    lease = leaving.prepare_save(request, 0, 8)
    for page in lease.pages:
        np.copyto(leaving.slots.array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))
    ending = threading.Thread(target=lambda: leaving.complete(lease))
    ending.start()
    wait_until(
        lambda: daemon.look(lambda d: any(h.is_ending for s in d.clients.sessions.values() for h in s.leases.values()))
    )

    leaving.close()
    wait_until(lambda: daemon.look(lambda d: len(d.clients.sessions)) == 1)

    assert store.stats()["slots"]["filling"] == 8  # still taken
    may_copy.set()
    ending.join(30)
    wait_until(lambda: store.lookup(store.request(prompt(8, seed=3))).num_blocks == 8)
    assert load(store, store.request(prompt(8, seed=3)))[0] == 8


def test_a_save_is_stored_where_no_thread_can_be_started_and_is_not_copied_again_later(
    daemon: LocalDaemon, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Callable[[], None]] = []

    def submit(pool: ThreadPoolExecutor, work: Callable[[], None]) -> None:
        late.append(work)  # as the pool does: another of its threads takes it when it is free
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", submit)
        save(store, store.request(prompt(8, seed=3)))
    assert store.keep.forget(store.request(prompt(8, seed=3))) == 8
    others = [prompt(16, seed=seed) for seed in (4, 5, 6, 7)]  # all slots there are
    for tokens in others:
        save(store, store.request(tokens))

    for work in late:
        work()

    assert late
    assert store.stats()["leases"] == 0
    assert [load(store, store.request(tokens))[0] for tokens in others] == [16] * 4


def test_a_client_killed_in_the_middle_of_a_save_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = ("service.isolate=true", f"service.isolate_bytes={16 * PAGE_BYTES}")
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", *settings)
    try:
        with attach(daemon.socket) as store:
            saver = subprocess.Popen(
                [sys.executable, "-c", SAVER, str(daemon.socket)],
                cwd=Path(__file__).resolve().parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"8\n"
            assert store.stats()["slots"]["filling"] == 8
            os.kill(saver.pid, signal.SIGKILL)
            saver.communicate(timeout=60)

            wait_until(lambda: store.stats()["leases"] == 0)

            assert store.stats()["slots"] == {"free": 60, "filling": 0, "resident": 4}
            assert store.lookup(store.request(prompt(8, seed=8))).num_blocks == 0
            assert load(store, store.request(prompt(4, seed=7)))[0] == 4
            assert use(store, prompt(8, seed=8)) == 0
            assert load(store, store.request(prompt(8, seed=8)))[0] == 8
    finally:
        daemon.kill()

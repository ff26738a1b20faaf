"""A forked child and what its parent had opened: a clear error at once, never a wait, never a byte in common."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.build import open_rows, open_store
from kvstore.config.sections import Config
from kvstore.errors import StoreForked
from kvstore.forks import forbid, in_child
from kvstore.move.worker import Worker
from kvstore.store import LocalStore
from kvstore.tiers.host import HUGE_PAGE_BYTES, HostSlab
from kvstore.tiers.memory import MemoryTier
from tests.helpers.daemons import attach, local_daemon
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import LAYOUT, PAGE_BYTES, load, namespace, prompt, save, use

CHILD_S = 20  # then the child is taken to hang


def in_fork(act: Callable[[], object]) -> str:
    """What a forked child says of `act`: "returned", or the error. A child that hangs ends by SIGALRM."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_S)
        try:
            try:
                act()
                said = "returned"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, said.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child ended by signal {-os.waitstatus_to_exitcode(status)}"
    return said


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """A lock that another thread holds at the moment of the fork."""
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    try:
        yield
    finally:
        may_go.set()
        thread.join()


def config(tmp_path: Path | None = None) -> Config:
    values: dict[str, Any] = {"host": {"capacity_bytes": 64 * PAGE_BYTES}}
    if tmp_path is not None:
        values["disk"] = {"path": str(tmp_path / "kv"), "capacity_bytes": 64 * PAGE_BYTES}
    return Config.model_validate(values)


@pytest.fixture(params=[None, "kvstore-forks"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    with open_store(config(tmp_path), LAYOUT, namespace(), shared_name=request.param) as store:
        use(store, prompt(4))
        yield store
        assert use(store, prompt(4)) == 4
        store.check()


class TestTheStore:
    def test_every_call_of_a_child_fails_at_once_though_its_locks_are_held_for_ever(self, store: LocalStore) -> None:
        request = store.request(prompt(4))
        admin = store.admin
        lease = store.prepare_load(request, 4)
        calls: dict[str, Callable[[], object]] = {
            "lookup": lambda: store.lookup(request),
            "wait_lookup": lambda: store.wait_lookup(request),
            "peek": lambda: store.peek(request),
            "ask": lambda: store.ask(request),
            "prepare_load": lambda: store.prepare_load(request, 2),
            "wait": lambda: store.wait(lease),
            "poll": lambda: store.poll(lease),
            "prefetch": lambda: store.prefetch(request),
            "cancel": lambda: store.cancel(1),
            "prepare_save": lambda: store.prepare_save(request, 0, 4),
            "complete": lambda: store.complete(lease),
            "release": lambda: store.release(lease),
            "release_owner": lambda: store.release_owner(""),
            "finished": lambda: store.keep.finished(request),
            "abandon": lambda: store.abandon(request),
            "pin": lambda: store.keep.pin(request),
            "forget": lambda: store.keep.forget(request),
            "set_ttl": lambda: store.keep.set_ttl(request, 1.0),
            "take_events": lambda: store.take_events(),
            "slot_view": lambda: store.slots.view(0),
            "slot_array": lambda: store.slots.array(0),
            "slab_handle": lambda: store.slots.slabs[-1],
            "slab_array": lambda: store.slots.buffer,
            "flush": lambda: store.flush(1.0),
            "stats": store.stats,
            "clear": lambda: admin.clear(),
            "explain": lambda: admin.explain(request),
            "resize_host": lambda: admin.resize_host(8),
            "a method taken before": store.check,
        }

        with held(store._dispatcher.lock):
            said = {name: in_fork(call) for name, call in calls.items()}

        assert {name: line for name, line in said.items() if not line.startswith("StoreForked: ")} == {}
        assert f"opened in process {os.getpid()}" in said["lookup"]
        store.complete(lease)

    def test_a_child_may_close_it_and_ends_at_once(self, store: LocalStore) -> None:
        with held(store._dispatcher.lock), held(store._dispatcher.mover._lock):
            assert in_fork(store.close) == "returned"
            assert in_fork(lambda: store.__exit__(None, None, None)) == "returned"

    def test_a_child_may_open_one_of_its_own(self, store: LocalStore) -> None:
        def own() -> None:
            with open_store(config(), LAYOUT, namespace()) as other:
                use(other, prompt(4))
                assert use(other, prompt(4)) == 4

        assert in_fork(own) == "returned"

    def test_a_child_of_multiprocessing_and_of_a_preexec_fn_is_told_too(self, store: LocalStore) -> None:
        process = multiprocessing.get_context("fork").Process(target=store.stats)
        process.start()
        process.join(CHILD_S)

        assert process.exitcode == 1
        with pytest.raises(subprocess.SubprocessError):
            subprocess.run([sys.executable, "-c", ""], preexec_fn=store.stats, check=True)
        subprocess.run([sys.executable, "-c", ""], preexec_fn=os.setpgrp, check=True)

    def test_a_child_that_ends_as_programs_do_leaves_the_parent_alone(self, tmp_path: Path) -> None:
        script = tmp_path / "forks.py"
        script.write_text(
            "import os, sys\n"
            "from pathlib import Path\n"
            "from tests.kvstore.test_forks import *\n"
            "store = open_store(config(Path(sys.argv[1])), LAYOUT, namespace())\n"
            "use(store, prompt(4))\n"
            "if os.fork() == 0:\n"
            "    sys.exit(0)\n"  # finalizers and atexit run
            "assert os.wait()[1] == 0\n"
            "assert use(store, prompt(4)) == 4\n"
            "store.close()\n"
        )

        subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=6 * CHILD_S, env=_env())


class TestTheBytes:
    def test_a_child_neither_sees_nor_changes_them_through_views_from_before_the_fork(self, store: LocalStore) -> None:
        lease = store.prepare_load(store.request(prompt(4)), 4)
        slot = lease.pages[0].slot
        view, array, whole = store.slots.view(slot), store.slots.array(slot), store.slots.buffer
        before = whole.copy()
        assert array.any()

        def touch() -> None:
            assert not whole.any()
            assert not any(view)
            whole[:] = 7
            view[:] = b"\7" * len(view)

        assert in_fork(touch) == "returned"
        assert np.array_equal(whole, before)
        store.complete(lease)

    def test_a_child_that_lets_the_views_go_harms_nothing_else(self) -> None:
        slabs = [HostSlab(4, HUGE_PAGE_BYTES), HostSlab(4, HUGE_PAGE_BYTES, shared_name="kvstore-forks")]

        def let_go() -> None:
            fresh = [mmap.mmap(-1, HUGE_PAGE_BYTES) for _ in range(8)]
            slabs.clear()
            for memory in fresh:
                memory[:4] = b"mine"
            assert all(memory[:4] == b"mine" for memory in fresh)

        assert in_fork(let_go) == "returned"
        for slab in slabs:
            slab.close()

    def test_the_parent_keeps_its_huge_pages(self) -> None:
        with closing(HostSlab(8, HUGE_PAGE_BYTES)) as slab:
            before = huge_bytes(slab)
            if not before:
                pytest.skip("the kernel gives no huge pages here")
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.read(reader, 1)  # lives while the parent writes
                os._exit(0)

            slab.buffer[::4096] = 1

            assert huge_bytes(slab) == before
            os.write(writer, b"x")
            os.waitpid(pid, 0)
            os.close(reader)
            os.close(writer)


def _needs_redis(test: Callable[..., None]) -> Callable[..., None]:
    for mark in NEEDS_REDIS:
        test = mark(test)
    return test


class TestTheOthers:
    def test_workers_memory_tiers_and_rows_fail_at_once(self, tmp_path: Path) -> None:
        worker, tier = Worker("forks"), MemoryTier(4, 4096)
        rows = open_rows(config(tmp_path), LAYOUT, memoryview(bytearray(8 * PAGE_BYTES)), PAGE_BYTES)

        with held(worker._changed), held(tier._lock):
            said = [
                in_fork(lambda: worker.submit(int)),
                in_fork(lambda: worker.flush(CHILD_S)),
                in_fork(lambda: tier.contains([], timeout_s=1)),
                in_fork(lambda: rows.poll(CHILD_S)),
                in_fork(lambda: rows.probe("disk", [], deadline=0.0)),
            ]
            ends = [
                in_fork(lambda: worker.close(CHILD_S)),
                in_fork(lambda: rows.close(CHILD_S)),
                in_fork(tier.close),
            ]

        assert all(line.startswith("StoreForked: ") for line in said), said
        assert ends == ["returned"] * 3
        worker.close(1.0)
        rows.close(1.0)

    def test_a_client_of_a_daemon_gets_a_session_of_its_own_though_its_locks_are_held(self, tmp_path: Path) -> None:
        with local_daemon(tmp_path / "kv.sock"), attach(tmp_path / "kv.sock") as store:
            store.want_events()
            request = store.request(prompt(3))
            save(store, request)
            lease = store.prepare_load(request, 3)
            view = store.slots.view(lease.pages[0].slot)

            def use_it() -> None:
                assert not any(view)
                assert load(store, store.request(prompt(3)))[0] == 3
                store.complete(lease)  # the parent's: not known here
                store.take_events()
                store.close()

            with held(store._leases._lock), held(store._link._lock):
                assert in_fork(use_it) == "returned"
            assert store.wait(lease).num_blocks == 3
            store.complete(lease)

    @_needs_redis
    def test_a_redis_tier_dials_anew_though_its_locks_are_held_and_a_helper_server_lives_on(self) -> None:
        from kvstore.testing.redis_server import LocalRedis
        from kvstore.tiers.redis.tier import RedisTier

        with LocalRedis() as server:
            tier = RedisTier(server.url, slot_bytes=4096, ttl_s=0)
            tier.ping(timeout_s=1)

            def use_it() -> None:
                tier.ping(timeout_s=5)
                tier.close()
                server.stop()

            with held(tier._count_lock), held(tier._route._node._lock):
                assert in_fork(use_it) == "returned"
            tier.ping(timeout_s=1)
            tier.close()


class TestBinding:
    def test_what_was_let_go_of_is_not_called_in_a_child(self) -> None:
        class Thing:
            pass

        called: list[str] = []
        gone, there = Thing(), Thing()
        in_child(gone, lambda thing: called.append("gone"))
        in_child(there, lambda thing: called.append("there"))
        del gone

        assert in_fork(lambda: called == ["there"] or pytest.fail(str(called))) == "returned"
        assert called == []

    def test_what_is_forbidden_stays_of_its_kind(self) -> None:
        worker = Worker("forks")

        assert in_fork(lambda: isinstance(worker, Worker) or pytest.fail("another kind")) == "returned"
        assert in_fork(lambda: setattr(worker, "name", "x")).startswith("StoreForked: Worker was opened in process ")
        worker.close(1.0)

    def test_the_parent_is_not_forbidden_anything(self) -> None:
        class Thing:
            value = 1

            def use(self) -> int:
                return self.value

        thing = Thing()
        forbid(thing)

        assert in_fork(thing.use) != "returned"
        assert thing.use() == 1
        assert issubclass(StoreForked, Exception)


def huge_bytes(slab: HostSlab) -> int:
    """What of a slab lies in huge pages, by the kernel's word."""
    address, found, size = slab.buffer.ctypes.data, False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            size += int(line.split()[1]) << 10
    return size


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}

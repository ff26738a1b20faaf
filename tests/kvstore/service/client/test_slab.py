"""The slab of a daemon in an engine's other processes: ranks copy, a scheduler plans, and each of them dies."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import Request, SlotPage
from kvstore.service.client.connect import connect
from kvstore.service.client.slab import AttachedSlab, attach_slab
from kvstore.service.client.store import RemoteStore
from tests.helpers.daemons import DaemonProcess, attach, local_daemon
from tests.helpers.stores import BLOCK, namespace, page_of, prompt
from tests.helpers.waiting import WAIT_S, wait_until

SHARD_BYTES = 4096
PAIR = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0, 1), SHARD_BYTES),), "test:bytes", "uint8", shards=2)

# A rank: maps what it is told to, copies its half of each slot, and answers. Commands and answers are pickles.
RANK = """
import pickle, sys
import numpy as np
from kvstore.service.client.slab import attach_slab

shard, half, slab = int(sys.argv[1]), 4096, None
while True:
    verb, value = pickle.load(sys.stdin.buffer)
    answer = None
    try:
        if verb == "map":
            if slab is not None:
                slab.close()
            slab = attach_slab(value)
        elif verb == "write":
            for slot, page in value:
                np.copyto(slab.array(slot)[shard * half : (shard + 1) * half], page[shard * half : (shard + 1) * half])
        elif verb == "read":
            answer = [slab.array(slot)[shard * half : (shard + 1) * half].copy() for slot in value]
        elif verb == "is_lost":
            answer = slab.is_lost
        elif verb == "close":
            slab.close()
    except Exception as error:
        answer = error
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""

DYING_SCHEDULER = """
import os, pickle, signal, sys
from kvstore.service.client.connect import connect
from tests.helpers.stores import namespace, prompt
from tests.kvstore.service.client.test_slab import PAIR

store = connect("unix://" + sys.argv[1], PAIR, namespace(PAIR))
lease = store.prepare_save(store.request(prompt(8, seed=8)), 0, 8)
pickle.dump((store.slots.slabs[-1], [page.slot for page in lease.pages]), sys.stdout.buffer)
sys.stdout.buffer.flush()
sys.stdin.buffer.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Rank:
    """A rank in a process of its own."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.process = _python(RANK, str(shard))

    def ask(self, verb: str, value: Any = None) -> Any:
        """Have it do something; what it answers. Raises what it raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((verb, value), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk")
    yield daemon
    daemon.kill()


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    ranks = [Rank(0), Rank(1)]
    yield ranks
    for rank in ranks:
        rank.kill()


def test_two_ranks_save_and_load_their_shards_also_after_the_daemon_has_started_again(
    daemon: DaemonProcess, ranks: list[Rank]
) -> None:
    with _scheduler(daemon.socket) as store:
        request = store.request(prompt(6))
        _save_by_ranks(store, ranks, request)
        assert _load_by_ranks(store, ranks, request) == 6

        assert daemon.terminate() == 0
        daemon.start()
        wait_until(lambda: store.wait_lookup(request).num_blocks == 6)

        assert store.num_attached == 2
        assert _load_by_ranks(store, ranks, request) == 6
        later = store.request(prompt(4, seed=1))
        _save_by_ranks(store, ranks, later)
        assert _load_by_ranks(store, ranks, later) == 4


def test_a_slot_of_another_daemon_is_refused_by_a_rank(daemon: DaemonProcess, ranks: list[Rank]) -> None:
    with _scheduler(daemon.socket) as store:
        rank = ranks[0]
        rank.ask("map", store.slots.slabs[-1])
        before = store.prepare_save(store.request(prompt(2)), 0, 2).pages
        daemon.kill()
        daemon.start()
        wait_until(lambda: store.lookup(store.request(prompt(1))) is not None and store.num_attached == 2)
        after = store.prepare_save(store.request(prompt(2)), 0, 2).pages

        with pytest.raises(IndexError, match="another daemon"):
            rank.ask("read", [after[0].slot])
        rank.ask("map", store.slots.slabs[-1])
        assert len(rank.ask("read", [after[0].slot])) == 1
        with pytest.raises(IndexError, match="another daemon"):
            rank.ask("read", [before[0].slot])


def test_leases_of_a_scheduler_that_died_stay_until_the_rank_that_copies_is_done(
    daemon: DaemonProcess, ranks: list[Rank]
) -> None:
    _, slots = _die_with_a_rank_attached(daemon, ranks[0])

    with _scheduler(daemon.socket) as other:
        wait_until(lambda: bool(ranks[0].ask("is_lost")))
        assert other.stats()["slots"]["filling"] == 8
        taken = other.prepare_save(other.request(prompt(64, seed=9)), 0, 64)
        assert len(taken.pages) == 64 - 8
        assert not {page.slot for page in taken.pages} & set(slots)

        ranks[0].ask("write", [(slot, np.zeros(2 * SHARD_BYTES, np.uint8)) for slot in slots])
        ranks[0].ask("close")

        wait_until(lambda: other.stats()["slots"]["free"] == 8)
        assert other.stats()["leases"] == 1


def test_leases_of_a_scheduler_that_died_are_released_when_its_rank_dies(
    daemon: DaemonProcess, ranks: list[Rank]
) -> None:
    handle, _ = _die_with_a_rank_attached(daemon, ranks[0])
    with _scheduler(daemon.socket) as other:
        assert other.stats()["slots"]["filling"] == 8
        with pytest.raises(ConnectionResetError, match="session is gone"):
            ranks[1].ask("map", handle)  # too late: nobody plans for it any more

        ranks[0].kill()

        wait_until(lambda: other.stats()["slots"] == {"free": 64, "filling": 0, "resident": 0})


def test_an_idle_rank_does_not_keep_a_session_whose_scheduler_is_gone(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock") as daemon:
        store = attach(tmp_path / "kv.sock")
        slab = _attached(store)
        store.close()

        wait_until(lambda: daemon.look(lambda inside: len(inside.clients.sessions)) == 0)

        wait_until(lambda: slab.is_lost)
        slab.close()


def test_a_forked_child_of_a_rank_does_not_keep_its_anchor(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock") as daemon:
        store = attach(tmp_path / "kv.sock")
        lease = store.prepare_save(store.request(prompt(2)), 0, 2)
        slab = _attached(store)
        pid = os.fork()
        if pid == 0:
            threading.Event().wait(60)
            os._exit(0)
        try:
            slab.close()
            store.close()
            wait_until(lambda: daemon.look(lambda inside: len(inside.clients.sessions)) == 0)
            assert len(lease.pages) == 2
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def test_no_daemon_no_slab(tmp_path: Path) -> None:
    with attach(tmp_path / "nobody.sock") as store:
        assert store.slots.slabs == ()
        assert store.slots.buffer is None


def _python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).resolve().parents[4],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _scheduler(socket: Path) -> RemoteStore:
    return connect(f"unix://{socket}", PAIR, namespace(PAIR))


def _attached(store: RemoteStore) -> AttachedSlab:
    assert store.slots.slabs[-1] is not None
    return attach_slab(store.slots.slabs[-1])


def _page(request: Request, page: SlotPage) -> Any:
    return page_of(request.keys[page.block], page.group, 2 * SHARD_BYTES)


def _save_by_ranks(store: RemoteStore, ranks: list[Rank], request: Request) -> None:
    lease = store.prepare_save(request, 0, len(request.keys))
    for rank in ranks:
        rank.ask("map", store.slots.slabs[-1])
        rank.ask("write", [(page.slot, _page(request, page)) for page in lease.pages])
    store.complete(lease)


def _load_by_ranks(store: RemoteStore, ranks: list[Rank], request: Request) -> int:
    lease = store.prepare_load(request, store.wait_lookup(request).num_blocks)
    num_blocks = store.wait(lease, 5.0).num_blocks
    for rank in ranks:
        rank.ask("map", store.slots.slabs[-1])
        parts = rank.ask("read", [page.slot for page in lease.pages])
        own = slice(rank.shard * SHARD_BYTES, (rank.shard + 1) * SHARD_BYTES)
        for page, part in zip(lease.pages, parts, strict=True):
            assert np.array_equal(part, _page(request, page)[own]), f"wrong bytes in {page}"
    store.complete(lease)
    return num_blocks


def _die_with_a_rank_attached(daemon: DaemonProcess, rank: Rank) -> tuple[Any, list[int]]:
    """A scheduler leases 8 slots to be filled, its rank maps the slab, and the scheduler is killed."""
    scheduler = _python(DYING_SCHEDULER, str(daemon.socket))
    assert scheduler.stdout is not None
    handle, slots = pickle.load(scheduler.stdout)
    rank.ask("map", handle)
    scheduler.communicate(b".", timeout=WAIT_S)
    return handle, slots

"""What a daemon's client is told of blocks: those who believe it never believe in a block that is not there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kvstore.plan.journal import Event
from kvstore.plan.records import Request, RequestOptions
from kvstore.service.client import events as client_side
from kvstore.service.client.connect import connect
from kvstore.service.client.store import MISS, RemoteStore
from kvstore.service.daemon import events as daemon_side
from kvstore.service.daemon.events import Feed
from kvstore.service.protocol.frames import ProtocolError
from kvstore.service.protocol.messages import EventsCall
from tests.helpers.daemons import DaemonProcess, Http, LocalDaemon, attach, local_daemon
from tests.helpers.stores import LAYOUT, namespace, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

Belief = tuple[str, bytes]  # tier, block


class Believer:
    """Takes and adds what it is told."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self.beliefs: set[Belief] = set()
        self.told: list[Event] = []
        store.want_events()

    def hear(self) -> set[Belief]:
        for event in self.store.take_events():
            self.told.append(event.event)
            blocks = {(event.tier, bytes(key)) for key in event.keys}
            if event.event is Event.STORED:
                self.beliefs |= blocks
            elif event.event is Event.REMOVED:
                self.beliefs -= blocks
            else:
                self.beliefs.clear()
        return self.beliefs

    def blocks(self, tier: str) -> set[bytes]:
        return {block for where, block in self.hear() if where == tier}


def names(store: RemoteStore, request: Request) -> set[bytes]:
    return {bytes(key) for key in request.keys}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", service={"http_port": 0}) as daemon:
        yield daemon


def follow(daemon: LocalDaemon, store: RemoteStore) -> Believer:
    """Follow, and wait until the daemon has heard of it."""

    def num_listeners() -> int:
        return daemon.look(lambda inside: len(inside.events._streams))

    before = num_listeners()
    believer = Believer(store)
    wait_until(lambda: num_listeners() > before)
    return believer


def test_a_client_hears_what_another_one_stored_and_what_left(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store, attach(tmp_path / "kv.sock") as other:
        believer = follow(daemon, store)
        first = other.request(prompt(10))
        use(other, prompt(10))
        assert other.flush(WAIT_S)
        wait_until(lambda: believer.blocks("host") == believer.blocks("disk") == names(store, first))

        for seed in range(1, 30):  # more than host memory and disk hold
            use(other, prompt(10, seed))
            assert other.flush(WAIT_S)

        pages = other.stats()["pages"]
        wait_until(
            lambda: (len(believer.blocks("host")), len(believer.blocks("disk"))) == (pages["host"], pages["disk"])
        )
        assert not names(store, first) & (believer.blocks("host") | believer.blocks("disk"))
        assert Event.DROPPED not in believer.told


def test_nothing_is_written_down_unless_asked_for(daemon: LocalDaemon, tmp_path: Path) -> None:
    def wants(inside: object) -> bool:
        return any(opened.journal.wants_events for opened in daemon.daemon.stores.all())

    with attach(tmp_path / "kv.sock") as store:
        save(store, store.request(prompt(3)))
        assert store.take_events() == []
        assert not daemon.look(wants)
        with attach(tmp_path / "kv.sock") as other:
            follow(daemon, other)
        wait_until(lambda: not daemon.look(wants))  # it left


def test_what_an_operator_clears_is_gone(daemon: LocalDaemon, tmp_path: Path) -> None:
    http = Http(daemon.daemon.app.port)
    with attach(tmp_path / "kv.sock") as store:
        believer = follow(daemon, store)
        save(store, store.request(prompt(4)))
        wait_until(lambda: len(believer.blocks("host")) == 4)

        (own,) = http.get("/v1/namespaces")["namespaces"]
        http.call("POST", f"/v1/namespaces/{own['id']}/clear")

        wait_until(lambda: believer.hear() == set())


def test_only_the_own_namespace_is_told(tmp_path: Path) -> None:
    socket = tmp_path / "kv.sock"
    with (
        local_daemon(socket, service={"max_namespaces": 2}) as daemon,
        attach(socket) as store,
        connect(f"unix://{socket}", LAYOUT, namespace(model="other")) as other,
    ):
        believer, others = follow(daemon, store), follow(daemon, other)
        save(other, other.request(prompt(3)))
        mine = store.request(prompt(2))
        save(store, mine)

        wait_until(lambda: len(others.blocks("host")) == 3)
        wait_until(lambda: believer.blocks("host") == names(store, mine))


def test_names_hold_for_requests_with_a_tenant_of_their_own(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        believer = follow(daemon, store)
        request = store.request(prompt(3), RequestOptions(tenant="a"))
        save(store, request)

        wait_until(lambda: believer.blocks("host") == names(store, request))


def test_a_client_that_never_takes_is_told_that_it_missed_something(
    daemon: LocalDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_side, "MAX_KEYS", 8)
    with attach(tmp_path / "kv.sock") as store:
        believer = follow(daemon, store)
        first, last = store.request(prompt(4)), store.request(prompt(6, 3))
        save(store, first)
        wait_until(lambda: len(believer.blocks("host")) == 4)

        save(store, store.request(prompt(6, 2)))
        store.keep.forget(first)
        save(store, last)
        follower = store._follower
        assert follower is not None
        wait_until(lambda: any(last.keys[-1] in event.keys for event in list(follower._events)))

        assert believer.blocks("host") <= names(store, last) | names(store, store.request(prompt(6, 2)))
        assert believer.told.count(Event.DROPPED) >= 1


def test_a_client_that_reads_too_slowly_is_told_by_the_daemon(
    daemon: LocalDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_side, "MAX_QUEUED_BYTES", 200)  # four blocks
    with attach(tmp_path / "kv.sock") as store:
        believer = follow(daemon, store)

        save(store, store.request(prompt(20)))

        wait_until(lambda: bool(believer.hear()) and Event.DROPPED in believer.told)
        assert len(believer.blocks("host")) < 20


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk")
    yield daemon
    daemon.kill()


def believing(believer: Believer) -> Believer:
    """One who has been told of something, though it is not known when the daemon has heard of it."""
    seeds = count(len(believer.told))

    def has_heard() -> bool:
        save(believer.store, believer.store.request(prompt(2, next(seeds))))
        return bool(believer.hear())

    wait_until(has_heard)
    return believer


def test_with_a_dead_daemon_all_beliefs_end_and_with_a_new_one_others_begin(process: DaemonProcess) -> None:
    with attach(process.socket, retry_max_s=0.1) as store:
        believer = believing(Believer(store))

        process.kill()

        wait_until(lambda: believer.hear() == set())  # nobody called
        assert not store.is_attached
        assert believer.told.count(Event.DROPPED) == 1
        process.start()
        first = store.request(prompt(3, 500))
        wait_until(lambda: save(store, first) == 3)  # the first that the new daemon has
        wait_until(lambda: believer.blocks("host") == names(store, first))


def test_a_daemon_that_does_not_answer_has_nothing(process: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_side, "LISTEN_S", 0.2)
    with attach(process.socket, retry_max_s=0.1, call_timeout_s=0.3) as store:
        believer = believing(Believer(store))
        process.signal(signal.SIGSTOP)

        wait_until(lambda: believer.hear() == set())

        assert store.lookup(store.request(prompt(2))) == MISS
        process.signal(signal.SIGCONT)
        believing(believer)


def test_closing_does_not_wait_for_news(process: DaemonProcess) -> None:
    store = attach(process.socket)
    believing(Believer(store))
    process.signal(signal.SIGSTOP)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "kvstore-events"]

    store.close()

    assert not thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-seeker"]


def test_a_daemon_that_tells_no_events_is_left_in_peace(
    daemon: LocalDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Feed, call: EventsCall) -> bytes:
        asked.append(1)
        raise ProtocolError("this release does not know EVENTS")

    asked: list[int] = []
    monkeypatch.setattr(Feed, "answer", refuse)
    monkeypatch.setattr(client_side, "RETRY_S", 0.0)
    with attach(tmp_path / "kv.sock") as store:
        believer = Believer(store)
        wait_until(lambda: len(asked) == 1)

        assert save(store, store.request(prompt(3))) == 3  # all else goes on
        assert store.lookup(store.request(prompt(3))).num_blocks == 3
        assert believer.hear() == set()
        assert len(asked) == 1

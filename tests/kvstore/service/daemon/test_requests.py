"""What the daemon keeps of requests that nobody ends is bounded, and gone when the client is."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.service.client.store import RemoteStore
from kvstore.service.daemon import ledger, requests
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon, wait_until
from tests.helpers.stores import BLOCK, load, prompt, save


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}, store={"load_or_recompute": False}) as daemon:
        yield daemon
        daemon.look(lambda d: [opened.store.check() for opened in d.stores.all()])


def ask(store: RemoteStore, num_requests: int, num_blocks: int = 10) -> None:
    """Look up prompts, and end none of the requests."""
    for seed in range(num_requests):
        store.lookup(store.request(np.random.default_rng(1000 + seed).integers(0, 50_000, num_blocks * BLOCK + 1)))


def kept(daemon: LocalDaemon) -> tuple[int, int]:
    """Keys that are known of all clients, and notes of the planner."""

    def read(inside: object) -> tuple[int, int]:
        (opened,) = inside.stores.all()  # type: ignore[attr-defined]
        return opened.ledger.num_keys, len(opened.store._planner.lookups.requests)

    return daemon.look(read)


def test_a_client_that_ends_no_request_has_the_oldest_forgotten(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requests, "MAX_KEYS", 100)
    with attach(tmp_path / "kv.sock") as store:
        request = store.request(prompt(10))
        save(store, request)
        ask(store, 40)

        assert kept(daemon) == (100, 10)
        assert load(store, request)[0] == 10  # it was forgotten, so the client sends it whole again


def test_what_is_used_again_is_not_forgotten_for_what_is_not(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requests, "MAX_KEYS", 30)
    with attach(tmp_path / "kv.sock") as store:
        request = store.request(prompt(10))
        store.lookup(request)
        for seed in range(5):
            store.lookup(store.request(prompt(10, 50 + seed)))
            store.lookup(request)

        (session,) = daemon.look(lambda d: list(d.clients.sessions.values()))
        assert request.keys in [one.keys for one in session.requests]


def test_of_several_clients_the_one_with_most_gives_way(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ledger, "MAX_KEYS", 100)
    with attach(tmp_path / "kv.sock") as modest, attach(tmp_path / "kv.sock") as greedy:
        ask(modest, 2)
        ask(greedy, 40)

        assert kept(daemon)[0] == 100
        assert [len(s.requests.ids) for s in daemon.look(lambda d: list(d.clients.sessions.values()))] == [2, 8]


def test_a_client_that_hangs_up_leaves_nothing(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        ask(store, 40)
        assert kept(daemon) == (400, 40)

    wait_until(lambda: kept(daemon) == (0, 0))


def test_a_question_over_http_leaves_nothing(daemon: LocalDaemon, tmp_path: Path) -> None:
    http = Http(daemon.daemon.app.port)
    with attach(tmp_path / "kv.sock") as store:
        save(store, store.request(prompt(4)))
        before = kept(daemon)
        tokens = prompt(8).tolist()
        for path in ("lookup", "explain", "prefetch", "pin", "unpin", "delete"):
            http.post(f"/v1/{path}", tokens=tokens)
        http.post("/v1/ttl", tokens=tokens, ttl_s=5)
        assert http.call("POST", "/v1/pages/read", {"tokens": tokens})[0] == 200

        assert kept(daemon) == before

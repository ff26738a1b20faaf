"""Who is attached, what they hold, and what becomes of it when they stop without dying."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.service.client.slab import SlabShare, attach_slab
from kvstore.service.daemon import clients
from kvstore.tiers.host import SlabHandle
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.stores import load, prompt, save
from tests.helpers.waiting import WAIT_S, wait_until

HOLDER = """
import sys
from kvstore.service.client.connect import connect
from tests.helpers.stores import LAYOUT, load, namespace, page_of, prompt, save
import numpy as np

store = connect(sys.argv[1], LAYOUT, namespace(), client="holder")
save(store, store.request(prompt(4, seed=7)))
reading = store.prepare_load(store.request(prompt(4, seed=7)), 4)
request = store.request(prompt(6, seed=8))
writing = store.prepare_save(request, 0, 6)
print("held", flush=True)
sys.stdin.readline()
for page in writing.pages:
    np.copyto(store.slots.array(page.slot), page_of(request.keys[page.block], 0, 8192))
store.complete(writing)
print(store.wait(reading).num_blocks, flush=True)
store.complete(reading)
print(load(store, store.request(prompt(4, seed=7)))[0], flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "lease_max_s": 0.3}) as daemon:
        yield daemon


@pytest.fixture
def socket(daemon: LocalDaemon) -> Path:
    assert daemon.config.service.socket is not None
    return daemon.config.service.socket


class Holder:
    """A client in a process of its own that holds 4 pages for reading and 6 for writing, and is stopped."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, url],
            cwd=Path(__file__).resolve().parents[4],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "held"
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Wake it, and let it do what it was about to."""
        os.kill(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


def of(http: Http, name: str) -> dict[str, Any]:
    """The client of that name, as operators see it."""
    (client,) = [client for client in http.get("/v1/clients")["clients"] if client["client"].startswith(name)]
    found: dict[str, Any] = client
    return found


def test_clients_are_told_with_their_process_and_what_they_hold(http: Http, socket: Path) -> None:
    with attach(socket, client="engine 7") as store:
        lease = store.prepare_save(store.request(prompt(3)), 0, 3)

        client = of(http, "engine 7")

        assert (client["pid"], client["is_remote"], client["is_alone"], client["ranks"]) == (
            os.getpid(),
            False,
            False,
            0,
        )
        assert (client["leases"], client["slots"], client["tenant"]) == (1, 3, "local")
        assert 0 <= client["oldest_lease_s"] <= client["attached_s"]
        assert client["connections"] == 2  # its anchor, and one for calls
        store.complete(lease)
        assert of(http, "engine 7")["oldest_lease_s"] is None


def test_a_client_may_call_itself_anything_and_writes_no_line_into_log_or_json(http: Http, socket: Path) -> None:
    with attach(socket, client="evil\n2026-11-29 ERROR\ud800\x1b[2J"):
        assert of(http, "evil")["client"] == "evil?2026-11-29 ERROR??[2J"


def test_what_a_stopped_client_on_this_machine_holds_is_out_of_use_and_told(http: Http, socket: Path) -> None:
    with attach(socket, client="watcher") as store:
        holder = Holder(f"unix://{socket}")
        try:
            wait_until(lambda: of(http, "holder")["overdue_leases"] == 2)
            client = of(http, "holder")
            assert (client["pid"], client["slots"]) == (holder.process.pid, 10)
            own = http.get("/v1/stats")["service"]
            assert (own["kvstore_service_overdue_leases"], own["kvstore_service_overdue_slots"]) == (2, 10)
            assert b"\nkvstore_service_overdue_slots 10.0\n" in http.get("/metrics")
            assert save(store, store.request(prompt(64, seed=1))) == 54  # all but those

            status, problem = http.call("POST", f"/v1/clients/{client['id']}/disconnect")
            assert status == 409
            assert f"end its process, {holder.process.pid}" in problem["detail"]
            assert http.call("POST", "/v1/clients/999/disconnect")[0] == 404
            assert http.call("POST", "/v1/clients/nobody/disconnect")[0] == 404

            holder.go_on()  # as if nothing had been
            assert holder.line() == "4"
            assert holder.line() == "4"
            assert load(store, store.request(prompt(6, seed=8)))[0] == 6
        finally:
            holder.end()


def test_what_a_stopped_client_on_this_machine_holds_is_free_when_its_process_ends(http: Http, socket: Path) -> None:
    with attach(socket) as store:
        holder = Holder(f"unix://{socket}")
        try:
            wait_until(lambda: of(http, "holder")["overdue_leases"] == 2)
        finally:
            holder.end()

        wait_until(lambda: store.stats()["leases"] == 0)

        assert http.get("/v1/stats")["service"]["kvstore_service_overdue_slots"] == 0
        assert store.stats()["slots"]["filling"] == 0


def test_only_operators_see_the_clients_on_the_socket(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        '[[tenant]]\nname = "blue"\ntoken = "blue-token-0123456789"\n'
        '[[tenant]]\nname = "red"\ntoken = "red-token-0123456789"\noperator = true\n'
    )
    tokens.chmod(0o600)
    with (
        local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "tokens_file": tokens}) as daemon,
        attach(tmp_path / "kv.sock"),
    ):
        port = daemon.daemon.app.port
        blue, red = Http(port, "blue-token-0123456789"), Http(port, "red-token-0123456789")

        assert blue.get("/v1/clients")["clients"] == []
        assert [client["tenant"] for client in red.get("/v1/clients")["clients"]] == ["local"]
        assert blue.get("/v1/stats")["service"] == {}
        assert blue.call("POST", "/v1/clients/1/disconnect")[0] == 403


def test_the_connections_of_a_client_are_bounded(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_CONNECTIONS", 4)
    with attach(socket) as store:
        store.lookup(store.request(prompt(1)))  # its anchor and a connection for calls
        handle = store.slots.slabs[-1]
        assert handle is not None
        ranks = [attach_slab(handle), attach_slab(handle)]

        with pytest.raises(ConnectionError, match="4 connections"):
            attach_slab(handle)

        ranks.pop().close()
        wait_until(lambda: _attaches(handle))
        for rank in ranks:
            rank.close()


def _attaches(handle: SlabHandle | SlabShare) -> bool:
    try:
        attach_slab(handle).close()
    except OSError:
        return False
    return True

"""Pages over plain HTTP: a transfer is listed, can be ended, and does not hold a lease for longer than it may."""

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.service.http import pages
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon, wait_until
from tests.helpers.stores import BLOCK, PAGE_BYTES, namespace, prompt, save

BIG = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0, 1), 1 << 20),), "test:big", "uint8")
HOST_SLOTS = 32


@contextmanager
def big_daemon(tmp_path: Path, lease_max_s: float) -> Iterator[tuple[LocalDaemon, Http, bytes]]:
    """A daemon with 32 pages of a megabyte, all of one prompt, and the request that reads them."""
    sections = {
        "service": {"http_port": 0, "lease_max_s": lease_max_s},
        "host": {"capacity_bytes": HOST_SLOTS << 20, "huge_pages": False},
        "store": {"load_or_recompute": False},
    }
    with (
        local_daemon(tmp_path / "kv.sock", **sections) as daemon,
        connect(f"unix://{tmp_path / 'kv.sock'}", BIG, namespace(BIG)) as store,
    ):
        assert save(store, store.request(prompt(HOST_SLOTS))) == HOST_SLOTS
        body = json.dumps({"tokens": prompt(HOST_SLOTS).tolist()}).encode()
        head = b"POST /v1/pages/read HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        yield daemon, Http(daemon.daemon.app.port), head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        daemon.look(lambda d: [opened.store.check() for opened in d.stores.all()])


def start(daemon: LocalDaemon, request: bytes) -> socket.socket:
    """Send a request, and take nothing of its answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", daemon.daemon.app.port))
    connection.sendall(request)
    return connection


def transfers(http: Http) -> list[dict[str, object]]:
    return [one for one in http.get("/v1/clients")["clients"] if "pages" in one["client"]]


def num_leases(daemon: LocalDaemon) -> int:
    return daemon.look(lambda d: sum(one.store.stats()["leases"] for one in d.stores.all()))


def test_a_reader_that_takes_nothing_is_listed_and_ends_with_its_lease(tmp_path: Path) -> None:
    with big_daemon(tmp_path, lease_max_s=1.0) as (daemon, http, request), start(daemon, request):
        wait_until(lambda: bool(transfers(http)))
        (told,) = transfers(http)
        assert (told["client"], told["slots"], told["is_remote"]) == ("pages read by 127.0.0.1", HOST_SLOTS, True)

        wait_until(lambda: not transfers(http) and num_leases(daemon) == 0)

        assert daemon.look(lambda d: d.state.own_metrics()["kvstore_service_leases_expired_total"]) == 1


def test_an_operator_ends_a_transfer(tmp_path: Path) -> None:
    with big_daemon(tmp_path, lease_max_s=600.0) as (daemon, http, request), start(daemon, request):
        wait_until(lambda: bool(transfers(http)))

        status, _ = http.call("POST", f"/v1/clients/{transfers(http)[0]['id']}/disconnect")

        assert status == 200
        assert transfers(http) == []
        wait_until(lambda: num_leases(daemon) == 0)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    sections = {"service": {"http_port": 0, "lease_max_s": 1.0}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", **sections) as daemon, attach(tmp_path / "kv.sock"):
        yield daemon
        daemon.look(lambda d: [opened.store.check() for opened in d.stores.all()])


def put(num_blocks: int) -> bytes:
    """The head of a PUT in chunks, and its prompt."""
    text = json.dumps({"tokens": prompt(num_blocks).tolist()}).encode()
    head = b"PUT /v1/pages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    return head + f"Content-Type: {pages.CONTENT_TYPE}\r\n\r\n".encode() + chunk(struct.pack("<I", len(text)) + text)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_sender_that_sends_a_byte_now_and_then_ends_with_its_lease(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    with start(daemon, put(2) + chunk(pages.FRAME.pack(0, 0, 0, PAGE_BYTES, 0, 0) + bytes(100))) as sender:
        wait_until(lambda: bool(transfers(http)))
        assert transfers(http)[0]["client"] == "pages stored by 127.0.0.1"

        def is_over() -> bool:
            with suppress(ConnectionError):
                sender.sendall(chunk(b"x"))
            return not transfers(http)

        wait_until(is_over)

    wait_until(lambda: num_leases(daemon) == 0)
    assert http.post("/v1/lookup", tokens=prompt(2).tolist())["num_blocks"] == 0


def test_a_frame_whose_head_does_not_come_as_a_whole_ends_the_transfer(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "READ_TIMEOUT_S", 0.5)
    with start(daemon, put(2)) as sender:
        answer = b""
        while not answer:
            with suppress(ConnectionError):
                sender.sendall(chunk(b"\0"))
            sender.settimeout(0.1)
            with suppress(TimeoutError):
                answer = sender.recv(4096)

    assert answer.startswith(b"HTTP/1.1 408")


def test_more_transfers_than_there_may_be_are_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.service.daemon.transfers.MAX_TRANSFERS", 1)
    with big_daemon(tmp_path, lease_max_s=600.0) as (daemon, http, request), start(daemon, request) as reader:
        wait_until(lambda: bool(transfers(http)))

        status, problem = http.call("POST", "/v1/pages/read", {"tokens": prompt(2).tolist()})

        assert (status, problem["title"]) == (429, "too many transfers of pages")
        reader.close()
        wait_until(lambda: not transfers(http))
        assert http.call("POST", "/v1/pages/read", {"tokens": prompt(2).tolist()})[0] == 200

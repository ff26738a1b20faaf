"""Events as a router sees them."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.service.daemon.daemon import Daemon
from kvstore.service.daemon.events import MAX_QUEUED_BYTES, SENT, EventStream
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.stores import prompt, save
from tests.helpers.waiting import wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}) as daemon:
        yield daemon


def read_until(raw: socket.socket, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The events up to the first one of that name."""
    text = ""
    while True:
        text += raw.recv(65536).decode()
        lines = [line for line in text.splitlines() if line.startswith(("event: ", "data: "))]
        names = [line[7:] for line in lines if line.startswith("event: ")]
        data = [line[6:] for line in lines if line.startswith("data: ")]
        if name in names[: len(data)] and text.endswith("\r\n"):
            return [(event, json.loads(line)) for event, line in zip(names, data, strict=True)]


def test_a_router_hears_of_what_is_stored_removed_and_cleared(daemon: LocalDaemon, tmp_path: Path) -> None:
    http = Http(daemon.daemon.app.port)
    with attach(tmp_path / "kv.sock") as store, socket.create_connection(("127.0.0.1", http.port), 20) as raw:
        raw.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: daemon.daemon.events.num_streams == 1)
        request = store.request(prompt(2))
        save(store, request)
        http.post("/v1/delete", tokens=prompt(2).tolist(), first=1)
        (own,) = http.get("/v1/namespaces")["namespaces"]
        http.call("POST", f"/v1/namespaces/{own['id']}/clear")

        events = read_until(raw, "AllBlocksCleared")

    stored = [data for name, data in events if name == "BlockStored"]
    removed = [data for name, data in events if name == "BlockRemoved"]
    keys = [key.hex() for key in request.keys]
    assert [key for data in stored for key in data["block_hashes"]] == keys
    assert [key for data in stored for key in data["parent_block_hashes"]] == [None, keys[0]]
    assert {data["medium"] for data in stored} == {"host"}
    assert [key for data in removed for key in data["block_hashes"]] == [keys[1], keys[0]]
    wait_until(lambda: daemon.daemon.events.num_streams == 0)


async def test_a_slow_listener_is_told_how_much_it_missed() -> None:
    stream = EventStream(lambda opened: True, SENT)
    fit = MAX_QUEUED_BYTES // 1024
    for number in range(fit + 3):
        stream.put(b"%-1023d\n" % number)

    data = await stream.take(1.0)

    dropped, kept = data.split(b"\n\n")
    assert dropped == b'event: Dropped\ndata: {"events":3}'
    assert [int(line) for line in kept.splitlines()] == list(range(3, fit + 3))
    assert await stream.take(0.01) == b": still here\n\n"


def test_news_that_a_listener_left_behind_are_not_told_to_the_next(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        first, second = store.request(prompt(2)), store.request(prompt(2, 1))

        def listen_twice(inside: Daemon) -> EventStream:
            (opened,) = inside.stores.all()
            gone = inside.events.listen(lambda opened: True)
            save(opened.store, opened.new_request(list(first.keys), first.num_tokens, first.options))
            inside.events.leave(gone)
            opened.store.keep.forget(first)  # while nobody listens
            return inside.events.listen(lambda opened: True)

        stream = daemon.look(listen_twice)
        save(store, second)
        told = bytearray()

        def is_told() -> bool:
            told.extend(daemon.look(lambda inside: stream.drain()))
            return second.keys[-1].hex().encode() in told

        wait_until(is_told)
        assert first.keys[0].hex().encode() not in told

"""By configuration alone: a daemon's store where one is named, else one in this process."""

import json
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.opening import open_configured
from kvstore.service.client.connect import connect
from kvstore.service.client.slab import attach_slab
from kvstore.service.client.store import RemoteStore
from kvstore.store import LocalStore
from tests.helpers.daemons import local_daemon
from tests.helpers.stores import LAYOUT, PAGE_BYTES, load, namespace, page_of, prompt, save


def test_the_url_decides_where_the_store_is(tmp_path: Path) -> None:
    host = {"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False}
    with local_daemon(tmp_path / "kv.sock"):
        url = f"unix://{tmp_path / 'kv.sock'}"

        here = open_configured(Config(host=host), LAYOUT, namespace(), shared_name="test")
        there = open_configured(Config(host=host, service={"url": url}), LAYOUT, namespace())

        assert isinstance(here, LocalStore)
        assert isinstance(there, RemoteStore)
        for store in (here, there):
            save(store, store.request(prompt(3)))
            assert load(store, store.request(prompt(3)))[0] == 3
            store.close()


def test_a_daemon_is_told_how_its_clients_render_chats(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock") as daemon:
        config = Config(service={"url": f"unix://{tmp_path / 'kv.sock'}"})
        stores = [open_configured(config, LAYOUT, namespace(), rendering=one) for one in ("5f0c3ab1d2e49867", "")]

        told = daemon.look(lambda d: [session.rendering for session in d.clients.sessions.values()])

        assert told == ["5f0c3ab1d2e49867", ""]
        for store in stores:
            store.close()


def test_a_further_process_maps_the_daemons_slab_by_the_clients_handle(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock"):
        config = Config(service={"url": f"unix://{tmp_path / 'kv.sock'}"})
        store = open_configured(config, LAYOUT, namespace())
        assert isinstance(store, RemoteStore)
        request = store.request(prompt(2))
        save(store, request)
        lease = store.prepare_load(request, 2)

        assert store.slots.slabs[-1] is not None
        rank = attach_slab(store.slots.slabs[-1])  # what a worker of the same engine does

        expected = page_of(request.keys[0], 0, PAGE_BYTES)
        assert rank.array(lease.pages[0].slot).tolist() == expected.tolist()
        rank.close()
        store.complete(lease)
        store.close()


def test_a_daemon_of_the_release_before_is_told_in_the_log_and_the_store_is_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = json.dumps({"type": "ProtocolError", "message": "frame has protocol version 2; this release speaks 1"})
    answer = struct.pack("<HBBB3xII", 0x564B, 1, 1, 2, len(refusal), 0) + refusal.encode()  # as it was packed then

    def answer_one() -> None:
        connected, _ = listening.accept()
        with connected:
            connected.recv(1 << 16)
            connected.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "kv.sock"))
        listening.listen()
        daemon = threading.Thread(target=answer_one)
        daemon.start()
        with connect(f"unix://{tmp_path / 'kv.sock'}", LAYOUT, namespace(), call_timeout_s=30.0) as store:
            assert store.lookup(store.request(prompt(3))).num_blocks == 0
        daemon.join()

    assert "the other side speaks version 1 of the protocol" in caplog.text
    assert "install the same release of kvtiers for both" in caplog.text


@pytest.mark.parametrize("url", ["http://node:8470", "https://kv:hunter2@node:8470"])
@pytest.mark.parametrize("options", [{}, {"token": "t0k3n"}, {"call_timeout_s": 5.0}])
def test_a_daemon_on_another_machine_is_refused_in_one_sentence_that_names_redis(
    url: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as told:
        kvstore.connect(url, LAYOUT, namespace(), **options)

    for words in ("service.url is ", "machines share by Redis", "unix:///path/of/socket", "redis.url"):
        assert words in str(told.value)
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("url", ["", "node:8470", "tcp://node:1", "/run/kv.sock", "unix://run/kv.sock"])
def test_what_is_no_url_of_a_socket_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.url is .*unix:///"):
        connect(url, LAYOUT, namespace())

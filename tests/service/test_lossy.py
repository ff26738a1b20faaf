"""A daemon whose disk stores with loss: its clients, its HTTP API, and another daemon after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.codecs.loss import Loss, loss_of
from kvstore.plan.records import RequestOptions
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import CALL_TIMEOUT_S, Http, LocalDaemon, daemon_config
from tests.helpers.hints import envelope
from tests.helpers.kv_pages import layout_with, plain_axes
from tests.helpers.stores import namespace
from tests.helpers.waiting import wait_until

LAYOUT = layout_with(plain_axes(1, 2, 16, 64))
TOKENS = list(range(4 * 16 + 1))
EXACT = RequestOptions(exact=True)


def config_with(socket: Path, disk: Path, codec: str) -> Any:
    size = 256 * LAYOUT.slot_bytes
    return daemon_config(
        socket,
        None,
        host={"capacity_bytes": size},
        disk={"path": disk, "capacity_bytes": size, "codec": codec},
        service={"http_port": 0, "max_namespaces": 1},
        store={"load_or_recompute": False},
    )


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture
def daemon(socket: Path, tmp_path: Path) -> Iterator[LocalDaemon]:
    daemon = LocalDaemon(config_with(socket, tmp_path / "disk", "near"))
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def http(daemon: LocalDaemon) -> Http:
    return Http(daemon.daemon.app.port)


@pytest.fixture
def store(daemon: LocalDaemon, socket: Path) -> Iterator[RemoteStore]:
    with client(socket) as store:
        yield store


def client(socket: Path, **options: Any) -> RemoteStore:
    return connect(f"unix://{socket}", LAYOUT, namespace(LAYOUT), call_timeout_s=CALL_TIMEOUT_S, **options)


def save(store: RemoteStore, options: RequestOptions | None = None) -> None:
    request = store.request(TOKENS, options)
    store.complete(store.prepare_save(request, 0, len(request.keys)))
    store.keep.finished(request)


def stored(http: Http, **fields: Any) -> int:
    blocks: int = http.post("/v1/lookup", tokens=TOKENS, **fields)["num_blocks"]
    return blocks


def test_http_asks_for_what_clients_save_or_for_what_lost_nothing(store: RemoteStore, http: Http) -> None:
    save(store)
    assert (stored(http), stored(http, exact=True)) == (4, 0)
    assert http.post("/v1/explain", tokens=TOKENS)["loss"] == "near"

    save(store, EXACT)
    assert (stored(http), stored(http, exact=True)) == (4, 4)
    assert http.post("/v1/explain", tokens=TOKENS, exact=True)["loss"] == "exact"


def test_a_prompt_is_deleted_whatever_its_pages_may_have_lost(store: RemoteStore, http: Http) -> None:
    save(store)
    save(store, EXACT)
    assert http.post("/v1/delete", tokens=TOKENS, first=1, exact=True)["blocks"] == 3
    assert (stored(http), stored(http, exact=True)) == (4, 1)

    assert http.post("/v1/delete", tokens=TOKENS)["blocks"] == 5
    assert (stored(http), stored(http, exact=True)) == (0, 0)


def test_hints_mean_the_blocks_that_are_saved(store: RemoteStore, http: Http) -> None:
    save(store)
    (outcome,) = http.post("/v1/hints", **envelope(("pin", {"tokens": TOKENS, "ttl_s": 60})))["outcomes"]
    assert store.stats()["kept_pages"] == 4, outcome

    save(store, EXACT)
    store.hint(envelope(("pin", {"tokens": TOKENS, "ttl_s": 60})), store.request(TOKENS, EXACT))
    assert store.stats()["kept_pages"] == 8


def test_a_namespace_is_opened_over_http_with_what_lies_where(http: Http) -> None:
    layout, name = layout_to_json(LAYOUT), namespace_to_json(namespace(LAYOUT))
    del layout["groups"][0]["axes"]
    status, told = http.call("POST", "/v1/namespaces", {"layout": layout, "namespace": name})
    assert (status, "does not tell what lies where in a page" in str(told)) == (409, True)

    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=name)
    assert stored(http) == 0


def test_a_client_that_took_lossy_pages_does_not_name_blocks_exact_again(socket: Path, tmp_path: Path) -> None:
    """Its engine may have, in a cache of its own, what it computed after them."""
    first = LocalDaemon(config_with(socket, tmp_path / "near", "near"))
    with client(socket, retry_max_s=0.05) as store:
        assert store.loss is Loss.NEAR
        first.stop()
        second = LocalDaemon(config_with(socket, tmp_path / "exact", "exact"))
        try:
            asked = store.request(TOKENS)
            wait_until(lambda: store.lookup(asked) and store.num_attached == 2)
            assert {loss_of(key) for key in store.request(TOKENS).keys} == {Loss.NEAR}
            assert {loss_of(key) for key in store.request(TOKENS, EXACT).keys} == {Loss.EXACT}
            with client(socket) as other:
                assert other.loss is Loss.EXACT
        finally:
            second.stop()

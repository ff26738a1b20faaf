"""A client on another machine, so to speak: the same store over an upgraded HTTP connection, bytes and all."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import LeaseState
from kvstore.service.client.connect import connect
from kvstore.service.client.connection import dial_http
from kvstore.service.client.memory import StagedMemory
from kvstore.service.client.store import RemoteStore
from kvstore.service.protocol import batches, messages
from kvstore.service.protocol.frames import HEADER, MAGIC, VERSION, Op, Status
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.stores import BLOCK, LAYOUT, PAGE_BYTES, load, namespace, page_of, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

BLUE, RED = "blue-token-0123456789", "red-token-0123456789"
TENANTS = f"""
[[tenant]]
name = "blue"
token = "{BLUE}"
host_bytes = {32 * PAGE_BYTES}
disk_bytes = {16 * PAGE_BYTES}
operator = true

[[tenant]]
name = "red"
token = "{RED}"
disk_bytes = 0
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", service={"http_port": 0}) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


@pytest.fixture
def store(daemon: LocalDaemon) -> Iterator[RemoteStore]:
    with remote(daemon) as store:
        yield store
        stats = store.stats()
        assert stats["leases"] == stats["slots"]["filling"] == 0
        assert isinstance(store._memory, StagedMemory)
        assert store._memory.num_free == store._memory.staging.slab.num_slots


def remote(daemon: LocalDaemon, token: str | None = None, staging_pages: int = 64) -> RemoteStore:
    url = f"http://127.0.0.1:{daemon.daemon.app.port}"
    return connect(url, LAYOUT, namespace(), token=token, staging_bytes=staging_pages * PAGE_BYTES)


def one_page(lease_id: int, index: int, page: bytes) -> bytes:
    """A frame that brings one page."""
    body = b"".join(batches.parts(lease_id, [index], [memoryview(page)]))
    return HEADER.pack(MAGIC, VERSION, Op.WRITE, Status.OK, len(body), 9) + body


def test_local_and_remote_clients_share_pages_both_ways(store: RemoteStore, daemon: LocalDaemon) -> None:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as local:
        save(local, local.request(prompt(10)))
        save(store, store.request(prompt(10, 1)))

        assert load(store, store.request(prompt(10)))[0] == 10
        assert load(local, local.request(prompt(10, 1)))[0] == 10


LARGE = Layout(
    BLOCK, (LayerGroup(GroupKind.FULL, (0,), 600 << 10), LayerGroup(GroupKind.FULL, (1,), 1 << 20)), "large", "uint8"
)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[RemoteStore]:
    """Pages so large that they come in pieces, of two sizes."""
    num_bytes = 20 * LARGE.slot_bytes
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}, host={"capacity_bytes": num_bytes}) as daemon:
        url = f"http://127.0.0.1:{daemon.daemon.app.port}"
        with connect(url, LARGE, namespace(LARGE), staging_bytes=num_bytes) as store:
            yield store


def test_large_pages_of_several_groups_travel_in_one_batch(large: RemoteStore) -> None:
    request = large.request(prompt(4))
    lease = large.prepare_save(request, 0, 4)
    for page in lease.pages:
        num_bytes = LARGE.stored_bytes(page.group)
        np.copyto(large.slot_array(page.slot)[:num_bytes], page_of(request.keys[page.block], page.group, num_bytes))
    assert len(lease.pages) == 8
    large.complete(lease)

    found = large.prepare_load(request, 4)

    assert large.wait(found).num_blocks == 4
    for page in found.pages:
        num_bytes = LARGE.stored_bytes(page.group)
        expected = page_of(request.keys[page.block], page.group, num_bytes)
        assert np.array_equal(large.slot_array(page.slot)[:num_bytes], expected)
    large.complete(found)
    assert large.stats()["leases"] == 0


def test_a_large_page_that_ends_in_the_middle_holds_nothing_up(large: RemoteStore) -> None:
    attachment = large._link.attachment
    assert attachment is not None
    lease = large.prepare_save(large.request(prompt(1)), 0, 1)
    wire = attachment.take(large._link._dial, 1.0)
    page = next(index for index, page in enumerate(lease.pages) if page.group == 1)

    wire.socket.sendall(one_page(lease.id, page, bytes(1 << 20))[:1000])
    wire.close()
    large.complete(lease, filled=[False] * len(lease.pages))

    wait_until(lambda: large.stats()["leases"] == 0)
    assert large.stats()["slots"]["free"] == 20


def test_pages_come_from_disk_over_the_wire(store: RemoteStore) -> None:
    for seed in range(8):
        use(store, prompt(10, seed))
        assert store.flush(WAIT_S)

    loaded, match = load(store, store.request(prompt(10)))

    assert (loaded, match.by_tier) == (10, {"disk": 10})


def test_a_page_that_was_not_filled_is_not_published(store: RemoteStore) -> None:
    request = store.request(prompt(3))
    lease = store.prepare_save(request, 0, 3)
    for page in lease.pages:
        np.copyto(store.slot_array(page.slot), page_of(request.keys[page.block], 0, PAGE_BYTES))

    store.complete(lease, filled=[True, False, True])

    assert load(store, store.request(prompt(3)))[0] == 1


def test_more_pages_than_this_process_has_slots_for_are_loaded_in_part(daemon: LocalDaemon) -> None:
    with remote(daemon) as store, remote(daemon, staging_pages=4) as small:
        save(store, store.request(prompt(10)))
        request = small.request(prompt(10))

        lease = small.prepare_load(request, 10)

        assert lease.num_blocks == 4
        assert small.wait(lease).num_blocks == 4
        small.complete(lease)
        full = small.prepare_save(small.request(prompt(5, 1)), 0, 5)
        assert (full.pages, full.skipped) == ((), 5)
        assert small.stats()["leases"] == 0


def test_a_remote_client_that_hangs_up_in_the_middle_of_a_page_leaves_nothing(daemon: LocalDaemon) -> None:
    with remote(daemon) as store:
        dying = remote(daemon)
        lease = dying.prepare_save(dying.request(prompt(2)), 0, 2)
        attachment = dying._link.attachment
        assert attachment is not None
        wire = attachment.take(dying._link._dial, 1.0)
        wire.socket.sendall(one_page(lease.id, 0, bytes(PAGE_BYTES))[: -PAGE_BYTES // 2])

        wire.close()
        dying.close()

        wait_until(lambda: store.stats()["leases"] == 0)
        assert store.stats()["slots"]["free"] == 64


def test_a_page_for_a_lease_that_ended_goes_nowhere(store: RemoteStore) -> None:
    lease = store.prepare_save(store.request(prompt(2)), 0, 2)
    attachment = store._link.attachment
    assert attachment is not None
    wire = attachment.take(store._link._dial, 1.0)
    frame = one_page(lease.id, 0, b"\xff" * PAGE_BYTES)
    wire.socket.sendall(frame[:-PAGE_BYTES])
    store.release(lease)
    save(store, store.request(prompt(64, 1)))  # every slot

    wire.socket.sendall(frame[-PAGE_BYTES:])
    assert wire.call(Op.STATS, b"", 5.0)[0] is Status.OK
    wire.close()

    assert load(store, store.request(prompt(64, 1)))[0] == 64


def test_a_page_whose_bytes_are_not_those_that_were_sent_is_not_published(store: RemoteStore) -> None:
    request = store.request(prompt(1))
    lease = store.prepare_save(request, 0, 1)
    attachment = store._link.attachment
    assert attachment is not None
    with store._link.borrow(attachment) as wire:
        frame = bytearray(one_page(lease.id, 0, b"\x11" * PAGE_BYTES))
        frame[-20] ^= 1
        wire.socket.sendall(frame)
        wire.call(Op.COMPLETE, messages.encode_complete(lease.id, None), 5.0)

    assert store.lookup(store.request(prompt(1))).num_blocks == 0
    store.release(lease)


@pytest.mark.parametrize(("index", "size"), [(9, PAGE_BYTES), (0, 100)])
def test_a_page_the_lease_does_not_have_ends_the_connection(store: RemoteStore, index: int, size: int) -> None:
    lease = store.prepare_save(store.request(prompt(2)), 0, 2)
    attachment = store._link.attachment
    assert attachment is not None
    wire = attachment.take(store._link._dial, 1.0)

    wire.socket.sendall(one_page(lease.id, index, bytes(size)))

    assert b"ProtocolError" in wire.socket.recv(4096)
    assert wire.socket.recv(1) == b""
    wire.close()
    store.release(lease)


def test_a_daemon_that_is_gone_is_a_miss_over_http_too(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}) as daemon:
        store = remote(daemon)
        save(store, store.request(prompt(3)))
        lease = store.prepare_load(store.request(prompt(3)), 3)
    assert store.wait(lease).state is LeaseState.CLOSED
    store.complete(lease)
    assert store.lookup(store.request(prompt(3))).num_blocks == 0
    store.close()


# ---- tenants


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[LocalDaemon]:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)
    sections = {"service": {"http_port": 0, "tokens_file": tokens}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        yield daemon


def test_tenants_see_neither_each_others_pages_nor_numbers(shared: LocalDaemon) -> None:
    port = shared.daemon.app.port
    with remote(shared, BLUE) as blue, remote(shared, RED) as red:
        save(blue, blue.request(prompt(5)))
        keys = [key.hex() for key in blue.request(prompt(5)).keys]

        assert load(blue, blue.request(prompt(5)))[0] == 5
        assert red.lookup(red.request(prompt(5))).num_blocks == 0
        assert Http(port, BLUE).post("/v1/lookup", keys=keys)["num_blocks"] == 5
        assert Http(port, RED).post("/v1/lookup", keys=keys)["num_blocks"] == 0
        (stats,) = Http(port, RED).get("/v1/stats")["namespaces"].values()
        assert stats["saved_pages"] == 0
        metrics = Http(port, RED).get("/metrics").decode()
        assert 'tenant="red"' in metrics
        assert "blue" not in metrics
        assert "kvstore_service" not in metrics
        assert 'tenant="red"' in Http(port, BLUE).get("/metrics").decode()


def test_a_tenants_quota_is_its_stores_size(shared: LocalDaemon) -> None:
    with remote(shared, BLUE) as blue, remote(shared, RED) as red:
        assert blue.stats()["capacity_pages"] == {"host": 32, "disk": 16}
        assert red.stats()["capacity_pages"] == {"host": 64}
        use(red, prompt(20))
        for seed in range(8):
            use(blue, prompt(20, seed))

        assert load(red, red.request(prompt(20)))[0] == 20
        assert blue.stats()["pages"]["host"] <= 32


@pytest.mark.parametrize("path", ["/v1/stats", "/v1/namespaces", "/metrics", "/v1/tiers", "/v1/events"])
def test_a_wrong_token_learns_nothing(shared: LocalDaemon, path: str) -> None:
    port = shared.daemon.app.port

    answers = [Http(port, token).call("GET", path) for token in (None, "wrong", BLUE[:-1], BLUE + "x", "ü")]

    assert {status for status, _ in answers} == {401}
    assert len({str(body) for _, body in answers}) == 1
    assert Http(port).get("/healthz") == {"status": "ok"}


def test_only_operators_change_tiers(shared: LocalDaemon) -> None:
    port = shared.daemon.app.port
    with remote(shared, BLUE), remote(shared, RED):
        assert Http(port, RED).call("POST", "/v1/tiers/disk/detach", {})[0] == 403
        assert Http(port, BLUE).call("POST", "/v1/tiers/disk/detach", {})[0] == 200


def test_a_client_with_a_wrong_token_is_told_at_the_start(shared: LocalDaemon) -> None:
    with pytest.raises(ConfigError, match=r"service\.token is refused"):
        remote(shared, "wrong-token-0123456789")


def test_a_session_of_another_tenant_cannot_be_joined(shared: LocalDaemon) -> None:
    with remote(shared, BLUE) as blue:
        attachment = blue._link.attachment
        assert attachment is not None
        wire = dial_http("127.0.0.1", shared.daemon.app.port, token=RED)(5.0)

        status, _ = wire.call(Op.ATTACH, b'{"session":"%s"}' % attachment.session.encode(), 5.0)

        assert status is Status.GONE
        wire.close()


def test_pages_travel_over_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    service = {"http_port": 0, "tls_cert": cert, "tls_key": key}
    with local_daemon(tmp_path / "kv.sock", service=service) as daemon:
        url = f"https://127.0.0.1:{daemon.daemon.app.port}"
        with connect(url, LAYOUT, namespace(), tls_ca=cert, staging_bytes=64 * PAGE_BYTES) as store:
            save(store, store.request(prompt(10)))
            assert load(store, store.request(prompt(10)))[0] == 10
        with connect(url, LAYOUT, namespace(), staging_bytes=4 * PAGE_BYTES) as distrusting:
            assert not distrusting.is_attached


def test_in_a_private_network_the_api_answers_to_the_names_it_was_given(tmp_path: Path) -> None:
    service = {"http_port": 0, "http_host": "0.0.0.0", "http_names": "node,10.0.0.5"}
    with local_daemon(tmp_path / "kv.sock", service=service) as daemon:
        http = Http(daemon.daemon.app.port)
        answers = {
            name: http.call("GET", "/healthz", headers={"Host": name})[0]
            for name in ("node:8470", "10.0.0.5", "localhost", "evil.example", "")
        }

    assert answers == {"node:8470": 200, "10.0.0.5": 200, "localhost": 200, "evil.example": 400, "": 400}


@pytest.mark.parametrize("names", ["http://node", "a b", "node,"])
def test_http_names_are_names_without_ports(names: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.http_names .*such as node"):
        Config(service={"http_names": names})


def test_a_bind_for_everybody_needs_tokens(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"service\.http_host is '0\.0\.0\.0'"),
        local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "http_host": "0.0.0.0"}),
    ):
        pass

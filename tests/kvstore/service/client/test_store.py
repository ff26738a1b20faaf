"""RemoteStore against a daemon in this process: the same walk as with a store in here, and what happens around it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import ConfigError, RequestError, StoreClosed
from kvstore.layout import GroupKind, LayerGroup, LayerSpec, Layout, groups_with_states
from kvstore.plan.records import LeaseState, RequestOptions
from kvstore.service.client.connect import connect
from kvstore.service.client.store import MISS, RemoteStore
from kvstore.service.daemon.daemon import Daemon
from tests.helpers.daemons import LocalDaemon, attach, local_daemon
from tests.helpers.stores import BLOCK, LAYOUT, load, namespace, open_small, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture(params=[False, True], ids=["shared", "isolated"])
def daemon(request: pytest.FixtureRequest, socket: Path, tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(socket, tmp_path / "disk", service={"isolate": request.param}) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


@pytest.fixture
def store(daemon: LocalDaemon, socket: Path) -> Iterator[RemoteStore]:
    with attach(socket) as store:
        yield store
        stats = store.stats()
        assert stats["leases"] == stats["slots"]["filling"] == 0


def test_what_one_client_saves_another_loads(store: RemoteStore, socket: Path) -> None:
    assert save(store, store.request(prompt(10))) == 10

    with attach(socket) as other:
        loaded, match = load(other, other.request(prompt(10)))

    assert loaded == 10
    assert match.by_tier == {"host": 10}


def test_both_clients_see_the_same_memory(store: RemoteStore, socket: Path) -> None:
    save(store, store.request(prompt(2)))

    with attach(socket) as other:
        lease = other.prepare_load(other.request(prompt(2)), 2)
        page = lease.pages[0]

        assert np.array_equal(store.slots.array(page.slot), other.slots.array(page.slot))
        assert store.slots.view(page.slot) == other.slots.view(page.slot)
        assert store.slots.array(page.slot).ctypes.data != other.slots.array(page.slot).ctypes.data
        other.complete(lease)


def test_a_page_of_an_unfinished_save_is_no_hit(store: RemoteStore) -> None:
    request = store.request(prompt(3))
    lease = store.prepare_save(request, 0, 3)

    assert store.lookup(store.request(prompt(3))).num_blocks == 0

    store.complete(lease, filled=[True, False, True])
    assert store.lookup(store.request(prompt(3))).num_blocks == 1


def test_a_lease_ends_once(store: RemoteStore) -> None:
    lease = store.prepare_save(store.request(prompt(3)), 0, 3)

    store.complete(lease)
    store.release(lease)
    store.complete(lease)

    assert store.lookup(store.request(prompt(3))).num_blocks == 3


def test_a_request_grows_and_only_its_new_keys_travel(store: RemoteStore) -> None:
    tokens = prompt(8)
    request = store.request(tokens[: 4 * BLOCK])
    save(store, request)
    store.extend(request, tokens[4 * BLOCK :])

    save(store, request, 4)

    assert store.lookup(store.request(tokens)).num_blocks == 8
    assert store._link.attachment is not None
    assert store._link.attachment.sent[request.id] == 8


def test_a_daemon_that_forgot_a_request_is_told_again(store: RemoteStore, daemon: LocalDaemon) -> None:
    request = store.request(prompt(5))
    save(store, request)

    def forget_requests(inside: Daemon) -> None:
        for session in inside.clients.sessions.values():
            session.requests.clear()

    daemon.look(forget_requests)

    assert store.lookup(request).num_blocks == 5


def test_options_travel(store: RemoteStore, daemon: LocalDaemon) -> None:
    request = store.request(prompt(2), RequestOptions(session="chat", priority=3, ttl_s=9.0, pin=True))
    store.lookup(request)

    (seen,) = daemon.look(lambda d: [r for s in d.clients.sessions.values() for r in s.requests])

    assert seen.options == request.options


def test_tenants_of_requests_do_not_meet(store: RemoteStore) -> None:
    save(store, store.request(prompt(4), RequestOptions(tenant="a")))

    assert store.lookup(store.request(prompt(4), RequestOptions(tenant="b"))).num_blocks == 0
    assert store.lookup(store.request(prompt(4), RequestOptions(tenant="a"))).num_blocks == 4


def test_names_blocks_as_a_store_in_process_does(store: RemoteStore) -> None:
    with open_small() as local:
        assert store.request(prompt(6)).keys == local.request(prompt(6)).keys


def test_pages_come_from_disk_after_they_left_host_memory(store: RemoteStore) -> None:
    for seed in range(12):
        assert use(store, prompt(10, seed)) == 0
        assert store.flush(WAIT_S)

    loaded, match = load(store, store.request(prompt(10, 1)))

    assert loaded == 10
    assert match.by_tier == {"disk": 10}


def test_what_is_kept_and_prefetched_reaches_the_planner(store: RemoteStore) -> None:
    request = store.request(prompt(5))
    save(store, request)

    assert store.keep.pin(request) == 5
    assert store.stats()["pinned_pages"] == 5
    assert store.keep.unpin(request) == 5
    assert store.keep.set_ttl(request, 3600.0) == 5
    store.cancel(store.prefetch(request))
    assert store.keep.forget(request, 2) == 3
    assert store.lookup(store.request(prompt(5))).num_blocks == 2


def test_a_time_to_live_that_is_none_is_refused_before_it_is_sent(store: RemoteStore) -> None:
    with pytest.raises(RequestError, match="ttl_s is nan"):
        store.keep.set_ttl(store.request(prompt(2)), float("nan"))


def test_observed_prefill_rate_reaches_the_planner(store: RemoteStore) -> None:
    store.observe_prefill(1000, 0.5)
    store.observe_prefill(0, float("nan"))

    assert store.stats()["prefill_rate"] == 2000.0


def test_owner_that_died_gives_its_leases_back(store: RemoteStore) -> None:
    request = store.request(prompt(6))
    store.prepare_save(request, 0, 3, owner="rank 1")
    mine = store.prepare_save(request, 3, 3, owner="rank 2")

    assert store.release_owner("rank 1") == 1
    assert store.stats()["leases"] == 1
    store.release(mine)


def test_a_client_that_hangs_up_gives_its_leases_back(store: RemoteStore, socket: Path) -> None:
    other = attach(socket)
    other.prepare_save(other.request(prompt(4, 1)), 0, 4)
    assert store.stats()["slots"]["filling"] == 4

    other.close()

    wait_until(lambda: store.stats()["leases"] == 0)
    assert store.stats()["slots"] == {"free": 64, "filling": 0, "resident": 0}


def test_misuse_is_told_to_the_caller(store: RemoteStore) -> None:
    request = store.request(prompt(3))

    with pytest.raises(RequestError, match="num_blocks is 4; the request has blocks 0 to 3"):
        store.prepare_load(request, 4)
    with pytest.raises(RequestError, match=r"first \+ num_blocks is 5"):
        store.prepare_save(request, 2, 3)
    with pytest.raises(RequestError, match="ttl_s is -1"):
        store.request(prompt(1), RequestOptions(ttl_s=-1))
    with pytest.raises(RequestError, match="session"):
        store.lookup(store.request(prompt(1), RequestOptions(session=7)))  # type: ignore[arg-type]


def test_a_closed_store_says_so(store: RemoteStore, socket: Path) -> None:
    other = attach(socket)
    request = other.request(prompt(1))
    other.close()
    other.close()

    with pytest.raises(StoreClosed):
        other.lookup(request)


def test_without_a_daemon_everything_is_a_miss(tmp_path: Path) -> None:
    with attach(tmp_path / "none") as store:
        request = store.request(prompt(4))

        assert not store.is_attached
        assert store.wait_lookup(request) == MISS
        lease = store.prepare_load(request, 4)
        assert (lease.num_blocks, len(lease.pages)) == (0, 0)
        assert store.wait(lease).state is LeaseState.CLOSED
        store.complete(lease)
        save_lease = store.prepare_save(request, 0, 4)
        assert (len(save_lease.pages), save_lease.skipped) == (0, 4)
        store.complete(save_lease, filled=[])
        assert (
            store.keep.pin(request)
            == store.keep.unpin(request)
            == store.keep.forget(request)
            == store.prefetch(request)
            == 0
        )
        assert store.stats() == {}
        assert not store.flush(0.1)
        store.keep.finished(request)


def test_a_namespace_the_daemon_has_no_room_for_is_refused_at_once(store: RemoteStore, socket: Path) -> None:
    with pytest.raises(ConfigError, match=r"service\.max_namespaces is 1"):
        connect(f"unix://{socket}", LAYOUT, namespace(model="other"))


def test_namespaces_with_layouts_of_their_own_share_a_daemon(tmp_path: Path) -> None:
    socket = tmp_path / "two.sock"
    with (
        local_daemon(socket, service={"max_namespaces": 2}),
        attach(socket) as one,
        connect(f"unix://{socket}", LAYOUT, namespace(model="other")) as two,
    ):
        save(one, one.request(prompt(4)))

        assert two.lookup(two.request(prompt(4))).num_blocks == 0
        assert one.stats()["capacity_pages"]["host"] == two.stats()["capacity_pages"]["host"] == 32


def test_a_hash_that_can_collide_is_refused(socket: Path) -> None:
    with pytest.raises(ConfigError, match=r"namespace\.hash"):
        connect(f"unix://{socket}", LAYOUT, namespace(hash="xxh3_128"))


@pytest.mark.parametrize("url", ["unix://", "http://", "tcp://x:1", "redis://x"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.url"):
        connect(url, LAYOUT, namespace())


def test_a_forked_child_gets_a_session_of_its_own(store: RemoteStore, socket: Path, daemon: LocalDaemon) -> None:
    save(store, store.request(prompt(3)))
    child = os.fork()
    if child == 0:
        loaded, _ = load(store, store.request(prompt(3)))
        os._exit(0 if loaded == 3 and store.num_attached == 2 else 1)

    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert store.lookup(store.request(prompt(3))).num_blocks == 3
    wait_until(lambda: daemon.look(lambda d: len(d.clients.sessions)) == 1)


def test_a_flush_says_whether_all_is_there_and_each_client_is_told_of_losses(
    store: RemoteStore, socket: Path, daemon: LocalDaemon
) -> None:
    use(store, prompt(4))
    result = store.flush(10.0)
    assert result
    assert result.written == {"disk": 4}
    assert result.missing == result.undeleted == {}

    (opened,) = daemon.daemon.stores.all()
    with attach(socket) as other:
        opened.store._planner.books.tiers[0].debts.num_lost_saves += 3

        assert store.flush(10.0).missing == {"disk": {"lost": 3}}
        assert store.flush(10.0)
        assert other.flush(10.0).missing == {"disk": {"lost": 3}}
        assert other.flush(10.0)
    with attach(socket) as late:
        assert late.flush(10.0)


def test_what_was_forgotten_is_deleted_when_a_flush_is_true(store: RemoteStore, daemon: LocalDaemon) -> None:
    use(store, prompt(4))
    assert store.flush(10.0)

    assert store.keep.forget(store.request(prompt(4)), 1) == 3

    assert store.flush(10.0)
    (opened,) = daemon.daemon.stores.all()
    assert opened.store.stats()["pages"]["disk"] == 1
    assert opened.store.stats()["deleted_pages"]["disk"] == 3


def test_pages_saved_to_a_daemon_that_is_gone_are_unknown_until_that_was_told(socket: Path, tmp_path: Path) -> None:
    with local_daemon(socket, tmp_path / "disk") as first, attach(socket) as store:
        use(store, prompt(4, seed=1))
        assert store.flush(10.0)
        use(store, prompt(4, seed=2))
        first.stop()
        assert "the daemon" in store.flush(1.0).error
        with local_daemon(socket, tmp_path / "disk"):
            results = [store.flush(1.0)]
            while results[-1].error:
                results.append(store.flush(1.0))

            assert results[-1].missing == {"daemon": {"unknown": 4}}
            use(store, prompt(4, seed=3))
            assert store.flush(10.0)


def test_pages_and_a_state_go_through_a_daemon_as_pairs(daemon: LocalDaemon, socket: Path) -> None:
    piece = LayerGroup(GroupKind.RECURRENT, (1,), LAYOUT.groups[0].page_bytes)
    layout = Layout(BLOCK, (*LAYOUT.groups, piece, piece), "test:pairs", "uint8")
    with connect(f"unix://{socket}", layout, namespace(layout)) as store:
        request = store.request(prompt(4))
        lease = store.prepare_save(request, 0, 4, states=[1])
        for page in lease.pages:
            store.slots.array(page.slot)[:] = 10 * page.block + page.group
        store.complete(lease)
        found = store.wait_lookup(request)
        loaded = store.prepare_load(request, found.num_blocks)
        first_bytes = [(page.block, page.group, int(store.slots.array(page.slot)[0])) for page in loaded.pages]
        store.complete(loaded)

    assert (found.num_blocks, found.without_state) == (2, 4)
    assert first_bytes == [(0, 0, 0), (1, 0, 10), (1, 1, 11), (1, 2, 12)]


def test_a_state_of_hundreds_of_pieces_is_no_layout_too_many(socket: Path) -> None:
    """A state of 100 MB beside small blocks (Nemotron-H, blocks of 16 tokens)."""
    groups = groups_with_states([LayerSpec(GroupKind.FULL, 256)], 16, range(1, 49), 400 * 4096)
    layout = Layout(16, groups, "test:many", "uint8")
    with local_daemon(socket), connect(f"unix://{socket}", layout, namespace(layout)) as store:
        assert len(store.layout.groups) == 401
        assert store.is_attached

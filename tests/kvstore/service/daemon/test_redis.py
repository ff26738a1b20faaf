"""What a daemon does about Redis: asks it to explain a prompt, clears a namespace in it, bounds tenants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.daemons import Http, LocalDaemon, local_daemon
from tests.helpers.http_pages import HttpPages
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import LAYOUT, PAGE_BYTES, ids, load, namespace, open_small, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = NEEDS_REDIS


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def daemon(tmp_path: Path, server: LocalRedis) -> Iterator[LocalDaemon]:
    with local_daemon(
        tmp_path / "kv.sock",
        service={"http_port": 0, "max_namespaces": 2},
        redis={"url": server.url, "timeout_s": 0.5},
        store={"load_or_recompute": False, "lookup_deadline_s": 0.5},
    ) as daemon:
        yield daemon


def elsewhere(server: LocalRedis, num_blocks: int, seed: int) -> None:
    """Another machine saves a prompt, which only Redis has then."""
    with open_small(redis_url=server.url) as other:
        use(other, prompt(num_blocks, seed))
        assert other.flush(WAIT_S)


def test_explain_tells_what_redis_has_and_has_not(http: Http, store: RemoteStore, server: LocalRedis) -> None:
    elsewhere(server, 4, seed=1)

    there = http.post("/v1/explain", tokens=ids(4, 1))
    longer = http.post("/v1/explain", tokens=ids(4, 1) + ids(2, 2))
    unasked = http.post("/v1/explain", tokens=ids(4, 1), timeout_s=0)

    assert (there["reason"], there["by_tier"]) == ("hit", {"redis": 4})
    assert (longer["reason"], longer["known"], longer["asked"]) == ("never_stored", 4, {"redis": False})
    assert longer["text"].endswith("; redis does not have it")
    assert (unasked["reason"], unasked["asked"]) == ("never_stored", {"redis": None})
    assert store.stats()["lookups"] == 0  # asking is no lookup


def test_explain_tells_that_redis_has_not_answered(http: Http, store: RemoteStore, server: LocalRedis) -> None:
    save(store, store.request(prompt(2)))
    server.freeze()
    try:
        explained = http.post("/v1/explain", tokens=ids(4), timeout_s=0.2)
    finally:
        server.thaw()

    assert explained["asked"] == {"redis": None}
    assert explained["text"].endswith("; redis has not answered")
    assert load(store, store.request(prompt(2)))[0] == 2


# ---- clear


def test_clear_deletes_what_only_redis_has_and_no_other_namespace(
    http: Http, store: RemoteStore, server: LocalRedis, daemon: LocalDaemon
) -> None:
    elsewhere(server, 4, seed=1)
    with open_small(redis_url=server.url) as machine, connect(_url(daemon), LAYOUT, namespace(model="other")) as other:
        use(other, prompt(3, 2))
        assert other.flush(WAIT_S)
        use(store, prompt(5, 3))
        assert store.flush(WAIT_S)
        (own,) = (n["id"] for n in http.get("/v1/namespaces")["namespaces"] if n["model"] == "tiny")

        cleared = http.post(f"/v1/namespaces/{own}/clear")

        assert cleared["blocks"] == 5
        assert cleared["keys"]["redis"] >= 4  # those of block 5 may have gone with the index
        for seed in (1, 3):
            assert machine.wait_lookup(machine.request(prompt(5, seed)), 5.0).num_blocks == 0
            assert store.wait_lookup(store.request(prompt(5, seed)), 5.0).num_blocks == 0
        assert list(_pages_by_prefix(server).values()) == [3]
        assert load(other, other.request(prompt(3, 2)))[0] == 3
        use(store, prompt(4, 1))
        assert store.flush(WAIT_S)
        assert load(machine, machine.request(prompt(4, 1)))[0] == 4


def test_clear_says_that_redis_could_not_be_reached(http: Http, store: RemoteStore, server: LocalRedis) -> None:
    use(store, prompt(3))
    (own,) = (n["id"] for n in http.get("/v1/namespaces")["namespaces"])
    server.kill()

    status, problem = http.call("POST", f"/v1/namespaces/{own}/clear")

    assert (status, problem["title"]) == (503, "a shared tier is not cleared")
    assert problem["detail"].startswith("3 blocks that were known here are deleted")
    server.start()
    wait_until(lambda: http.call("POST", f"/v1/namespaces/{own}/clear")[0] == 200)


# ---- tenants


TENANTS = f"""
[[tenant]]
name = "blue"
token = "blue-token-0123456789"
redis_bytes = {20 * PAGE_BYTES}

[[tenant]]
name = "red"
token = "red-token-0123456789"
"""


def test_a_tenants_bytes_in_redis_are_bounded_for_all_its_machines_together(tmp_path: Path, server: LocalRedis) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)

    def machine(name: str) -> LocalDaemon:
        daemon = local_daemon(
            tmp_path / name, service={"http_port": 0, "tokens_file": tokens}, redis={"url": server.url},
            store={"load_or_recompute": False, "lookup_deadline_s": 1.0},
        )  # fmt: skip
        return stack.enter_context(daemon)

    with ExitStack() as stack:
        ports = [one.daemon.app.port for one in (machine("one.sock"), machine("two.sock"))]
        blues = [HttpPages(port, "blue-token-0123456789") for port in ports]
        red = HttpPages(ports[0], "red-token-0123456789")
        for seed in range(6):
            for blue in blues:
                blue.save(prompt(6, seed))
                red.save(prompt(6, seed))
        assert all(tenant.flush() for tenant in (*blues, red))

        pages = _pages_by_prefix(server)

        assert sorted(pages.values()) == [20, 36]
        # What it has is the latest: the other machine finds it there.
        blues[0].save(prompt(6, 9))
        assert blues[0].flush()
        assert blues[1].lookup(prompt(6, 9))["by_tier"] == {"redis": 6}
        assert blues[1].load(prompt(6, 9)) == 6


def _pages_by_prefix(server: LocalRedis) -> dict[bytes, int]:
    with server.client() as client:
        names = [name for name in client.keys("*") if not name.endswith(b"ledger")]
    heads = {name[: len(b"kv:") + 17 + 36] for name in names}
    prefixes = [head[: len(b"kv:") + 17] for head in heads]
    return {prefix: prefixes.count(prefix) for prefix in prefixes}


def _url(daemon: LocalDaemon) -> str:
    return f"unix://{daemon.config.service.socket}"

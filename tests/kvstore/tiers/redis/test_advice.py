"""A server looked at as a place for pages: each line from what it says of itself, and from real servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis.advice import SLOW_BYTES_S, Advice, advise, advise_times, differing
from kvstore.tiers.redis.info import PageTimes, ServerInfo, ask_servers, time_pages
from kvstore.units import GiB, KiB, MiB
from tests.helpers.redis_products import Product
from tests.helpers.redis_server import cluster_nodes, command

PAGE_BYTES = 2 * MiB
GOOD = ServerInfo(
    where="cache:6379",
    product="redis",
    version="7.0.15",
    role="master",
    policy="allkeys-lfu",
    maxmemory_bytes=32 * GiB,
    used_bytes=GiB,
    system_bytes=64 * GiB,
    allocator="jemalloc-5.3.0",
    evicted_keys=0,
    replicas=0,
    backlog_bytes=MiB,
    snapshots="",
    appends=False,
    max_clients_memory="20%",
    normal_output_limit=0,
)


def judged(**changes: object) -> dict[str, Advice]:
    """The lines that are not ok, of a good server with some changes, by what they are about."""
    lines = advise(replace(GOOD, **changes), page_bytes=PAGE_BYTES)  # type: ignore[arg-type]
    return {line.what: line for line in lines if line.state != "ok"}


def test_a_good_server_has_nothing_to_be_done() -> None:
    assert judged() == {}
    assert all(not line.do for line in advise(GOOD, page_bytes=PAGE_BYTES))


@pytest.mark.parametrize(
    ("changes", "what", "state"),
    [
        ({"version": "6.0.16"}, "version", "bad"),
        ({"role": "slave"}, "role", "bad"),
        ({"maxmemory_bytes": 0}, "maxmemory", "bad"),
        ({"maxmemory_bytes": 63 * GiB}, "maxmemory", "bad"),
        ({"maxmemory_bytes": 100 * MiB}, "maxmemory", "warn"),
        ({"policy": "noeviction"}, "maxmemory-policy", "bad"),
        ({"policy": "allkeys-random"}, "maxmemory-policy", "warn"),
        ({"policy": "allkeys-lru", "maxmemory_bytes": GiB}, "maxmemory-policy", "warn"),
        ({"max_clients_memory": "0"}, "maxmemory-clients", "warn"),
        ({"snapshots": "900 1"}, "persistence", "warn"),
        ({"appends": True}, "persistence", "warn"),
        ({"replicas": 1}, "replicas", "warn"),
    ],
)
def test_each_weakness_is_told_with_its_reason_and_remedy(changes: dict[str, object], what: str, state: str) -> None:
    found = judged(**changes)

    assert list(found) == [what]
    assert found[what].state == state
    assert found[what].why
    assert found[what].do
    assert "cache:6379" in found[what].line


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "allkeys-lru"},  # of tens of GiB a second turns nothing over
        {"policy": "volatile-ttl"},
        {"max_clients_memory": "0", "normal_output_limit": 64 * MiB},
        {"product": "valkey", "version": "9.1.2", "max_clients_memory": "0"},  # sends large values by reference
        {"replicas": 1, "backlog_bytes": 256 * MiB},
    ],
)
def test_what_does_no_harm_is_not_complained_of(changes: dict[str, object]) -> None:
    assert judged(**changes) == {}


def test_what_a_server_does_not_say_is_not_judged() -> None:
    lines = advise(ServerInfo(where="cache:6379"), page_bytes=PAGE_BYTES)

    assert [(line.what, line.state) for line in lines] == [("version", "ok")]


def test_a_bound_of_ours_makes_up_for_a_server_that_does_not_evict() -> None:
    lines = advise(replace(GOOD, policy="noeviction"), page_bytes=PAGE_BYTES, is_bounded=True)

    assert all(line.state == "ok" for line in lines)


def test_nodes_that_are_set_differently_are_told() -> None:
    nodes = [GOOD, replace(GOOD, where="other:6379", maxmemory_bytes=GiB)]

    [line] = differing(nodes)

    assert (line.what, line.state) == ("maxmemory", "warn")
    assert "other:6379" in line.found
    assert differing([GOOD, GOOD]) == []


def test_pages_that_come_slower_than_they_are_computed_are_a_warning() -> None:
    slow = PAGE_BYTES / SLOW_BYTES_S * 2

    assert advise_times("cache:6379", PageTimes(PAGE_BYTES, 0.001, 0.001)).state == "ok"
    assert advise_times("cache:6379", PageTimes(PAGE_BYTES, 0.001, slow)).state == "warn"


@pytest.mark.redis
def test_a_server_as_we_start_it_is_good_and_keeps_nothing_of_the_look(product: Product) -> None:
    with LocalRedis() as server:
        [seen] = ask_servers(server.url, timeout_s=5.0)
        times = time_pages(server.url, PAGE_BYTES, prefix="kv:", timeout_s=5.0)
        left = command(server, "DBSIZE")

    assert [line for line in advise(seen, page_bytes=PAGE_BYTES) if line.state != "ok"] == []
    assert seen.numbers >= (6, 2)
    assert (seen.role, seen.snapshots, seen.appends) == ("master", "", False)
    assert times.write_s > 0 < times.read_s
    assert left == 0


@pytest.mark.redis
def test_an_account_that_may_only_store_pages_is_told_of_what_it_can_see(product: Product) -> None:
    with LocalRedis() as server:
        command(server, "ACL", "SETUSER", "app", "on", ">secret", "~kv:*", "+set", "+mget", "+unlink")
        url = f"redis://app:secret@127.0.0.1:{server.port}/0"
        [seen] = ask_servers(url, timeout_s=5.0)
        times = time_pages(url, 64 * KiB, prefix="kv:", timeout_s=5.0)

    assert seen == ServerInfo(where=seen.where)
    assert times.page_bytes == 64 * KiB


@pytest.mark.redis
def test_of_a_cluster_every_node_that_holds_keys_is_asked(product: Product) -> None:
    with cluster_nodes(2) as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        seen = ask_servers(url, timeout_s=10.0)
        times = time_pages(url, 64 * KiB, prefix="kv:", timeout_s=10.0)

    assert [one.where for one in seen] == [f"127.0.0.1:{nodes[0].port}"]  # the other one has no slots
    assert times.read_s > 0

"""Deployments that change while pages are read and written: no wrong page, no call that hangs, service afterwards."""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
import redis.exceptions
from redis.crc import key_slot

from kvstore.page import PageKey
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis import calls
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_load import Load, under_load
from tests.helpers.redis_products import Product, find_product
from tests.helpers.redis_server import NEEDS_REDIS, command
from tests.helpers.redis_slots import begin_move, end_move, move_keys, move_slot
from tests.helpers.redis_topologies import Sentinel, Servers, cluster, is_primary, joined, node_id, under_sentinel
from tests.helpers.waiting import wait_until

pytestmark = NEEDS_REDIS
MiB = 1 << 20
PAGE_BYTES = 2 * MiB
SMALL_BYTES = 64 << 10
CALL_S = 2.0
# Far above CALL_S and far below what a hang takes: tells a kept deadline, also on a busy machine.
IN_TIME_S = 15.0
KEYS = keys_of("page", 12)
DOWN_MS = 1000

BOTH = ["redis", "valkey"]
REDIS = ["redis", pytest.param("valkey", marks=pytest.mark.slow)]
VALKEY = [pytest.param("redis", marks=pytest.mark.slow), "valkey"]


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Product:
    return find_product(request.param)


def tier_on(servers: Servers, page_bytes: int = SMALL_BYTES) -> RedisTier:
    return RedisTier(servers.url, slot_bytes=page_bytes, ttl_s=3600, connect_timeout_s=1.0)


def held_by(tier: RedisTier, node: LocalRedis) -> list[PageKey]:
    """Those of KEYS whose slot a node of a cluster has."""
    mine = node_id(node)
    ranges = [(first, last) for first, last, (_, _, name, *_), *_ in slots_of(node) if name.decode() == mine]
    return [key for key in KEYS if any(first <= slot_of(tier, key) <= last for first, last in ranges)]


def slots_of(node: LocalRedis) -> list[Any]:
    with node.client() as client:
        client.response_callbacks.pop("CLUSTER SLOTS", None)
        found: list[Any] = client.execute_command("CLUSTER SLOTS")  # type: ignore[assignment]
        return found


def slot_of(tier: RedisTier, key: PageKey) -> int:
    return int(key_slot(tier._names.head(key)))


def assert_well(load: Load) -> None:
    assert load.wrong == []
    assert load.longest_s < IN_TIME_S


def assert_whole(tier: RedisTier, page_bytes: int) -> None:
    """Everything can be stored and read."""
    assert store(tier, KEYS, page_bytes) == [True] * len(KEYS)
    assert fetch(tier, KEYS, page_bytes) == [payload(key, page_bytes) for key in KEYS]
    assert tier.counters.corrupt_pages == 0


@pytest.mark.parametrize("made", REDIS, indirect=True)
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_shard_that_dies_is_missed_until_its_replica_has_taken_over(made: Product, how: str) -> None:
    with cluster(made.binary, node_timeout_ms=DOWN_MS) as servers, closing(tier_on(servers)) as tier:
        dying = servers.nodes[0]  # which is also the one that the URL names
        theirs, others = held_by(tier, dying), [key for key in KEYS if key not in held_by(tier, dying)]
        with under_load(tier, KEYS, SMALL_BYTES, CALL_S) as load:
            if how == "killed":
                dying.kill()
            else:
                dying.freeze()
            load.await_hits(others, "the other shards are read meanwhile")
            load.await_hits(theirs, "its pages are had again")
            load.await_hits(KEYS, "all of them")

        assert_well(load)
        assert is_primary(servers.nodes[3])
        assert_whole(tier, SMALL_BYTES)
        if how == "frozen":
            dying.thaw()
        else:
            dying.start()
        wait_until(lambda: not is_primary(dying), "the old one follows the new one")
        assert_whole(tier, SMALL_BYTES)


@pytest.mark.parametrize("made", VALKEY, indirect=True)
def test_a_shard_that_is_failed_over_by_hand_loses_nothing(made: Product) -> None:
    with cluster(made.binary) as servers, closing(tier_on(servers)) as tier:
        assert store(tier, KEYS, SMALL_BYTES) == [True] * len(KEYS)
        with under_load(tier, KEYS, SMALL_BYTES, CALL_S) as load:
            for replica in servers.nodes[3:]:
                command(replica, "CLUSTER", "FAILOVER")
            for replica in servers.nodes[3:]:
                wait_until(lambda one=replica: is_primary(one), "it took over")  # type: ignore[misc]
            load.await_hits(KEYS, "all pages are read from the new primaries")

        assert_well(load)
        assert tier.counters.extra["redirects"] > 0
        assert fetch(tier, KEYS, SMALL_BYTES) == [payload(key, SMALL_BYTES) for key in KEYS]


@pytest.mark.parametrize("made", BOTH, indirect=True)
def test_slots_that_are_moved_with_large_values(made: Product) -> None:
    with cluster(made.binary, replicas=0) as servers, closing(tier_on(servers, PAGE_BYTES)) as tier:
        assert store(tier, KEYS, PAGE_BYTES) == [True] * len(KEYS)
        old, new = servers.nodes[0], servers.nodes[2]
        theirs = held_by(tier, old)
        assert theirs
        with under_load(tier, KEYS, PAGE_BYTES, 4 * CALL_S) as load:
            for key in theirs:
                move_slot(slot_of(tier, key), old, new, servers.nodes)
            load.await_hits(KEYS, "all pages are read where they are now")

        assert_well(load)
        assert load.errors == []
        assert tier.counters.extra["redirects"] > 0
        assert command(old, "DBSIZE") == 0
        assert_whole(tier, PAGE_BYTES)


@pytest.mark.parametrize("made", BOTH, indirect=True)
def test_in_the_middle_of_a_move_pages_are_there_or_not_and_no_error(made: Product) -> None:
    with cluster(made.binary, replicas=0) as servers, closing(tier_on(servers, PAGE_BYTES)) as tier:
        assert store(tier, KEYS, PAGE_BYTES) == [True] * len(KEYS)
        old, new = servers.nodes[0], servers.nodes[2]
        key, *_ = held_by(tier, old)
        slot = slot_of(tier, key)
        begin_move(slot, old, new)
        names = sorted(command(old, "CLUSTER", "GETKEYSINSLOT", slot, 100), key=len)
        assert len(names) == 2

        for name in [None, *names]:  # nothing of the page has gone, its head has, all of it has
            if name is not None:
                move_keys([name], old, new)
            there = name is None
            assert tier.contains([key], timeout_s=TIMEOUT_S) == [there]
            assert fetch(tier, [key], PAGE_BYTES) == [payload(key, PAGE_BYTES) if there else None]
            assert store(tier, [key], PAGE_BYTES) == [there]

        end_move(slot, old, new, servers.nodes)
        assert fetch(tier, [key], PAGE_BYTES) == [payload(key, PAGE_BYTES)]
        assert tier.counters.corrupt_pages == 0


@pytest.mark.parametrize("made", REDIS, indirect=True)
def test_in_the_middle_of_a_move_nobody_waits_for_a_claim(made: Product) -> None:
    with cluster(made.binary, replicas=0) as servers, closing(tier_on(servers)) as tier:
        old, new = servers.nodes[0], servers.nodes[2]
        key, *_ = held_by(tier, old)
        begin_move(slot_of(tier, key), old, new)

        claimed = tier.claim(KEYS, token=b"machine", lease_s=60.0, timeout_s=TIMEOUT_S)
        tier.unclaim(KEYS, token=b"machine", timeout_s=TIMEOUT_S)

        assert claimed == [True] * len(KEYS)
        assert command(new, "DBSIZE") == 0


@pytest.mark.parametrize("made", VALKEY, indirect=True)
def test_a_node_that_is_added_takes_its_share(made: Product) -> None:
    with ExitStack() as stack:
        servers = stack.enter_context(cluster(made.binary, replicas=0))
        tier = stack.enter_context(closing(tier_on(servers, PAGE_BYTES)))
        old = servers.nodes[1]
        theirs = held_by(tier, old)
        assert theirs
        with under_load(tier, KEYS, PAGE_BYTES, 4 * CALL_S) as load:
            added = stack.enter_context(joined(made.binary, servers))
            for key in theirs:
                move_slot(slot_of(tier, key), old, added, [*servers.nodes, added])
            load.await_hits(KEYS, "all pages are read where they are now")

        assert_well(load)
        assert load.errors == []
        assert command(added, "DBSIZE") == 2 * len(theirs)
        assert_whole(tier, PAGE_BYTES)


@pytest.mark.parametrize("made", ["valkey"], indirect=True)
def test_slots_that_valkey_moves_at_once_by_itself(made: Product) -> None:
    with cluster(made.binary, replicas=0) as servers, closing(tier_on(servers, PAGE_BYTES)) as tier:
        assert store(tier, KEYS, PAGE_BYTES) == [True] * len(KEYS)
        old, new = servers.nodes[0], servers.nodes[2]
        ((first, last),) = [(row[0], row[1]) for row in slots_of(old) if row[2][2].decode() == node_id(old)]
        with under_load(tier, KEYS, PAGE_BYTES, 4 * CALL_S) as load:
            command(old, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", first, last, "NODE", node_id(new))
            wait_until(lambda: not held_by(tier, old), "the slots have gone")
            load.await_hits(KEYS, "all pages are read where they are now")

        assert_well(load)
        assert tier.counters.extra["redirects"] > 0
        assert_whole(tier, PAGE_BYTES)


def begins_failover(sentinel: Sentinel) -> bool:
    """Ask for a failover; False if it is refused, as while a replica's last answer is too old."""
    with suppress(redis.exceptions.ResponseError):
        sentinel.ask("SENTINEL", "FAILOVER", "pages")
        return True
    return False


@pytest.mark.parametrize("made", REDIS, indirect=True)
@pytest.mark.parametrize("how", ["killed", "by hand"])
def test_a_primary_under_sentinel_that_is_failed_over(made: Product, how: str) -> None:
    with under_sentinel(made.binary, down_after_ms=DOWN_MS) as servers, closing(tier_on(servers)) as tier:
        old, new = servers.nodes
        with under_load(tier, KEYS, SMALL_BYTES, CALL_S) as load:
            if how == "killed":
                old.kill()
            else:
                wait_until(lambda: begins_failover(servers.sentinels[0]), "Sentinel finds the replica good enough")
            wait_until(lambda: is_primary(new), "the replica took over")
            load.await_hits(KEYS, "all pages are had again")

        assert_well(load)
        assert_whole(tier, SMALL_BYTES)
        assert command(new, "DBSIZE") == 2 * len(KEYS)


@pytest.mark.parametrize("made", ["redis"], indirect=True)
def test_a_shard_that_was_out_for_long_is_used_soon_after_it_was_failed_over(
    made: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(made.binary) as servers, closing(tier_on(servers)) as tier:
        assert store(tier, KEYS, SMALL_BYTES) == [True] * len(KEYS)
        monkeypatch.setattr(calls, "MAX_OUT_S", 1e6)
        dying, replica = servers.nodes[0], servers.nodes[3]
        theirs = held_by(tier, dying)
        dying.kill()
        assert tier.contains(theirs, timeout_s=CALL_S) == [False] * len(theirs)
        (name,) = tier._calls._out
        tier._calls._out[name] = calls._Out(tier._calls._out[name].error, 1e6, 1e12)  # as after days

        command(replica, "CLUSTER", "FAILOVER", "TAKEOVER")

        wait_until(lambda: all(tier.contains(theirs, timeout_s=CALL_S)), "its pages are found", timeout_s=60.0)

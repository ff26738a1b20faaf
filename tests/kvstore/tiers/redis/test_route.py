from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from kvstore.errors import TierRefused, TierUnavailable
from kvstore.ports import free_port
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.node import Node
from kvstore.tiers.redis.route import make_route
from kvstore.tiers.redis.tier import RedisTier
from kvstore.tiers.redis.url import parse_redis_url
from tests.helpers.redis_products import ON_EACH_PRODUCT
from tests.helpers.redis_server import (
    ALL_SLOTS,
    canned_server,
    cluster_nodes,
    command,
    sentinel_of,
    wait_until,
)

pytestmark = ON_EACH_PRODUCT
SLOT_BYTES = 8192


def soon() -> float:
    return time.monotonic() + TIMEOUT_S


def node_of(url: str, connections: int = 2) -> Node:
    route = make_route(parse_redis_url(url), connections=connections, connect_timeout_s=1.0)
    ((node, _),) = route.split([b"k"], soon())
    return node


def ping(node: Node) -> RedisConnection:
    with node.lease(soon()) as wire:
        assert wire.ask([(b"PING",)]) == [b"PONG"]
        return wire


class TestNode:
    def test_a_wire_is_used_again_and_dropped_on_request(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url)

            first = ping(node)
            assert ping(node) is first
            node.drop_idle()
            assert ping(node) is not first
            node.close()

    def test_a_wire_left_in_the_middle_of_a_reply_is_not_used_again(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url)
            with node.lease(soon()) as first:
                first.send([b"*1\r\n$4\r\nPING\r\n"], replies=1)

            assert not first.is_reusable
            assert ping(node) is not first
            node.close()

    def test_a_wire_whose_server_was_restarted_is_replaced_without_a_failure(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url)
            ping(node)

            server.kill()
            server.start()

            ping(node)
            node.close()

    def test_a_forked_process_makes_its_own_wire_and_leaves_the_parents_alone(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url, connections=1)
            ours = ping(node)

            child = os.fork()
            if child == 0:  # no pytest from here on: the exit status says it all
                status = 1
                try:
                    status = 0 if ping(node) is not ours else 2
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)

            assert os.waitstatus_to_exitcode(status) == 0
            assert ping(node) is ours
            node.close()

    def test_no_more_wires_than_allowed_are_out_at_once(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url, connections=1)
            with (
                node.lease(soon()),
                pytest.raises(TierUnavailable, match="all 1 connections are busy"),
                node.lease(time.monotonic() + 0.01),
            ):
                raise AssertionError("a second wire was leased")

            ping(node)
            node.close()

    def test_a_waiting_call_gets_the_wire_that_is_given_back(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url, connections=1)
            got: list[RedisConnection] = []
            with node.lease(soon()):
                thread = threading.Thread(target=lambda: got.append(ping(node)))
                thread.start()
            thread.join()

            assert len(got) == 1
            node.close()

    def test_after_close_no_wire_is_out_or_given(self) -> None:
        with LocalRedis() as server:
            node = node_of(server.url)
            idle = ping(node)
            with node.lease(soon()) as leased:
                assert leased is idle
                node.close()

            assert not leased.is_reusable
            with pytest.raises(TierUnavailable, match="closed"):
                ping(node)
            wait_until(lambda: command(server, "INFO", "clients")["connected_clients"] == 1, "only the asking client")


class TestSentinel:
    def test_the_master_is_found_and_found_again_after_it_changed(self, tmp_path: Path) -> None:
        keys = keys_of("page", 2)
        with LocalRedis() as old, LocalRedis() as new, sentinel_of(old, "main", tmp_path) as port:
            tier = RedisTier(f"redis+sentinel://127.0.0.1:{port}/main/3", slot_bytes=SLOT_BYTES, ttl_s=60)
            assert store(tier, keys, SLOT_BYTES) == [True, True]
            assert command(old, "INFO", "keyspace")["db3"]["keys"] == 4

            # The old master is demoted and the sentinel told, as at the end of a failover.
            command(old, "REPLICAOF", "127.0.0.1", new.port)
            sentinel = LocalRedis()
            sentinel.port = port
            command(sentinel, "SENTINEL", "REMOVE", "main")
            command(sentinel, "SENTINEL", "MONITOR", "main", "127.0.0.1", new.port, 1)

            with pytest.raises(TierUnavailable, match="read only replica"):
                store(tier, keys_of("next", 1), SLOT_BYTES)
            assert store(tier, keys, SLOT_BYTES) == [True, True]
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            assert command(new, "INFO", "keyspace")["db3"]["keys"] == 4
            tier.close()

    def test_a_dead_sentinel_is_passed_over(self, tmp_path: Path) -> None:
        with LocalRedis() as master, sentinel_of(master, "main", tmp_path) as port:
            url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/main"
            ping(node_of(url))

    def test_an_unknown_service_is_named(self, tmp_path: Path) -> None:
        with LocalRedis() as master, sentinel_of(master, "main", tmp_path) as port:
            node = node_of(f"redis+sentinel://127.0.0.1:{port}/other")

            with pytest.raises(TierUnavailable, match="knows no master named 'other'"):
                ping(node)

    @pytest.mark.parametrize("answer", [b"*1\r\n$1\r\nh\r\n", b"*2\r\n$1\r\nh\r\n$1\r\nx\r\n", b"*2\r\n:1\r\n:2\r\n"])
    def test_an_answer_that_cannot_be_read_is_unavailable(self, answer: bytes) -> None:
        with canned_server([answer]) as port:
            node = node_of(f"redis+sentinel://127.0.0.1:{port}/main")

            with pytest.raises(TierUnavailable, match="its answer cannot be read"):
                ping(node)

    def test_a_frozen_sentinel_does_not_use_up_the_time_of_the_next(self, tmp_path: Path) -> None:
        with LocalRedis() as frozen, LocalRedis() as master, sentinel_of(master, "main", tmp_path) as port:
            frozen.freeze()
            node = node_of(f"redis+sentinel://127.0.0.1:{frozen.port},127.0.0.1:{port}/main")

            with node.lease(time.monotonic() + 1.0) as wire:
                assert wire.ask([(b"PING",)]) == [b"PONG"]


class TestCluster:
    def test_a_moved_slot_is_followed_within_the_call(self) -> None:
        keys = keys_of("page", 6)
        with cluster_nodes(2) as (first, second):
            tier = RedisTier(f"redis+cluster://127.0.0.1:{first.port}", slot_bytes=SLOT_BYTES, ttl_s=60)
            assert all(store(tier, keys, SLOT_BYTES))

            # All slots go to the second node, which is empty.
            command(first, "FLUSHALL")
            second_id = command(second, "CLUSTER", "MYID").decode()
            command(first, "CLUSTER", "DELSLOTSRANGE", *ALL_SLOTS)
            command(second, "CLUSTER", "DELSLOTSRANGE", *ALL_SLOTS)
            command(second, "CLUSTER", "ADDSLOTSRANGE", *ALL_SLOTS)
            command(second, "CLUSTER", "BUMPEPOCH")
            wait_until(lambda: _owner(first) == second_id, "the first node has heard of it")
            for node in (first, second):
                wait_until(lambda node=node: _is_ok(node), "the cluster is up again")  # type: ignore[misc]

            assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False] * 6
            assert tier.counters.extra["redirects"] == 1
            assert all(store(tier, keys, SLOT_BYTES))
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            assert command(second, "DBSIZE") == 12
            tier.close()

    def test_pages_are_spread_over_nodes_and_answers_stay_in_order(self) -> None:
        keys = keys_of("page", 8)
        with cluster_nodes(2) as (first, second):
            half = ALL_SLOTS[1] // 2
            command(first, "CLUSTER", "DELSLOTSRANGE", half + 1, ALL_SLOTS[1])
            command(second, "CLUSTER", "DELSLOTSRANGE", half + 1, ALL_SLOTS[1])
            command(second, "CLUSTER", "ADDSLOTSRANGE", half + 1, ALL_SLOTS[1])
            wait_until(lambda: _is_ok(first) and _is_ok(second), "both halves are assigned")
            tier = RedisTier(f"redis+cluster://127.0.0.1:{first.port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            assert store(tier, keys[::2], SLOT_BYTES) == [True] * 4

            assert tier.contains(keys, timeout_s=TIMEOUT_S) == [True, False] * 4
            assert tier.touch(keys, expires_at=0.0, timeout_s=TIMEOUT_S) == [True, False] * 4
            assert fetch(tier, keys, SLOT_BYTES) == [
                payload(k, SLOT_BYTES) if i % 2 == 0 else None for i, k in enumerate(keys)
            ]
            assert command(first, "DBSIZE") > 0
            assert command(second, "DBSIZE") > 0
            tier.ping(timeout_s=TIMEOUT_S)
            tier.close()

    def test_a_server_that_is_no_cluster_says_so(self) -> None:
        with LocalRedis() as server:
            tier = RedisTier(f"redis+cluster://127.0.0.1:{server.port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            with pytest.raises(TierUnavailable, match="use redis:// for a server that is not a cluster"):
                tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S)

    def test_a_cluster_without_slots_is_unavailable(self) -> None:
        with canned_server([b"*0\r\n"]) as port:
            tier = RedisTier(f"redis+cluster://127.0.0.1:{port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            with pytest.raises(TierUnavailable, match="no slots assigned"):
                tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S)

    @pytest.mark.parametrize("table", [b":1\r\n", b"*1\r\n*1\r\n:0\r\n", b"*1\r\n*3\r\n:0\r\n:9\r\n*1\r\n$1\r\nh\r\n"])
    def test_a_table_that_cannot_be_read_is_unavailable(self, table: bytes) -> None:
        with canned_server([table]) as port:
            tier = RedisTier(f"redis+cluster://127.0.0.1:{port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            with pytest.raises(TierUnavailable, match="table of slots cannot be read"):
                tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S)

    def test_a_slot_that_no_node_has_is_a_miss_and_a_delete_is_owed(self) -> None:
        with canned_server([b"*1\r\n*3\r\n:9\r\n:9\r\n*2\r\n$9\r\n127.0.0.1\r\n:1\r\n"]) as port:
            tier = RedisTier(f"redis+cluster://127.0.0.1:{port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            assert tier.contains(keys_of("page", 8), timeout_s=TIMEOUT_S) == [False] * 8
            with pytest.raises(TierRefused, match="some slots have no node"):
                tier.delete(keys_of("page", 8), timeout_s=TIMEOUT_S)

    def test_a_node_that_is_cut_off_from_its_cluster_is_not_asked_again_and_again_who_has_what(self) -> None:
        cut_off, other = free_port(), free_port()
        whole, entry = b"*1\r\n", b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n"
        old = b"*2\r\n" + entry % (0, 16382, cut_off) + entry % (16383, 16383, other)
        down = b"-CLUSTERDOWN The cluster is down\r\n"
        with (
            canned_server([old, down] * 3, port=cut_off),
            canned_server([whole + entry % (0, 16383, other), b":1\r\n"], port=other),
        ):
            tier = RedisTier(f"redis+cluster://127.0.0.1:{cut_off}", slot_bytes=SLOT_BYTES, ttl_s=60)

            with pytest.raises(TierRefused, match="CLUSTERDOWN"):
                tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S)
            assert tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S) == [True]
            tier.close()

    def test_a_slot_on_the_move_is_a_miss_and_not_a_failure(self) -> None:
        slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$0\r\n\r\n:%d\r\n"
        port = free_port()
        with canned_server([slots % port, b"-ASK 1 127.0.0.1:9\r\n", b"-TRYAGAIN no\r\n"], port=port):
            tier = RedisTier(f"redis+cluster://127.0.0.1:{port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            assert tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S) == [False]
            assert fetch(tier, keys_of("page", 1), SLOT_BYTES) == [None]
            tier.close()

    def test_slots_that_keep_moving_end_the_call(self) -> None:
        slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$0\r\n\r\n:%d\r\n"
        port = free_port()
        with canned_server([slots % port, b"-MOVED 1 127.0.0.1:9\r\n"] * 3, port=port):
            tier = RedisTier(f"redis+cluster://127.0.0.1:{port}", slot_bytes=SLOT_BYTES, ttl_s=60)

            with pytest.raises(TierUnavailable, match="moved 3 times"):
                tier.contains(keys_of("page", 1), timeout_s=TIMEOUT_S)


def _owner(node: LocalRedis) -> str:
    (_, _, master, *_), *_ = command(node, "CLUSTER", "SLOTS") or [[0, 0, [b"", 0, b""]]]
    return str(master[2].decode()) if isinstance(master[2], bytes) else str(master[2])


def _is_ok(node: LocalRedis) -> bool:
    info: bytes = command(node, "CLUSTER", "INFO")
    return b"cluster_state:ok" in info

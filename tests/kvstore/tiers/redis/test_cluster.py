"""A real cluster of three masters, in every way in which it may tell where its nodes are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from kvstore.direction import Direction
from kvstore.errors import TierRefused, TierUnavailable
from kvstore.ports import free_port
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_server import NEEDS_OPENSSL, NEEDS_REDIS, command, make_certificate, wait_until

pytestmark = [*NEEDS_REDIS]

SLOT_BYTES = 8192
KEYS = keys_of("page", 40)
SHARED_S = 3.0  # a node that does not answer takes its share
THIRDS = ((0, 5460), (5461, 10922), (10923, 16383))
FIRST, LAST = THIRDS[1]


@contextmanager
def masters(
    *arguments: str, tls: tuple[Path, Path] | None = None, flags: dict[str, str] | None = None
) -> Iterator[list[LocalRedis]]:
    """Three masters with a third of the slots each. flags: of redis-server, set on each once they are up."""
    nodes: list[LocalRedis] = []
    try:
        for first, last in THIRDS:
            bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "5000")
            node = LocalRedis(arguments=(*bus, *arguments), tls_cert=tls and tls[0], tls_key=tls and tls[1])
            nodes.append(node)
            node.start()
            command(node, "CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in nodes[1:]:
            bus_port = node.arguments[node.arguments.index("--cluster-port") + 1]
            command(nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus_port)
        wait_until(lambda: all(is_up(node) for node in nodes), "the cluster is up")
        for name, value in (flags or {}).items():
            for node in nodes:
                command(node, "CONFIG", "SET", name, value)
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def is_up(node: LocalRedis) -> bool:
    info: bytes = command(node, "CLUSTER", "INFO")
    return {b"cluster_state:ok", b"cluster_known_nodes:3", b"cluster_size:3"} <= set(info.split())


def cluster_url(node: LocalRedis, host: str = "127.0.0.1", userinfo: str = "") -> str:
    return f"redis+cluster://{userinfo}{host}:{node.port}"


def open_tier(url: str) -> RedisTier:
    return RedisTier(url, slot_bytes=SLOT_BYTES, ttl_s=600, connect_timeout_s=5.0)


def assert_serves(tier: RedisTier) -> None:
    assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)
    assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
    tier.ping(timeout_s=TIMEOUT_S)
    for way in Direction:
        tier.probe(way, timeout_s=TIMEOUT_S)


def assert_spread(nodes: list[LocalRedis]) -> None:
    assert all(command(node, "DBSIZE") for node in nodes)


@pytest.mark.parametrize("kind", ["ip", "hostname", "unknown-endpoint"])
def test_every_preferred_endpoint_type(kind: str) -> None:
    with (
        masters(flags={"cluster-preferred-endpoint-type": kind}) as nodes,
        closing(open_tier(cluster_url(nodes[0]))) as tier,
    ):
        assert_serves(tier)
        assert_spread(nodes)


def test_announced_names() -> None:
    flags = {"cluster-announce-hostname": "localhost", "cluster-preferred-endpoint-type": "hostname"}
    with masters(flags=flags) as nodes:
        told = lambda: [entry[2][0] for entry in raw_slots(nodes[0])]  # noqa: E731
        wait_until(lambda: told() == [b"localhost"] * 3, "the names are known")
        with closing(open_tier(cluster_url(nodes[0]))) as tier:
            assert_serves(tier)
            assert_spread(nodes)


def raw_slots(node: LocalRedis) -> list[list[list[bytes]]]:
    client = redis.Redis("127.0.0.1", node.port, protocol=2)
    with client:
        client.response_callbacks.pop("CLUSTER SLOTS", None)
        found: list[list[list[bytes]]] = client.execute_command("CLUSTER SLOTS")  # type: ignore[assignment]
        return found


def test_addresses_of_ipv6() -> None:
    with masters("--bind", "127.0.0.1", "::1") as nodes, closing(open_tier(cluster_url(nodes[0], "[::1]"))) as tier:
        for node in nodes:
            command(node, "CONFIG", "SET", "cluster-announce-ip", "::1")
        wait_until(lambda: all(entry[2][0] == b"::1" for entry in raw_slots(nodes[0])), "the addresses are known")
        assert_serves(tier)
        assert_spread(nodes)


@NEEDS_OPENSSL
def test_over_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    tls = ("--tls-cluster", "yes", "--tls-replication", "yes")
    with masters(*tls, tls=(cert, key)) as nodes:
        url = f"rediss+cluster://127.0.0.1:{nodes[0].port}?ssl_ca_certs={cert}"
        with closing(open_tier(url)) as tier:
            assert_serves(tier)
            assert_spread(nodes)


@pytest.mark.parametrize("kind", ["ip", "unknown-endpoint"])  # MOVED 3999 127.0.0.1:7001, and MOVED 3999 :7001
def test_slots_that_move_are_followed_at_once(kind: str) -> None:
    with (
        masters(flags={"cluster-preferred-endpoint-type": kind}) as nodes,
        closing(open_tier(cluster_url(nodes[0]))) as tier,
    ):
        assert_serves(tier)
        old, new = nodes[0], nodes[2]
        for node in nodes:
            command(node, "FLUSHALL")
        ids = [command(node, "CLUSTER", "MYID") for node in nodes]
        moving = {key_slot(tier._names.head(key)) for key in KEYS} & set(range(THIRDS[0][0], THIRDS[0][1] + 1))
        for slot in moving:
            for node in (new, old, nodes[1]):
                command(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[2])

        assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)

        assert command(old, "DBSIZE") == 0
        assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]


def test_one_node_that_refuses_writes_leaves_the_others() -> None:
    with masters() as nodes, closing(open_tier(cluster_url(nodes[0]))) as tier:
        command(nodes[1], "CONFIG", "SET", "min-replicas-to-write", "1")

        stored = store(tier, KEYS, SLOT_BYTES)

        assert 0 < sum(stored) < len(KEYS)
        assert tier.contains(KEYS, timeout_s=TIMEOUT_S) == stored
        assert tier.counters.extra["refused"] == 1
        with pytest.raises(TierRefused, match="NOREPLICAS"):
            tier.probe(Direction.WRITE, timeout_s=TIMEOUT_S)
        tier.probe(Direction.READ, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_one_node_that_is_dead_leaves_the_others(how: str) -> None:
    flags = {"cluster-require-full-coverage": "no"}
    with masters(flags=flags) as nodes, closing(open_tier(cluster_url(nodes[0]))) as tier:
        assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)
        theirs = [FIRST <= key_slot(tier._names.head(key)) <= LAST for key in KEYS]
        assert any(theirs)
        if how == "killed":
            nodes[1].kill()
        else:
            nodes[1].freeze()
        others = [not one for one in theirs]
        read = [None if one else payload(key, SLOT_BYTES) for key, one in zip(KEYS, theirs, strict=True)]

        for _ in range(3):
            assert tier.contains(KEYS, timeout_s=SHARED_S) == others
            assert fetch(tier, KEYS, SLOT_BYTES) == read
            assert store(tier, KEYS, SLOT_BYTES) == others
            tier.ping(timeout_s=SHARED_S)
        gone = [key for key, one in zip(KEYS, theirs, strict=True) if one]
        assert tier.contains(gone, timeout_s=SHARED_S) == [False] * len(gone)  # misses, and no verdict on the tier
        with pytest.raises(TierRefused, match=f":{nodes[1].port}"):
            tier.delete(KEYS, timeout_s=SHARED_S)
        assert tier.contains(KEYS, timeout_s=SHARED_S) == [False] * len(KEYS)

        if how == "killed":
            nodes[1].start()
        else:
            nodes[1].thaw()
            wait_until(lambda: stored_again(tier), "the node is used again")


def stored_again(tier: RedisTier) -> bool:
    return store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)


def test_a_cluster_of_which_no_node_is_reached_is_unavailable() -> None:
    with masters() as nodes, closing(open_tier(cluster_url(nodes[0]))) as tier:
        assert stored_again(tier)
        for node in nodes:
            node.kill()

        with pytest.raises(TierUnavailable):
            tier.contains(KEYS, timeout_s=SHARED_S)
        with pytest.raises(TierUnavailable):
            tier.ping(timeout_s=SHARED_S)


def test_an_account_without_cluster_commands_is_told_which_one_is_missing() -> None:
    with masters() as nodes:
        for node in nodes:
            command(node, "ACL", "SETUSER", "app", "on", ">x", "~*", "+@all", "-cluster")
        with closing(open_tier(cluster_url(nodes[0], userinfo="app:x@"))) as tier:
            with pytest.raises(TierUnavailable, match=r"may not run CLUSTER.*\+cluster\|slots"):
                tier.contains(KEYS, timeout_s=TIMEOUT_S)
            for node in nodes:
                command(node, "ACL", "SETUSER", "app", "+cluster|shards")

            assert_serves(tier)


def test_a_node_of_a_cluster_asked_as_a_single_server_says_so() -> None:
    with (
        masters() as nodes,
        closing(open_tier(f"redis://127.0.0.1:{nodes[0].port}")) as tier,
        pytest.raises(TierUnavailable, match=r"redis\+cluster://"),
    ):
        store(tier, KEYS, SLOT_BYTES)


def test_a_single_server_asked_as_a_cluster_says_so() -> None:
    with (
        LocalRedis() as server,
        closing(open_tier(cluster_url(server))) as tier,
        pytest.raises(TierUnavailable, match="use redis:// for a server that is not a cluster"),
    ):
        tier.contains(KEYS, timeout_s=TIMEOUT_S)

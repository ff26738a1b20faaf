"""A real cluster of three masters, in every way in which it may tell where its nodes are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from kvstore.direction import Direction
from kvstore.errors import TierRefused, TierUnavailable
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis, find_redis_server
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_products import ON_EACH_PRODUCT, Product
from tests.helpers.redis_server import NEEDS_OPENSSL, command, make_certificate
from tests.helpers.redis_slots import move_slot
from tests.helpers.redis_topologies import Servers, cluster
from tests.helpers.waiting import wait_until

pytestmark = ON_EACH_PRODUCT

SLOT_BYTES = 8192
KEYS = keys_of("page", 40)
SHARED_S = 3.0  # a node that does not answer takes its share
FIRST, LAST = 5461, 10922  # slots of the second of three


@contextmanager
def masters(
    *arguments: str, tls: tuple[Path, Path] | None = None, flags: dict[str, str] | None = None
) -> Iterator[list[LocalRedis]]:
    """Three masters with a third of the slots each. flags: of redis-server, set on each once they are up."""
    with cluster(find_redis_server(), *arguments, replicas=0, tls=tls) as servers:
        for name, value in (flags or {}).items():
            servers.on_each("CONFIG", "SET", name, value)
        yield servers.nodes


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


@dataclass(frozen=True, slots=True)
class Form:
    """A way to tell of nodes: settings of each, and the host that clients are told then."""

    settings: dict[str, str]
    told: bytes | None


# By Redis's redis.conf and CLUSTER SLOTS, and Valkey's valkey.conf. The last two are Valkey's, 8.1 and later.
FORMS = {
    "ip": Form({}, b"127.0.0.1"),
    "announced ip": Form({"cluster-announce-ip": "127.0.0.1"}, b"127.0.0.1"),
    "ipv6": Form({"cluster-announce-ip": "::1"}, b"::1"),
    "name": Form(
        {"cluster-announce-hostname": "localhost", "cluster-preferred-endpoint-type": "hostname"}, b"localhost"
    ),
    "name that is not preferred": Form({"cluster-announce-hostname": "localhost"}, b"127.0.0.1"),
    "name that is not set": Form({"cluster-preferred-endpoint-type": "hostname"}, b"?"),
    "unknown": Form({"cluster-preferred-endpoint-type": "unknown-endpoint"}, None),
    "ipv4 for clients": Form({"cluster-announce-client-ipv4": "127.0.0.1", "cluster-announce-ip": "::1"}, b"127.0.0.1"),
    "ipv6 for clients": Form({"cluster-announce-client-ipv6": "::1"}, b"127.0.0.1"),
}
# The others are empty. An address that is not announced any more is kept by those who have heard it.
DEFAULTS = {"cluster-preferred-endpoint-type": "ip", "cluster-announce-ip": "127.0.0.1"}
OTHER_HOSTS = [pytest.param(host, marks=pytest.mark.slow) for host in ("localhost", "[::1]")]


@pytest.fixture(scope="module")
def both_stacks(product: Product) -> Iterator[Servers]:
    """A cluster that listens at IPv4 and IPv6."""
    with cluster(product.binary, "--bind", "127.0.0.1", "::1", replicas=0) as servers:
        yield servers


@pytest.fixture
def told_as(both_stacks: Servers, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Its nodes, told of in a form."""
    form: Form = FORMS[request.param]
    try:
        for name, value in form.settings.items():
            both_stacks.on_each("CONFIG", "SET", name, value)
    except redis.exceptions.ResponseError as error:
        pytest.skip(f"this server has no such form: {error}")
    told = lambda: {entry[2][0] for node in both_stacks.nodes for entry in raw_slots(node)}  # noqa: E731
    wait_until(lambda: told() == {form.told}, lambda: f"told is {told()}", poll_s=0.1)
    both_stacks.on_each("FLUSHALL")
    yield both_stacks
    for name in form.settings:
        both_stacks.on_each("CONFIG", "SET", name, DEFAULTS.get(name, ""))


@pytest.mark.parametrize("host", ["127.0.0.1", *OTHER_HOSTS])
@pytest.mark.parametrize("told_as", FORMS, indirect=True)
def test_nodes_are_found_however_they_are_told_of(told_as: Servers, host: str) -> None:
    for node in told_as.nodes:  # each of them alone is enough
        command(node, "FLUSHALL")
        with closing(open_tier(cluster_url(node, host))) as tier:
            assert_serves(tier)
    assert_spread(told_as.nodes)


@pytest.mark.parametrize("told_as", FORMS, indirect=True)  # MOVED 3999 127.0.0.1:7001, ::1:7001, localhost:7001, :7001
def test_slots_that_move_are_followed_at_once(told_as: Servers) -> None:
    nodes = told_as.nodes
    with closing(open_tier(cluster_url(nodes[0]))) as tier:
        assert_serves(tier)
        told_as.on_each("FLUSHALL")
        port_of: dict[int, object] = {}
        for first, last, (_, port, *_), *_ in raw_slots(nodes[0]):  # type: ignore[misc]
            port_of |= dict.fromkeys(range(int(first), int(last) + 1), port)  # type: ignore[call-overload]
        slots = {key_slot(tier._names.head(key)) for key in KEYS}
        old = next(node for node in nodes if any(port_of[slot] == node.port for slot in slots))
        new = next(node for node in nodes if node is not old)
        for slot in (slot for slot in slots if port_of[slot] == old.port):
            move_slot(slot, old, new, nodes)

        assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)

        assert tier.counters.extra["redirects"] > 0
        assert command(old, "DBSIZE") == 0
        assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]


def raw_slots(node: LocalRedis) -> list[list[list[bytes]]]:
    client = redis.Redis("127.0.0.1", node.port, protocol=2)
    with client:
        client.response_callbacks.pop("CLUSTER SLOTS", None)
        found: list[list[list[bytes]]] = client.execute_command("CLUSTER SLOTS")  # type: ignore[assignment]
        return found


@NEEDS_OPENSSL
def test_over_tls(product: Product, tmp_path: Path) -> None:
    product.need_tls()
    cert, key = make_certificate(tmp_path)
    with masters(tls=(cert, key)) as nodes:
        url = f"rediss+cluster://127.0.0.1:{nodes[0].port}?ssl_ca_certs={cert}"
        with closing(open_tier(url)) as tier:
            assert_serves(tier)
            assert_spread(nodes)


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

"""All servers of a deployment struck at once: a right page, a miss or an error in time, and service afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from kvstore.errors import TierUnavailable
from kvstore.page import PageMeta
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, slots, store
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.proxy import Fault, Proxy
from tests.helpers.redis_products import find_product
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.redis_topologies import Servers, topology
from tests.helpers.waiting import wait_until

pytestmark = NEEDS_REDIS
SLOT_BYTES = 64 << 10
KEYS = keys_of("page", 12)
SHORT_S = 0.3
# Far above SHORT_S and far below TIMEOUT_S: tells a kept deadline from a hang, also on a busy machine.
IN_TIME_S = 10.0
DEPLOYED = [
    ("redis", "sentinel"),
    ("redis", "cluster"),
    pytest.param(("valkey", "sentinel"), marks=pytest.mark.slow),
    ("valkey", "cluster"),
]


@pytest.fixture(scope="module", params=DEPLOYED, ids="-".join)
def deployed(request: pytest.FixtureRequest) -> Iterator[Servers]:
    product, kind = request.param
    with topology(kind, find_product(product).binary) as servers:
        yield servers


@pytest.fixture
def servers(deployed: Servers) -> Servers:
    deployed.flush()
    return deployed


@pytest.fixture
def tier(servers: Servers) -> Iterator[RedisTier]:
    with closing(RedisTier(servers.url, slot_bytes=SLOT_BYTES, ttl_s=3600, connect_timeout_s=5.0)) as tier:
        yield tier


def serves(tier: RedisTier) -> bool:
    """Whether all of it is stored and read."""
    return store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS) and fetch(tier, KEYS, SLOT_BYTES) == right(KEYS)


def right(keys: list[bytes]) -> list[bytes | None]:
    return [payload(key, SLOT_BYTES) for key in keys]  # type: ignore[arg-type]


def try_all(tier: RedisTier, timeout_s: float) -> None:
    """Every call ends in time, with a right answer or an error."""
    views = slots(len(KEYS), SLOT_BYTES)
    metas = [PageMeta(SLOT_BYTES)] * len(KEYS)
    calls = (
        lambda: tier.contains(KEYS, timeout_s=timeout_s),
        lambda: tier.read_into(KEYS, views, metas, timeout_s=timeout_s),
        lambda: tier.write_from(KEYS, slots(len(KEYS), SLOT_BYTES), metas, timeout_s=timeout_s),
        lambda: tier.touch(KEYS, expires_at=0.0, timeout_s=timeout_s),
        lambda: tier.delete(KEYS, timeout_s=timeout_s),
        lambda: tier.ping(timeout_s=timeout_s),
    )
    for number, call in enumerate(calls):
        started = time.monotonic()
        with pytest.raises(TierUnavailable):
            call()
        assert time.monotonic() - started < IN_TIME_S, number


def test_frozen_then_thawed(servers: Servers, tier: RedisTier) -> None:
    assert serves(tier)

    servers.freeze()
    try:
        try_all(tier, SHORT_S)
    finally:
        servers.thaw()

    wait_until(lambda: _without_error(tier), "it serves again")
    assert tier.counters.corrupt_pages == 0


def test_frozen_before_the_first_connection(servers: Servers, tier: RedisTier) -> None:
    servers.freeze()
    try:
        try_all(tier, SHORT_S)
    finally:
        servers.thaw()

    wait_until(lambda: _without_error(tier), "it serves again")


def test_flushed_pages_are_misses(servers: Servers, tier: RedisTier) -> None:
    assert serves(tier)

    servers.flush()

    assert tier.contains(KEYS, timeout_s=TIMEOUT_S) == [False] * len(KEYS)
    assert fetch(tier, KEYS, SLOT_BYTES) == [None] * len(KEYS)
    assert serves(tier)
    assert tier.counters.extra["failures"] == 0


def test_clients_thrown_out_between_two_calls_are_no_failure(servers: Servers, tier: RedisTier) -> None:
    assert serves(tier)

    servers.on_each("CLIENT", "KILL", "TYPE", "normal")

    assert serves(tier)
    assert tier.counters.extra["failures"] == 0


def test_servers_that_are_full_take_no_page_and_keep_what_they_have(servers: Servers, tier: RedisTier) -> None:
    assert serves(tier)
    servers.on_each("CONFIG", "SET", "maxmemory-policy", "noeviction")
    servers.on_each("CONFIG", "SET", "maxmemory", 1 << 20)
    try:
        assert store(tier, keys_of("next", 12), SLOT_BYTES) == [False] * 12
        assert fetch(tier, KEYS, SLOT_BYTES) == right(KEYS)
        assert tier.counters.extra["oom_replies"] > 0
    finally:
        servers.on_each("CONFIG", "SET", "maxmemory", 256 << 20)
        servers.on_each("CONFIG", "SET", "maxmemory-policy", "allkeys-lfu")

    assert store(tier, keys_of("next", 12), SLOT_BYTES) == [True] * 12


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.STALL, Fault.TRICKLE, Fault.GARBLE])
@pytest.mark.parametrize("after_bytes", [0, 100, SLOT_BYTES + 100])
def test_a_network_that_fails_in_the_middle_of_replies(servers: Servers, fault: Fault, after_bytes: int) -> None:
    with ExitStack() as stack:
        proxies = {node.port: stack.enter_context(Proxy(node.port)) for node in servers.nodes}
        tier = stack.enter_context(closing(behind(proxies, servers)))
        assert serves(tier)
        for proxy in proxies.values():
            proxy.arm(fault, after_bytes=after_bytes)

        started = time.monotonic()
        views = slots(len(KEYS), SLOT_BYTES)
        try:
            found = tier.read_into(KEYS, views, [PageMeta(SLOT_BYTES)] * len(KEYS), timeout_s=SHORT_S)
        except TierUnavailable:
            found = [False] * len(KEYS)
        assert time.monotonic() - started < IN_TIME_S
        assert all(not ok or view == payload(key, SLOT_BYTES) for ok, view, key in zip(found, views, KEYS, strict=True))
        assert not all(found)

        # The late rest of those replies must not be taken for the answers to these calls.
        for proxy in proxies.values():
            proxy.arm(Fault.NONE)
        wait_until(lambda: _without_error(tier), "it serves again")


def test_killed_then_started_again(servers: Servers, tier: RedisTier) -> None:
    assert serves(tier)

    servers.kill()
    try_all(tier, TIMEOUT_S)
    servers.start()

    wait_until(lambda: _without_error(tier), "it serves again")


def behind(proxies: dict[int, Proxy], servers: Servers) -> RedisTier:
    """A tier that reaches every node by its proxy, whatever address it was told."""
    tier = RedisTier(servers.url, slot_bytes=SLOT_BYTES, ttl_s=3600, connect_timeout_s=5.0)
    route: object = tier._route
    dialer = getattr(route, "_dialer", None) or route._node._connect.__self__._dialer  # type: ignore[attr-defined]
    dial = dialer.dial

    def by_proxy(address: tuple[str, int], deadline: float, **changes: object) -> object:
        host, port = address
        return dial((host, proxies[port].port if port in proxies else port), deadline, **changes)

    dialer.dial = by_proxy
    return tier


def _without_error(tier: RedisTier) -> bool:
    try:
        return serves(tier)
    except TierUnavailable:
        return False

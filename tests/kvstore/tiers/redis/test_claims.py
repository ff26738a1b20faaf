"""Claims in a real Redis: who computes what, between machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from kvstore.errors import TierError, TierRefused
from kvstore.testing.pages import TIMEOUT_S, keys_of
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.base import Claimable
from kvstore.tiers.redis.claims import KEYS_AT_ONCE
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_products import ON_EACH_PRODUCT, Product
from tests.helpers.redis_server import cluster_nodes

pytestmark = ON_EACH_PRODUCT
A, B = b"machine a", b"machine b"
LEASE_S = 60.0


@pytest.fixture(scope="module", params=["single", "cluster"])
def server(request: pytest.FixtureRequest, product: Product) -> Iterator[tuple[str, Any]]:
    """A URL, and a client past the tier."""
    with cluster_nodes(1) if request.param == "cluster" else _one() as (node,):
        scheme = "redis+cluster" if request.param == "cluster" else "redis"
        client: Any = node.client()
        client.ping()  # connects now, so that the connection is the fixture's and not a test's
        yield f"{scheme}://127.0.0.1:{node.port}", client


@contextmanager
def _one() -> Iterator[list[LocalRedis]]:
    with LocalRedis() as server:
        yield [server]


@pytest.fixture
def client(server: tuple[str, Any]) -> Any:
    server[1].flushall()
    return server[1]


@pytest.fixture
def tier(server: tuple[str, Any], client: Any) -> Iterator[RedisTier]:
    with closing(RedisTier(server[0], prefix="kv-test", slot_bytes=8192, ttl_s=3600)) as tier:
        yield tier


def claim(tier: RedisTier, keys: Any, token: bytes, lease_s: float = LEASE_S) -> list[bool]:
    return tier.claim(keys, token=token, lease_s=lease_s, timeout_s=TIMEOUT_S)


def test_redis_takes_claims(tier: RedisTier) -> None:
    assert isinstance(tier, Claimable)


def test_of_two_claims_the_first_is_held(tier: RedisTier) -> None:
    keys = keys_of("claim", 4)

    assert claim(tier, keys, A) == [True] * 4
    assert claim(tier, keys, B) == [False] * 4


def test_who_is_refused_at_the_first_key_holds_none_behind_it(tier: RedisTier, client: Any) -> None:
    keys = keys_of("claim", 4)
    claim(tier, keys[:1], A)

    assert claim(tier, keys, B) == [False] * 4
    assert client.dbsize() == 1


def test_who_holds_the_first_keeps_out_of_what_others_hold_behind_it(tier: RedisTier) -> None:
    keys = keys_of("claim", 4)
    claim(tier, keys[2:3], A)

    assert claim(tier, keys, B) == [True, True, False, True]


def test_a_claim_ends_by_itself(tier: RedisTier, client: Any) -> None:
    keys = keys_of("claim", 3)
    claim(tier, keys, A, lease_s=7.0)

    assert all(0 < client.pttl(name) <= 7000 for name in client.keys("*"))


def test_claiming_again_renews_it(tier: RedisTier, client: Any) -> None:
    keys = keys_of("claim", 3)
    claim(tier, keys, A, lease_s=1.0)

    assert claim(tier, keys, A) == [True] * 3
    assert all(client.pttl(name) > 50_000 for name in client.keys("*"))


def test_only_the_own_claims_are_given_back(tier: RedisTier, client: Any) -> None:
    keys = keys_of("claim", 4)
    claim(tier, keys[:2], A)
    claim(tier, keys[2:], B)

    tier.unclaim(keys, token=A, timeout_s=TIMEOUT_S)

    assert client.dbsize() == 2
    assert claim(tier, keys[:2], B) == [True] * 2


def test_a_claim_is_no_page(tier: RedisTier) -> None:
    keys = keys_of("claim", 4)
    claim(tier, keys, A)

    assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False] * 4


def test_a_long_path_is_claimed_whole(tier: RedisTier, client: Any) -> None:
    keys = keys_of("claim", KEYS_AT_ONCE + 100)

    assert claim(tier, keys, A) == [True] * len(keys)
    assert claim(tier, keys, B) == [False] * len(keys)
    tier.unclaim(keys, token=A, timeout_s=TIMEOUT_S)
    assert client.dbsize() == 0


def test_a_server_that_takes_no_claims_still_takes_pages(server: tuple[str, Any], client: Any) -> None:
    client.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-eval"])
    url = server[0].replace("://", "://reader:x@")
    with closing(RedisTier(url, prefix="kv-test", slot_bytes=8192, ttl_s=3600)) as tier:
        with pytest.raises(TierError, match="takes no claims") as refused:
            claim(tier, keys_of("claim", 2), A)

        assert isinstance(refused.value, TierRefused)
        assert tier.contains(keys_of("claim", 2), timeout_s=TIMEOUT_S) == [False] * 2

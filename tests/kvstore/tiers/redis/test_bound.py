"""Redis with a bound: the least recently used pages of all writers leave, and the ledger is never the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.page import PageKey, PageMeta
from kvstore.testing.pages import TIMEOUT_S, FakeClock, fetch, filled, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.base import Tier
from kvstore.tiers.redis.bound import BoundedRedis
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_contract import RedisContract, opened
from tests.helpers.redis_medium import Medium
from tests.helpers.redis_products import Product
from tests.helpers.redis_server import cluster_nodes

SLOT_BYTES = 8192
PREFIX = "kv-test:"
TTL_S = 3600.0


SLOW = [pytest.param(f"valkey-{kind}", marks=pytest.mark.slow) for kind in ("single", "cluster")]
ON = ["redis-single", "redis-cluster", *SLOW]


@pytest.fixture(scope="module", params=ON)
def medium(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    with opened(request.param, tmp_path_factory) as medium:
        yield medium


@pytest.mark.usefixtures("medium")
class TestBoundedRedis(RedisContract):
    """The contract holds with a bound that is far."""

    @pytest.fixture
    def tier(self, clock: FakeClock, request: pytest.FixtureRequest) -> Iterator[Tier]:
        self.raw: Medium = request.getfixturevalue("medium")
        self.raw.flush()
        with closing(bounded(self.raw.url, 10_000, clock)) as tier:
            yield tier


@pytest.fixture(scope="module")
def server(product: Product) -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def client(server: LocalRedis) -> Iterator[Any]:
    client = server.client()
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def tier(server: LocalRedis, client: Any, clock: FakeClock) -> Iterator[BoundedRedis]:
    with closing(bounded(server.url, 8, clock)) as tier:
        yield tier


def bounded(url: str, capacity_pages: int, clock: FakeClock, prefix: str = PREFIX) -> BoundedRedis:
    tier = RedisTier(url, prefix=prefix, slot_bytes=SLOT_BYTES, ttl_s=TTL_S, now=clock)
    return BoundedRedis(tier, capacity_pages, ttl_s=TTL_S, now=clock)


def put(tier: Tier, keys: Sequence[PageKey]) -> list[bool]:
    """Write pages as one path, root first."""
    metas = [PageMeta(SLOT_BYTES, depth=depth) for depth in range(len(keys))]
    return tier.write_from(keys, filled(keys, SLOT_BYTES), metas, timeout_s=TIMEOUT_S)


def there(tier: Tier, keys: Sequence[PageKey]) -> list[bool]:
    return tier.contains(keys, timeout_s=TIMEOUT_S)


def test_the_least_recently_used_path_leaves_first_and_its_leaves_before_its_root(
    tier: BoundedRedis, clock: FakeClock
) -> None:
    old, new = keys_of("old", 5), keys_of("new", 5)
    put(tier, old)
    clock.advance(1)

    assert put(tier, new) == [True] * 5

    assert there(tier, old) == [True, True, True, False, False]
    assert fetch(tier, new, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in new]
    assert tier.counters.extra["bound_evictions"] == 2


def test_what_was_touched_stays(tier: BoundedRedis, clock: FakeClock) -> None:
    first, second, third = keys_of("first", 4), keys_of("second", 4), keys_of("third", 4)
    put(tier, first)
    clock.advance(1)
    put(tier, second)
    clock.advance(1)
    assert tier.touch(first, expires_at=0.0, timeout_s=TIMEOUT_S) == [True] * 4
    clock.advance(1)

    put(tier, third)

    assert there(tier, first) == [True] * 4
    assert there(tier, second) == [False] * 4


def test_all_writers_share_the_bound_and_other_namespaces_have_their_own(
    tier: BoundedRedis, server: LocalRedis, client: Any, clock: FakeClock
) -> None:
    with closing(bounded(server.url, 8, clock)) as second, closing(bounded(server.url, 8, clock, "other:")) as other:
        for turn in range(6):
            clock.advance(1)
            put(tier, keys_of(f"one {turn}", 3))
            put(second, keys_of(f"two {turn}", 3))
            put(other, keys_of(f"other {turn}", 2))

    assert client.zcard(PREFIX + "ledger") == 8
    assert len({key[: len(PREFIX) + 36] for key in client.keys(PREFIX + "*")} - {PREFIX.encode() + b"ledger"}) == 8
    assert client.zcard("other:ledger") == 8


def test_of_a_batch_larger_than_the_bound_the_head_is_written(tier: BoundedRedis) -> None:
    keys = keys_of("long", 12)

    assert put(tier, keys) == [True] * 8 + [False] * 4
    assert there(tier, keys) == [True] * 8 + [False] * 4


def test_expired_and_deleted_pages_leave_the_ledger(tier: BoundedRedis, client: Any, clock: FakeClock) -> None:
    put(tier, keys_of("old", 6))
    clock.advance(TTL_S + 1)
    new = keys_of("new", 3)
    put(tier, new)
    assert client.zcard(PREFIX + "ledger") == 3
    assert 0 < client.pttl(PREFIX + "ledger") <= TTL_S * 1000

    tier.delete(new[:2], timeout_s=TIMEOUT_S)

    assert client.zcard(PREFIX + "ledger") == 1


def test_after_the_clock_was_set_back_new_pages_have_room_and_old_ones_leave(
    tier: BoundedRedis, client: Any, clock: FakeClock
) -> None:
    old = keys_of("old", 8)
    put(tier, old)
    clock.advance(-7 * 86_400.0)

    assert put(tier, keys_of("new", 4)) == [True] * 4
    clock.advance(1)
    assert put(tier, keys_of("newer", 4)) == [True] * 4

    assert there(tier, keys_of("new", 4)) == there(tier, keys_of("newer", 4)) == [True] * 4
    assert client.zcard(PREFIX + "ledger") == 8


def test_a_ledger_that_is_gone_begins_anew_with_what_is_used(tier: BoundedRedis, client: Any) -> None:
    keys = keys_of("page", 4)
    put(tier, keys)
    client.delete(PREFIX + "ledger")

    tier.touch(keys, expires_at=0.0, timeout_s=TIMEOUT_S)

    assert client.zcard(PREFIX + "ledger") == 4
    assert client.pttl(PREFIX + "ledger") > 0


def test_pages_that_are_gone_are_struck_out_when_they_are_touched(tier: BoundedRedis, client: Any) -> None:
    keys = keys_of("page", 4)
    put(tier, keys)
    for name in client.keys(PREFIX + "*"):
        if name != PREFIX.encode() + b"ledger":
            client.delete(name)

    assert tier.touch(keys, expires_at=0.0, timeout_s=TIMEOUT_S) == [False] * 4

    assert client.zcard(PREFIX + "ledger") == 0


def test_sweep_deletes_all_under_the_prefix_and_nothing_else(server: LocalRedis, client: Any, clock: FakeClock) -> None:
    client.set("kv[1]", "somebody's")
    client.set("kv1*:", "somebody else's")
    with closing(bounded(server.url, 5000, clock, "kv[1]*:")) as tier, closing(bounded(server.url, 9, clock)) as other:
        for batch in range(12):
            store(tier, keys_of(f"page {batch}", 100), SLOT_BYTES)
        store(other, keys_of("page", 5), SLOT_BYTES)

        assert tier.sweep(timeout_s=60.0) >= 1200

        assert not any(there(tier, keys_of("page 3", 100)))
        assert there(other, keys_of("page", 5)) == [True] * 5
        assert client.exists("kv[1]", "kv1*:") == 2
        assert tier.sweep(timeout_s=60.0) == 0


def test_sweep_walks_all_nodes_of_a_cluster(product: Product, clock: FakeClock) -> None:
    with cluster_nodes(2) as (first, _), closing(bounded(f"redis+cluster://127.0.0.1:{first.port}", 99, clock)) as tier:
        keys = keys_of("page", 20)
        assert store(tier, keys, SLOT_BYTES) == [True] * 20

        assert tier.sweep(timeout_s=60.0) >= 21

        assert there(tier, keys) == [False] * 20


def test_claims_pass_and_are_not_counted(tier: BoundedRedis, server: LocalRedis, client: Any, clock: FakeClock) -> None:
    keys = keys_of("page", 3)
    with closing(bounded(server.url, 8, clock)) as other:
        assert tier.claim(keys, token=b"a" * 16, lease_s=60, timeout_s=TIMEOUT_S) == [True] * 3
        assert other.claim(keys, token=b"b" * 16, lease_s=60, timeout_s=TIMEOUT_S) == [False] * 3
        tier.unclaim(keys, token=b"a" * 16, timeout_s=TIMEOUT_S)
        assert other.claim(keys, token=b"b" * 16, lease_s=60, timeout_s=TIMEOUT_S) == [True] * 3
    assert client.zcard(PREFIX + "ledger") == 0


def test_a_bound_below_a_page_is_refused() -> None:
    tier = RedisTier("redis://h", prefix=PREFIX, slot_bytes=SLOT_BYTES, ttl_s=TTL_S)
    with pytest.raises(ConfigError, match=r"redis\.capacity_bytes holds 0 pages"):
        BoundedRedis(tier, 0, ttl_s=TTL_S)

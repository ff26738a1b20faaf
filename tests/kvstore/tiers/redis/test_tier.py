from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from kvstore.codecs.coder import PageCoder
from kvstore.errors import ConfigError
from kvstore.page import PageKey, PageMeta
from kvstore.testing.pages import TIMEOUT_S, FakeClock, fetch, filled, key_of, keys_of, payload, slots, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_medium import Medium
from tests.helpers.redis_products import ON_EACH_PRODUCT, Product
from tests.helpers.redis_server import NEEDS_OPENSSL, make_certificate
from tests.helpers.waiting import wait_until

SLOT_BYTES = 8192
MiB = 1 << 20
PREFIX = "kv-test"


@pytest.fixture(scope="module")
def tls_medium(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    product.need_tls()
    cert, key = make_certificate(tmp_path_factory.mktemp("tls"))
    with (
        LocalRedis(tls_cert=cert, tls_key=key, password="secret") as server,
        closing(Medium([server], server.url)) as medium,
    ):
        yield medium


def bfloat16_page(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that a codec for bfloat16 can shrink."""
    elements = np.random.default_rng(seed).normal(size=num_bytes // 2).astype("<f4").view("<u4") >> 16
    return elements.astype("<u2").tobytes()


@pytest.fixture(scope="module")
def server(product: Product) -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def medium(server: LocalRedis) -> Iterator[Medium]:
    with closing(Medium([server], server.url)) as medium:
        medium.flush()
        yield medium


def make_tier(medium: Medium, slot_bytes: int = SLOT_BYTES, **changes: Any) -> RedisTier:
    arguments: dict[str, Any] = {"prefix": PREFIX, "slot_bytes": slot_bytes, "ttl_s": 3600, **changes}
    return RedisTier(medium.url, **arguments)


@pytest.fixture
def tier(medium: Medium) -> Iterator[RedisTier]:
    with closing(make_tier(medium)) as tier:
        yield tier


class TestConstruction:
    def test_no_server_is_needed(self) -> None:
        tier = RedisTier("redis://:secret@192.0.2.1:1/0", slot_bytes=SLOT_BYTES, ttl_s=60)

        assert (tier.name, tier.capacity_pages, tier.url) == ("redis", None, "redis://:***@192.0.2.1:1/0")
        assert list(tier.scan()) == []
        tier.close()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prefix": "a{b"}, r"redis\.prefix is 'a\{b'; it must be ASCII without braces"),
            ({"prefix": "é"}, r"redis\.prefix"),
            ({"ttl_s": -1}, r"redis\.ttl_s is -1; it must be positive, or 0 for never"),
            ({"connections": 0}, r"redis\.connections is 0; it must be at least 1"),
            ({"connect_timeout_s": 0}, r"redis\.connect_timeout_s is 0; it must be positive"),
            ({"slot_bytes": 0}, "slot_bytes is 0"),
            ({"slot_bytes": 1 << 30}, "from 1 to about 500 MiB"),
        ],
    )
    def test_a_wrong_value_names_the_field_and_what_would_be_right(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RedisTier("redis://h", **{"slot_bytes": SLOT_BYTES, "ttl_s": 60, **changes})


class TestPages:
    pytestmark = ON_EACH_PRODUCT

    @pytest.mark.parametrize("num_bytes", [256 << 10, MiB, 1474560, 2 * MiB, 4 * MiB, 9 * MiB])
    @pytest.mark.parametrize("kind", ["tcp", "unix"])
    def test_pages_of_every_size_read_back_the_same(self, medium: Medium, num_bytes: int, kind: str) -> None:
        medium.url = medium.server.url if kind == "tcp" else medium.server.unix_url
        keys = keys_of("page", 2)
        with closing(make_tier(medium, num_bytes)) as tier:
            assert store(tier, keys, num_bytes) == [True, True]

            assert fetch(tier, keys, num_bytes) == [payload(key, num_bytes) for key in keys]
            tier.delete(keys, timeout_s=TIMEOUT_S)
            assert medium.client.dbsize() == 0

    @pytest.mark.parametrize("num_bytes", [256 << 10, MiB, 1474560, 2 * MiB, 4 * MiB])
    def test_the_server_spends_hardly_more_than_the_page(self, medium: Medium, num_bytes: int) -> None:
        key = key_of("page")
        with closing(make_tier(medium, num_bytes)) as tier:
            store(tier, [key], num_bytes)

        used = sum(medium.client.memory_usage(name) for name in medium.names(key))
        assert used / num_bytes < 1 + 1 / 32 + 1024 / num_bytes
        # What the cut is for: a power of two in one piece takes a block a quarter larger.
        medium.client.set("whole", bytes(num_bytes + 128))
        if num_bytes & (num_bytes - 1) == 0 and "jemalloc" in medium.client.info("memory")["mem_allocator"]:
            assert medium.client.memory_usage("whole") / num_bytes > 1.2

    def test_all_parts_of_a_large_page_are_verified(self, medium: Medium) -> None:
        num_bytes, key = 9 * MiB, key_of("page")
        with closing(make_tier(medium, num_bytes)) as tier:
            store(tier, [key], num_bytes)
            names = medium.names(key)
            assert len(names) == 5

            for i, name in enumerate(names):
                medium.flip(name, medium.client.strlen(name) // 2, 3)
                assert fetch(tier, [key], num_bytes) == [None]
                assert tier.counters.corrupt_pages == i + 1
                assert medium.names(key) == []
                store(tier, [key], num_bytes)

    def test_a_codec_shrinks_what_is_stored_and_every_tier_can_read_it(self, medium: Medium) -> None:
        key, num_bytes = key_of("page"), 256 << 10
        data = bfloat16_page(num_bytes)
        view = slots(1, num_bytes)
        view[0][:] = data
        with (
            closing(make_tier(medium, num_bytes, coder=PageCoder("lossless"))) as packing,
            closing(make_tier(medium, num_bytes)) as plain,
        ):
            assert packing.write_from([key], view, [PageMeta(num_bytes)], timeout_s=TIMEOUT_S) == [True]

            assert sum(medium.client.strlen(name) for name in medium.names(key)) < 0.8 * num_bytes
            assert fetch(packing, [key], num_bytes) == [data]
            assert fetch(plain, [key], num_bytes) == [data]

    def test_every_flipped_bit_of_an_encoded_page_is_found(self, medium: Medium) -> None:
        key, meta = key_of("page"), PageMeta(1024)
        view = slots(1, SLOT_BYTES)
        view[0][:1024] = bfloat16_page(1024)
        with closing(make_tier(medium, coder=PageCoder("lossless"))) as tier:
            tier.write_from([key], view, [meta], timeout_s=TIMEOUT_S)
            (name,) = medium.names(key)
            stored = medium.client.get(name)

            for position in range(len(stored)):
                medium.client.set(name, stored)
                medium.flip(name, position, position % 8)

                assert fetch(tier, [key], SLOT_BYTES, meta=meta) == [None], position
                assert tier.counters.corrupt_pages == position + 1

    @NEEDS_OPENSSL
    def test_tls_and_plain_connections_give_the_same_bytes(self, tls_medium: Medium) -> None:
        keys, num_bytes = keys_of("page", 3), 2 * MiB
        with (
            closing(Medium([tls_medium.server], tls_medium.server.unix_url)) as plain_medium,
            closing(make_tier(tls_medium, num_bytes)) as over_tls,
            closing(make_tier(plain_medium, num_bytes)) as plain,
        ):
            assert store(over_tls, keys, num_bytes) == [True] * 3

            assert fetch(over_tls, keys, num_bytes) == [payload(key, num_bytes) for key in keys]
            assert fetch(plain, keys, num_bytes) == [payload(key, num_bytes) for key in keys]


class TestSharedServer:
    pytestmark = ON_EACH_PRODUCT

    def test_another_prefix_sees_nothing(self, medium: Medium, tier: RedisTier) -> None:
        key = key_of("page")
        store(tier, [key], SLOT_BYTES)

        with closing(make_tier(medium, prefix="other")) as other:
            assert other.contains([key], timeout_s=TIMEOUT_S) == [False]

    def test_replicas_share_pages(self, medium: Medium, tier: RedisTier) -> None:
        key = key_of("page")
        store(tier, [key], SLOT_BYTES)

        with closing(make_tier(medium)) as other:
            assert fetch(other, [key], SLOT_BYTES) == [payload(key, SLOT_BYTES)]

    def test_pages_that_are_there_are_not_sent_again(self, medium: Medium, tier: RedisTier) -> None:
        keys = keys_of("page", 4)
        store(tier, keys, SLOT_BYTES)
        before = medium.client.info("stats")["total_net_input_bytes"]

        assert store(tier, keys, SLOT_BYTES, version=1) == [True] * 4

        assert medium.client.info("stats")["total_net_input_bytes"] - before < SLOT_BYTES

    def test_two_writers_at_once_leave_one_whole_page(self, medium: Medium) -> None:
        keys, num_bytes = keys_of("page", 20), 64 << 10
        with closing(make_tier(medium, num_bytes)) as tier:
            threads = [
                threading.Thread(target=store, args=(tier, keys, num_bytes), kwargs={"version": version})
                for version in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

            for key, data in zip(keys, fetch(tier, keys, num_bytes), strict=True):
                assert data in [payload(key, num_bytes, version) for version in range(3)]
            assert tier.counters.corrupt_pages == 0

    def test_a_page_that_lost_a_part_is_a_miss_and_its_rest_is_deleted(self, medium: Medium, tier: RedisTier) -> None:
        keys = keys_of("page", 2)
        for lost in (0, 1):
            store(tier, keys, SLOT_BYTES)
            medium.client.delete(medium.names(keys[0])[lost])

            assert fetch(tier, keys, SLOT_BYTES) == [None, payload(keys[1], SLOT_BYTES)]

            assert medium.names(keys[0]) == []
            assert (tier.counters.lost_pages, tier.counters.corrupt_pages) == (lost + 1, 0)

    def test_a_corrupt_page_that_was_replaced_meanwhile_is_kept(
        self, medium: Medium, tier: RedisTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = key_of("page")
        store(tier, [key], SLOT_BYTES)
        medium.flip(medium.names(key)[0], 200, 0)
        drop = tier._drop_unchanged

        def replace_then_drop(*args: Any) -> None:
            with closing(make_tier(medium)) as other:
                other.delete([key], timeout_s=TIMEOUT_S)
                store(other, [key], SLOT_BYTES, version=1)
            drop(*args)

        monkeypatch.setattr(tier, "_drop_unchanged", replace_then_drop)

        assert fetch(tier, [key], SLOT_BYTES) == [None]
        assert fetch(tier, [key], SLOT_BYTES) == [payload(key, SLOT_BYTES, version=1)]


class TestTime:
    pytestmark = ON_EACH_PRODUCT

    def lives_for(self, medium: Medium, key: PageKey) -> list[int]:
        """Seconds left for each part, rounded; -1 for ever."""
        return [round(left / 1000) if left > 0 else left for left in map(medium.client.pttl, medium.names(key))]

    def test_the_sooner_of_ttl_and_deadline_counts(self, medium: Medium) -> None:
        clock = FakeClock()
        near, far, none = keys_of("page", 3)
        with closing(make_tier(medium, ttl_s=600, now=clock)) as tier:
            store(tier, [near], SLOT_BYTES, meta=PageMeta(SLOT_BYTES, expires_at=clock() + 60))
            store(tier, [far], SLOT_BYTES, meta=PageMeta(SLOT_BYTES, expires_at=clock() + 6000))
            store(tier, [none], SLOT_BYTES)

        assert [self.lives_for(medium, key) for key in (near, far, none)] == [[60, 60], [600, 600], [600, 600]]

    def test_touch_sets_a_deadline_no_later_than_the_ttl_and_without_one_leaves_it(self, medium: Medium) -> None:
        clock = FakeClock()
        key = key_of("page")
        with closing(make_tier(medium, ttl_s=600, now=clock)) as tier:
            store(tier, [key], SLOT_BYTES)
            medium.pass_time(30)
            seen = []
            for expires_at in (0.0, clock() + 60, 0.0, clock() + 6000):
                assert tier.touch([key], expires_at=expires_at, timeout_s=TIMEOUT_S) == [True]
                seen.append(self.lives_for(medium, key))

        assert seen == [[570, 570], [60, 60], [60, 60], [600, 600]]

    def test_touch_with_a_deadline_in_the_past_ends_the_page(self, medium: Medium) -> None:
        clock = FakeClock()
        key = key_of("page")
        with closing(make_tier(medium, now=clock)) as tier:
            store(tier, [key], SLOT_BYTES)

            assert tier.touch([key], expires_at=clock() - 1, timeout_s=TIMEOUT_S) == [False]

        assert medium.names(key) == []

    def test_without_a_ttl_pages_stay_until_their_own_deadline_or_for_ever(self, medium: Medium) -> None:
        clock = FakeClock()
        own, none = keys_of("page", 2)
        with closing(make_tier(medium, ttl_s=0, now=clock)) as tier:
            store(tier, [own], SLOT_BYTES, meta=PageMeta(SLOT_BYTES, expires_at=clock() + 60))
            store(tier, [none], SLOT_BYTES)
            assert tier.touch([own, none], expires_at=0.0, timeout_s=TIMEOUT_S) == [True, True]

        assert [self.lives_for(medium, key) for key in (own, none)] == [[60, 60], [-1, -1]]

    def test_a_page_past_its_deadline_is_not_stored(self, medium: Medium) -> None:
        clock = FakeClock()
        keys = keys_of("page", 2)
        with closing(make_tier(medium, now=clock)) as tier:
            metas = [PageMeta(SLOT_BYTES, expires_at=clock() + 0.0001), PageMeta(SLOT_BYTES)]
            views = filled(keys, SLOT_BYTES)

            assert tier.write_from(keys, views, metas, timeout_s=TIMEOUT_S) == [False, True]

        assert medium.names(keys[0]) == []


class TestLeaks:
    pytestmark = ON_EACH_PRODUCT

    def test_close_leaves_no_socket_and_no_client(self, medium: Medium) -> None:
        keys = keys_of("page", 4)
        medium.client.ping()
        sockets_before, clients_before = _open_sockets(), _clients(medium)
        tier = make_tier(medium, connections=4)
        threads = [threading.Thread(target=store, args=(tier, [key], SLOT_BYTES)) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert sockets_before < _open_sockets() <= sockets_before + 4
        tier.close()
        assert _open_sockets() == sockets_before
        wait_until(lambda: _clients(medium) == clients_before, "the server has seen them go")

    def test_a_call_that_is_under_way_while_the_tier_closes_ends_and_leaves_no_socket(self, medium: Medium) -> None:
        sockets_before = _open_sockets()
        tier = make_tier(medium)
        answers: list[list[bool]] = []
        thread = threading.Thread(target=lambda: answers.append(store(tier, keys_of("page", 5), SLOT_BYTES)))

        medium.server.freeze()
        try:
            thread.start()
            wait_until(lambda: _open_sockets() > sockets_before, "the call waits for the frozen server")
            tier.close()
        finally:
            medium.server.thaw()
        thread.join(TIMEOUT_S)

        assert answers == [[True] * 5]
        assert _open_sockets() == sockets_before


def _clients(medium: Medium) -> int:
    return int(medium.client.info("clients")["connected_clients"])


def _open_sockets() -> int:
    return sum(_is_socket(fd) for fd in os.listdir("/proc/self/fd"))


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except FileNotFoundError:  # the descriptor of the listing itself
        return False

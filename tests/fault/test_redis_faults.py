"""What a Redis server can do to a caller, and that the caller gets a right page, a miss or TierUnavailable in time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from kvstore.errors import TierRefused, TierUnavailable
from kvstore.page import PageMeta
from kvstore.ports import free_port
from kvstore.testing.pages import TIMEOUT_S, fetch, filled, keys_of, payload, slots, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis import full
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.proxy import Fault, Proxy
from tests.helpers.redis_products import ON_EACH_PRODUCT
from tests.helpers.redis_server import canned_server, command
from tests.helpers.waiting import wait_until

pytestmark = ON_EACH_PRODUCT
SLOT_BYTES = 256 << 10
SHORT_S = 0.3
# Far above SHORT_S and far below TIMEOUT_S: tells a kept deadline from a hang, also on a busy machine.
IN_TIME_S = 10.0


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


def tier_at(port: int, slot_bytes: int = SLOT_BYTES) -> RedisTier:
    return RedisTier(f"redis://127.0.0.1:{port}", slot_bytes=slot_bytes, ttl_s=3600)


def every_call(tier: RedisTier, timeout_s: float) -> list[tuple[str, Callable[[], object]]]:
    keys, metas = keys_of("page", 1), [PageMeta(SLOT_BYTES)]
    return [
        ("contains", lambda: tier.contains(keys, timeout_s=timeout_s)),
        ("read", lambda: tier.read_into(keys, slots(1, SLOT_BYTES), metas, timeout_s=timeout_s)),
        ("write", lambda: tier.write_from(keys, filled(keys, SLOT_BYTES), metas, timeout_s=timeout_s)),
        ("touch", lambda: tier.touch(keys, expires_at=0.0, timeout_s=timeout_s)),
        ("delete", lambda: tier.delete(keys, timeout_s=timeout_s)),
        ("ping", lambda: tier.ping(timeout_s=timeout_s)),
    ]


def assert_unavailable_in_time(tier: RedisTier, timeout_s: float, match: str | None = None) -> None:
    for name, call in every_call(tier, timeout_s):
        started = time.monotonic()
        with pytest.raises(TierUnavailable, match=match):
            call()
        assert time.monotonic() - started < IN_TIME_S, name


def assert_works(tier: RedisTier, slot_bytes: int = SLOT_BYTES) -> None:
    keys = keys_of("after", 2)
    tier.ping(timeout_s=TIMEOUT_S)
    assert store(tier, keys, slot_bytes) == [True, True]
    assert fetch(tier, keys, slot_bytes) == [payload(key, slot_bytes) for key in keys]


class TestServer:
    def test_refusing(self) -> None:
        with closing(tier_at(free_port())) as tier:
            assert_unavailable_in_time(tier, TIMEOUT_S, match="refused")
            assert tier.counters.extra["failures"] == 5

    def test_a_unix_socket_that_is_not_there(self) -> None:
        with closing(RedisTier("unix:///nowhere/redis.sock", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            assert_unavailable_in_time(tier, TIMEOUT_S, match="/nowhere/redis.sock")

    def test_frozen_then_thawed(self, server: LocalRedis) -> None:
        with closing(tier_at(server.port)) as tier:
            assert_works(tier)

            server.freeze()
            assert_unavailable_in_time(tier, SHORT_S, match="no answer in time")
            assert tier.counters.extra["timeouts"] == 5
            server.thaw()

            assert_works(tier)

    def test_frozen_before_the_first_connection(self, server: LocalRedis) -> None:
        with closing(RedisTier(f"redis://:pw@127.0.0.1:{server.port}", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            server.freeze()

            assert_unavailable_in_time(tier, SHORT_S)

            server.thaw()

    def test_a_page_whose_time_was_up_before_the_server_had_it_never_comes(
        self, server: LocalRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size, keys = SLOT_BYTES, keys_of("page", 1)
        with closing(tier_at(server.port, size)) as tier:
            for n in range(5):  # then our kernel takes a page at once, and the server's not all of it
                store(tier, keys_of(f"before {n}", 1), size)
            encode = tier._encode

            def freeze_first(*arguments: Any) -> Any:
                server.freeze()
                return encode(*arguments)

            monkeypatch.setattr(tier, "_encode", freeze_first)
            with pytest.raises(TierUnavailable, match="no answer in time"):
                tier.write_from(keys, filled(keys, size), [PageMeta(size)], timeout_s=SHORT_S)
            server.thaw()
            wait_until(lambda: command(server, "CLIENT", "LIST").count(b"\n") == 1, "the server reads what it was sent")

            assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False]

    def test_killed_then_started_again(self, server: LocalRedis) -> None:
        keys = keys_of("page", 2)
        with closing(tier_at(server.port)) as tier:
            store(tier, keys, SLOT_BYTES)

            server.kill()
            assert_unavailable_in_time(tier, TIMEOUT_S)
            server.start()

            assert fetch(tier, keys, SLOT_BYTES) == [None, None]
            assert_works(tier)

    def test_restarted_between_two_calls_is_no_failure(self, server: LocalRedis) -> None:
        with closing(tier_at(server.port)) as tier:
            assert_works(tier)

            server.kill()
            server.start()

            assert_works(tier)
            assert tier.counters.extra["failures"] == 0

    def test_flushed_pages_are_misses(self, server: LocalRedis) -> None:
        keys = keys_of("page", 3)
        with closing(tier_at(server.port)) as tier:
            store(tier, keys, SLOT_BYTES)

            command(server, "FLUSHALL")

            assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False] * 3
            assert fetch(tier, keys, SLOT_BYTES) == [None] * 3
            assert tier.counters.lost_pages == 3
            assert_works(tier)

    def test_clients_thrown_out_between_two_calls_are_no_failure(self, server: LocalRedis) -> None:
        with closing(tier_at(server.port)) as tier:
            assert_works(tier)

            command(server, "CLIENT", "KILL", "TYPE", "normal")

            assert_works(tier)
            assert tier.counters.extra["failures"] == 0


class TestMemory:
    def test_out_of_memory_is_no_room_and_the_rest_is_not_sent(self) -> None:
        keys = keys_of("page", 64)
        with LocalRedis(maxmemory_bytes=4 << 20, policy="noeviction") as server, closing(tier_at(server.port)) as tier:
            answers = store(tier, keys, SLOT_BYTES)

            assert 0 < sum(answers) < 20
            assert answers == sorted(answers, reverse=True)
            assert tier.counters.extra["oom_replies"] == 1
            assert tier.contains(keys, timeout_s=TIMEOUT_S) == answers
            for key, ok, data in zip(keys, answers, fetch(tier, keys, SLOT_BYTES), strict=True):
                assert data == (payload(key, SLOT_BYTES) if ok else None)

            command(server, "CONFIG", "SET", "maxmemory", 1 << 20)  # else a buffer that is freed meanwhile makes room
            assert store(tier, keys_of("small", 1), 64, meta=PageMeta(64)) == [False]
            assert tier.counters.extra["oom_replies"] == 2
            tier.delete(keys, timeout_s=TIMEOUT_S)
            command(server, "CONFIG", "SET", "maxmemory", 64 << 20)
            assert_works(tier)

    def test_a_full_server_that_evicts_nothing_is_told_once_with_the_remedy(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with LocalRedis(maxmemory_bytes=4 << 20, policy="noeviction") as server, closing(tier_at(server.port)) as tier:
            for n in range(3):
                assert not all(store(tier, keys_of(f"page {n}", 64), SLOT_BYTES))

            (told,) = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
            assert f":{server.port} is full and takes no pages" in told
            assert "allkeys-lfu" in told
            assert "redis.capacity_bytes" in told

            command(server, "CONFIG", "SET", "maxmemory", 64 << 20)
            monkeypatch.setattr(full, "QUIET_S", 0.0)
            with caplog.at_level("INFO"):
                assert_works(tier)
            assert "takes pages again" in caplog.text

    def test_what_the_server_evicts_is_a_miss(self) -> None:
        keys = keys_of("page", 64)
        with LocalRedis(maxmemory_bytes=8 << 20) as server, closing(tier_at(server.port)) as tier:
            assert all(store(tier, keys, SLOT_BYTES))

            pages = fetch(tier, keys, SLOT_BYTES)

            assert 0 < sum(page is not None for page in pages) < 32
            assert all(page in (None, payload(key, SLOT_BYTES)) for key, page in zip(keys, pages, strict=True))
            assert tier.counters.corrupt_pages == 0
            # Pages that had lost one part are gone entirely now: what is there could be read. (Not all that was read is
            # there: a reply that waits counts as memory, so reading evicts as well.)
            present = tier.contains(keys, timeout_s=TIMEOUT_S)
            assert any(present)
            assert all(page is not None for page, is_there in zip(pages, present, strict=True) if is_there)


class TestRights:
    def test_a_wrong_password_is_named_and_not_shown(self) -> None:
        with LocalRedis(password="right") as server:
            url = f"redis://:wrong-one@127.0.0.1:{server.port}"
            with closing(RedisTier(url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
                with pytest.raises(TierUnavailable, match=r"refuses the user or password of redis\.url") as caught:
                    tier.ping(timeout_s=TIMEOUT_S)

                assert "wrong-one" not in str(caught.value)

    def test_a_missing_password_is_asked_for(self) -> None:
        with LocalRedis(password="right") as server, closing(tier_at(server.port)) as tier:
            assert_unavailable_in_time(tier, TIMEOUT_S, match="asks for a password")

    def test_a_database_that_is_not_there_is_unavailable(self, server: LocalRedis) -> None:
        with closing(RedisTier(f"redis://127.0.0.1:{server.port}/99", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            assert_unavailable_in_time(tier, TIMEOUT_S, match="DB index is out of range")

    def test_a_user_who_may_not_write_is_unavailable_for_writing_only(self, server: LocalRedis) -> None:
        keys = keys_of("page", 1)
        with closing(tier_at(server.port)) as tier:
            store(tier, keys, SLOT_BYTES)
        command(server, "ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+@connection")

        url = f"redis://reader:pw@127.0.0.1:{server.port}"
        with closing(RedisTier(url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            assert fetch(tier, keys, SLOT_BYTES) == [payload(keys[0], SLOT_BYTES)]
            with pytest.raises(TierUnavailable, match="permissions"):
                store(tier, keys_of("next", 1), SLOT_BYTES)

    def test_a_replica_serves_reads_and_is_unavailable_for_writes(self, server: LocalRedis) -> None:
        keys = keys_of("page", 2)
        with LocalRedis() as replica, closing(tier_at(server.port)) as master, closing(tier_at(replica.port)) as tier:
            command(server, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
            command(replica, "REPLICAOF", "127.0.0.1", server.port)
            store(master, keys, SLOT_BYTES)
            wait_until(lambda: command(replica, "DBSIZE") == 4, "the pages are replicated")

            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            with pytest.raises(TierUnavailable, match="read only replica"):
                store(tier, keys_of("next", 1), SLOT_BYTES)

    @pytest.mark.parametrize(
        "answer",
        [
            "LOADING Redis is loading the dataset in memory",
            "MASTERDOWN Link with MASTER is down",
            "ERR max number of clients reached",
        ],
    )
    def test_a_server_that_cannot_serve_is_unavailable(self, answer: str) -> None:
        with canned_server([b"-%s\r\n" % answer.encode()]) as port, closing(tier_at(port)) as tier:
            assert_unavailable_in_time(tier, TIMEOUT_S, match=re.escape(answer.partition(" ")[2]))

    @pytest.mark.parametrize(
        "answer",
        [
            "CLUSTERDOWN The cluster is down",
            "MISCONF Redis is configured to save RDB snapshots",
            "NOREPLICAS Not enough good replicas to write.",
            "ERR something nobody thought of",
        ],
    )
    def test_an_error_is_a_refusal_of_that_call_and_an_answer_to_a_ping(self, answer: str) -> None:
        code, text = answer.split(" ", 1)
        with canned_server([b"-%s\r\n" % answer.encode()]) as port, closing(tier_at(port)) as tier:
            for name, call in every_call(tier, TIMEOUT_S):
                if name == "ping":
                    call()
                    continue
                with pytest.raises(TierRefused, match=re.escape(text)) as refused:
                    call()
                assert refused.value.reason == code

    @pytest.mark.parametrize("answer", ["LOADING Redis is loading", "BUSY Redis is busy running a script."])
    def test_a_server_that_serves_nobody_fails_its_ping(self, answer: str) -> None:
        with (
            canned_server([b"-%s\r\n" % answer.encode()]) as port,
            closing(tier_at(port)) as tier,
            pytest.raises(TierUnavailable, match=answer),
        ):
            tier.ping(timeout_s=TIMEOUT_S)


class TestNetwork:
    @pytest.fixture
    def proxy(self, server: LocalRedis) -> Iterator[Proxy]:
        with Proxy(server.port) as proxy:
            yield proxy

    @pytest.mark.parametrize("after_bytes", [0, 1, 3, 20, 100, 5000, SLOT_BYTES, SLOT_BYTES + 100])
    def test_cut_in_the_middle_of_a_reply(self, proxy: Proxy, after_bytes: int) -> None:
        keys = keys_of("page", 3)
        with closing(tier_at(proxy.port)) as tier:
            store(tier, keys, SLOT_BYTES)

            proxy.arm(Fault.CUT, after_bytes=after_bytes)
            with pytest.raises(TierUnavailable):
                fetch(tier, keys, SLOT_BYTES)
            proxy.arm(Fault.NONE)

            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]

    @pytest.mark.parametrize("fault", [Fault.STALL, Fault.TRICKLE])
    @pytest.mark.parametrize("after_bytes", [0, 100, 5000])
    def test_slow_or_stalled_in_the_middle_of_a_reply(self, proxy: Proxy, fault: Fault, after_bytes: int) -> None:
        keys = keys_of("page", 3)
        metas = [PageMeta(SLOT_BYTES)] * 3
        with closing(tier_at(proxy.port)) as tier:
            store(tier, keys, SLOT_BYTES)
            proxy.arm(fault, after_bytes=after_bytes)

            started = time.monotonic()
            with pytest.raises(TierUnavailable, match="no answer in time"):
                tier.read_into(keys, slots(3, SLOT_BYTES), metas, timeout_s=SHORT_S)
            assert time.monotonic() - started < IN_TIME_S

            # The late rest of that reply must not be taken for the answer to this call.
            proxy.arm(Fault.NONE)
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]

    def test_a_bit_garbled_anywhere_on_the_way_never_gives_a_wrong_page(self, server: LocalRedis, proxy: Proxy) -> None:
        num_bytes = 512
        keys = keys_of("page", 3)
        meta = PageMeta(num_bytes)
        with closing(tier_at(proxy.port, 4096)) as tier:
            for position in range(0, 3 * (num_bytes + 150), 11):
                store(tier, keys, 4096, meta=meta)
                proxy.arm(Fault.GARBLE, after_bytes=position)
                try:
                    views = slots(3, 4096)
                    found = tier.read_into(keys, views, [meta] * 3, timeout_s=0.1)
                except TierUnavailable:
                    found = [False] * 3
                proxy.arm(Fault.NONE)

                for key, ok, view in zip(keys, found, views, strict=True):
                    assert not ok or view[:num_bytes] == payload(key, num_bytes), position
            assert tier.counters.corrupt_pages > 50

    def test_cut_while_writing_leaves_whole_pages_or_none(self, proxy: Proxy) -> None:
        with closing(tier_at(proxy.port)) as tier:
            for turn, after_bytes in enumerate((0, 4, 9, 30, 60)):
                keys = keys_of(f"page {turn}", 3)
                proxy.arm(Fault.CUT, after_bytes=after_bytes)
                with pytest.raises(TierUnavailable):
                    store(tier, keys, SLOT_BYTES)
                proxy.arm(Fault.NONE)

                there = tier.contains(keys, timeout_s=TIMEOUT_S)
                pages = fetch(tier, keys, SLOT_BYTES)
                assert [page is not None for page in pages] == there
                assert all(page in (None, payload(key, SLOT_BYTES)) for key, page in zip(keys, pages, strict=True))
            assert tier.counters.corrupt_pages == 0

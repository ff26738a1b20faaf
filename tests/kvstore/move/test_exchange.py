from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.errors import StoreClosed
from kvstore.move.breaker import Breaker
from kvstore.move.exchange import Exchange
from kvstore.move.lane import Lane
from kvstore.testing.pages import keys_of
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.rows import ROW_BYTES, Rows, faulty
from tests.helpers.waiting import wait_until

KEYS = keys_of("exchange", 4)


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def open_exchange(tiers: list[FaultyTier], batch_pages: int = 2) -> Exchange:
    def make_lanes(view: Callable[[int], memoryview]) -> list[Lane]:
        return [Lane(tier, view, workers=2, timeout_s=20.0, breaker=Breaker(3, 1000.0, 1000.0)) for tier in tiers]

    return Exchange(make_lanes, ROW_BYTES, batch_pages)


@pytest.fixture
def tiers() -> list[FaultyTier]:
    return [faulty("disk"), faulty("redis")]


@pytest.fixture
def exchange(tiers: list[FaultyTier]) -> Iterator[Exchange]:
    exchange = open_exchange(tiers)
    yield exchange
    for tier in tiers:
        tier.recover()
    exchange.close(20.0)


class Engine:
    """An engine's memory, copied out of and into by rows."""

    def __init__(self) -> None:
        self.rows = Rows()
        for row in range(4):
            self.rows[row] = row + 1

    def copy_out(self, index: int, page: memoryview) -> None:
        page[:ROW_BYTES] = self.rows[index]

    def copy_in(self, index: int, page: memoryview) -> None:
        at = (8 + index) * ROW_BYTES
        self.rows.memory[at : at + ROW_BYTES] = page[:ROW_BYTES]

    def has_all(self) -> bool:
        return all(self.rows.has(8 + index, index + 1) for index in range(4))

    def is_untouched(self) -> bool:
        return all(self.rows.has(8 + index, 0) for index in range(4))


@pytest.fixture
def engine() -> Engine:
    return Engine()


def save(exchange: Exchange, engine: Engine, seconds: float = 20.0) -> list[str]:
    return exchange.save(KEYS, ROW_BYTES, engine.copy_out, deadline=soon(seconds))


def load(exchange: Exchange, engine: Engine, seconds: float = 20.0) -> list[str]:
    return exchange.load(KEYS, ROW_BYTES, engine.copy_in, deadline=soon(seconds))


def test_what_was_saved_is_found_and_loaded(exchange: Exchange, engine: Engine) -> None:
    assert all(save(exchange, engine))

    assert exchange.find(KEYS, deadline=soon()) == ["disk"] * 4
    assert load(exchange, engine) == ["disk"] * 4
    assert engine.has_all()


def test_what_is_nowhere_is_a_miss(exchange: Exchange, engine: Engine) -> None:
    assert exchange.find(KEYS, deadline=soon()) == [""] * 4
    assert load(exchange, engine) == [""] * 4
    assert engine.is_untouched()


def test_a_page_that_the_first_tier_lost_comes_from_the_second_and_goes_back_to_the_first(
    exchange: Exchange, engine: Engine, tiers: list[FaultyTier]
) -> None:
    save(exchange, engine)
    tiers[0].delete(KEYS[:2], timeout_s=1.0)

    assert load(exchange, engine) == ["redis", "redis", "disk", "disk"]

    assert engine.has_all()
    wait_until(lambda: exchange.num_filled_pages == 2, "the first tier has them again")
    assert exchange.find(KEYS, deadline=soon()) == ["disk"] * 4


def test_a_corrupt_page_is_a_miss_where_no_other_tier_has_it(engine: Engine) -> None:
    tier = faulty("disk")
    exchange = open_exchange([tier])
    try:
        save(exchange, engine)
        tier.corrupt_next(1)

        assert sorted(load(exchange, engine)) == ["", "disk", "disk", "disk"]
    finally:
        exchange.close(20.0)


def test_a_tier_that_fails_is_a_miss_and_nothing_is_raised(
    exchange: Exchange, engine: Engine, tiers: list[FaultyTier]
) -> None:
    for tier in tiers:
        tier.fail()

    assert save(exchange, engine) == [""] * 4
    assert load(exchange, engine) == [""] * 4


def test_a_load_ends_at_its_deadline_and_what_comes_later_touches_nothing(engine: Engine) -> None:
    tier = faulty("disk")
    exchange = open_exchange([tier])
    try:
        save(exchange, engine)
        tier.hang(honour_timeout=False, only=("read_into",))

        assert load(exchange, engine, 0.1) == [""] * 4

        tier.recover()
        wait_until(lambda: exchange.lane_counters("disk").running == 0, "the tier has returned")
        assert engine.is_untouched()
    finally:
        tier.recover()
        exchange.close(20.0)


def test_a_load_does_not_end_while_a_page_is_copied_into_memory(exchange: Exchange, engine: Engine) -> None:
    save(exchange, engine)
    has_ended, was_in_time = threading.Event(), []

    def copy_in(index: int, page: memoryview) -> None:
        was_in_time.append(not has_ended.wait(0.3))  # past the deadline
        engine.copy_in(index, page)

    exchange.load(KEYS[:1], ROW_BYTES, copy_in, deadline=soon(0.1))
    has_ended.set()

    assert was_in_time == [True]


def test_what_has_come_and_is_not_copied_at_the_deadline_touches_nothing(
    exchange: Exchange, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(exchange, engine)
    has_ended, copied = threading.Event(), Exchange._copied

    def copied_late(self: Exchange, batch: Any, ok: tuple[bool, ...]) -> tuple[bool, ...]:
        has_ended.wait(20.0)
        return copied(self, batch, ok)

    monkeypatch.setattr(Exchange, "_copied", copied_late)
    assert load(exchange, engine, 0.1) == [""] * 4

    has_ended.set()
    exchange.close(20.0)
    assert engine.is_untouched()


def test_a_save_that_has_ended_reads_no_memory_any_more(engine: Engine) -> None:
    tier = faulty("disk")
    exchange = open_exchange([tier])
    copied: list[int] = []

    def copy_out(index: int, page: memoryview) -> None:
        copied.append(index)
        engine.copy_out(index, page)

    try:
        tier.hang(honour_timeout=False, only=("write_from",))
        assert exchange.save(KEYS, ROW_BYTES, copy_out, deadline=soon(0.2)) == [""] * 4
        before = list(copied)
        for row in range(4):
            engine.rows[row] = 99  # another page lies there now

        tier.recover()
        wait_until(lambda: exchange.lane_counters("disk").running == 0, "the tier has returned")

        assert copied == before
        found = exchange.find(KEYS, deadline=soon())
        assert load(exchange, engine) == found  # what was copied in time was stored as it was then
        assert all(engine.rows.has(8 + i, i + 1) for i, tier_name in enumerate(found) if tier_name)
    finally:
        tier.recover()
        exchange.close(20.0)


def test_calls_of_several_threads_do_not_mix(exchange: Exchange) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        keys, byte = keys_of(f"thread {number}", 8), bytes([number]) * ROW_BYTES
        got: dict[int, bytes] = {}

        def copy_out(index: int, page: memoryview) -> None:
            page[:ROW_BYTES] = byte

        def copy_in(index: int, page: memoryview) -> None:
            got[index] = bytes(page[:ROW_BYTES])

        exchange.save(keys, ROW_BYTES, copy_out, deadline=soon())
        exchange.load(keys, ROW_BYTES, copy_in, deadline=soon())
        if got != dict.fromkeys(range(8), byte):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_after_the_close_calls_are_refused(engine: Engine) -> None:
    exchange = open_exchange([faulty("disk")])
    exchange.close(20.0)

    with pytest.raises(StoreClosed):
        load(exchange, engine)


def test_no_page_of_ours_is_lost(exchange: Exchange, engine: Engine, tiers: list[FaultyTier]) -> None:
    for _ in range(20):
        save(exchange, engine)
        load(exchange, engine)
    many = exchange.staging_pages

    tiers[0].lose_next(4)
    for _ in range(20):
        load(exchange, engine)

    assert exchange.staging_pages == many

"""A store in use while its tiers fail in every way they can: right answers, in time, and the tier comes back by itself.

`faults` says how each fault is made, `fault_table` plays it and measures; docs/faults.md has the figures. Times are
asserted with a slack that only a call without any deadline would use up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvstore.page import PageKey, page_key
from kvstore.plan.records import LeaseState
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.disk.tier import DiskTier
from tests.fault.engine import Engine
from tests.fault.fault_table import WAITS, is_good, markdown, play
from tests.fault.faults import FAULTS, LOAD_DEADLINE_S, LOOKUP_DEADLINE_S, PROMPTS, Fault, faulty_disk_store
from tests.helpers.disk import flip_slab_bit, put_raw_record, raw_record
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import PAGE_BYTES, load, open_small, prompt, save, use

SLACK_S = 20.0  # a busy machine; a call that waited for a broken tier would take a minute or for ever
DEADLINES_S = {"wait_lookup": LOOKUP_DEADLINE_S, "wait": LOAD_DEADLINE_S}
FLUSH_S = 60.0


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracebacks of a failing tier are wanted by operators, not here; and nobody waits 10 s for another measurement."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("kvstore.plan.cost.REMEASURE_AFTER_S", 0.3)


def marks(fault: Fault) -> list[pytest.MarkDecorator]:
    reason = fault.needs()
    own = [pytest.mark.redis] if fault.tier == "redis" else []
    return [*own, pytest.mark.skipif(bool(reason), reason=reason)]


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name, marks=marks(fault)) for fault in FAULTS])
def test_requests_are_answered_right_and_in_time_and_the_tier_comes_back(fault: Fault, tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    directory.mkdir()

    seen = play(fault, directory)

    assert seen.errors == []
    assert (seen.wrong, seen.right) == (0, seen.requests)
    for call, ms in seen.slowest_ms.items():
        assert ms / 1000 <= DEADLINES_S.get(call, 0.0) + SLACK_S, f"{call} took {ms:.0f} ms"
    assert seen.is_felt, f"the fault was not felt: {seen}"
    assert (seen.healed_s is not None) == fault.is_lifted
    assert not fault.opens_breaker or seen.breaker_opened
    assert seen.leaks == []


def test_the_table_tells_good_rows_from_bad_ones() -> None:
    row: dict[str, Any] = {"fault": "f", "requests": 2, "right": 2, "is_felt": True, "healed_s": 0.5, "leaks": []}
    row |= {"is_lifted": True, "slowest_ms": {WAITS[0]: 7.0}, "breaker_opened": 0, "counters": {}, "errors": []}

    assert is_good(row)
    assert is_good(row | {"healed_s": None, "is_lifted": False})
    assert not any(is_good(row | bad) for bad in ({"right": 1}, {"is_felt": False}, {"healed_s": None}, {"leaks": "x"}))
    assert "| f | 2 | 2 | 7 | 0 | 0 | no | 0.5 | none |" in markdown([row])
    assert "not played: no root" in markdown([{"fault": "f", "skipped": "no root"}])


class TestAfterAFault:
    def test_a_store_closes_in_time_while_its_tier_hangs(self, tmp_path: Path) -> None:
        with ExitStack() as stack:
            store, tier = faulty_disk_store(stack, tmp_path)
            engine = Engine(store, PROMPTS)
            engine.start()
            engine.run(requests=20)
            tier.hang(honour_timeout=False)
            tier.wait_for_hanging()
            engine.stop()

            store.close(timeout_s=0.5)
            tier.recover()

        assert engine.tally.wrong == 0
        assert engine.tally.errors == []

    def test_slots_of_a_hanging_fetch_are_not_given_to_anyone(self, tmp_path: Path) -> None:
        with ExitStack() as stack:
            store, tier = faulty_disk_store(stack, tmp_path)
            for blocks, seed in PROMPTS:
                use(store, prompt(blocks, seed))
                assert store.flush(FLUSH_S)
            tier.hang(honour_timeout=False, only=("read_into",))
            request = store.request(prompt(*PROMPTS[0]))
            lease = store.prepare_load(request, 8)
            tier.wait_for_hanging()
            store.release(lease)

            held = {page.slot for page in lease.pages}
            others = store.prepare_save(store.request(prompt(64, seed=99)), 0, 64)
            assert held.isdisjoint(page.slot for page in others.pages)
            store.check()

            tier.recover()
            store.release(others)

    def test_nobody_waits_for_a_fetch_that_hangs_in_a_tier_that_is_down(self, tmp_path: Path) -> None:
        with ExitStack() as stack:
            store, tier = faulty_disk_store(stack, tmp_path)
            for blocks, seed in PROMPTS:
                use(store, prompt(blocks, seed))
                assert store.flush(FLUSH_S)
            tier.hang(honour_timeout=False)
            request = store.request(prompt(*PROMPTS[0]))

            lease = store.prepare_load(request, 8)
            status = store.wait(lease, timeout_s=60.0)  # ends when the breaker opens

            assert (status.state, status.num_blocks) == (LeaseState.READY, 0)
            assert store.lookup(store.request(prompt(*PROMPTS[0]))).num_blocks == 0
            store.complete(lease)
            store.check()
            tier.recover()
            engine = Engine(store, PROMPTS[:1], threads=1)
            engine.start()
            assert engine.run(lambda: store.lookup(request).num_blocks == 8)
            engine.stop()
            assert engine.tally.wrong == 0


# ---- one flipped bit -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[LocalStore]:
    with open_small(tmp_path, **SMALL_HOST) as store:
        yield store
        store.check()


@pytest.fixture
def on_redis() -> Iterator[tuple[LocalStore, LocalRedis]]:
    with LocalRedis() as server, open_small(None, server.url, **SMALL_HOST) as store:
        yield store, server
        store.check()


SMALL_HOST: dict[str, Any] = {
    "host": {"capacity_bytes": 8 * PAGE_BYTES},
    "store": {"load_or_recompute": False, "lookup_deadline_s": 5.0, "load_deadline_s": 5.0},
}
DAMAGED = 3  # block of the six whose page is damaged


def check_that_one_bad_page_is_a_miss(store: LocalStore, tier: str, damage: Callable[[PageKey], object]) -> None:
    """Store six pages, damage one below host memory, load: three come; after computing the rest, all six come."""
    use(store, prompt(6, seed=1))
    push_out(store, seed=2)
    request = store.request(prompt(6, seed=1))
    before = store.stats()["corrupt_pages"][tier]

    damage(page_key(request.keys[DAMAGED]))

    assert load(store, request)[0] == DAMAGED
    assert store.stats()["corrupt_pages"][tier] == before + 1
    assert save(store, request, DAMAGED) == 1  # the pages behind it came whole
    store.keep.finished(request)
    push_out(store, seed=3)
    assert load(store, store.request(prompt(6, seed=1)))[0] == 6
    assert store.stats()["corrupt_pages"][tier] == before + 1


def push_out(store: LocalStore, seed: int) -> None:
    """Let another prompt take every host slot."""
    assert store.flush(FLUSH_S)
    use(store, prompt(8, seed=seed))
    assert store.flush(FLUSH_S)


def disk_of(store: LocalStore) -> DiskTier:
    tier = store._dispatcher.lanes["disk"].tier
    assert isinstance(tier, DiskTier)
    return tier


@pytest.mark.parametrize(("byte", "bit"), [(0, 0), (1, 7), (4096, 3), (PAGE_BYTES - 1, 7)])
def test_a_flipped_bit_in_the_slab_is_a_miss(on_disk: LocalStore, byte: int, bit: int) -> None:
    tier = disk_of(on_disk)

    check_that_one_bad_page_is_a_miss(on_disk, "disk", lambda key: flip_slab_bit(tier, key, byte, bit))


# Magic, version, codec, key, parent, depth, lengths, created, expires, generation, checksum, padding; then stamp,
# deadline, slot, zeros and the record's own checksum.
RECORD_BYTES = [0, 4, 5, 9, 45, 77, 81, 85, 93, 101, 109, 117, 127, 130, 137, 144, 149, 153, 159]


@pytest.mark.parametrize("byte", RECORD_BYTES)
def test_a_flipped_bit_in_an_index_record_is_a_miss(on_disk: LocalStore, byte: int) -> None:
    tier = disk_of(on_disk)

    def flip(key: PageKey) -> None:
        raw = bytearray(raw_record(tier, key))
        raw[byte] ^= 1 << (byte % 8)
        put_raw_record(tier, key, bytes(raw))

    check_that_one_bad_page_is_a_miss(on_disk, "disk", flip)


@pytest.mark.parametrize("region", ["slab", "record"])
def test_a_bit_flipped_while_the_store_was_closed_is_a_miss(tmp_path: Path, region: str) -> None:
    with open_small(tmp_path, **SMALL_HOST) as store:
        use(store, prompt(6, seed=1))
        assert store.flush(FLUSH_S)
        tier, key = disk_of(store), page_key(store.request(prompt(6, seed=1)).keys[DAMAGED])
        if region == "slab":
            flip_slab_bit(tier, key, 77, 1)
        else:
            put_raw_record(tier, key, raw_record(tier, key)[:-1] + b"\0")

    with open_small(tmp_path, **SMALL_HOST) as store:
        request = store.request(prompt(6, seed=1))
        assert load(store, request)[0] == DAMAGED
        save(store, request, DAMAGED)
        assert store.flush(FLUSH_S)

    with open_small(tmp_path, **SMALL_HOST) as store:
        assert load(store, store.request(prompt(6, seed=1)))[0] == 6
        assert store.stats()["corrupt_pages"]["disk"] == 0


# The head has the header (128 bytes) and most of the page, the second key the rest.
REDIS_BYTES = [(0, byte) for byte in (0, 4, 5, 7, 9, 45, 77, 81, 85, 89, 101, 109, 117, 127, 128, 5000)]


@NEEDS_REDIS[0]
@NEEDS_REDIS[1]
@pytest.mark.parametrize(("part", "byte"), [*REDIS_BYTES, (1, 0), (1, 191)])
def test_a_flipped_bit_in_a_redis_value_is_a_miss(
    on_redis: tuple[LocalStore, LocalRedis], part: int, byte: int
) -> None:
    store, server = on_redis

    def flip(key: PageKey) -> None:
        with server.client() as client:
            names: Any = client.keys("*")
            name = sorted(name for name in names if key in name)[part]
            value: Any = client.getrange(name, byte, byte)
            client.setrange(name, byte, bytes([value[0] ^ 1 << byte % 8]))

    check_that_one_bad_page_is_a_miss(store, "redis", flip)

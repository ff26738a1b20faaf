"""The linker without SGLang: pools of numpy, a small store, and a counter that says what SGLang's does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from connectors.sglang_linker import promises
from connectors.sglang_linker.core import LinkerCore
from connectors.sglang_linker.pools import DevicePages
from connectors.sglang_linker.ranks import Ranks
from kvstore.base import LeaseState
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from tests.helpers.clocks import Clocks
from tests.helpers.stores import BLOCK, LAYOUT, PAGE_BYTES, open_small
from tests.helpers.waiting import wait_until

LAYERS = 4
PAGES = 40
PIECE = PAGE_BYTES // LAYERS // 2


class Counter:
    """SGLang's LayerWiseLoadCounter, as far as the linker sees it."""

    def __init__(self) -> None:
        self.batches: dict[int, list[Future[None]]] = {}

    def update_producer(self) -> int:
        index = len(self.batches)
        self.batches[index] = [Future() for _ in range(LAYERS)]
        return index

    def complete(self, index: int, layer: int) -> None:
        self.batches[index][layer].set_result(None)

    def fail(self, index: int, error: BaseException) -> None:
        for future in self.batches[index]:
            if not future.done():
                future.set_exception(error)

    def finish(self, index: int) -> bool:
        return all(future.exception() is None for future in self.batches[index])

    def reset(self) -> None:
        self.batches = {index: [] for index in self.batches}


class Rig:
    """A linker over a pool of PAGES pages whose bytes tell which they are."""

    def __init__(self, store: Any, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - it is frozen
        self.clock = Clocks()
        self.pool = np.random.default_rng(1).integers(0, 255, (LAYERS * 2, PAGES, PIECE), np.uint8)
        table = paged_table(list(self.pool))
        self.counter = Counter()
        self.core = LinkerCore(
            store,
            DevicePages(LAYOUT, table, LAYERS, 2, False),
            CpuDevice(),
            CpuDevice(),
            self.counter,
            ranks,
            now=lambda: self.clock.now,
        )

    def save(self, before: list[str], hashes: list[str], pages: list[int]) -> bool:
        self.core.offload(before, hashes, slots(pages), ())
        wait_until(self.core.offloads.num_ended)
        return self.core.offloads.pop()

    def run(self) -> bool:
        return self.core.loads.finish(self.core.loads.start(()))


def names(seed: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{seed} {index}".encode()).hexdigest() for index in range(count)]


def slots(pages: list[int]) -> Any:
    return torch.tensor([page * BLOCK + token for page in pages for token in range(BLOCK)])


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(open_small())
    yield made
    made.core.quiesce()
    stats = made.core.store.stats()
    assert (stats["leases"], stats["pinned_pages"], made.core.counters["errors"]) == (0, 0, 0)
    made.core.close()


def test_what_was_saved_comes_back_into_other_pages(rig: Rig) -> None:
    hashes = names("a", 6)
    assert rig.save([], hashes, [1, 2, 3, 4, 5, 6])

    assert rig.core.lookup("r", [], hashes) == [1, 2, 3, 4, 5, 6]
    assert rig.core.load("r", hashes, slots([11, 9, 13, 20, 21, 22]))
    assert rig.run()

    assert np.array_equal(rig.pool[:, [11, 9, 13, 20, 21, 22]], rig.pool[:, 1:7])


def test_a_path_is_known_by_all_that_it_continues(rig: Rig) -> None:
    head, tail = names("a", 3), names("b", 3)
    rig.save([], head, [1, 2, 3])
    rig.save(head, tail, [4, 5, 6])

    assert rig.core.lookup("r", head, tail) == [1, 2, 3]
    assert rig.core.lookup("s", [], head + tail) == [1, 2, 3, 4, 5, 6]


def test_a_load_may_be_shorter_than_what_was_promised(rig: Rig) -> None:
    hashes = names("a", 6)
    rig.save([], hashes, [1, 2, 3, 4, 5, 6])
    rig.core.lookup("r", hashes[:1], hashes[1:])

    assert rig.core.load("r", hashes[1:3], slots([30, 31]))
    assert rig.run()

    assert np.array_equal(rig.pool[:, [30, 31]], rig.pool[:, [2, 3]])


@pytest.mark.parametrize("wanted", [["b"], ["a", "b"]])
def test_a_load_of_other_pages_than_were_promised_is_refused(rig: Rig, wanted: list[str]) -> None:
    hashes = names("a", 4)
    rig.save([], hashes, [1, 2, 3, 4])
    rig.core.lookup("r", [], hashes)

    others = [hash_ for seed in wanted for hash_ in names(seed, 1)]
    assert not rig.core.load("r", others, slots([30 + index for index in range(len(others))]))
    assert len(rig.core.promises) == 0


def test_a_load_into_slots_that_are_no_whole_pages_is_refused(rig: Rig) -> None:
    hashes = names("a", 2)
    rig.save([], hashes, [1, 2])
    rig.core.lookup("r", [], hashes)

    assert not rig.core.load("r", hashes, slots([30, 31]) + 1)
    assert rig.core.counters["errors"] == 1
    rig.core.counters["errors"] = 0


def test_without_a_lookup_nothing_is_loaded(rig: Rig) -> None:
    hashes = names("a", 2)
    rig.save([], hashes, [1, 2])

    assert not rig.core.load("r", hashes, slots([30, 31]))


def test_a_promise_that_nobody_asks_for_lapses(rig: Rig) -> None:
    hashes = names("a", 4)
    rig.save([], hashes, [1, 2, 3, 4])
    rig.core.lookup("r", [], hashes)
    assert rig.core.promises.num_pages == 4

    rig.clock.advance(promises.LEASE_S)
    rig.core.tick()

    assert rig.core.promises.num_pages == 0
    assert rig.core.counters["lapsed_leases"] == 1
    assert not rig.core.load("r", hashes, slots([30, 31, 32, 33]))


def test_a_request_that_waits_keeps_its_promise(rig: Rig) -> None:
    hashes = names("a", 4)
    rig.save([], hashes, [1, 2, 3, 4])
    for _ in range(5):
        assert rig.core.lookup("r", [], hashes) == [1, 2, 3, 4]
        rig.clock.advance(0.9 * promises.LEASE_S)
        rig.core.tick()

    assert rig.core.load("r", hashes, slots([30, 31, 32, 33]))
    assert rig.run()


def test_the_newest_lookup_has_room_and_the_oldest_lets_it_go(rig: Rig) -> None:
    for seed in "abc":
        rig.save([], names(seed, 15), list(range(15)))

    for seed in "abc":  # half of 64 slots may be leased
        assert len(rig.core.lookup(seed, [], names(seed, 15))) == 15

    assert rig.core.promises.num_pages == 30
    assert rig.core.counters["crowded_leases"] == 1
    assert not rig.core.load("a", names("a", 15), slots(list(range(15))))
    assert rig.core.load("c", names("c", 15), slots(list(range(15))))


def test_what_is_stored_meanwhile_is_found_by_a_later_pass(rig: Rig) -> None:
    hashes = names("a", 4)
    assert rig.core.lookup("r", [], hashes) == []
    rig.save([], hashes[:2], [1, 2])
    assert rig.core.lookup("r", [], hashes) == []  # asked a moment ago

    rig.clock.advance(promises.LOOK_AGAIN_S)

    assert rig.core.lookup("r", [], hashes) == [1, 2]


def test_a_cancelled_load_gives_its_lease_back(rig: Rig) -> None:
    hashes = names("a", 4)
    rig.save([], hashes, [1, 2, 3, 4])
    rig.core.lookup("r", [], hashes)
    assert rig.core.load("r", hashes, slots([30, 31, 32, 33]))

    assert rig.core.loads.cancel("r")
    assert not rig.core.loads.cancel("r")
    assert rig.core.loads.start(()) == -1
    assert rig.core.store.stats()["leases"] == 0


def test_a_lease_that_was_taken_back_while_it_was_copied_fails_the_load(rig: Rig) -> None:
    hashes = names("a", 2)
    rig.save([], hashes, [1, 2])
    rig.core.lookup("r", [], hashes)
    assert rig.core.load("r", hashes, slots([30, 31]))
    store: Any = rig.core.store
    poll = store.poll
    store.poll = lambda lease: SimpleNamespace(state=LeaseState.CLOSED, num_blocks=0)

    assert not rig.run()

    store.poll = poll
    assert rig.core.counters["failed_loads"] == 1


def test_each_offload_ends_in_its_order_also_one_that_cannot_be_saved(rig: Rig) -> None:
    rig.core.offload([], names("a", 2), slots([1, 2]), ())
    rig.core.offload(None, names("b", 2), slots([3, 4]), ())  # nobody knows where it hangs
    rig.core.offload([], names("c", 2), slots([5]), ())  # not as many pages as names
    rig.core.offload([], names("d", 1), slots([6]), ())

    wait_until(lambda: rig.core.offloads.num_ended() == 4)

    assert [rig.core.offloads.pop() for _ in range(4)] == [True, False, False, True]
    assert rig.core.counters["failed_offloads"] == 2


def test_an_offload_without_room_ends_badly_and_keeps_what_found_room() -> None:
    rig = Rig(open_small())
    for seed in "abcd":  # all slots are leased, but for eight
        rig.save([], names(seed, 14), list(range(14)))
    held = []
    for seed in "abcd":
        request = rig.core.store.request_from_hashes([bytes.fromhex(one) for one in names(seed, 14)], 14 * BLOCK + 1)
        held.append(rig.core.store.prepare_load(request, 14))

    assert not rig.save([], names("e", 12), list(range(12)))
    assert rig.core.counters["skipped_pages"] == 4
    assert len(rig.core.lookup("r", [], names("e", 12))) == 8

    rig.core.promises.clear()
    for lease in held:
        rig.core.store.complete(lease)
    rig.core.close()


def test_quiet_means_no_copy_and_no_lease(rig: Rig) -> None:
    hashes = names("a", 4)
    rig.save([], hashes, [1, 2, 3, 4])
    rig.core.lookup("asks", [], hashes)
    rig.core.lookup("waits", [], hashes)
    assert rig.core.load("waits", hashes, slots([30, 31, 32, 33]))
    rig.core.offload([], names("b", 4), slots([5, 6, 7, 8]), ())

    rig.core.quiesce()

    assert rig.core.store.stats()["leases"] == 0
    assert rig.core.offloads.num_ended() == 0
    assert rig.core.lookup("r", [], names("b", 4)) == [1, 2, 3, 4]  # what was stored stays


def test_a_closed_linker_answers_with_misses(rig: Rig) -> None:
    hashes = names("a", 2)
    rig.save([], hashes, [1, 2])
    rig.core.close()

    assert rig.core.lookup("r", [], hashes) == []
    assert not rig.core.load("r", hashes, slots([30, 31]))
    rig.core.offload([], hashes, slots([1, 2]), ())
    assert rig.core.offloads.num_ended() == 1
    assert not rig.core.offloads.pop()
    rig.core.tick()


class Veto(Ranks):
    """Ranks of which another one has something against it."""

    def agree(self, is_right: bool) -> bool:
        return False


def test_a_load_that_another_rank_refuses_is_refused_here_too() -> None:
    rig = Rig(open_small(), Veto())
    hashes = names("a", 2)
    rig.save([], hashes, [1, 2])
    assert rig.core.lookup("r", [], hashes) == [1, 2]

    assert not rig.core.load("r", hashes, slots([30, 31]))

    assert len(rig.core.loads) == 0
    assert rig.core.store.stats()["leases"] == 0
    rig.core.close()


class LockingDevice(CpuDevice):
    """Notes what is page-locked."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: list[Any] = []

    def register(self, slab: Any) -> None:
        self.locked.append(slab)

    def unregister(self, slab: Any) -> None:
        self.locked = [one for one in self.locked if one is not slab]


def test_the_slab_of_a_daemon_that_comes_back_is_page_locked_in_place_of_the_old_one(rig: Rig) -> None:
    device, old, new = LockingDevice(), np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    core: Any = rig.core
    core._devices, core._registered, store = (device,), None, core.store
    for buffer, locked in ((old, [old]), (old, [old]), (None, []), (new, [new])):
        core.store = SimpleNamespace(slots=SimpleNamespace(buffer=buffer))
        core.tick()

        assert len(device.locked) == len(locked)
        assert all(one is other for one, other in zip(device.locked, locked, strict=True))
    core.store = store

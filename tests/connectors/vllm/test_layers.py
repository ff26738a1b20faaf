"""Loads beside a forward: a layer's attention sees its own blocks, and a forward that did not wait is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from connectors.vllm import layers
from connectors.vllm.layers import LayeredLoads
from connectors.vllm.messages import LoadJob, PageCopies
from kvstore.devices import spans
from kvstore.devices.base import CopyEvent, PageTable
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from tests.helpers.waiting import WAIT_S

NAMES = ("a", "b", "c")
LAYER_BYTES = 4096
NUM_BLOCKS = 4
JOB = LoadJob(7, "r", (PageCopies(0, (0, 1), (2, 3)),), is_async=False)


class SlowDevice(CpuDevice):
    """Copies a span when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)
        self.error: Exception | None = None

    def copy_in(self, table: PageTable, page_ids: Sequence[int], slots: Any) -> CopyEvent:
        assert self.allowed.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        return super().copy_in(table, page_ids, slots)


class Forward:
    """An engine of three layers and what its attention saw of block 2."""

    def __init__(self, device: CpuDevice, span_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spans, "SPAN_BYTES", span_bytes)
        self.tensors = [np.zeros((NUM_BLOCKS, LAYER_BYTES), np.uint8) for _ in NAMES]
        self.pages = [np.arange(3, dtype=np.uint8).repeat(LAYER_BYTES) + 10 * (slot + 1) for slot in range(2)]
        self.loads = LayeredLoads(device, NAMES, paged_table(self.tensors))
        self.saw: list[int] = []

    def start(self, job: LoadJob = JOB) -> None:
        assert self.loads.start(job, lambda: self.pages)

    def layer(self, index: int) -> None:
        self.loads.wait(NAMES[index])
        self.saw.append(int(self.tensors[index][2][-1]))

    def run(self) -> None:
        for index in range(len(NAMES)):
            self.layer(index)


@pytest.fixture(params=[1, 2 * LAYER_BYTES, 1 << 20])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forward]:
    forward = Forward(CpuDevice(), request.param, monkeypatch)
    yield forward
    forward.loads.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SlowDevice, Forward]]:
    device = SlowDevice()
    forward = Forward(device, 1, monkeypatch)
    yield device, forward
    device.allowed.release(10)
    forward.loads.close()


def test_every_layer_finds_its_blocks_filled(forward: Forward) -> None:
    forward.start()
    forward.run()

    (ended,) = forward.loads.finish(1)
    assert (ended.job, ended.error, ended.num_bytes) == (JOB, "", 2 * 3 * LAYER_BYTES)
    assert forward.saw == [10, 11, 12]
    for layer, tensor in enumerate(forward.tensors):
        assert not tensor[:2].any()
        assert (tensor[2] == 10 + layer).all()
        assert (tensor[3] == 20 + layer).all()


def test_a_layer_does_not_wait_for_those_after_it(slow: tuple[SlowDevice, Forward]) -> None:
    device, forward = slow
    forward.start()
    device.allowed.release()

    forward.layer(0)  # would hang if it waited for the others

    assert forward.saw == [10]
    assert not forward.tensors[1].any()


def test_the_end_of_the_forward_waits_for_the_copies(slow: tuple[SlowDevice, Forward]) -> None:
    device, forward = slow
    forward.start()
    ended: list[Any] = []
    waiter = threading.Thread(target=lambda: ended.extend(forward.loads.finish(1)))
    waiter.start()
    device.allowed.release(2)
    waiter.join(0.05)
    assert waiter.is_alive()

    device.allowed.release()
    waiter.join(WAIT_S)

    assert len(ended) == 1


def test_a_layer_that_was_not_waited_for_fails_the_load(forward: Forward) -> None:
    forward.run()
    forward.loads.finish(1)
    assert forward.loads.is_proven
    forward.start()
    forward.layer(0)
    forward.layer(2)

    (ended,) = forward.loads.finish(1)

    assert ended.error == "the engine did not wait for 1 layers, b the first"
    assert not forward.loads.is_proven


def test_only_a_forward_that_waited_for_all_layers_proves_it(forward: Forward) -> None:
    assert not forward.loads.is_proven
    forward.loads.finish(0)  # a step without a forward says nothing
    assert not forward.loads.is_proven
    forward.run()
    forward.loads.finish(1)
    assert forward.loads.is_proven
    forward.loads.finish(0)
    assert forward.loads.is_proven
    forward.loads.finish(1)
    assert not forward.loads.is_proven


def test_a_copy_that_fails_lets_every_layer_go_and_is_told(slow: tuple[SlowDevice, Forward]) -> None:
    device, forward = slow
    device.error = RuntimeError("no copy today")
    forward.start()
    device.allowed.release()

    forward.run()
    (ended,) = forward.loads.finish(1)

    assert ended.error == "RuntimeError: no copy today"


def test_an_unknown_layer_waits_for_everything(slow: tuple[SlowDevice, Forward]) -> None:
    device, forward = slow
    forward.start()
    device.allowed.release(3)

    forward.loads.wait("shares the cache of another layer")

    assert forward.tensors[2][2].all()


def test_after_close_nothing_is_taken(forward: Forward) -> None:
    forward.loads.close()

    assert not forward.loads.start(JOB, lambda: forward.pages)
    assert forward.loads.finish(1) == []


def test_a_copying_thread_that_is_interrupted_fails_the_load_and_holds_no_layer_up(
    slow: tuple[SlowDevice, Forward],
) -> None:
    _, forward = slow
    take = forward.loads._worker._do

    def interrupted(job: Any, lost: Any) -> None:
        def ended() -> None:
            raise SystemExit  # before the job's own first line, where nothing of it can end the wait

        take(ended, lost)

    forward.loads._worker._do = interrupted  # type: ignore[method-assign]
    forward.start()

    forward.run()

    (ended,) = forward.loads.finish(1)
    assert "interrupted" in ended.error


def test_a_load_that_is_dropped_at_the_end_holds_no_layer_up(
    slow: tuple[SlowDevice, Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, forward = slow
    monkeypatch.setattr(layers, "CLOSE_TIMEOUT_S", 0.0)
    forward.start()
    forward.start()
    forward.loads.close()  # the first is being copied, or none is
    device.allowed.release(10)

    forward.run()

    assert [bool(ended.error) for ended in forward.loads.finish(1)] in ([False, True], [True, True])

"""One scheduler's half and two ranks over a real store: what one rank lacks, nobody has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from connectors.vllm.config import parse_extra_config
from connectors.vllm.layout import EngineLayout
from connectors.vllm.messages import StepReport
from connectors.vllm.scheduler import SchedulerHalf
from connectors.vllm.worker import WorkerHalf, page_tables
from kvstore.base import KVStore
from kvstore.config.sections import Config
from kvstore.devices.cpu import CpuDevice
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.opening import open_configured
from radix.namespace import Namespace
from tests.helpers.daemons import local_daemon
from tests.helpers.waiting import WAIT_S

BLOCK = 4
NUM_BLOCKS = 16
LAYER_BYTES = 2 * BLOCK * 8 * 2  # heads of one rank, tokens, content, bytes
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0, 1), 2 * LAYER_BYTES),), "test", "bfloat16", shards=2)
ENGINE = EngineLayout(LAYOUT, (0,), (("a", "b"),), ((LAYER_BYTES, LAYER_BYTES),))
NAMESPACE = Namespace("test", "", "bfloat16", LAYOUT.fingerprint, BLOCK)
HOST = {"capacity_bytes": 64 * LAYOUT.slot_bytes, "huge_pages": False}


@contextmanager
def opened(where: str, folder: Path) -> Iterator[KVStore]:
    """A store in this process, or one that a daemon keeps."""
    if where == "daemon":
        with local_daemon(folder / "kv.sock", host=HOST):
            store = open_configured(Config(service={"url": f"unix://{folder}/kv.sock"}), LAYOUT, NAMESPACE)
            yield store
            store.close()
        return
    with open_configured(Config(host=HOST), LAYOUT, NAMESPACE, shared_name="kvstore-test") as store:  # type: ignore[attr-defined]
        yield store


class Pair:
    """An engine of two ranks, its processes played by objects of this one."""

    def __init__(self, store: KVStore) -> None:
        self.half = SchedulerHalf(store, ENGINE, parse_extra_config({}, "kv_both"), world=2)
        self.half.bind_pool(
            SimpleNamespace(blocks=[None] * NUM_BLOCKS, touch=lambda _: None, free_blocks=lambda _: None)
        )
        self.tensors = [
            {name: torch.randn(NUM_BLOCKS, 2, BLOCK, 8).to(torch.bfloat16) for name in ("a", "b")} for _ in range(2)
        ]
        self.ranks = [WorkerHalf(ENGINE, rank, CpuDevice()) for rank in range(2)]
        for rank, tensors in zip(self.ranks, self.tensors, strict=True):
            rank.register(page_tables(ENGINE, tensors, NUM_BLOCKS))

    def step(self, scheduled: dict[str, int], blocks: list[int]) -> list[StepReport]:
        """One engine step; a report of each rank, when all its copies have ended."""
        plan = self.half.plan_step(scheduled, lambda name: (blocks,))
        num_jobs = len(plan.loads) + len(plan.saves)
        loads, saves = plan.loads, plan.saves
        reports = []
        for rank in self.ranks:
            plan.loads, plan.saves = list(loads), list(saves)  # each process has a plan of its own
            rank.begin(plan)
            rank.start_loads()
            rank.start_saves()
            report = StepReport()
            until = time.monotonic() + WAIT_S
            while sum(report.done.values()) < num_jobs:
                assert time.monotonic() < until
                rank.take_results()
                report = report.merge(rank.take_report() or StepReport())
            reports.append(report)
        return reports

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def request(name: str, num_tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        num_tokens=num_tokens,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        block_hashes=[bytes([n]) * 32 for n in range(num_tokens // BLOCK)],
        kv_transfer_params=None,
    )


@pytest.fixture(params=["in process", "daemon"])
def pair(request: Any, tmp_path: Path) -> Iterator[Pair]:
    with opened(request.param, tmp_path) as store:
        pair = Pair(store)
        yield pair
        pair.close()


def stored(pair: Pair) -> int:
    """Tokens of the prompt that another request would be promised."""
    other = request("other", 3 * BLOCK + 1)
    pair.half.new_request(other)
    tokens = pair.half.matched(other, 0)[0]
    pair.half.request_finished(other)
    assert tokens is not None
    return tokens


def save(pair: Pair) -> list[StepReport]:
    pair.half.new_request(request("a", 3 * BLOCK + 1))
    return pair.step({"a": 3 * BLOCK + 1}, [1, 2, 3, 4])


def test_each_rank_gets_its_own_half_of_every_page_back(pair: Pair) -> None:
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in pair.tensors]
    for report in save(pair):
        pair.half.reported(report)
    for tensors in pair.tensors:
        for tensor in tensors.values():
            tensor.zero_()

    again = request("b", 3 * BLOCK + 1)
    pair.half.new_request(again)
    assert pair.half.matched(again, 0) == (3 * BLOCK, True)
    pair.half.allocated(again, [[SimpleNamespace(block_id=n, is_null=False) for n in (7, 8, 9, 10)]], 3 * BLOCK)
    for report in pair.step({}, []):
        pair.half.reported(report)

    for rank in range(2):
        for name in ("a", "b"):
            assert torch.equal(pair.tensors[rank][name][7:10], before[rank][name][1:4])
    assert pair.half.store.stats()["leases"] == 0


def test_a_page_that_one_rank_has_not_reported_is_not_stored(pair: Pair) -> None:
    first, second = save(pair)

    pair.half.reported(first)
    assert stored(pair) == 0
    pair.half.reported(second)

    assert stored(pair) == 3 * BLOCK


def test_a_page_that_one_rank_could_not_copy_is_not_stored(pair: Pair) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no copy today")

    pair.ranks[1]._device.copy_out = fail  # type: ignore[method-assign, assignment]

    for report in save(pair):
        pair.half.reported(report)

    assert stored(pair) == 0
    assert pair.half.counters["save_failures"] == 1
    assert pair.half.store.stats()["leases"] == 0

"""The worker's half over tensors of the test's own and a shared slab: bytes arrive, failures are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectors.vllm.layout import EngineLayout
from connectors.vllm.messages import LoadJob, PageCopies, SaveJob, StepPlan, StepReport
from connectors.vllm.worker import WorkerHalf, page_tables
from kvstore.devices.cpu import CpuDevice
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.service.client.slab import AttachedSlab, attach_slab
from kvstore.service.client.store import RemoteStore
from kvstore.tiers.host import HostSlab, SlabHandle
from radix.namespace import Namespace
from tests.helpers.daemons import local_daemon
from tests.helpers.kv_pages import layout_with, packed_axes
from tests.helpers.waiting import WAIT_S

NUM_BLOCKS = 6
LAYER_BYTES = 2 * 4 * 8 * 2  # heads, tokens, content, bytes


def engine_of(shards: int = 1) -> EngineLayout:
    layout = Layout(4, (LayerGroup(GroupKind.FULL, (0, 1), 2 * LAYER_BYTES),), "test", "bfloat16", shards)
    return EngineLayout(layout, (0,), (("a", "b"),), ((LAYER_BYTES, LAYER_BYTES),))


def caches() -> dict[str, torch.Tensor]:
    return {name: torch.randn(NUM_BLOCKS, 2, 4, 8).to(torch.bfloat16) for name in ("a", "b")}


@pytest.fixture
def slab() -> Iterator[HostSlab]:
    slab = HostSlab(8, 4096, shared_name="kvstore-test", huge_pages=False)
    yield slab
    slab.close()


class Rank:
    """One worker half and its tensors."""

    def __init__(self, slab: HostSlab | RemoteStore, rank: int = 0, shards: int = 1, is_early: bool = False) -> None:
        self.waits_for: tuple[str, ...] = ("a", "b")
        self.engine = engine_of(shards)
        self.tensors = caches()
        self.slab = slab
        self.half = WorkerHalf(self.engine, rank, CpuDevice(), is_early=is_early)
        self.half.register(page_tables(self.engine, self.tensors, NUM_BLOCKS))

    def step(
        self, *jobs: LoadJob | SaveJob, layout: str | None = None, num_tokens: int = 1, heard: tuple[int, ...] = ()
    ) -> None:
        loads = [job for job in jobs if isinstance(job, LoadJob)]
        saves = [job for job in jobs if isinstance(job, SaveJob)]
        handles = self.slab.slots.slabs if isinstance(self.slab, RemoteStore) else self.slab.slabs
        plan = StepPlan(num_tokens, layout or self.engine.layout.fingerprint, "", handles, loads, saves)
        plan.heard = heard
        self.half.begin(plan)
        self.half.start_loads()
        for name in self.waits_for:
            self.half.wait_for_layer(name)
        self.half.start_saves()

    def settle(self, num_leases: int) -> tuple[set[str], set[str], StepReport]:
        """Results and report of `num_leases` copies."""
        until = time.monotonic() + WAIT_S
        finished: set[str] = set()
        failed: set[str] = set()
        report = StepReport()
        while len(report.done) < num_leases and time.monotonic() < until:
            new = self.half.take_results()
            finished |= new[0]
            failed |= new[1]
            report = report.merge(self.half.take_report() or StepReport())
            time.sleep(0.001)
        return finished, failed, report


def copies(slots: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[PageCopies, ...]:
    return (PageCopies(0, slots, blocks),)


def test_a_block_comes_back_as_it_was_saved(slab: HostSlab) -> None:
    rank = Rank(slab)
    before = {name: tensor.clone() for name, tensor in rank.tensors.items()}

    rank.step(SaveJob(1, "r", copies((3, 5), (1, 4))))
    rank.settle(1)
    for tensor in rank.tensors.values():
        tensor.zero_()
    rank.step(LoadJob(2, "r", copies((3, 5), (0, 2))))
    finished, failed, report = rank.settle(1)

    assert (finished, failed, report.done) == ({"r"}, set(), {2: 1})
    for name, tensor in rank.tensors.items():
        assert torch.equal(tensor[0], before[name][1])
        assert torch.equal(tensor[2], before[name][4])
        assert not tensor[[1, 3, 4, 5]].any()
    rank.half.close()


def test_through_a_daemon_that_keeps_clients_apart_a_block_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    layout = engine_of().layout
    namespace = Namespace("test", "1", layout.dtype, layout.fingerprint, layout.block_size)
    socket = tmp_path / "kv.sock"
    with (
        local_daemon(socket, service={"isolate": True}),
        connect(f"unix://{socket}", layout, namespace) as store,
    ):
        rank = Rank(store)
        before = {name: tensor.clone() for name, tensor in rank.tensors.items()}
        request = store.request(range(2 * layout.block_size + 1))
        saving = store.prepare_save(request, 0, 2)
        rank.step(SaveJob(1, "r", copies(tuple(page.slot for page in saving.pages), (1, 4))))
        saved = rank.settle(1)
        store.complete(saving)
        for tensor in rank.tensors.values():
            tensor.zero_()

        loading = store.prepare_load(request, 2)
        assert store.wait(loading).num_blocks == 2
        rank.step(LoadJob(2, "r", copies(tuple(page.slot for page in loading.pages), (0, 2))))
        loaded = rank.settle(1)
        store.complete(loading)
        rank.half.close()

    assert (saved[1], saved[2].done) == (set(), {1: 1})
    assert (loaded[1], loaded[2].done) == (set(), {2: 1})
    for name, tensor in rank.tensors.items():
        assert torch.equal(tensor[0], before[name][1])
        assert torch.equal(tensor[2], before[name][4])


def test_a_synchronous_load_has_ended_when_the_step_goes_on(slab: HostSlab) -> None:
    rank = Rank(slab)
    slab.array(0)[:] = 7

    rank.step(LoadJob(1, "r", copies((0,), (3,)), is_async=False))

    assert rank.tensors["a"][3].view(torch.uint8).eq(7).all()
    finished, _, report = rank.settle(1)
    assert finished == set()
    assert report.done == {1: 1}
    rank.half.close()


def test_ranks_lie_side_by_side_in_a_slot(slab: HostSlab) -> None:
    ranks = [Rank(slab, rank, shards=2) for rank in range(2)]
    for rank in ranks:
        rank.step(SaveJob(1, "r", copies((0,), (1,))))
        rank.settle(1)

    page = slab.array(0)[: 4 * LAYER_BYTES].reshape(2, 2, LAYER_BYTES)
    for number, rank in enumerate(ranks):
        for layer, name in enumerate(("a", "b")):
            own = rank.tensors[name][1].reshape(-1).view(torch.uint8).numpy()
            np.testing.assert_array_equal(page[number, layer], own)
        rank.half.close()


def test_with_one_shard_only_the_first_rank_saves(slab: HostSlab) -> None:
    rank = Rank(slab, rank=1, shards=1)

    rank.step(SaveJob(1, "r", copies((0,), (1,))))
    _, _, report = rank.settle(1)

    assert report.done == {1: 1}
    assert not slab.array(0).any()
    rank.half.close()


def test_after_a_sleep_copies_go_where_the_tensors_are_now(slab: HostSlab) -> None:
    rank = Rank(slab)
    slab.array(0)[:] = 7
    before = {name: tensor.clone() for name, tensor in rank.tensors.items()}
    old = {name: tensor.data for name, tensor in rank.tensors.items()}

    rank.half.unregister()
    rank.half.unregister()
    for name, tensor in rank.tensors.items():
        tensor.data = before[name].clone()
    rank.half.register(page_tables(rank.engine, rank.tensors, NUM_BLOCKS))
    rank.step(LoadJob(1, "r", copies((0,), (3,))))
    finished, failed, _ = rank.settle(1)

    assert (finished, failed) == ({"r"}, set())
    for name, tensor in rank.tensors.items():
        assert tensor[3].view(torch.uint8).eq(7).all()
        assert torch.equal(old[name], before[name])
    rank.half.close()


def test_while_asleep_a_copy_fails_and_touches_nothing(slab: HostSlab) -> None:
    rank = Rank(slab)
    before = {name: tensor.clone() for name, tensor in rank.tensors.items()}

    rank.half.unregister()
    rank.step(LoadJob(1, "r", copies((0,), (3,)), is_async=False), SaveJob(2, "s", copies((1,), (1,))))
    _, _, report = rank.settle(2)

    assert report.failed == {1, 2}
    assert all(torch.equal(rank.tensors[name], before[name]) for name in before)
    rank.half.close()


def test_sleep_is_refused_while_a_copy_does_not_end(slab: HostSlab, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(slab)
    go_on = threading.Event()
    monkeypatch.setattr("connectors.vllm.worker.CLOSE_TIMEOUT_S", 0.05)
    copy_out = CpuDevice.copy_out

    def stuck(*arguments: Any) -> Any:
        go_on.wait(WAIT_S)
        return copy_out(*arguments)

    monkeypatch.setattr(CpuDevice, "copy_out", stuck)
    rank.step(SaveJob(1, "r", copies((0,), (1,))))

    with pytest.raises(RuntimeError, match="a copy has not ended"):
        rank.half.unregister()

    go_on.set()
    _, _, report = rank.settle(1)
    assert (report.done, report.failed) == ({1: 1}, set())
    rank.half.close()


@pytest.mark.parametrize("bad", [{"layout": "another"}, {}])
def test_a_load_that_cannot_be_copied_is_told(slab: HostSlab, bad: dict[str, Any]) -> None:
    rank = Rank(slab)
    blocks = (NUM_BLOCKS + 3,) if not bad else (2,)

    rank.step(LoadJob(1, "r", copies((0,), blocks)), **bad)
    finished, failed, report = rank.settle(1)

    assert (finished, failed, report.failed) == ({"r"}, {"r"}, {1})
    assert rank.half.take_bad_blocks() == set(blocks)
    assert rank.half.take_bad_blocks() == set()
    rank.half.close()


def test_after_a_load_failed_inside_a_step_nothing_is_saved_until_the_scheduler_knows(slab: HostSlab) -> None:
    rank = Rank(slab)
    load = LoadJob(1, "r", copies((0,), (NUM_BLOCKS,)), is_async=False)

    # "other" may share the blocks that are missing; the step after was planned before anybody heard.
    rank.step(load, SaveJob(2, "r", copies((1,), (2,))), SaveJob(3, "other", copies((2,), (3,))))
    _, _, report = rank.settle(3)
    rank.step(SaveJob(4, "other", copies((3,), (3,))))
    _, _, next_report = rank.settle(1)

    assert report.failed == {1, 2, 3}
    assert next_report.failed == {4}
    assert not any(slab.array(slot).any() for slot in (1, 2, 3))

    rank.step(SaveJob(5, "other", copies((2,), (3,))), heard=(1,))
    assert rank.settle(1)[2].failed == set()
    assert slab.array(2).any()
    rank.half.close()


def test_a_rank_that_saves_nothing_tells_too_that_a_load_failed(slab: HostSlab) -> None:
    rank = Rank(slab, rank=1)
    load = LoadJob(1, "r", copies((0,), (NUM_BLOCKS,)), is_async=False)

    rank.step(load, SaveJob(2, "r", copies((1,), (2,))))

    assert rank.settle(2)[2].failed == {1, 2}
    rank.half.close()


def test_after_a_forward_that_waited_for_its_layers_a_synchronous_load_goes_beside_it(
    slab: HostSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(slab)
    rank.step()
    copy_in, threads = rank.half._device.copy_in, []

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return copy_in(*arguments)

    monkeypatch.setattr(rank.half._device, "copy_in", note)
    slab.array(0)[:] = 7

    rank.step(LoadJob(1, "r", copies((0,), (3,)), is_async=False))

    assert rank.tensors["a"][3].view(torch.uint8).eq(7).all()
    assert rank.settle(1)[2].done == {1: 1}
    assert set(threads) == {"kvstore-vllm-layers"}
    rank.half.close()


def test_a_load_beside_a_forward_that_did_not_wait_is_told_as_failed(slab: HostSlab) -> None:
    rank = Rank(slab)
    rank.step()
    rank.waits_for = ("a",)

    rank.step(LoadJob(1, "r", copies((0,), (3,)), is_async=False), SaveJob(2, "r", copies((1,), (4,))))

    assert rank.settle(2)[2].failed == {1, 2}
    assert rank.half.take_bad_blocks() == {3}
    rank.half.close()


def test_vllm_may_ask_for_results_before_it_comes_to_the_saves(slab: HostSlab) -> None:
    rank = Rank(slab)
    rank.step()
    plan = StepPlan(1, rank.engine.layout.fingerprint, "", (slab.handle,))
    plan.loads = [LoadJob(1, "r", copies((0,), (3,)), is_async=False)]

    rank.half.begin(plan)
    rank.half.start_loads()
    rank.half.take_results()

    report = rank.half.take_report()
    assert report is not None
    assert report.failed == {1}  # no layer was waited for
    rank.half.start_saves()
    rank.half.close()


@pytest.mark.parametrize("is_early", [True, False])
def test_an_early_load_begins_with_the_step_and_not_after_its_forward(slab: HostSlab, is_early: bool) -> None:
    rank = Rank(slab, is_early=is_early)
    slab.array(0)[:] = 7
    plan = StepPlan(1, rank.engine.layout.fingerprint, "", (slab.handle,), [LoadJob(1, "r", copies((0,), (3,)))])

    rank.half.begin(plan)
    rank.half._loads.flush(WAIT_S)

    assert bool(rank.tensors["a"][3].view(torch.uint8).eq(7).all()) is is_early
    rank.half.start_loads()
    rank.half.start_saves()
    assert rank.settle(1)[2].done == {1: 1}
    rank.half.close()


def test_a_slab_that_is_gone_fails_the_copy_and_not_the_engine(slab: HostSlab) -> None:
    rank = Rank(slab)
    gone = HostSlab(8, 4096, shared_name="kvstore-gone", huge_pages=False)
    rank.slab = gone
    handle = gone.handle
    gone.close()
    plan = StepPlan(1, rank.engine.layout.fingerprint, "", (handle,), [LoadJob(1, "r", copies((0,), (1,)))], [])

    rank.half.begin(plan)
    rank.half.start_loads()
    _, failed, report = rank.settle(1)

    assert failed == {"r"}
    assert "FileNotFoundError" in report.error or "Error" in report.error
    rank.half.close()


def test_finer_kernel_blocks_are_seen_as_the_schedulers(slab: HostSlab) -> None:
    engine = engine_of()
    fine = {name: torch.randn(2 * NUM_BLOCKS, 2, 2, 8).to(torch.bfloat16) for name in ("a", "b")}

    (table,) = page_tables(engine, fine, NUM_BLOCKS)

    assert table.num_pages == NUM_BLOCKS
    assert table.page_stride.tolist() == [LAYER_BYTES, LAYER_BYTES]


def test_tensors_that_do_not_hold_the_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer b has no KV tensor"):
        page_tables(engine_of(), {"a": caches()["a"]}, NUM_BLOCKS)
    with pytest.raises(ConfigError, match="do not lie in it one by one"):
        page_tables(engine_of(), caches(), NUM_BLOCKS - 1)
    split = {name: torch.zeros(2, NUM_BLOCKS, 4, 8).bfloat16().transpose(0, 1) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="do not lie in it one by one"):
        page_tables(engine_of(), split, NUM_BLOCKS)


def test_with_a_lossy_codec_blocks_that_lie_otherwise_than_told_are_refused() -> None:
    layout = layout_with(packed_axes(2, 2, 4, 8), tokens=4)
    engine = EngineLayout(layout, (0,), (("a", "b"),), ((256, 256),))
    tensors = {name: torch.zeros(NUM_BLOCKS, 2, 4, 16).bfloat16() for name in ("a", "b")}
    others = {**tensors, "b": torch.zeros(NUM_BLOCKS, 4, 2, 16).bfloat16()}

    assert page_tables(engine, tensors, NUM_BLOCKS, "small")
    assert page_tables(engine, others, NUM_BLOCKS)
    with pytest.raises(ConfigError, match="codec is 'small', but of the KV of layer b it is not known what lies where"):
        page_tables(engine, others, NUM_BLOCKS, "small")


def test_sizes_that_differ_from_the_configuration_are_refused(slab: HostSlab) -> None:
    rank = Rank(slab)
    layout = Layout(4, (LayerGroup(GroupKind.FULL, (0, 1), 4 * LAYER_BYTES),), "test", "bfloat16")
    other = WorkerHalf(EngineLayout(layout, (0,), (("a", "b"),), ((1, 1),)), 0, CpuDevice())

    with pytest.raises(ConfigError, match="by its configuration"):
        other.register(page_tables(rank.engine, rank.tensors, NUM_BLOCKS))
    other.close()
    rank.half.close()


def test_reports_of_ranks_add_up() -> None:
    one = StepReport(done={1: 1, 2: 1}, failed={2}, loaded_bytes=5, error="why")
    two = StepReport(done={1: 1}, saved_bytes=7)

    both = one.merge(two)

    assert both.done == {1: 2, 2: 1}
    assert both.failed == {2}
    assert (both.loaded_bytes, both.saved_bytes, both.error) == (5, 7, "why")


def test_a_step_that_computes_nothing_waits_for_its_copy(slab: HostSlab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.vllm.worker.IDLE_WAIT_S", 30.0)
    rank = Rank(slab)

    rank.step(LoadJob(1, "r", copies((0,), (3,))), num_tokens=0)

    assert rank.half.take_results() == ({"r"}, set())
    rank.half.close()


def test_a_step_that_computes_waits_for_no_copy(slab: HostSlab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.vllm.worker.IDLE_WAIT_S", 30.0)
    rank, may_copy = Rank(slab), threading.Event()
    copy_in = rank.half._device.copy_in
    rank.half._device.copy_in = lambda *given: may_copy.wait(WAIT_S) and copy_in(*given)  # type: ignore[assignment, method-assign]

    rank.step(LoadJob(1, "r", copies((0,), (3,))))
    first = rank.half.take_results()
    may_copy.set()

    assert first == (set(), set())
    assert rank.settle(1)[0] == {"r"}
    rank.half.close()


def test_a_slab_that_both_copying_threads_map_at_once_is_closed_as_often(
    slab: HostSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=WAIT_S)
    mapped: list[AttachedSlab] = []

    def attach(handle: SlabHandle) -> AttachedSlab:
        one = attach_slab(handle)
        mapped.append(one)
        both.wait()
        return one

    monkeypatch.setattr("connectors.vllm.worker.attach_slab", attach)
    rank = Rank(slab)

    rank.step(SaveJob(1, "r", copies((0,), (2,))), LoadJob(2, "s", copies((1,), (3,)), is_async=True))
    report = rank.settle(2)[2]
    rank.half.close()

    assert (report.done, report.failed) == ({1: 1, 2: 1}, set())
    assert [copy.buffer.size for copy in mapped] == [0, 0]  # and `no_file_is_left` counts their descriptors


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_copy_that_is_interrupted_is_told_once(slab: HostSlab, moment: str) -> None:
    rank = Rank(slab)
    for worker in (rank.half._loads, rank.half._saves):
        do = worker._do

        def interrupted(job: Any, lost: Any, do: Any = do) -> None:
            def cut_short() -> None:
                if moment == "after":
                    job()
                raise SystemExit

            do(cut_short, lost)

        worker._do = interrupted  # type: ignore[method-assign]
    save = SaveJob(1, "r", (PageCopies(0, (0,), (2,)),))
    load = LoadJob(2, "s", (PageCopies(0, (1,), (3,)),), is_async=True)

    rank.step(save, load)
    finished, failed, report = rank.settle(2)
    rank.half.close()

    assert finished == {"s"}
    assert report.done == {1: 1, 2: 1}
    assert (report.failed, failed) == (({1, 2}, {"s"}) if moment == "before" else (set(), set()))

"""The worker's half: copies pages between the engine's blocks and the slots of the shared slab.

One instance per rank, in the process that owns the KV tensors. It decides nothing: each step it gets a `StepPlan`,
hands its copies to a thread each for loads and saves (on CUDA to streams, the threads only wait), and tells what has
ended since the last step. A copy never raises into the engine: what fails is reported, and the request computes.

What makes it right:
* a save's blocks are held by the scheduler until the copy is reported, so nobody overwrites them meanwhile;
* a load's slots are pinned by their lease until the copy is reported;
* after a load failed inside a step nothing is saved until the scheduler has heard of it: blocks that this step and the
  next one fill, of any request that shares the missing ones, may be computed over them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.vllm.cpus import copy_cpus
from connectors.vllm.layers import LayeredLoads
from connectors.vllm.layout import EngineLayout, odd_blocks
from connectors.vllm.messages import IDLE_WAIT_S, LoadJob, PageCopies, SaveJob, StepPlan, StepReport
from kvstore.base import Slab
from kvstore.devices.base import CopyEvent, Device, PageTable
from kvstore.errors import ConfigError
from kvstore.move.worker import Worker
from kvstore.opening import AttachedSlab, attach_slab

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

MIN_PREFILL_TOKENS = 64  # shorter steps tell nothing of the rate of a prefill
MAX_JOBS = 4096  # copies waiting in a thread; one per request and step
CLOSE_TIMEOUT_S = 5.0

Ended = tuple["LoadJob | SaveJob", bool, int, float, str]


class WorkerHalf:
    """Copies for one rank. The engine's worker thread, but for the copies themselves.

    rank:      number of this rank's shard in a slot.
    is_early:  asynchronous loads may begin before the step's forward, as nothing else writes to new blocks.
    on_saved:  called from the copying thread as soon as a save ended, with its lease and whether it is whole; set where
               the scheduler is in this process, so that pages are published without another engine step.
    """

    def __init__(
        self,
        engine: EngineLayout,
        rank: int,
        device: Device,
        *,
        is_early: bool = False,
        on_saved: Callable[[str, int, bool], None] | None = None,
    ) -> None:
        self._engine = engine
        self._layout = engine.layout
        self._device = device
        self._shard = rank if engine.layout.shards > 1 else 0
        self._is_copying_out = engine.layout.shards > 1 or rank == 0  # one shard: one rank saves for all
        self._is_early = is_early and device.name == "cpu"
        self._on_saved = on_saved
        self._layers: LayeredLoads | None = None
        self._tables: list[PageTable] = []
        self._handles: tuple[Slab, ...] = ()
        self._slabs: dict[Slab, AttachedSlab] = {}
        cpus = copy_cpus() if device.name == "cpu" else None
        self._loads = Worker("vllm-load", MAX_JOBS, cpus=cpus)
        self._saves = Worker("vllm-save", MAX_JOBS, cpus=cpus)
        self._ended: deque[Ended] = deque()
        self._open: dict[int, LoadJob | SaveJob] = {}  # by identity: jobs whose end is not booked
        self._report = StepReport()
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._unheard: set[int] = set()  # loads that failed inside a step, as long as the scheduler does not know
        self._bad_blocks: set[int] = set()
        self.plan = StepPlan()
        self._started_at = 0.0
        self._is_in_forward = False

    def register(self, tables: Sequence[PageTable]) -> None:
        """Learn where the engine keeps its blocks, one table per layer group. Raises ConfigError if sizes differ."""
        self.unregister()
        for index, (table, group) in enumerate(zip(tables, self._layout.groups, strict=True)):
            if table.page_bytes != group.page_bytes:
                raise ConfigError(
                    f"vLLM: a block of layer group {index} is {table.page_bytes} bytes in memory, "
                    f"{group.page_bytes} by its configuration; the connector cannot store it"
                )
        self._tables = list(tables)
        if self._device.name == "cpu" and len(self._tables) == 1:
            self._layers = LayeredLoads(self._device, self._engine.layer_names[0], self._tables[0])

    def unregister(self) -> None:
        """Forget where the blocks are: they are about to go. A copy that is asked for later fails. Idempotent.

        Raises RuntimeError if a copy does not come to its end: it would go on in memory that is not there any more.
        """
        if not (self._loads.flush(CLOSE_TIMEOUT_S) and self._saves.flush(CLOSE_TIMEOUT_S)):
            raise RuntimeError(f"kvstore: a copy has not ended within {CLOSE_TIMEOUT_S:.0f} s; the KV cache is in use")
        self._tables = []
        if self._layers is not None:
            self._layers.close()
            self._layers = None

    # ---- one step ---------------------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> None:
        """A step begins; its plan is bound until the next one."""
        self.plan = plan
        self._started_at = time.perf_counter()
        self._is_in_forward = True
        self._unheard.difference_update(plan.heard)
        if plan.slabs is not None:
            self._use(plan.slabs)
        if self._is_early:
            self._start_loads([job for job in plan.loads if job.is_async])
            plan.loads = [job for job in plan.loads if not job.is_async]

    def start_loads(self) -> None:
        """Start the plan's loads; the forward may begin with those that are not asynchronous."""
        self._start_loads(self.plan.loads)
        self.plan.loads = []

    def wait_for_layer(self, name: str) -> None:
        """The forward is about to read the blocks of a layer."""
        if self._layers is not None:
            self._layers.wait(name)

    def start_saves(self) -> None:
        """Start the plan's saves; the forward has been given to the device."""
        plan = self.plan
        self._end_forward()
        if plan.saves:
            self._collect()
        for job in plan.saves:
            self._open[id(job)] = job
            if self._unheard or not self._fits(plan):
                self._end(job, False, 0, 0.0, "")
            elif not self._is_copying_out:
                self._end(job, True, 0, 0.0, "")
            elif not self._submit(self._saves, job):
                self._end(job, False, 0, 0.0, "too many copies are waiting")
        plan.saves = []

    def take_results(self) -> tuple[set[str], set[str]]:
        """Requests whose asynchronous load ended since the last call, and those of them that failed."""
        self._end_forward()  # with a draft model vLLM asks before it has come to the saves
        if not self.plan.num_tokens:
            self._wait_for_copies()
        self._collect()
        finished, self._finished = self._finished, set()
        failed, self._failed = self._failed & finished, set()
        return finished, failed

    def take_bad_blocks(self) -> set[int]:
        """Engine blocks that were promised and are not filled, since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_report(self) -> StepReport | None:
        """The message to the scheduler; None if there is nothing."""
        if self._report.is_empty:
            return None
        report, self._report = self._report, StepReport()
        return report

    def close(self) -> None:
        """Finish the copies under way and let the slab go. Idempotent."""
        if self._layers is not None:
            self._layers.close()
        self._loads.close(CLOSE_TIMEOUT_S)
        self._saves.close(CLOSE_TIMEOUT_S)
        self._device.close()
        self._tables = []
        self._use(())

    def _wait_for_copies(self) -> None:
        # vLLM steps on as fast as it can while nothing but a copy is under way, and then holds the interpreter: the
        # copying thread gets it only after 5 ms, once to begin and once to tell its end. So the engine waits here.
        if not self._ended and self._loads.flush(IDLE_WAIT_S) and not self._ended:
            self._saves.flush(IDLE_WAIT_S)

    def _end_forward(self) -> None:
        """The forward is over: book it, and the loads beside it. Once a step."""
        if not self._is_in_forward:
            return
        self._is_in_forward = False
        num_tokens = self.plan.num_tokens
        beside = self._layers.finish(num_tokens) if self._layers is not None else []
        for load in beside:
            self._end(load.job, not load.error, load.num_bytes, load.seconds, load.error)
        if num_tokens >= MIN_PREFILL_TOKENS and self._device.name == "cpu" and not beside:
            self._report.forward_seconds += time.perf_counter() - self._started_at
            self._report.forward_tokens += num_tokens

    # ---- copying ----------------------------------------------------------------------------------------------

    def _start_loads(self, jobs: Sequence[LoadJob]) -> None:
        for job in jobs:
            self._open[id(job)] = job
            if job.is_bad or not self._fits(self.plan):
                self._end(job, False, 0, 0.0, "" if job.is_bad else "the slab or the layout is not the scheduler's")
            elif job.is_async:
                if not self._submit(self._loads, job):
                    self._end(job, False, 0, 0.0, "too many copies are waiting")
            elif not self._start_beside(job):
                self._run(job, self.plan.half)

    def _start_beside(self, job: LoadJob) -> bool:
        """Copy beside the forward, if that is known to be right here."""
        layers = self._layers
        if layers is None or not layers.is_proven or not job.copies:
            return False
        (part,) = job.copies
        return layers.start(job, lambda: self._shard_slots(part))

    def _fits(self, plan: StepPlan) -> bool:
        return plan.layout == self._layout.fingerprint

    def _submit(self, worker: Worker, job: LoadJob | SaveJob) -> bool:
        # CUDA orders copies after what the engine's stream was given so far: they are given to it here, in the engine's
        # thread, and only waited for in ours. A CPU copies where it is told to, so that is the thread.
        begun = self._start(job) if self._device.name != "cpu" else None
        half = self.plan.half
        return worker.submit(lambda: self._run(job, half, begun), lost=lambda: self._lose(job, begun))

    def _lose(self, job: LoadJob | SaveJob, begun: list[CopyEvent] | str | None) -> None:
        """The copying thread was interrupted, or closed, before a job's end was told, or just after."""
        for event in begun if isinstance(begun, list) else ():
            with contextlib.suppress(Exception):  # what the device has begun still reads and writes the slots
                event.wait()
        self._end(job, False, 0, 0.0, "the copying thread was interrupted, or closed")

    def _start(self, job: LoadJob | SaveJob) -> list[CopyEvent] | str:
        """Begin a job's copies; a text says why not."""
        try:
            events: list[CopyEvent] = []
            for part in job.copies:
                slots = self._shard_slots(part)
                table = self._tables[part.group]
                copy = self._device.copy_in if isinstance(job, LoadJob) else self._device.copy_out
                events.append(copy(table, part.blocks, slots))
            return events
        except Exception as error:  # a device may fail in its own ways; the engine must not
            return f"{type(error).__name__}: {error}"

    def _run(self, job: LoadJob | SaveJob, half: str, begun: list[CopyEvent] | str | None = None) -> None:
        started = time.perf_counter()
        if begun is None:
            begun = self._start(job)
        error = begun if isinstance(begun, str) else ""
        if not isinstance(begun, str):
            try:
                for event in begun:
                    event.wait()
            except Exception as failure:  # as above
                error = f"{type(failure).__name__}: {failure}"
        num_bytes = sum(len(part.slots) * self._layout.groups[part.group].page_bytes for part in job.copies)
        self._end(job, not error, num_bytes, time.perf_counter() - started, error)
        if isinstance(job, SaveJob) and self._on_saved is not None:
            self._on_saved(half, job.lease, not error)

    def _shard_slots(self, part: PageCopies) -> list[npt.NDArray[np.uint8]]:
        size = self._layout.groups[part.group].page_bytes
        start = self._shard * size
        slab = self._mapped(part.slots[0])
        return [slab.array(slot)[start : start + size] for slot in part.slots]

    def _mapped(self, slot: int) -> AttachedSlab:
        """The slab that a slot lies in, and with it all of its lease."""
        for handle in self._handles:
            if handle.holds(slot):
                slab = self._slabs.get(handle)
                return slab if slab is not None else self._map(handle)
        raise ConfigError(f"slot {slot} lies in none of the {len(self._handles)} slabs of the plan")

    def _map(self, handle: Slab) -> AttachedSlab:
        # Two threads may get here at once: both map it, one mapping is kept, and the other must be closed. Nothing
        # else would: it has a descriptor, and with a daemon a connection.
        slab = attach_slab(handle)
        self._device.register(slab.buffer)
        kept = self._slabs.setdefault(handle, slab)
        if kept is not slab:
            self._device.unregister(slab.buffer)
            slab.close()
        return kept

    def _use(self, handles: tuple[Slab, ...]) -> None:
        """Slots lie in these slabs. No copy of ours is under way in others: their leases have ended."""
        self._handles = handles
        for handle in [known for known in list(self._slabs) if known not in handles]:
            slab = self._slabs.pop(handle)
            self._device.unregister(slab.buffer)
            slab.close()

    def _end(self, job: LoadJob | SaveJob, ok: bool, num_bytes: int, seconds: float, error: str) -> None:
        if isinstance(job, LoadJob) and not ok and not job.is_async:
            self._unheard.add(job.lease)
        self._ended.append((job, ok, num_bytes, seconds, error))

    def _collect(self) -> None:
        """Book what ended; the engine's thread."""
        while self._ended:
            job, ok, num_bytes, seconds, error = self._ended.popleft()
            if self._open.pop(id(job), None) is None:
                continue  # told, and lost after that
            report = self._report
            report.done[job.lease] = report.done.get(job.lease, 0) + 1
            if not ok:
                report.failed.add(job.lease)
                report.error = report.error or error
                if error:
                    log.warning("kvstore: %s of request %s failed: %s", type(job).__name__, job.request, error)
            if isinstance(job, SaveJob):
                report.saved_bytes += num_bytes if ok else 0
                report.save_seconds += seconds
                continue
            report.loaded_bytes += num_bytes if ok else 0
            report.load_seconds += seconds
            if job.is_async:
                self._finished.add(job.request)
            if not ok:
                self._bad_blocks.update(job.blocks)
                if job.is_async:
                    self._failed.add(job.request)


def page_tables(
    engine: EngineLayout, kv_caches: Mapping[str, Any], num_blocks: int, lossy_codec: str = ""
) -> list[PageTable]:
    """The memory of the engine's blocks, by layer group.

    A layer's tensor may be cut finer than the scheduler's blocks (kernel blocks), padded, or interleaved with other
    layers; what counts is where its first block begins, how far the next one is, and how many bytes it has.

    lossy_codec: of tiers in this process; "" for none.

    Raises ConfigError if a layer is missing, if its blocks are not equally far apart, or if tiers store with loss and
    its elements lie otherwise than the layout says.
    """
    tables: list[PageTable] = []
    for group, names, sizes in zip(engine.layout.groups, engine.layer_names, engine.layer_bytes, strict=True):
        bases: list[int] = []
        strides: list[int] = []
        tensors: list[Any] = []
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            if name not in kv_caches:
                raise ConfigError(f"vLLM: layer {name} has no KV tensor among {len(kv_caches)}")
            tensor = kv_caches[name]
            pieces, rest = divmod(int(tensor.shape[0]), num_blocks)
            stride = int(tensor.stride(0)) * int(tensor.element_size()) * pieces
            inside = 1 + sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
            if rest or not pieces or stride < size or (pieces == 1 and inside * tensor.element_size() > size):
                raise ConfigError(
                    f"vLLM: the KV tensor of layer {name} has shape {tuple(tensor.shape)} and strides "
                    f"{tuple(tensor.stride())}; {num_blocks} blocks of {size} bytes do not lie in it one by one"
                )
            odd = odd_blocks(group.axes[2 * index : 2 * index + 2], tensor.shape, tensor.stride())
            if odd and lossy_codec:
                raise ConfigError(
                    f"codec is {lossy_codec!r}, but of the KV of layer {name} it is not known what lies where: {odd}; "
                    "exact and lossless take any page"
                )
            if odd:
                log.info("KV of layer %s: %s; where a daemon's codecs lose something, they lose more", name, odd)
            bases.append(int(tensor.data_ptr()))
            strides.append(stride)
            tensors.append(tensor)
        column = np.asarray(sizes, np.int64)
        tables.append(
            PageTable(
                base=np.asarray(bases, np.int64),
                page_stride=np.asarray(strides, np.int64),
                num_runs=np.ones(len(bases), np.int64),
                run_stride=column,
                run_bytes=column,
                num_pages=num_blocks,
                keep_alive=tuple(tensors),
            )
        )
    return tables

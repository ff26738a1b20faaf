"""vLLM: prefixes survive eviction from the engine's own cache, restarts, and are shared by replicas.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "connectors.vllm", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": {"capacity_bytes": "8GiB"}, "disk": {"path": "/var/cache/kv"}}}'

vLLM makes one `KVStoreConnector` in its engine core (scheduler role) and one in every worker. This class only
translates; the scheduler's half decides (scheduler.py), the worker's half copies (worker.py). docs/vllm.md
draws what runs where.

The promise: nothing of ours raises inside an engine step. Every hook that vLLM calls there is guarded; an error is
logged, counted, and answered with what makes the engine go on without us.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from connectors.vllm import versions
from connectors.vllm.config import parse_extra_config
from connectors.vllm.layout import engine_layout
from connectors.vllm.messages import StepPlan, StepReport
from connectors.vllm.metrics import KVStorePromMetrics, KVStoreStats, Snapshots
from connectors.vllm.scheduler import SchedulerHalf
from connectors.vllm.start import open_half
from connectors.vllm.worker import WorkerHalf, page_tables
from kvstore.devices.base import Device
from kvstore.errors import ConfigError
from kvstore.opening import lossy_codec

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

STATS_INTERVAL_S = 0.5
CLOSE_TIMEOUT_S = 10.0

# Scheduler halves of this process by name: a worker half beside one of them publishes at once.
_NEIGHBOURS: dict[str, SchedulerHalf] = {}

T = TypeVar("T")


def quiet(default: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Guard a hook: an exception is logged and counted, and `default()` is the answer. Also measures the hook."""

    def wrap(hook: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(hook)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> T:
            started = time.perf_counter()
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # the engine must go on: this is the top of our part of its step
                self._hook_errors += 1
                if self._hook_errors <= 10 or self._hook_errors % 1000 == 0:
                    log.exception("kvstore: %s failed (%d errors so far)", hook.__name__, self._hook_errors)
                answer: T = default()
                return answer
            finally:
                self._hook_seconds += time.perf_counter() - started

        return guarded

    return wrap


@dataclass
class KVStoreMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not typed for us
    """A `StepPlan` on its way to the workers."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class KVStoreWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A `StepReport` on its way to the scheduler."""

    report: StepReport = field(default_factory=StepReport)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge the reports of two ranks."""
        return KVStoreWorkerMetadata(self.report.merge(other.report))


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The connector that vLLM loads. Raises ConfigError at the start for whatever could not work later."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        versions.check_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._hook_errors = 0
        self._hook_seconds = 0.0
        self._steps = 0
        self._config = parse_extra_config(transfer.kv_connector_extra_config, transfer.kv_role)
        if not vllm_config.cache_config.enable_prefix_caching and not self._config.fields.without_prefix_caching:
            raise ConfigError(
                "vLLM's prefix caching is off: by --no-enable-prefix-caching, or because vLLM turns it off for this "
                'model on this platform. If it was you, set "without_prefix_caching": true in '
                "kv_connector_extra_config. vLLM turns it off for MLA on CPUs without AMX: there that gives right "
                "tokens to models whose positions are scaled by DeepSeek's YaRN, and wrong ones to those with plain "
                'rotary positions (docs/vllm.md, "What is refused")'
            )
        self._engine = engine_layout(vllm_config, kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            if transfer.kv_load_failure_policy != "recompute":
                log.warning(
                    "kvstore: kv_load_failure_policy is %r; set it to 'recompute', or a request whose pages cannot be "
                    "copied ends with an error instead of being computed",
                    transfer.kv_load_failure_policy,
                )
            # Elsewhere vLLM goes on with wrong tokens after a load has failed inside a step: it has no name for blocks
            # of several groups, and recovers wrongly with asynchronous scheduling (its issue 49250), which CPUs lack.
            is_beside = (
                len(kv_cache_config.kv_cache_groups) == 1
                and vllm_config.device_config.device_type == "cpu"
                and not vllm_config.scheduler_config.async_scheduling
            )
            if self._config.fields.load == "sync" and not is_beside:
                raise ConfigError(
                    'kv_connector_extra_config: load is "sync", which needs a model of one layer group on CPU: '
                    'elsewhere vLLM does not recover from a copy that fails inside a step; leave it out ("auto")'
                )
            self._scheduler = open_half(
                vllm_config,
                self._config,
                self._engine,
                vllm.__version__,
                is_beside=is_beside,
                is_whole=self._config.fields.load != "sync"
                and versions.can_load_whole(vllm_config, self._engine.layout),
            )
            _NEIGHBOURS[self._scheduler.name] = self._scheduler
            self._snapshots = Snapshots()
            self._stats_at = 0.0
            self._cleared = False
            events = getattr(vllm_config, "kv_events_config", None)
            self._tells_events = bool(events and events.enable_kv_cache_events)
            if self._tells_events:
                self._scheduler.announce()

    # ---- worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learn the engine's KV tensors; at the start, so it may raise ConfigError."""
        parallel = self._vllm_config.parallel_config
        rank = int(getattr(parallel, "rank", 0)) % int(parallel.tensor_parallel_size)
        self._worker = WorkerHalf(
            self._engine,
            rank,
            _device(next(iter(kv_caches.values()))),
            # vLLM zeroes new blocks of some models in the step in which they are given, after its first call of us.
            is_early=not getattr(self._kv_cache_config, "needs_kv_cache_zeroing", True),
            on_saved=_tell_neighbour,
        )
        self._kv_caches = kv_caches
        self.restore_kv_caches()

    def unregister_kv_caches(self) -> None:
        """Sleep (0.33): the memory of the KV tensors is about to go. Raises RuntimeError if a copy does not end."""
        if self._worker is not None:
            self._worker.unregister()

    def restore_kv_caches(self) -> None:
        """The KV tensors have memory again, maybe elsewhere."""
        if self._worker is not None:
            num_blocks, codec = self._kv_cache_config.num_blocks, lossy_codec(self._config.store)
            self._worker.register(page_tables(self._engine, self._kv_caches, num_blocks, codec))

    @quiet(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """The first call of a step. Blocks under a save are held by the scheduler, so nothing has to be waited for."""
        if self._worker is not None:
            self._worker.begin(kv_connector_metadata.plan)

    @quiet(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's loads."""
        if self._worker is not None:
            metadata = self._get_connector_metadata()
            if metadata.plan is not self._worker.plan:
                self._worker.begin(metadata.plan)
            self._worker.start_loads()

    @quiet(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for a layer's blocks of loads beside this forward."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are copied whole after the forward."""

    @quiet(lambda: None)
    def wait_for_save(self) -> None:
        """Start the step's saves. Their blocks are held until they are reported; nothing waits here."""
        if self._worker is not None:
            self._worker.start_saves()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The older form of get_transfer_results."""
        results = self.get_transfer_results(finished_req_ids)
        return None, results.finished_recving or None

    @quiet(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose load ended."""
        if self._worker is None:
            return KVConnectorTransferResults()
        finished, failed = self._worker.take_results()
        # Blocks of several groups have overlapping numbers: there a failure is told by the request's name.
        by_name = len(self._kv_cache_config.kv_cache_groups) > 1
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed if by_name else set())

    @quiet(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were promised and could not be filled."""
        if self._worker is None:
            return set()
        blocks = self._worker.take_bad_blocks()
        return set() if len(self._kv_cache_config.kv_cache_groups) > 1 else blocks

    @quiet(lambda: None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The copies of this rank since the last step."""
        report = self._worker.take_report() if self._worker is not None else None
        return None if report is None else KVStoreWorkerMetadata(report)

    # ---- scheduler --------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache; a save that does not happen is a miss later."""
        return False

    @quiet(lambda: None)
    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Learn the pool in which blocks under a save are held."""
        self._half.bind_pool(gpu_block_pool)

    @quiet(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """A request came."""
        self._half.new_request(request)

    @quiet(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded after those that vLLM has itself; None: ask again."""
        return self._half.matched(request, num_computed_tokens)

    @quiet(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM has blocks for the request."""
        try:
            self._half.allocated(request, blocks.blocks, num_external_tokens)
        except Exception:
            # vLLM counts on the load now and would wait for it for ever: tell it that it failed.
            if num_external_tokens:
                self._half.refuse(request, blocks.blocks)
            raise

    @quiet(dict)
    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """The origin of the loaded tokens."""
        return versions.hit_sources(self._half.hit_sources(request, num_external_tokens))

    @quiet(KVStoreMetadata)
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The plan of the step that was just scheduled."""
        self._steps += 1
        ids = functools.partial(versions.null_safe_block_ids, scheduler_output)
        return KVStoreMetadata(self._half.plan_step(scheduler_output.num_scheduled_tokens, ids))

    @quiet(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """The news of the workers."""
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            self._half.reported(metadata.report)

    @quiet(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks may go at once. Its answer says what became of its hints."""
        return False, self._half.request_finished(request)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished, for models with several layer groups."""
        return self.request_finished(request, block_ids)

    @quiet(lambda: False)
    def has_pending_push_work(self) -> bool:
        """True while saves are being copied: their end is told in a step."""
        return self._half.is_saving

    @quiet(lambda: False)
    def has_pending_block_frees(self) -> bool:
        """True while blocks are held for saves: better wait for them than preempt a request."""
        return self._half.is_saving

    @quiet(lambda: False)
    def reset_cache(self) -> bool:
        """Forget everything, as after new weights: nothing stored before is found by this engine again."""
        self._half.reset(f"reset {uuid.uuid4().hex}")
        self._cleared = True
        return True

    @quiet(tuple)
    def take_events(self) -> Iterable[Any]:
        """Which blocks can be had from this engine, for routers."""
        if not self._tells_events:
            return ()
        block_size = self._engine.layout.block_size
        events = [versions.kv_event(news, block_size) for news in self._half.take_news()]
        if self._cleared:
            self._cleared = False
            events.insert(0, versions.all_cleared())
        return events

    @quiet(lambda: None)
    def get_kv_connector_stats(self) -> KVStoreStats | None:
        """A snapshot, not more often than every STATS_INTERVAL_S while requests run."""
        if self._scheduler is None:
            return None
        now = time.monotonic()
        if now - self._stats_at < STATS_INTERVAL_S and self._scheduler.is_busy:
            return None
        self._stats_at = now
        counters = self._scheduler.counters
        counters["hook_seconds"] = self._hook_seconds - counters["rest_seconds"]  # a rest is inside a hook
        counters["steps"] = self._steps
        counters["hook_errors"] = self._hook_errors
        return KVStoreStats(data=self._snapshots.take(counters, self._scheduler.store.stats()))

    # ---- both -------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Finish copies, write behind what is left, stop all threads."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            _NEIGHBOURS.pop(self._scheduler.name, None)
            self._scheduler.close(CLOSE_TIMEOUT_S)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Layers apart, a block of a layer in one piece."""
        return "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStoreStats:
        """Stats that came from another process."""
        return KVStoreStats(data=data if data is not None else {"added": {}, "now": {}})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVStorePromMetrics:
        """`vllm:kvstore_*` of vLLM's /metrics."""
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _half(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler


def _device(tensor: Any) -> Device:
    """How to copy to and from the engine's memory."""
    if tensor.device.type == "cpu":
        from kvstore.devices.cpu import CpuDevice

        return CpuDevice()
    if tensor.device.type == "cuda":
        from kvstore.devices.cuda import CudaDevice

        return CudaDevice(tensor.device.index or 0)
    raise ConfigError(f"vLLM: the KV cache is on {tensor.device}; the connector supports cpu and cuda")


def _tell_neighbour(name: str, lease: int, ok: bool) -> None:
    half = _NEIGHBOURS.get(name)
    if half is not None:
        half.saved(lease, ok)

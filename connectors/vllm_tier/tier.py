"""A secondary tier of vLLM's own offloading: vLLM copies between GPU and host memory, we add disk and Redis below.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 34359738368, "secondary_tiers": [
            {"type": "KVStoreTier", "module_path": "connectors.vllm_tier",
             "disk": {"path": "/nvme/kv", "capacity_bytes": "200GiB"}, "redis": {"url": "redis://cache:6379"}}]}}'

One tier class owns both media. vLLM asks its tiers one after the other, loads a chunk from the first that has it and
has no second try: with two tiers, a page that is torn on disk would be computed though Redis has it, and each tier
would probe, pin and count for itself. One tier sees one lookup, prefers the faster medium and falls back within a job.

Every method is called from vLLM's scheduler thread and returns at once; the threads are those of the lanes
(kvstore.move). Nothing is raised after the start: errors are logged, counted, and answered as a miss. The logic, which
needs no vLLM, is in core.py and what it names.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import vllm
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, ParentManager, SecondaryTierManager, TransferJob

from connectors.vllm import hints, versions
from connectors.vllm.identity import chunk_namespace, find_engine_config
from connectors.vllm.layout import chunk_layout
from connectors.vllm_tier.chunks import TierSettings
from connectors.vllm_tier.config import TierConfig, parse_tier_config
from connectors.vllm_tier.core import TierCore
from connectors.vllm_tier.hints import RequestHints
from connectors.vllm_tier.jobs import JobDone
from connectors.vllm_tier.lookup import LookupAnswer
from connectors.vllm_tier.metrics import TierSamples, definitions
from kvstore.build import hint_limits, open_rows
from kvstore.errors import ConfigError
from kvstore.layout import Layout

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

_ANSWERS = {
    LookupAnswer.HIT: LookupResult.HIT,
    LookupAnswer.MISS: LookupResult.MISS,
    LookupAnswer.ASK_AGAIN: LookupResult.RETRY,
}
_MAX_LOGGED = 10


class KVStoreTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM's classes are untyped here
    """Disk and Redis below vLLM's host memory. Raises ConfigError (or LayoutMismatch) at the start only."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **given: Any,
    ) -> None:
        """Open the media that `given`, the keys of the entry in `secondary_tiers`, turns on.

        primary_kv_view: vLLM's host memory, [chunks, bytes of a chunk]; borrowed until `shutdown`.
        """
        versions.check_version(vllm.__version__)
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = parse_tier_config(given)
        vllm_config = find_engine_config()
        layout = chunk_layout(offloading_spec.config, self.block_size_bytes)
        namespace = chunk_namespace(
            vllm_config,
            layout,
            weights=config.fields.weights,
            vllm_version=vllm.__version__,
            adapters_by_name=config.fields.adapters_by_name,
        )
        self._num_errors = 0
        self._num_fills = 0
        self._is_open = True
        self._close_timeout_s = config.fields.close_timeout_s
        self.locality = _locality(config)
        tells_events = _tells_events(config, offloading_spec)
        mover = open_rows(config.store, layout, primary_kv_view.cast("B"), self.block_size_bytes)
        self.core = TierCore(mover, _settings(config, namespace.root(), mover.num_rows, layout))
        self.core.jobs.keeps_events = tells_events
        self._samples = TierSamples(self.core)
        log.info(
            "kvstore tier: chunks of %d KiB, %d layer groups, namespace %s, on %s",
            self.block_size_bytes >> 10,
            len(layout.groups),
            namespace.root().hex()[:12],
            " and ".join(mover.tiers),
        )

    # ---- lookup ---------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks as they are computed; what came from a tier is not stored again."""
        try:
            if (messages := hints.messages(req_context)) and (asked := self.core.hints.came(messages)) is not None:
                req_context.set_state(asked)
        except Exception:
            self._note_error("on_new_request")
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request is over, and so are its stores but for what is under way."""
        try:
            asked = req_context.get_state(RequestHints)
            if asked is not None:
                self.core.hints.finished(asked, lambda key: req_context.get_offload_key_position(OffloadKey(key)))
        except Exception:
            self._note_error("on_request_finished")

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT, MISS, or RETRY while the media are being asked."""
        try:
            self._saw(req_context, (key,))
            return _ANSWERS[self.core.lookup(key)]
        except Exception:
            self._note_error("lookup")
            return LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Chunks were used."""
        try:
            self._saw(req_context, keys)
            self.core.touch(list(reversed(list(keys))))  # tail first: a leaf must look older than its parent
        except Exception:
            self._note_error("touch")

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """The end of a scheduler step: ask the media about everything this step wanted to know."""
        try:
            self.core.end_step()
        except Exception:
            self._note_error("on_schedule_end")

    # ---- jobs -----------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to store rows; they are pinned until the job is reported."""
        job = job_metadata
        self._saw(job.req_context, job.keys)
        self._guard("submit_store", job, self.core.jobs.save)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to fill rows."""
        job = job_metadata
        self._guard("submit_load", job, self.core.jobs.load)

    def serve_external_requests(self, parent: ParentManager) -> None:
        """Once a step: chunks that came from Redis are written to our disk too, from vLLM's rows.

        vLLM offers only what it has computed; this call is meant for remote readers, and the only one in which a tier
        may have rows pinned for it.
        """
        try:
            keys = self.core.jobs.take_fills()
            if keys:
                self._fill(parent, [OffloadKey(key) for key in keys])
        except Exception:
            self._note_error("serve_external_requests")

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that ended since the last call."""
        return [_result(done) for done in self.core.take_done()]

    def has_pending_work(self) -> bool:
        """True while a job is under way, or chunks are to be deleted: vLLM must go on stepping."""
        return self.core.jobs.has_any or self.core.hints.is_forgetting

    def drain_jobs(self) -> None:
        """Return when every job has ended, at the latest at its deadline."""
        self.core.drain()

    def shutdown(self) -> None:
        """Store what is under way, within `close_timeout_s`, and close the media. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        num_cut = self.core.close(self._close_timeout_s)
        if num_cut:
            log.warning("kvstore tier: %d jobs were cut off after %.1f s", num_cut, self._close_timeout_s)

    # ---- what operators and routers see ---------------------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        """The chunks that were stored, and those that turned out to be gone."""
        jobs = self.core.jobs
        stored, jobs.stored = jobs.stored, []
        lost, jobs.lost = jobs.lost, []
        for keys, removed in ((stored, False), (lost, True)):
            if keys:
                yield OffloadingEvent(
                    keys=[OffloadKey(key) for key in keys],
                    medium=self.medium,
                    removed=removed,
                    locality=self.locality,
                    ownership=self.tier_type,
                )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """`vllm:kvstore_tier_*`. Also where the entry's keys are first checked."""
        parse_tier_config({key: value for key, value in extra_config.items() if key not in _VLLMS_OWN})
        kinds = {True: OffloadingCounterMetadata, False: OffloadingGaugeMetadata}
        return {
            metric.name: kinds[metric.is_counter](documentation=metric.help, labelnames=metric.labels)
            for metric in definitions()
        }

    def get_stats(self) -> Any:
        """The counts since the last call, or None."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        samples = self._samples.take()
        if not samples:
            return None
        stats = OffloadingConnectorStats()
        for sample in samples:
            record = stats.increase_counter if sample.is_counter else stats.set_gauge
            record(sample.name, sample.value, sample.labels)
        return stats

    # ---- private --------------------------------------------------------------------------------------------------

    def _saw(self, req_context: ReqContext, keys: Collection[OffloadKey]) -> None:
        """Note chunks of a request whose hints wait for its end."""
        asked = req_context.get_state(RequestHints)
        if asked is not None:
            asked.saw(keys)

    def _fill(self, parent: ParentManager, keys: list[OffloadKey]) -> None:
        self._num_fills += 1
        context = ReqContext(f"kvstore-fill-{self._num_fills}")
        parent.on_new_request(context)
        try:
            answers = [parent.lookup(key, context) for key in keys]
            ready = [key for key, answer in zip(keys, answers, strict=True) if answer is LookupResult.HIT]
            # A load whose end vLLM has not taken yet; what is neither has left host memory again.
            soon = [key for key, answer in zip(keys, answers, strict=True) if answer is LookupResult.HIT_PENDING]
            self.core.jobs.fill_later(soon)
            if ready:
                self._guard("fill_store", parent.create_store_job(ready, context), self.core.jobs.fill)
        finally:
            parent.on_request_finished(context)

    def _guard(self, name: str, job: TransferJob, begin: Any) -> None:
        try:
            begin(job.job_id, list(job.keys), job.chunk_ids.tolist())
        except Exception:
            self._note_error(name)
            self.core.jobs.fail(job.job_id, not name.endswith("store"), len(job.keys))

    def _note_error(self, name: str) -> None:
        self._num_errors += 1
        if self._num_errors <= _MAX_LOGGED or self._num_errors % 1000 == 0:
            log.exception("kvstore tier: %s failed (%d errors so far)", name, self._num_errors)


_VLLMS_OWN = ("type", "module_path", "backpressure")


def _result(done: JobDone) -> JobResult:
    return JobResult(
        job_id=done.job_id,
        success=done.success,
        successful_keys=done.ok if done.is_load and done.ok and not done.success else None,
        transfer_time=done.seconds,
        transfer_bytes=done.num_bytes,
    )


def _settings(config: TierConfig, root: bytes, num_rows: int, layout: Layout) -> TierSettings:
    store = config.store.store
    return TierSettings(
        root=root,
        batch_pages=store.lane_batch_pages,
        max_saving_rows=max(1, int(store.max_dirty_fraction * num_rows)),
        lookup_deadline_s=store.lookup_deadline_s,
        load_deadline_s=store.load_deadline_s,
        touch_interval_s=store.touch_interval_s,
        hints=hint_limits(config.store),
        num_groups=len(layout.groups),
        chunk_tokens=layout.block_size,
        ttl_s={kind.name: kind.value(section, "ttl_s", 0.0) for kind, section in config.store.tiers()},
    )


def _tells_events(config: TierConfig, offloading_spec: Any) -> bool:
    if not config.fields.enable_kv_events:
        return False
    if not offloading_spec.kv_events_config.enable_kv_cache_events:
        raise ConfigError("KVStoreTier: enable_kv_events is true, but vLLM's kv_events_config is off: turn that on too")
    return True


def _locality(config: TierConfig) -> Locality | None:
    if config.fields.locality is not None:
        return Locality(config.fields.locality)
    media = {kind.medium for kind, _ in config.store.tiers()}
    if len(media) > 1:
        return None  # both: a request that chooses by place is not kept from either
    return Locality.LOCAL if media == {"storage"} else Locality.REMOTE

"""The secondary tier without vLLM: lookups, and jobs that move chunks between rows of vLLM's host memory and our tiers.

vLLM calls every method from its scheduler's thread, several times in each step, so all bookkeeping lives there and
needs no lock: lanes answer through a queue that is emptied at the start of a call.

    lookup        -> Lookups; what nobody knows is asked for at the end of the step (`end_step`), one batch per tier
    fill          -> what came from Redis is also written to the disk that lacks it, once it is in vLLM's host memory
    load job      -> per chunk the first tier that has it (disk before Redis); what that one does not give is asked of
                     the next; chunks that arrive are kept, the others are computed
    save job      -> every tier that is up, in batches; a job is done when all have answered

Every job ends: loads at `load_deadline_s`, saves at SAVE_DEADLINE_S, each plus GRACE_S for an answer under way,
whatever a tier does. A load that is given up cannot reach its rows any more (kvstore.move.rows). A save that is given
up may still be read; if vLLM fills the row anew meanwhile, the bytes do not fit their checksum, which is a miss later.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from connectors.vllm_tier_lookup import Answer, Lookups
from kvstore.move.rows import RowMover
from kvstore.page import PageKey, PageMeta, page_key
from kvstore.plan.records import Outcome

log = logging.getLogger("vllm.kvstore")

SAVE_DEADLINE_S = 30.0  # a save that has not begun by then holds its rows in vain
GRACE_S = 0.5  # for an answer that is under way at the deadline; lanes look every 50 ms
TOUCH_BATCH = 512  # keys; a few milliseconds in one transaction
DRAIN_LOG_S = 10.0
IDLE_STEP_S = 0.001  # a step that computes takes longer
IDLE_WAIT_S = 0.002  # no longer, since new requests come between steps
MAX_FILLS = 4096  # chunks that may wait to be written to the first tier
GROUP_BYTES = 4  # vLLM's key is the block hash and the number of the layer group, big endian


@dataclass(frozen=True, slots=True)
class TierSettings:
    """What the tier was configured with.

    root:            of the namespace; chunks of another model, layout or machine have other names.
    batch_pages:     chunks per call of a lane.
    max_saving_rows: rows that saves may hold at once; what is beyond is skipped, since these rows are not there for
                     anything else meanwhile.
    ttl_s:           by tier: a chunk unused for so long is dropped; 0 means never.
    """

    root: bytes
    batch_pages: int
    max_saving_rows: int
    lookup_deadline_s: float
    load_deadline_s: float
    touch_interval_s: float
    ttl_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JobDone:
    """The end of a job.

    ok: chunks that were loaded, or stored on at least one tier; the order of the job.
    """

    job_id: int
    is_load: bool
    ok: tuple[bytes, ...]
    num_keys: int
    seconds: float
    num_bytes: int

    @property
    def success(self) -> bool:
        """True if all chunks are where they should be."""
        return len(self.ok) == self.num_keys


@dataclass(slots=True)
class TierCount:
    """What became of chunks, by tier; plain growing numbers."""

    loaded_chunks: int = 0
    failed_chunks: int = 0
    stored_chunks: int = 0
    unstored_chunks: int = 0


@dataclass(slots=True)
class CoreCounters:
    """What became of lookups and jobs; plain growing numbers."""

    hits: int = 0
    misses: int = 0
    skipped_chunks: int = 0  # not saved, since saves held too many rows already
    lost_loads: int = 0  # chunks that were offered and that no tier gave
    given_up: int = 0  # jobs that ended at their deadline
    by_tier: dict[str, TierCount] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    """A job of vLLM. `under_way` maps transfers to (tier, indexes into keys)."""

    id: int
    is_load: bool
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]
    began: float
    deadline: float
    ok: list[bool]
    to_try: list[list[str]] = field(default_factory=list)  # loads: tiers not asked yet, by index
    under_way: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    num_bytes: int = 0


class TierCore:
    """Lookups and jobs over a `RowMover`. One thread. See the module.

    wall: Unix seconds, for times to live.
    """

    def __init__(
        self,
        mover: RowMover,
        settings: TierSettings,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.counters = CoreCounters(by_tier={tier: TierCount() for tier in mover.tiers})
        self.mover = mover
        self.lookups = Lookups(settings.lookup_deadline_s, now)
        self.keeps_events = False
        self.stored: list[bytes] = []  # since the owner last emptied it, if it keeps events; likewise `lost`
        self.lost: list[bytes] = []
        self._settings = settings
        self._now = now
        self._wall = wall
        self._jobs: dict[int, _Job] = {}
        self._job_of: dict[int, _Job] = {}  # by transfer
        self._probes: dict[int, tuple[str, list[bytes]]] = {}
        self._done: list[JobDone] = []
        self._saving_rows = 0
        self._rested_at = float("-inf")
        self._to_fill: dict[bytes, None] = {}
        self._up_now = self._up()  # as of this step: a lookup is called for every chunk of a prompt
        self._touched: dict[tuple[str, bytes], float] = {}
        self._to_touch: dict[str, dict[bytes, None]] = {tier: {} for tier in mover.tiers}

    # ---- lookup -------------------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> Answer:
        """Is this chunk on a tier that is up? Never waits."""
        if self.mover.num_open:
            self._take_outcomes()
        answer = self.lookups.lookup(key, self._up_now)
        self.counters.hits += answer is Answer.HIT
        self.counters.misses += answer is Answer.MISS
        return answer

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were used: tell the tiers, at the end of the step and each at most once per `touch_interval_s`."""
        for tier in self.mover.tiers:
            self._touch_later(tier, keys)

    def end_step(self) -> None:
        """Send what gathered during a scheduler step: one probe per tier, and touches."""
        self._take_outcomes()
        self._up_now = self._up()
        now = self._now()
        if self.lookups.is_asking:
            questions = self.lookups.take_questions()
            names = [self._name(key) for key in questions]
            deadline = now + max(self._settings.lookup_deadline_s, GRACE_S)  # a late answer is still worth knowing
            for tier in self._up():
                transfer = self.mover.probe(tier, names, deadline=deadline)
                self._probes[transfer] = (tier, questions)
        for tier, keys in self._to_touch.items():
            if keys:
                self._send_touches(tier, list(keys), now)
                keys.clear()
        self._rest()

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def load(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """Fill rows with chunks that were a hit. Ends in `take_done`."""
        job = self._begin(job_id, keys, rows, True, self._settings.load_deadline_s)
        job.to_try = [self.lookups.where(key, self._up()) for key in job.keys]
        self._load_from_next(job, range(len(job.keys)))
        self._end_if_idle(job)

    def save(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int], tiers: Sequence[str] | None = None) -> None:
        """Store rows on `tiers`, all of them if None, as far as they are up. Ends in `take_done`."""
        room = max(0, self._settings.max_saving_rows - self._saving_rows)
        job = self._begin(job_id, keys, rows, False, SAVE_DEADLINE_S)
        self._saving_rows += len(job.rows)
        indexes = list(range(min(room, len(job.keys))))
        self.counters.skipped_chunks += len(job.keys) - len(indexes)
        names = [self._name(job.keys[i]) for i in indexes]
        for tier in self._up():
            if tiers is not None and tier not in tiers:
                continue
            metas = self._metas(tier, len(indexes))
            for part in self._batches(indexes):
                transfer = self.mover.save(
                    tier,
                    [names[i] for i in part],
                    [job.rows[i] for i in part],
                    metas[: len(part)],
                    deadline=job.deadline,
                )
                self._note(job, transfer, tier, part)
        self._end_if_idle(job)

    def fill(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """Store rows on the first tier alone: chunks that came from another one."""
        self.save(job_id, keys, rows, self.mover.tiers[:1])

    def take_fills(self) -> list[bytes]:
        """Chunks that the first tier lacks and that were just loaded from another one, each once."""
        keys = list(self._to_fill)
        self._to_fill.clear()
        return keys

    def fill_later(self, keys: Sequence[bytes]) -> None:
        """Remember chunks for `take_fills`; beyond MAX_FILLS they are not worth it."""
        self._to_fill.update(dict.fromkeys(keys[: max(0, MAX_FILLS - len(self._to_fill))]))

    def take_done(self) -> list[JobDone]:
        """Jobs that ended since the last call, each once."""
        self._take_outcomes()
        self._end_late_jobs()
        self._up_now = self._up()
        done, self._done = self._done, []
        return done

    def fail(self, job_id: int, is_load: bool, num_keys: int) -> None:
        """End a job that could not be begun; what of it is under way no longer reaches its rows."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.ok = [False] * len(job.keys)
            self._give_up(job)
        elif all(done.job_id != job_id for done in self._done):
            self._done.append(JobDone(job_id, is_load, (), num_keys, 0.0, 0))

    @property
    def has_jobs(self) -> bool:
        """True while a job is under way or its end was not taken."""
        return bool(self._jobs or self._done)

    def drain(self) -> None:
        """Return when every job has ended: done, failed, or given up at its deadline."""
        next_log = self._now() + DRAIN_LOG_S
        while self._jobs:
            self._take_outcomes(wait_s=0.05)
            self._end_late_jobs()
            if self._now() >= next_log:
                log.warning("kvstore tier: still waiting for %d jobs to end", len(self._jobs))
                next_log += DRAIN_LOG_S

    def close(self, timeout_s: float) -> int:
        """Wait up to `timeout_s` for saves, then end everything; return how many jobs were cut off."""
        until = self._now() + timeout_s
        while any(not job.is_load for job in self._jobs.values()) and self._now() < until:
            self._take_outcomes(wait_s=min(0.05, max(0.0, until - self._now())))
        num_cut = len(self._jobs)
        self.mover.close(max(1.0, until - self._now()))
        return num_cut

    def _rest(self) -> None:
        """Wait a little where the engine has nothing to do but ask again.

        It would step as fast as it can, and hold the interpreter that the lanes need to answer (a thread is let in
        after 5 ms). What is scheduled is not told to a tier; but steps that follow each other at once compute nothing.
        """
        if not self._probes and not any(job.is_load for job in self._jobs.values()):
            return
        if self._now() - self._rested_at < IDLE_STEP_S:
            self._take_outcomes(IDLE_WAIT_S)
        self._rested_at = self._now()

    # ---- private: outcomes --------------------------------------------------------------------------------------

    def _take_outcomes(self, wait_s: float = 0.0) -> None:
        for outcome in self.mover.poll(wait_s):
            probe = self._probes.pop(outcome.transfer_id, None)
            job = self._job_of.pop(outcome.transfer_id, None)
            if probe is not None:
                self.lookups.heard(*probe, outcome.ok)
            elif job is not None:
                tier, indexes = job.under_way.pop(outcome.transfer_id)
                job.num_bytes += outcome.num_bytes
                (self._loaded if job.is_load else self._saved)(job, tier, indexes, outcome)
                self._end_if_idle(job)

    def _end_late_jobs(self) -> None:
        now = self._now()
        for job in [job for job in self._jobs.values() if now > job.deadline + GRACE_S]:
            self._give_up(job)

    def _loaded(self, job: _Job, tier: str, indexes: list[int], outcome: Outcome) -> None:
        count = self.counters.by_tier[tier]
        again = []
        for index, is_ok in zip(indexes, outcome.ok, strict=True):
            job.ok[index] = is_ok
            if not is_ok:
                self.lookups.lost(tier, job.keys[index])
                again.append(index)
        count.loaded_chunks += len(indexes) - len(again)
        count.failed_chunks += len(again)
        # A leaf must look older than its parent, so that the medium evicts leaves first: tail first.
        self._touch_later(tier, [job.keys[index] for index in reversed(indexes) if job.ok[index]])
        first = self.mover.tiers[0]
        if tier != first and self.mover.is_up(first):
            arrived = [job.keys[index] for index in indexes if job.ok[index]]
            self.fill_later([key for key in arrived if self.lookups.lacks(key, first)])
        self._load_from_next(job, again)

    def _saved(self, job: _Job, tier: str, indexes: list[int], outcome: Outcome) -> None:
        count = self.counters.by_tier[tier]
        there = [job.keys[index] for index, is_ok in zip(indexes, outcome.ok, strict=True) if is_ok]
        for index, is_ok in zip(indexes, outcome.ok, strict=True):
            job.ok[index] = job.ok[index] or is_ok
        self.lookups.stored(tier, there)
        count.stored_chunks += len(there)
        count.unstored_chunks += len(indexes) - len(there)

    # ---- private: jobs ------------------------------------------------------------------------------------------

    def _begin(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int], is_load: bool, seconds: float) -> _Job:
        now = self._now()
        own = tuple(bytes(key) for key in keys)
        job = _Job(job_id, is_load, own, tuple(int(row) for row in rows), now, now + seconds, [False] * len(own))
        self._jobs[job_id] = job
        return job

    def _load_from_next(self, job: _Job, indexes: Sequence[int]) -> None:
        """Ask the next tier of each chunk; those without one stay failed."""
        by_tier: dict[str, list[int]] = {}
        for index in indexes:
            while job.to_try[index]:
                tier = job.to_try[index].pop(0)
                if self.mover.is_up(tier):
                    by_tier.setdefault(tier, []).append(index)
                    break
        for tier, chosen in by_tier.items():
            metas = self._metas(tier, len(chosen))
            for part in self._batches(chosen):
                names = [self._name(job.keys[i]) for i in part]
                transfer = self.mover.load(
                    tier, names, [job.rows[i] for i in part], metas[: len(part)], deadline=job.deadline
                )
                self._note(job, transfer, tier, part)

    def _note(self, job: _Job, transfer: int, tier: str, indexes: list[int]) -> None:
        job.under_way[transfer] = (tier, indexes)
        self._job_of[transfer] = job

    def _give_up(self, job: _Job) -> None:
        self.counters.given_up += 1
        for transfer in job.under_way:
            self._job_of.pop(transfer, None)
            if job.is_load:
                self.mover.give_up(transfer)
        job.under_way.clear()
        self._end_if_idle(job)

    def _end_if_idle(self, job: _Job) -> None:
        if job.under_way or job.id not in self._jobs:
            return
        del self._jobs[job.id]
        ok = tuple(key for key, is_ok in zip(job.keys, job.ok, strict=True) if is_ok)
        failed = [key for key, is_ok in zip(job.keys, job.ok, strict=True) if not is_ok]
        if job.is_load:
            self.lookups.failed(failed)
            self.counters.lost_loads += len(failed)
            if self.keeps_events:
                self.lost += failed
        else:
            self._saving_rows -= len(job.rows)
            if self.keeps_events:
                self.stored += ok
        self._done.append(JobDone(job.id, job.is_load, ok, len(job.keys), self._now() - job.began, job.num_bytes))

    # ---- private: the rest --------------------------------------------------------------------------------------

    def _up(self) -> list[str]:
        return [tier for tier in self.mover.tiers if self.mover.is_up(tier)]

    def _name(self, key: bytes) -> PageKey:
        block, group = key[:-GROUP_BYTES], int.from_bytes(key[-GROUP_BYTES:], "big")
        return page_key(hashlib.sha256(self._settings.root + block).digest(), group)

    def _metas(self, tier: str, count: int) -> list[PageMeta]:
        return [PageMeta(self.mover.row_bytes, expires_at=self._expires_at(tier))] * count

    def _expires_at(self, tier: str) -> float:
        ttl_s = self._settings.ttl_s.get(tier, 0.0)
        return self._wall() + ttl_s if ttl_s else 0.0

    def _batches(self, indexes: Sequence[int]) -> list[list[int]]:
        step = self._settings.batch_pages
        return [list(indexes[start : start + step]) for start in range(0, len(indexes), step)]

    def _touch_later(self, tier: str, keys: Sequence[bytes]) -> None:
        now = self._now()
        for key in keys:
            if now - self._touched.get((tier, key), -1e9) >= self._settings.touch_interval_s:
                self._touched.pop((tier, key), None)
                self._touched[tier, key] = now
                self._to_touch[tier][key] = None
        while self._touched and now - next(iter(self._touched.values())) >= self._settings.touch_interval_s:
            del self._touched[next(iter(self._touched))]

    def _send_touches(self, tier: str, keys: list[bytes], now: float) -> None:
        if not self.mover.is_up(tier):
            return
        expires_at = self._expires_at(tier)
        for start in range(0, len(keys), TOUCH_BATCH):
            names = [self._name(key) for key in keys[start : start + TOUCH_BATCH]]
            self.mover.touch(tier, names, expires_at=expires_at, deadline=now + SAVE_DEADLINE_S)

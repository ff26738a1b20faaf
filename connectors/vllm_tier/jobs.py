"""Jobs of the secondary tier: vLLM's chunks on their way between rows of its host memory and our tiers.

    load  -> per chunk the first tier that has it (disk before Redis); what that one does not give is asked of the next;
             chunks that arrive are kept, the others are computed
    save  -> every tier that is up, in batches; a job is done when all have answered
    fill  -> what came from Redis is also written to the disk that lacks it, once it is in vLLM's host memory

Every job ends: loads at `load_deadline_s`, saves at SAVE_DEADLINE_S, each plus GRACE_S for an answer under way,
whatever a tier does. A load that is given up cannot reach its rows any more (kvstore.move.rows). A save that is given
up may still be read; if vLLM fills the row anew meanwhile, the bytes do not fit their checksum, which is a miss later.

One thread, the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from connectors.vllm_tier.chunks import Chunks, TierSettings, Touches
from connectors.vllm_tier.lookup import Lookups
from kvstore.move.rows import RowMover
from kvstore.plan.records import Op, Outcome

SAVE_DEADLINE_S = 30.0  # a save that has not begun by then holds its rows in vain
GRACE_S = 0.5  # for an answer that is under way at the deadline; lanes look every 50 ms
LOAD_BATCH_BYTES = 8 << 20  # less, and calls cost more than they carry; more, and the last copy begins late
MAX_FILLS = 4096  # chunks that may wait to be written to the first tier


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
    """The outcomes of chunks, by tier; plain growing numbers."""

    loaded_chunks: int = 0
    failed_chunks: int = 0
    stored_chunks: int = 0
    unstored_chunks: int = 0


@dataclass(slots=True)
class CoreCounters:
    """The outcomes of lookups and jobs; plain growing numbers."""

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


class TierJobs:
    """Loads and saves over a `RowMover`. See the module.

    stored, lost: chunks, since the owner last emptied the lists, if it `keeps_events`.
    """

    def __init__(
        self,
        mover: RowMover,
        lookups: Lookups,
        chunks: Chunks,
        touches: Touches,
        settings: TierSettings,
        now: Callable[[], float],
    ) -> None:
        self.counters = CoreCounters(by_tier={tier: TierCount() for tier in mover.tiers})
        self.keeps_events = False
        self.stored: list[bytes] = []
        self.lost: list[bytes] = []
        self._mover = mover
        self._lookups = lookups
        self._chunks = chunks
        self._touches = touches
        self._settings = settings
        self._now = now
        self._load_batch = min(settings.batch_pages, max(1, LOAD_BATCH_BYTES // mover.row_bytes))
        self._jobs: dict[int, _Job] = {}
        self._job_of: dict[int, _Job] = {}  # by transfer
        self._done: list[JobDone] = []
        self._saving_rows = 0
        self._to_fill: dict[bytes, None] = {}

    def load(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """Fill rows with chunks that were a hit. Ends in `take_done`."""
        job = self._begin(job_id, keys, rows, True, self._settings.load_deadline_s)
        job.to_try = [self._lookups.where(key, self._up()) for key in job.keys]
        self._load_from_next(job, range(len(job.keys)))
        self._end_if_idle(job)

    def save(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int], tiers: Sequence[str] | None = None) -> None:
        """Store rows on `tiers`, all of them if None, as far as they are up. Ends in `take_done`."""
        room = max(0, self._settings.max_saving_rows - self._saving_rows)
        job = self._begin(job_id, keys, rows, False, SAVE_DEADLINE_S)
        self._saving_rows += len(job.rows)
        indexes = list(range(min(room, len(job.keys))))
        self.counters.skipped_chunks += len(job.keys) - len(indexes)
        names = [self._chunks.name(job.keys[i]) for i in indexes]
        for tier in self._mover.tiers if tiers is None else tiers:
            if not self._mover.takes(tier, Op.SPILL):
                continue
            metas = self._chunks.metas(tier, len(indexes))
            for part in _batches(indexes, self._settings.batch_pages):
                transfer = self._mover.save(
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
        self.save(job_id, keys, rows, self._mover.tiers[:1])

    def take_fills(self) -> list[bytes]:
        """Chunks that the first tier lacks and that were just loaded from another one, each once."""
        keys = list(self._to_fill)
        self._to_fill.clear()
        return keys

    def fill_later(self, keys: Sequence[bytes]) -> None:
        """Remember chunks for `take_fills`; beyond MAX_FILLS they are not worth it."""
        self._to_fill.update(dict.fromkeys(keys[: max(0, MAX_FILLS - len(self._to_fill))]))

    def landed(self, outcome: Outcome) -> None:
        """Book what became of a transfer; nothing if it is not of a job, or of one that was given up."""
        job = self._job_of.pop(outcome.transfer_id, None)
        if job is None:
            return
        tier, indexes = job.under_way.pop(outcome.transfer_id)
        job.num_bytes += outcome.num_bytes
        (self._loaded if job.is_load else self._saved)(job, tier, indexes, outcome)
        self._end_if_idle(job)

    def end_late(self) -> None:
        """End the jobs whose time is up."""
        now = self._now()
        for job in [job for job in self._jobs.values() if now > job.deadline + GRACE_S]:
            self._give_up(job)

    def take_done(self) -> list[JobDone]:
        """Jobs that ended since the last call, each once."""
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
    def num_loads(self) -> int:
        """Loads under way."""
        return sum(job.is_load for job in self._jobs.values())

    @property
    def num_saves(self) -> int:
        """Saves under way."""
        return len(self._jobs) - self.num_loads

    def saving(self) -> set[bytes]:
        """Chunks of saves under way."""
        return {key for job in self._jobs.values() if not job.is_load for key in job.keys}

    @property
    def has_any(self) -> bool:
        """True while a job is under way or its end was not taken."""
        return bool(self._jobs or self._done)

    # ---- private ------------------------------------------------------------------------------------------------

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
                if self._mover.is_up(tier):
                    by_tier.setdefault(tier, []).append(index)
                    break
        for tier, chosen in by_tier.items():
            metas = self._chunks.metas(tier, len(chosen))
            for part in _batches(chosen, self._load_batch):
                names = [self._chunks.name(job.keys[i]) for i in part]
                transfer = self._mover.load(
                    tier, names, [job.rows[i] for i in part], metas[: len(part)], deadline=job.deadline
                )
                self._note(job, transfer, tier, part)

    def _loaded(self, job: _Job, tier: str, indexes: list[int], outcome: Outcome) -> None:
        count = self.counters.by_tier[tier]
        again = []
        for index, is_ok in zip(indexes, outcome.ok, strict=True):
            job.ok[index] = is_ok
            if not is_ok:
                self._lookups.lost(tier, job.keys[index])
                again.append(index)
        count.loaded_chunks += len(indexes) - len(again)
        count.failed_chunks += len(again)
        # A leaf must look older than its parent, so that the medium evicts leaves first: tail first.
        self._touches.later(tier, [job.keys[index] for index in reversed(indexes) if job.ok[index]])
        first = self._mover.tiers[0]
        if tier != first and self._mover.takes(first, Op.SPILL):
            arrived = [job.keys[index] for index in indexes if job.ok[index]]
            self.fill_later([key for key in arrived if self._lookups.lacks(key, first)])
        self._load_from_next(job, again)

    def _saved(self, job: _Job, tier: str, indexes: list[int], outcome: Outcome) -> None:
        count = self.counters.by_tier[tier]
        there = [job.keys[index] for index, is_ok in zip(indexes, outcome.ok, strict=True) if is_ok]
        for index, is_ok in zip(indexes, outcome.ok, strict=True):
            job.ok[index] = job.ok[index] or is_ok
        self._lookups.stored(tier, there)
        count.stored_chunks += len(there)
        count.unstored_chunks += len(indexes) - len(there)

    def _note(self, job: _Job, transfer: int, tier: str, indexes: list[int]) -> None:
        job.under_way[transfer] = (tier, indexes)
        self._job_of[transfer] = job

    def _give_up(self, job: _Job) -> None:
        self.counters.given_up += 1
        for transfer in job.under_way:
            self._job_of.pop(transfer, None)
            if job.is_load:
                self._mover.give_up(transfer)
        job.under_way.clear()
        self._end_if_idle(job)

    def _end_if_idle(self, job: _Job) -> None:
        if job.under_way or job.id not in self._jobs:
            return
        del self._jobs[job.id]
        ok = tuple(key for key, is_ok in zip(job.keys, job.ok, strict=True) if is_ok)
        failed = [key for key, is_ok in zip(job.keys, job.ok, strict=True) if not is_ok]
        if job.is_load:
            self._lookups.failed(failed)
            self.counters.lost_loads += len(failed)
            if self.keeps_events:
                self.lost += failed
        else:
            self._saving_rows -= len(job.rows)
            if self.keeps_events:
                self.stored += ok
        self._done.append(JobDone(job.id, job.is_load, ok, len(job.keys), self._now() - job.began, job.num_bytes))

    def _up(self) -> list[str]:
        return [tier for tier in self._mover.tiers if self._mover.is_up(tier)]


def _batches(indexes: Sequence[int], most: int) -> list[list[int]]:
    return [list(indexes[start : start + most]) for start in range(0, len(indexes), most)]

"""The secondary tier without vLLM: lookups, jobs, and what a scheduler's step does for them.

vLLM calls every method from its scheduler's thread, several times in each step, so all bookkeeping lives there and
needs no lock: lanes answer through a queue that is emptied at the start of a call.

    lookup -> Lookups (lookup.py); what nobody knows is asked for in `end_step`, one batch per tier
    jobs   -> TierJobs (jobs.py): loads, saves, fills
    touch  -> Touches (chunks.py), sent in `end_step`
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from connectors.vllm_tier.chunks import Chunks, TierSettings, Touches
from connectors.vllm_tier.hints import TierHints
from connectors.vllm_tier.jobs import CoreCounters, JobDone, TierJobs
from connectors.vllm_tier.lookup import LookupAnswer, Lookups
from kvstore.move.rows import RowMover

log = logging.getLogger("vllm.kvstore")

PROBE_GRACE_S = 0.5  # an answer that comes later than a lookup waits is still worth knowing
DRAIN_LOG_S = 10.0
IDLE_STEP_S = 0.001  # a step that computes takes longer
IDLE_WAIT_S = 0.002  # no longer, since new requests come between steps


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
        self.mover = mover
        self.lookups = Lookups(settings.lookup_deadline_s, now)
        self._chunks = Chunks(settings, mover.row_bytes, wall)
        self._touches = Touches(mover, self._chunks, settings.touch_interval_s, now, wall)
        self.jobs = TierJobs(mover, self.lookups, self._chunks, self._touches, settings, now)
        self.hints = TierHints(
            mover,
            self.lookups,
            self._chunks,
            self._touches,
            self.jobs,
            num_groups=settings.num_groups,
            chunk_tokens=settings.chunk_tokens,
            limits=settings.hints,
            now=now,
            wall=wall,
        )
        self._settings = settings
        self._now = now
        self._probes: dict[int, tuple[str, list[bytes]]] = {}
        self._up_now = self._up()  # as of this step: a lookup is called for every chunk of a prompt
        self._rested_at = float("-inf")

    @property
    def counters(self) -> CoreCounters:
        """The outcomes of lookups and jobs."""
        return self.jobs.counters

    # ---- lookup -------------------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> LookupAnswer:
        """Is this chunk on a tier that is up? Never waits."""
        if self.mover.num_open:
            self._take_outcomes()
        answer = self.lookups.lookup(key, self._up_now)
        self.counters.hits += answer is LookupAnswer.HIT
        self.counters.misses += answer is LookupAnswer.MISS
        return answer

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were used: tell the tiers, at the end of the step and each at most once per `touch_interval_s`."""
        for tier in self.mover.tiers:
            self._touches.later(tier, keys)

    def end_step(self) -> None:
        """Send what gathered during a scheduler step: one probe per tier, and touches."""
        self._take_outcomes()
        self._up_now = self._up()
        if self.lookups.is_asking:
            questions = self.lookups.take_questions()
            names = [self._chunks.name(key) for key in questions]
            deadline = self._now() + max(self._settings.lookup_deadline_s, PROBE_GRACE_S)
            for tier in self._up_now:
                self._probes[self.mover.probe(tier, names, deadline=deadline)] = (tier, questions)
        self.hints.end_step()
        self._touches.send()
        self._rest()

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def take_done(self) -> list[JobDone]:
        """Jobs that ended since the last call, each once."""
        self._take_outcomes()
        self.jobs.end_late()
        self._up_now = self._up()
        return self.jobs.take_done()

    def drain(self) -> None:
        """Return when every job has ended: done, failed, or given up at its deadline."""
        next_log = self._now() + DRAIN_LOG_S
        while num_open := self.jobs.num_loads + self.jobs.num_saves:
            self._take_outcomes(wait_s=0.05)
            self.jobs.end_late()
            if self._now() >= next_log:
                log.warning("kvstore tier: still waiting for %d jobs to end", num_open)
                next_log += DRAIN_LOG_S

    def close(self, timeout_s: float) -> int:
        """Wait up to `timeout_s` for saves and deletes, then end everything; return how many jobs were cut off."""
        until = self._now() + timeout_s
        while (self.jobs.num_saves or self.hints.is_forgetting) and self._now() < until:
            self.hints.end_step()
            self._take_outcomes(wait_s=min(0.05, max(0.0, until - self._now())))
        num_cut = self.jobs.num_loads + self.jobs.num_saves
        self.mover.close(max(1.0, until - self._now()))
        return num_cut

    # ---- private ------------------------------------------------------------------------------------------------

    def _take_outcomes(self, wait_s: float = 0.0) -> None:
        for outcome in self.mover.poll(wait_s):
            probe = self._probes.pop(outcome.transfer_id, None)
            if probe is not None:
                self.lookups.heard(*probe, outcome.ok)
            else:
                self.jobs.landed(outcome)
                self.hints.landed(outcome)

    def _rest(self) -> None:
        """Wait a little where the engine has nothing to do but ask again.

        It would step as fast as it can, and hold the interpreter that the lanes need to answer (a thread is let in
        after 5 ms). What is scheduled is not told to a tier; but steps that follow each other at once compute nothing.
        """
        if not self._probes and not self.jobs.num_loads:
            return
        if self._now() - self._rested_at < IDLE_STEP_S:
            self._take_outcomes(IDLE_WAIT_S)
        self._rested_at = self._now()

    def _up(self) -> list[str]:
        return [tier for tier in self.mover.tiers if self.mover.is_up(tier)]

"""The store in this process: the verbs of a KVStore, each a step of the planner under the one lock.

The lock, and what goes on around a step, is the dispatcher's (dispatcher.py); what operators do is admin.py. A verb
that ends something is silent after close; any other raises StoreClosed then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from eviction.ttl import Ttl
from kvstore.admin import Admin
from kvstore.dispatcher import Dispatcher, silent_after_close
from kvstore.errors import RequestError
from kvstore.forks import forbid, harmless
from kvstore.hinting import Aimed, Hinting
from kvstore.hints.limits import HintLimits
from kvstore.hints.outcome import HintOutcome
from kvstore.keep import LocalKeep
from kvstore.layout import Layout
from kvstore.learned import Learned
from kvstore.move.lane import Lane
from kvstore.move.learned_writer import LearnedWriter, Taken
from kvstore.move.recorder import TrafficRecorder
from kvstore.plan.flushing import Flushing, Told
from kvstore.plan.journal import BlockEvent, Journal
from kvstore.plan.loads import load_lease
from kvstore.plan.planner import Planner
from kvstore.plan.records import (
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    SaveLease,
)
from kvstore.plan.state import Page
from kvstore.plan.wishes import Wish
from kvstore.requests import check_blocks, check_range
from kvstore.stats import snapshot
from kvstore.tiers.host import HostSlab
from kvstore.waits import Deadlines, Waits
from radix.namespace import Namespace

log = logging.getLogger(__name__)


class LocalStore(Hinting, Waits):
    """A KVStore (see base.py) that plans and keeps its pages in this process. Any thread.

    Made by `kvstore.build.open_store`, which owns the choice of tiers and policies. Use it as a context manager, or
    close it. In a forked child every call raises StoreForked (see forks.py).

    slots: the bytes. keep: how long pages stay. admin: what operators ask and change, while requests run.
    """

    def __init__(
        self,
        layout: Layout,
        namespace: Namespace,
        planner: Planner,
        slab: HostSlab,
        lanes: Sequence[Lane] = (),
        *,
        recorder: TrafficRecorder | None = None,
        learned: Learned | None = None,
        close_timeout_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(namespace)
        self._layout = layout
        self.namespace = namespace
        self._planner = planner
        self._in_steps = planner.in_steps
        self.slots = slab
        self._now = now
        self._close_timeout_s = close_timeout_s
        self._hint_limits = planner.books.settings.hints
        self._told = planner.told()
        self._dispatcher = Dispatcher(planner, lanes, slab.discard, now)
        self._lock = self._dispatcher.lock
        self._recorder = recorder
        if recorder is not None:
            planner.lookups.observer = recorder.put
        self._learned_writer = None if learned is None else LearnedWriter(learned, self._take_learned)
        self._begin_learning()
        self.keep = LocalKeep(self._dispatcher, self._in_steps, now)
        self.admin = Admin(self._dispatcher)
        forbid(self)

    @property
    def layout(self) -> Layout:
        """The geometry of this store's pages."""
        return self._layout

    # ---- lookups and loads ------------------------------------------------------------------------------------

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading, at once."""
        with self._lock, self._dispatcher.step() as now:
            return self._planner.lookup(request, now)

    def ask(self, request: Request) -> bool:
        """Ask shared tiers about a request, without looking it up; True until they have answered.

        Before `admin.explain`, and before a `peek` that must not block.
        """
        with self._lock, self._dispatcher.step() as now:
            return self._planner.ask(request, now)

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there."""
        check_range("num_blocks", num_blocks, len(request.keys))
        check_range("first", first, num_blocks)
        lease_id = self._in_steps.new_lease_id()
        try:
            steps = self._in_steps.prepare_load(lease_id, request, num_blocks, self._now(), owner, first)
            return load_lease(self._dispatcher.carry_out(steps), self.layout.block_size)
        except BaseException:
            self._end_badly(lease_id)  # of no effect if there is no such lease
            raise

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease, at once."""
        with self._lock:
            if self._dispatcher.is_closed:
                return LeaseStatus(LeaseState.CLOSED, 0, 0)
            self._dispatcher.settle()
            return self._planner.poll(lease.id)

    def prefetch(self, request: Request) -> int:
        """Start bringing the known prefix into host memory; returns a ticket."""
        ticket = self._in_steps.new_lease_id()
        return self._dispatcher.carry_out(self._in_steps.prefetch(ticket, request, self._now()))

    @silent_after_close
    def cancel(self, ticket: int) -> None:
        """Stop a prefetch."""
        with self._lock, self._dispatcher.step():
            self._dispatcher.mover.cancel(self._planner.cancel(ticket))

    # ---- saves ------------------------------------------------------------------------------------------------

    def prepare_save(
        self, request: Request, first: int, num_blocks: int, *, owner: str = "", states: Sequence[int] = ()
    ) -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have."""
        check_blocks(request, first, num_blocks)
        lease_id = self._in_steps.new_lease_id()
        try:
            steps = self._in_steps.prepare_save(lease_id, request, first, num_blocks, self._now(), owner, states)
            return self._dispatcher.carry_out(steps)
        except BaseException:
            self._end_badly(lease_id)
            raise

    @silent_after_close
    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        """End a lease well. A lease that ended already is ignored."""
        if filled is not None and len(filled) != len(lease.pages):
            raise RequestError(f"filled has {len(filled)} entries; the lease has {len(lease.pages)} pages")
        self._dispatcher.carry_out(self._in_steps.complete(lease.id, self._now(), filled), tell=True)

    def release(self, lease: LoadLease | SaveLease) -> None:
        """End a lease badly. A lease that ended already is ignored."""
        self._end_badly(lease.id)

    def release_owner(self, owner: str) -> int:
        """Release every lease of an owner that died."""
        return self._dispatcher.carry_out(self._in_steps.release_owner(owner, self._now()), tell=True)

    @silent_after_close
    def abandon(self, request: Request) -> None:
        """Drop a request whose maker is gone: the blocks it was going to compute are for others to compute."""
        with self._lock, self._dispatcher.step() as now:
            if self._planner.abandon(request, now):
                self._dispatcher.tell()

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes."""
        with self._lock:
            self._planner.observe_prefill(num_tokens, seconds)

    def obey(self, request: Request, wish: Wish) -> HintOutcome:
        """Do what one action of a hint says about a request. `hint` is made of it, and a daemon's doors are."""
        ticket = self._in_steps.new_lease_id()
        return self._dispatcher.carry_out(self._planner.hints.obey(ticket, request, wish, self._now()), tell=True)

    @property
    def hint_limits(self) -> HintLimits:
        """The bounds on hints."""
        return self._hint_limits

    def count_hints(self, outcomes: Sequence[HintOutcome]) -> None:
        """Count actions that came to their end before they reached the planner."""
        with self._lock:
            self._planner.hints.count(outcomes)

    def _carry_out(self, aimed: Sequence[Aimed | HintOutcome]) -> list[HintOutcome]:
        self.count_hints([one for one in aimed if isinstance(one, HintOutcome)])
        return [one if isinstance(one, HintOutcome) else self.obey(one.request, one.wish) for one in aimed]

    # ---- what comes and goes ----------------------------------------------------------------------------------

    def keep_journal(self, journal: Journal) -> None:
        """Write down from now on what comes and goes, for `take_events` and for operators."""
        with self._lock:
            self._planner.books.catalog.journal = journal

    def want_events(self) -> None:
        """Write down from now on what comes and goes, for `take_events`. Idempotent."""
        with self._lock:
            if self._planner.books.catalog.journal is None:
                self._planner.books.catalog.journal = Journal(time.time)
            self._planner.books.catalog.journal.wants_events = True

    def take_events(self) -> list[BlockEvent]:
        """The blocks that came and went since the last call; nothing without a journal that wants events."""
        with self._lock:
            journal = self._planner.books.catalog.journal
            return [] if journal is None else journal.take_events()

    # ---- the store as a whole ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float, told: Told | None = None) -> FlushResult:
        """Wait until everything saved and deleted so far is so on its tiers, or cannot be made so now.

        told: of a caller that shares the store with others (`told_of_losses`): each is told of every loss. Without it,
        all callers are one.
        """
        return self._dispatcher.flush(timeout_s, self._told if told is None else told)

    def told_of_losses(self) -> Told:
        """The notes of a caller whose flushes begin now, for `flush`: it is told of what is lost from here on."""
        with self._lock:
            return self._planner.told()

    def start_flush(self) -> Flushing:
        """The first half of a flush, for a server that cannot block in it: ask `flush_result` after each change."""
        return self._planner.flushing()

    def flush_result(self, flushing: Flushing, told: Told, *, at_once: bool = False) -> FlushResult | None:
        """The result of a flush; None while it goes on, unless it is asked for `at_once`."""
        with self._lock:
            is_over = self._dispatcher.is_flushed(flushing)
            return self._planner.flush_result(told) if is_over or at_once else None

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as plain numbers; kvstore/metrics.py documents them."""
        with self._lock:
            self._dispatcher.settle()
            counted = snapshot(self._planner, self._dispatcher.lanes)
        if self._recorder is not None:
            counted |= {"recorded": self._recorder.num_written, "record_dropped": self._recorder.num_dropped}
        if self._learned_writer is not None:
            learned = self._learned_writer.learned
            counted |= {"tables_written": learned.num_written, "tables_failed": learned.num_failed}
            counted["tables_unread"] = dict(learned.unread)
        return counted

    def relearn(self, tier: str, policy: Ttl[Page]) -> None:
        """Give the policy of a tier that comes back what the one before it has learned."""
        if self._learned_writer is not None and policy.learner is not None:
            self._learned_writer.write_now()
            self._learned_writer.learned.restore(tier, policy)
            self._learned_writer.begin()

    def listen(self, listener: Callable[[], None]) -> None:
        """Register `listener`, called whenever a wait may be over: an outcome, a tier's state, the end of a lease.

        For a server that cannot block in `wait`. It is called under the lock, from any thread: it may only note that
        there is something to look at.
        """
        self._dispatcher.listen(listener)

    def check(self) -> None:
        """Assert the planner's invariants. For tests."""
        with self._lock:
            self._dispatcher.settle()
            self._planner.check()

    @harmless
    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left, stop all threads, give everything back."""
        timeout_s = self._close_timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        if not self._dispatcher.is_closed:
            flushed = self.flush(timeout_s)
            if not flushed:
                log.warning("close: not everything is on its tiers: %s", flushed)
        if not self._dispatcher.close():
            return
        if self._learned_writer is not None:
            self._learned_writer.close()
        mover = self._dispatcher.mover
        mover.close(max(0.5, until - time.monotonic()))
        for lane in mover.lanes.values():
            lane.tier.close()
        if self._recorder is not None:
            self._recorder.close()
        if mover.num_hung:
            log.warning("close: %d transfers hang in their tier; the slab stays mapped for them", mover.num_hung)
        else:
            self.slots.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_learning(self) -> None:
        """Where no policy learns, there is no thread for it."""
        if self._learned_writer is not None and any(
            policy.learner is not None for _, policy in self._planner.books.policies()
        ):
            self._learned_writer.begin()

    def _take_learned(self) -> Taken:
        with self._lock:
            self._dispatcher.settle()
            return self._planner.books.learned()

    # ---- the looks that waits are made of (waits.py) ----------------------------------------------------------

    @property
    def _deadlines(self) -> Deadlines:
        settings = self._planner.books.settings
        return Deadlines(settings.lookup_deadline_s, settings.load_deadline_s)

    def _lookup_within(self, request: Request, wait_s: float) -> Match:
        until = time.monotonic() + wait_s
        cut: CutReason | None = None
        with self._lock:
            while True:
                with self._dispatcher.step() as now:
                    match = self._planner.lookup(request, now)
                is_another, cut = cut not in (None, match.cut), match.cut
                if is_another or not match.pending or not self._dispatcher.wait_until(until):
                    return match

    def _peek_within(self, request: Request, wait_s: float) -> Match:
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                with self._dispatcher.step() as now:
                    is_pending = self._planner.ask(request, now)
                if not is_pending or not self._dispatcher.wait_until(until):
                    break
            with self._dispatcher.step() as now:
                match = self._planner.explain(request).match
                self._planner.abandon(request, now)
                return match

    def _poll_within(self, lease: LoadLease, wait_s: float) -> LeaseStatus:
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                self._dispatcher.check_open()
                if not self._planner.is_waiting(lease.id) or not self._dispatcher.wait_until(until):
                    return self._planner.poll(lease.id)

    @silent_after_close
    def _end_badly(self, lease_id: int) -> None:
        self._dispatcher.carry_out(self._in_steps.release(lease_id, self._now()), tell=True)

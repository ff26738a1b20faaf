"""The store in this process: the facade with the one lock.

Planning happens under the lock and takes microseconds; bytes never move under it. Lanes report outcomes from their
own threads, the housekeeper reports ticks and tiers that went down or came back; each takes the lock, lets the
planner book it, hands on what the planner wants carried next, and wakes whoever waits.

The hard thing: a slot must not be reused while anything may still write to it. Slots are freed only by outcomes and
by the ends of leases, and a lane answers for a transfer only when its worker has returned from the tier; so waiting
has deadlines, slots do not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, RequestError, StoreClosed
from kvstore.layout import Layout
from kvstore.move.lane import Lane
from kvstore.move.mover import Mover
from kvstore.plan.cascade import TierPlan
from kvstore.plan.journal import BlockEvent, Journal, Shortfall
from kvstore.plan.planner import Planner
from kvstore.plan.records import (
    CutReason,
    Explanation,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Outcome,
    Request,
    SaveLease,
)
from kvstore.plan.tour import Tour
from kvstore.requests import RequestMaker, check_blocks, check_range
from kvstore.stats import snapshot
from kvstore.tiers.base import Sweepable
from kvstore.tiers.host import HostSlab, SlabHandle
from radix.namespace import Namespace

log = logging.getLogger(__name__)


class LocalStore(RequestMaker):
    """A KVStore (see base.py) that plans and keeps its pages in this process. Any thread.

    Made by `kvstore.build.open_store`, which owns the choice of tiers and policies. Use it as a context manager, or
    close it.
    """

    def __init__(
        self,
        layout: Layout,
        namespace: Namespace,
        planner: Planner,
        slab: HostSlab,
        lanes: Sequence[Lane] = (),
        *,
        close_timeout_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(namespace)
        self._layout = layout
        self.namespace = namespace
        self._planner = planner
        self._slab = slab
        self._now = now
        self._close_timeout_s = close_timeout_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_closed = False
        self._listeners: list[Callable[[], None]] = []
        self._lanes = {lane.name: lane for lane in lanes}
        self._mover = Mover(lanes, self._on_outcome, self._on_tier_state, self._on_tick, now=now)

    @property
    def layout(self) -> Layout:
        """The geometry of this store's pages."""
        return self._layout

    # ---- lookups and loads ------------------------------------------------------------------------------------

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading, at once."""
        with self._lock:
            self._check_open()
            match = self._planner.lookup(request, self._now())
            self._send()
            return match

    def wait_lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        """Lookup, waiting for pending tiers, and as long as the planner says for another request's computing."""
        wait_s = self._planner.settings.lookup_deadline_s if timeout_s is None else timeout_s
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                self._check_open()
                match = self._planner.lookup(request, self._now())
                self._send()
                if timeout_s is None and match.cut is CutReason.COMPUTING:
                    until = time.monotonic() + wait_s  # the deadline is that of tiers, which are asked again after it
                    self._changed.wait(self._planner.settings.compute_wait_s)  # a tick comes long before
                elif not match.pending or not self._wait_until(until):
                    return match

    def peek(self, request: Request, timeout_s: float | None = None) -> Match:
        """What a lookup would find, without its consequences."""
        wait_s = self._planner.settings.lookup_deadline_s if timeout_s is None else timeout_s
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                self._check_open()
                is_pending = self._planner.ask(request, self._now())
                self._send()
                if not is_pending or not self._wait_until(until):
                    break
            match = self._planner.explain(request).match
            self._planner.abandon(request, self._now())
            return match

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there."""
        check_range("num_blocks", num_blocks, len(request.keys))
        check_range("first", first, num_blocks)
        with self._lock:
            self._check_open()
            lease = self._planner.prepare_load(request, num_blocks, self._now(), owner, first)
            self._send()
            return lease

    def wait(self, lease: LoadLease, timeout_s: float | None = None) -> LeaseStatus:
        """Wait until the lease is ready, at most until the load deadline."""
        wait_s = self._planner.settings.load_deadline_s if timeout_s is None else timeout_s
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                self._check_open()
                if not self._planner.is_waiting(lease.id) or not self._wait_until(until):
                    return self._planner.poll(lease.id)

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease, at once."""
        with self._lock:
            return self._planner.poll(lease.id) if not self._is_closed else LeaseStatus(LeaseState.CLOSED, 0, 0)

    def prefetch(self, request: Request) -> int:
        """Start bringing the known prefix into host memory; returns a ticket."""
        with self._lock:
            self._check_open()
            ticket = self._planner.prefetch(request, self._now())
            self._send()
            return ticket

    def cancel(self, ticket: int) -> None:
        """Stop a prefetch."""
        with self._lock:
            if not self._is_closed:
                self._mover.cancel(self._planner.cancel(ticket))

    # ---- saves ------------------------------------------------------------------------------------------------

    def prepare_save(self, request: Request, first: int, num_blocks: int, *, owner: str = "") -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have."""
        check_blocks(request, first, num_blocks)
        with self._lock:
            self._check_open()
            lease = self._planner.prepare_save(request, first, num_blocks, self._now(), owner)
            self._send()
            return lease

    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        """End a lease well. A lease that ended already is ignored."""
        if filled is not None and len(filled) != len(lease.pages):
            raise RequestError(f"filled has {len(filled)} entries; the lease has {len(lease.pages)} pages")
        with self._lock:
            if not self._is_closed:
                self._planner.complete(lease.id, self._now(), filled)
                self._send()
                self._tell()

    def release(self, lease: LoadLease | SaveLease) -> None:
        """End a lease badly. A lease that ended already is ignored."""
        with self._lock:
            if not self._is_closed:
                self._planner.release(lease.id, self._now())
                self._send()
                self._tell()

    def release_owner(self, owner: str) -> int:
        """Release every lease of an owner that died."""
        with self._lock:
            self._check_open()
            released = self._planner.release_owner(owner, self._now())
            self._send()
            self._tell()
            return released

    # ---- retention --------------------------------------------------------------------------------------------

    def finished(self, request: Request, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """The request is over."""
        with self._lock:
            if not self._is_closed:
                self._planner.finished(request, self._now(), finish_reason=finish_reason, last_turn=last_turn)
                self._send()
                self._tell()

    def abandon(self, request: Request) -> None:
        """Whoever made the request is gone: what it was going to compute is for others to compute."""
        with self._lock:
            if not self._is_closed and self._planner.abandon(request, self._now()):
                self._send()
                self._tell()

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until unpin; returns the blocks pinned."""
        with self._lock:
            self._check_open()
            return self._planner.pin(request, self._now())

    def unpin(self, request: Request) -> int:
        """Undo pin; returns the blocks that had one."""
        with self._lock:
            self._check_open()
            return self._planner.unpin(request, self._now())

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that continues them; returns the blocks deleted."""
        check_range("first", first, len(request.keys))
        with self._lock:
            self._check_open()
            forgotten = self._planner.forget(request, first, self._now())
            self._send()
            self._tell()
            return forgotten

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes."""
        with self._lock:
            self._planner.observe_prefill(num_tokens, seconds)

    def set_ttl(self, request: Request, ttl_s: float) -> int:
        """Give the request's known blocks a time to live from now on; returns how many."""
        if not ttl_s > 0:
            raise RequestError(f"ttl_s is {ttl_s}; it must be a positive number of seconds")
        with self._lock:
            self._check_open()
            known = self._planner.set_ttl(request, ttl_s, self._now())
            self._send()
            return known

    def clear(self) -> int:
        """Delete every block that is known, in every tier that can be reached; returns how many."""
        with self._lock:
            self._check_open()
            cleared = self._planner.clear(self._now())
            self._send()
            return cleared

    def sweep(self, timeout_s: float) -> dict[str, int]:
        """After `clear`: have tiers that are not indexed delete what they hold of this namespace, whoever wrote it.

        Returns keys deleted, by tier. Any thread; holds no lock, and takes as long as a walk over the whole server.
        Raises TierUnavailable if a server is not reached, or the time runs out.
        """
        until = time.monotonic() + timeout_s
        tiers = [lane.tier for lane in list(self._lanes.values())]
        return {
            tier.name: tier.sweep(timeout_s=until - time.monotonic()) for tier in tiers if isinstance(tier, Sweepable)
        }

    # ---- what operators ask and change, while requests run -------------------------------------------------------

    def ask(self, request: Request) -> bool:
        """Ask shared tiers about a request, for `explain`, without looking it up; True until they have answered."""
        with self._lock:
            self._check_open()
            is_pending = self._planner.ask(request, self._now())
            self._send()
            return is_pending

    def explain(self, request: Request) -> Explanation:
        """Why a request matches what it matches, and not more."""
        with self._lock:
            self._check_open()
            return self._planner.explain(request)

    def keep_journal(self, journal: Journal) -> None:
        """Write down from now on what comes and goes, for `explain` and `take_events`."""
        with self._lock:
            self._planner.catalog.journal = journal

    def want_events(self) -> None:
        """Write down from now on what comes and goes, for `take_events` alone."""
        journal = Journal(time.time)
        journal.wants_events = True
        self.keep_journal(journal)

    def take_events(self) -> list[BlockEvent]:
        """What came and went since the last call; nothing without a journal that wants events."""
        with self._lock:
            journal = self._planner.catalog.journal
            return [] if journal is None else journal.take_events()

    def shortfalls(self) -> list[Shortfall]:
        """The last lookups that fell short, oldest first; nothing without a journal."""
        with self._lock:
            journal = self._planner.catalog.journal
            return [] if journal is None else list(journal.shortfalls)

    def guide(self, tour: Tour, max_blocks: int = 2048) -> bool:
        """One step of a walk over everything that is stored; True when it is over. See kvstore/plan/tour.py."""
        with self._lock:
            self._check_open()
            return tour.step(self._planner, max_blocks, self._now())

    def resize_host(self, num_slots: int) -> None:
        """Use `num_slots` of the slots; memory of the others goes back to the system as they come free."""
        most = self._planner.host.pool.num_slots
        if not 1 <= num_slots <= most:
            raise ConfigError(f"host: {num_slots} slots are asked for; the slab has 1 to {most}")
        with self._lock:
            self._check_open()
            self._planner.resize_host(num_slots)
            self._slab.discard(self._planner.host.pool.take_retired())

    def attach_tier(self, lane: Lane, plan: TierPlan) -> None:
        """Take up one more tier while requests run. Raises ConfigError if there is one of its name."""
        stored = [(page.key, page.meta) for page in lane.tier.scan()]
        with self._lock:
            self._check_open()
            self._mover.add(lane)
            self._lanes[lane.name] = lane
            self._planner.attach_tier(plan)
            self._planner.restore(lane.name, stored, self._now())
            self._send()
            self._tell()

    def detach_tier(self, name: str, timeout_s: float = 5.0) -> bool:
        """Take a tier away while requests run; its pages stay in the medium, and are a miss until it is back.

        False if a transfer still hangs in it after `timeout_s`: the tier is out of use, but not closed; call again.
        Raises ConfigError if there is no such tier.
        """
        with self._lock:
            self._check_open()
            if name not in self._lanes:
                raise ConfigError(f"there is no tier {name!r}; there are {', '.join(sorted(self._lanes)) or 'none'}")
            self._planner.detach_tier(name)
            self._send()
            self._tell()
        if not self._mover.remove(name, timeout_s):
            return False
        with self._lock:
            lane = self._lanes.pop(name)
        lane.tier.close()
        return True

    # ---- bytes ------------------------------------------------------------------------------------------------

    def slot_view(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        return self._slab.view(slot)

    def slot_array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot as an array."""
        return self._slab.array(slot)

    @property
    def slab_handle(self) -> SlabHandle:
        """How another process maps the slab; ValueError unless the store was opened with a shared one."""
        return self._slab.handle

    @property
    def slabs(self) -> tuple[SlabHandle, ...]:
        """The slabs that slots may lie in: one for ever, see RemoteStore. ValueError as for `slab_handle`."""
        return (self._slab.handle,)

    @property
    def slab_array(self) -> npt.NDArray[np.uint8]:
        """The whole slab, for a device to page-lock."""
        return self._slab.buffer

    # ---- the store as a whole ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything saved so far is written behind."""
        until = time.monotonic() + timeout_s
        with self._lock:
            while not self._planner.is_settled:
                if self._is_closed or not self._wait_until(until):
                    return self._planner.is_settled
            return True

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as plain numbers; kvstore/metrics.py documents them."""
        with self._lock:
            return snapshot(self._planner, self._lanes)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever a wait may be over: an outcome, a tier's state, the end of a lease.

        For a server that cannot block in `wait`. It is called under the lock, from any thread: it may only note that
        there is something to look at.
        """
        with self._lock:
            self._listeners.append(listener)

    def check(self) -> None:
        """Assert the planner's invariants. For tests."""
        with self._lock:
            self._planner.check()

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left, stop all threads, give everything back."""
        timeout_s = self._close_timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        if not self._is_closed and not self.flush(timeout_s):
            log.warning("close: %s pages were not written behind in %.1f s", self.stats()["owed_pages"], timeout_s)
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._tell()
        self._mover.close(max(0.5, until - time.monotonic()))
        for lane in self._lanes.values():
            lane.tier.close()
        if self._mover.num_hung:
            log.warning("close: %d transfers hang in their tier; the slab stays mapped for them", self._mover.num_hung)
        else:
            self._slab.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- callbacks of the mover -------------------------------------------------------------------------------

    def _on_outcome(self, outcome: Outcome) -> None:
        with self._lock:
            self._planner.outcome(outcome, self._now())
            self._send()
            self._tell()

    def _on_tier_state(self, name: str, is_up: bool) -> None:
        with self._lock:
            self._planner.set_tier_up(name, is_up, self._now())
            self._send()
            self._tell()

    def _on_tick(self) -> None:
        with self._lock:
            if not self._is_closed:
                is_over = self._planner.tick(self._now())
                self._send()
                if is_over:
                    self._tell()
                self._slab.discard(self._planner.host.pool.take_retired())

    # ---- private ----------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Hand the planner's transfers to the lanes. Under the lock, so that they go out in the planner's order."""
        transfers = self._planner.take_transfers()
        if transfers and not self._is_closed:
            self._mover.submit(transfers)
        promotions = self._planner.take_promotions()
        if promotions and not self._is_closed:
            self._mover.promote(promotions)

    def _tell(self) -> None:
        """Wake whoever waits. Under the lock."""
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def _wait_until(self, until: float) -> bool:
        left = until - time.monotonic()
        return left > 0 and self._changed.wait(left)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed("the store is closed")

"""The brain: decides what is loaded, saved, moved and evicted. It does no I/O, has no thread and no clock of its own.

Every method takes `now` (of `Clock.steady`: waits), changes the books, and leaves transfers in an outbox
(`take_transfers`); the store hands those to the lanes and brings their outcomes back (`outcome`). Times to live go by
the other two clocks that it is given. So the same code runs under a virtual clock over a trace, and in a server.

A page's life in host memory:

    ABSENT --prepare_save--> FILLING --complete--> READY --written behind--> READY, with copies below --evict--> ABSENT
    ABSENT --prepare_load / prefetch--> FILLING --outcome ok--> READY        (outcome not ok: back to ABSENT)

Called under the store's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from eviction.policy import EvictionPolicy
from kvstore.clock import SYSTEM_CLOCK, Clock
from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.layout import Layout
from kvstore.page import PageKey, PageMeta, page_key
from kvstore.plan.catalog import Catalog, Page, PageState
from kvstore.plan.cost import CostModel, TierCost
from kvstore.plan.endings import Endings
from kvstore.plan.flushing import Flushing, Told, report, told_of
from kvstore.plan.host import HostSpace
from kvstore.plan.keeper import Keeper
from kvstore.plan.leases import Load, Save, slot_pages
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tier import TierPlan
from kvstore.plan.lower_tiers import TierBook
from kvstore.plan.mend import mend
from kvstore.plan.outcomes import Outcomes
from kvstore.plan.records import (
    Explanation,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Outcome,
    Request,
    SaveLease,
    Transfer,
)
from kvstore.plan.retention import Retention
from kvstore.plan.saves import Preparing, Saver
from kvstore.plan.settings import PlanSettings
from kvstore.plan.single_flight import Turns
from kvstore.plan.transfers import Flights


class Planner:
    """Prefix index, host slots, lower tiers, leases: one state machine over plain records."""

    def __init__(
        self,
        layout: Layout,
        settings: PlanSettings,
        policy: EvictionPolicy[Page],
        tiers: Sequence[TierPlan] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.clock = clock
        groups = range(len(layout.groups))
        self.windows = [layout.window_blocks(group) for group in groups]
        page_bytes = [layout.stored_bytes(group) for group in groups]
        self.catalog = Catalog(len(layout.groups))
        self.flights = Flights()
        self.host = HostSpace(settings.num_slots, policy, self.catalog, clock.boot)
        self._book = TierBook(
            tiers,
            self.catalog,
            self.flights,
            page_bytes,
            batch_pages=settings.batch_pages,
            max_owed=2 * settings.num_slots,
            hash_bytes=settings.hash_bytes,
            wall=clock.wall,
        )
        self.tiers = self._book.all
        self.costs = CostModel(
            {tier.plan.name: TierCost(tier.plan.workers) for tier in self.tiers}, settings.batch_pages * max(page_bytes)
        )
        self.scout = Scout(layout, settings, self.catalog, self.tiers, self.flights, self.costs)
        self.loader = Loader(
            settings, self.host, self.catalog, self.tiers, self.flights, self.scout, self.windows, page_bytes
        )
        self.turns = Turns(
            settings.compute_wait_s,
            settings.lookup_deadline_s,
            settings.claimer,
            layout.block_size,
            self.tiers,
            self.flights,
            self.costs,
            self.scout.ask_again,
        )
        self.keeper = Keeper(self.host, clock, budget=settings.max_pinned_fraction, longest_s=settings.pin_max_s)
        self._retention = Retention(self.host, self.tiers, self.keeper, settings.touch_interval_s)
        self.saver = Saver(self.host, self.catalog, self.scout)
        self.endings = Endings(
            layout.block_size, self.tiers, self.costs, self.scout, self.saver, self.turns, self._retention
        )
        self._outcomes = Outcomes(
            self.catalog, self.flights, self._book, self.costs, self.scout, self.loader, self.turns, self._retention
        )
        self._next_lease = 1

    # ---- looking up and loading -------------------------------------------------------------------------------

    def lookup(self, request: Request, now: float) -> Match:
        """The longest prefix worth loading, and whether asking again may show more."""
        self._expire()
        match, stale = self.scout.lookup(request, now, self.turns.judge)
        if stale is not None:
            self.loader.sample(request, stale, now)
        return match

    def ask(self, request: Request, now: float) -> bool:
        """Ask shared tiers about a request without looking it up; True until they have answered."""
        self._expire()
        return self.scout.ask(request, now)

    def explain(self, request: Request) -> Explanation:
        """Why a request matches what it matches."""
        self._expire()
        return self.scout.explain(request)

    def prepare_load(self, request: Request, num_blocks: int, now: float, owner: str = "", first: int = 0) -> LoadLease:
        """Pin blocks [first, num_blocks) that are in host memory, make room for the rest, send the fetches."""
        self._expire()
        load = self.loader.prepare(self._lease_id(), request, num_blocks, now, owner, first)
        by_tier: dict[str, int] = {}
        for name in load.sources[load.first :]:
            by_tier[name] = by_tier.get(name, 0) + 1
        return LoadLease(
            load.id,
            load.num_blocks,
            load.num_blocks * self.layout.block_size,
            slot_pages(load.blocks, load.pages),
            by_tier,
        )

    def poll(self, lease_id: int) -> LeaseStatus:
        """How far a load lease is. A lease that ended has no usable block."""
        load = self.loader.loads.get(lease_id)
        if load is None:
            return LeaseStatus(LeaseState.CLOSED, 0, 0)
        usable = load.usable_blocks(self.windows)
        return LeaseStatus(load.state, usable, usable * self.layout.block_size)

    def is_waiting(self, lease_id: int) -> bool:
        """True while a load lease waits for pages."""
        load = self.loader.loads.get(lease_id)
        return load is not None and load.waiting > 0

    def prefetch(self, request: Request, now: float) -> int:
        """Start bringing the known prefix into host memory; returns a ticket."""
        self._expire()
        return self.loader.prefetch(self._lease_id(), request, now)

    def cancel(self, ticket: int) -> list[int]:
        """End a prefetch; returns the transfers that need not be carried out any more."""
        return self.loader.cancel(ticket)

    @property
    def num_leases(self) -> int:
        return len(self.loader.loads) + len(self.saver.saves)

    # ---- saving -----------------------------------------------------------------------------------------------

    def prepare_save(self, request: Request, first: int, num_blocks: int, now: float, owner: str = "") -> SaveLease:
        """Slots for the pages of blocks [first, first + num_blocks) that host memory does not have.

        Never waits: where no slot is free and nothing can be evicted, the rest is skipped and counted.
        """
        self._expire()  # else what is over would count as stored, and not be saved again
        steps = self.preparing_save(request, first, num_blocks, owner)
        while (lease := self.go_on(steps, request, now)) is None:
            pass
        return lease

    def preparing_save(self, request: Request, first: int, num_blocks: int, owner: str = "") -> Preparing:
        """The same in steps of milliseconds, by `go_on`."""
        return self.saver.preparing(self._lease_id(), request, first, num_blocks, owner)

    def go_on(self, steps: Preparing, request: Request, now: float) -> SaveLease | None:
        """One step of a save that is being prepared; the lease when it is over."""
        lease = steps.step()
        if lease is not None and lease.skipped:
            self.turns.end(request, now)  # nobody should wait for what will not be there
        return lease

    def complete(self, lease_id: int, now: float, filled: Sequence[bool] | None = None) -> None:
        """End a lease well: unpin after a load, publish after a save."""
        load = self.loader.complete(lease_id, now)
        if load is not None:
            self.endings.loaded(load, now)
            return
        ended = self.saver.end(lease_id, now, filled)
        if ended is not None:
            self.endings.saved(*ended, now)

    def release(self, lease_id: int, now: float) -> None:
        """End a lease badly: unpin, or drop what was being filled."""
        if self.loader.release(lease_id, now):
            return
        ended = self.saver.drop(lease_id, now)
        if ended is not None:
            self.endings.saved(*ended, now)

    def release_owner(self, owner: str, now: float) -> int:
        """Release every lease of an owner that died."""
        leases: list[Load | Save] = [*self.loader.loads.values(), *self.saver.saves.values()]
        own = [lease for lease in leases if lease.owner == owner]
        for lease in own:
            self.release(lease.id, now)
            self.turns.end(lease.request, now)
        return len(own)

    # ---- the end of a request, and what is said about it ------------------------------------------------------

    def finished(self, request: Request, now: float, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """Refresh the request's path in every tier, or let its private part go first if no turn will follow."""
        self.endings.finished(request, now, finish_reason, last_turn=last_turn)

    def abandon(self, request: Request, now: float) -> bool:
        """Nobody will go on with the request; True if others waited, or might have waited, for it to compute."""
        self.scout.end(request)
        return self.turns.end(request, now)

    def pin(self, request: Request, now: float) -> int:
        """Keep the request's blocks in host memory until unpin, as many as the budget holds and as long as may be."""
        self._expire()
        return self.keeper.keep(self.scout.known_path(request), float("inf"), request.holder)

    def unpin(self, request: Request, now: float) -> int:
        """Undo pin."""
        return self.keeper.let_go(self.scout.known_path(request))

    def forget(self, request: Request, first: int, now: float) -> int:
        """Delete blocks from `first` on and all that is known to continue them."""
        self.turns.end(request, now)
        if first >= len(request.keys):
            return 0
        removed = self.catalog.remove(request.keys[first])
        pages = self._retention.leave(removed)
        own = [page_key(key, group) for key in request.keys[first:] for group in range(len(self.windows))]
        for tier in self.tiers:
            # There may be what the catalog does not remember, or what others wrote.
            tier.delete(pages, own if tier.plan.is_shared or not tier.plan.is_indexed else ())
            tier.pump(now)
        return len(removed)

    def clear(self, now: float) -> int:
        """Delete every block that is known, and all that tiers know themselves of; returns how many were known."""
        removed = self.catalog.clear()
        pages = self._retention.leave(removed)
        for tier in self.tiers:
            tier.clear(pages)
            tier.pump(now)
        if self.catalog.journal is not None:
            self.catalog.journal.cleared()
        return len(removed)

    def set_ttl(self, request: Request, ttl_s: float, now: float) -> int:
        """Give the known blocks of a request a time to live from now on, in every tier; returns how many."""
        self._expire()
        path = self.scout.known_path(request)
        self._retention.set_ttl(path, ttl_s, now)
        return len(path)

    # ---- what the world reports -------------------------------------------------------------------------------

    def outcome(self, outcome: Outcome, now: float) -> None:
        """Book what became of a transfer. Unknown and repeated outcomes are ignored."""
        self._outcomes.book(outcome, now)

    def set_tier_up(
        self, name: str, is_up: bool, now: float, directions: Collection[Direction] = ALL_DIRECTIONS
    ) -> None:
        """Breakers opened or closed: lookups leave the tier out, or its debts are paid again."""
        self._book.set_up(name, is_up, now, directions)

    def attach_tier(self, plan: TierPlan) -> None:
        """A tier is there from now on, or is back; `restore` tells what it holds. Its lane must be there."""
        if self._book.add(plan):
            self.costs.tiers[plan.name] = TierCost(plan.workers)
            self.scout.add_tier(plan.name)
            self.loader.add_tier(plan.name)

    def detach_tier(self, name: str) -> None:
        """A tier is taken away: what it holds is forgotten, and nothing is sent there any more."""
        self._book.detach(name)

    def resize_host(self, num_slots: int) -> None:
        """Use fewer or more of the host slots."""
        self.host.resize(num_slots)

    def tick(self, now: float) -> bool:
        """Do what only time makes due: deadlines, promises that end. True if somebody need not wait any more."""
        self._expire()
        self.keeper.expire()
        self.host.shrink()
        for tier in self.tiers:
            tier.pump(now)
        # What had not begun when its tier went down has been answered for by now, and may be on its way from another
        # tier; the rest is inside and may never come back.
        stalled = [page for flight in self.flights.take_stalled() for page in flight.pages]
        return self.loader.give_up(stalled, now) | self.turns.tick(now)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """The engine computed `num_tokens` in `seconds`."""
        self.costs.observe_prefill(num_tokens, seconds)

    def restore(self, name: str, stored: Sequence[tuple[PageKey, PageMeta]]) -> int:
        """Book what a tier held when it was opened, least recently used first; returns the pages taken in."""
        return sum(self.restoring(name, stored))

    def restoring(self, name: str, stored: Sequence[tuple[PageKey, PageMeta]]) -> Iterator[int]:
        """The same in steps of milliseconds, each of which leaves the books in order; pages taken in by each."""
        return self._book.restoring(name, stored)

    def take_transfers(self) -> list[Transfer]:
        """What the lanes have to carry now."""
        return self.flights.take()

    def take_promotions(self) -> list[int]:
        """Transfers sent as prefetches that a request now waits for."""
        return self.loader.take_promotions()

    def told(self) -> Told:
        """The notes of a caller whose flushes begin now."""
        return told_of(self.tiers)

    def flush_result(self, told: Told) -> FlushResult:
        """What is owed to tiers, or lost to them; `told` notes that its caller knows."""
        return report(self.tiers, told)

    def flushing(self) -> Flushing:
        """A flush that begins now."""
        return Flushing(self.tiers)

    def check(self) -> None:
        """Assert what must always hold. For tests; walks everything."""
        pages = list(self.catalog.pages())
        known = set(pages)
        held = [page for load in self.loader.loads.values() for page in load.pages if page not in load.lost]
        filling = [page for save in self.saver.saves.values() for page in save.pages]
        flying = [page for flight in self.flights.under_way() for page in flight.pages]
        self.host.check({*pages, *(page for page in [*held, *filling, *flying] if page not in known)})
        pins: dict[Page, int] = {}
        for page in held:
            if page.state == PageState.READY:
                pins[page] = pins.get(page, 0) + 1
        for page in {*pages, *held}:
            expected = pins.get(page, 0) + page.kept
            assert page.pins == expected, f"page has {page.pins} pins, {expected} holders"
        for tier in self.tiers:
            tier.check(known)
        self.catalog.tree.check()
        self.turns.claims.check()
        self.keeper.check()

    @property
    def last_lease(self) -> int:
        """The highest number that a lease has."""
        return self._next_lease

    def mend(self, last_lease: int, now: float) -> None:
        """Put the books right after an exception in the middle of a call of one of these methods (see mend.py)."""
        mend(self, last_lease, now)

    # ---- private ----------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        """Let go what is past its deadline. Wherever it matters, and not by `tick` alone: ticks may be late."""
        self.host.expire()
        for tier in self.tiers:
            tier.expire()

    def _lease_id(self) -> int:
        self._next_lease += 1
        return self._next_lease

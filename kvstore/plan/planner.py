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
from itertools import count

from eviction.policy import EvictionPolicy
from kvstore.clock import SYSTEM_CLOCK, Clock
from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.layout import Layout
from kvstore.page import PageKey, PageMeta
from kvstore.plan.catalog import Catalog
from kvstore.plan.cost import CostModel, TierCost
from kvstore.plan.endings import Endings
from kvstore.plan.flushing import Flushing, Told, report, told_of
from kvstore.plan.host import HostSpace
from kvstore.plan.in_steps import InSteps
from kvstore.plan.keeper import Keeper
from kvstore.plan.leases import load_lease
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tiers import TierBook
from kvstore.plan.mend import Mender
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
from kvstore.plan.saves import Saver
from kvstore.plan.settings import PlanSettings
from kvstore.plan.single_flight import Turns
from kvstore.plan.state import Page, PageState
from kvstore.plan.steps import Steps, at_once
from kvstore.plan.tier_plan import TierPlan
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
            layout.block_size, self.tiers, self.costs, self.scout, self.loader, self.saver, self.turns, self._retention
        )
        self._outcomes = Outcomes(
            self.catalog, self.flights, self._book, self.costs, self.scout, self.loader, self.turns, self._retention
        )
        self._mender = Mender(
            self.catalog,
            self.flights,
            self.host,
            self.tiers,
            clock,
            self.scout,
            self.loader,
            self.saver,
            self.turns,
            self.keeper,
        )
        self._lease_ids = count(2)
        self.in_steps = InSteps(
            layout,
            self.host,
            self.catalog,
            self.tiers,
            self.flights,
            self.scout,
            self.loader,
            self.saver,
            self.turns,
            self.keeper,
            self._retention,
            self.endings,
        )

    # ---- looking up and loading -------------------------------------------------------------------------------

    def lookup(self, request: Request, now: float) -> Match:
        """The longest prefix worth loading, and whether asking again may show more."""
        self.in_steps.expire(request)
        match, stale = self.scout.lookup(request, now, self.turns.judge)
        if stale is not None:
            self.loader.sample(request, stale, now)
        return match

    def ask(self, request: Request, now: float) -> bool:
        """Ask shared tiers about a request without looking it up; True until they have answered."""
        self.in_steps.expire(request)
        return self.scout.ask(request, now)

    def explain(self, request: Request) -> Explanation:
        """Why a request matches what it matches."""
        self.in_steps.expire(request)
        return self.scout.explain(request)

    def prepare_load(self, request: Request, num_blocks: int, now: float, owner: str = "", first: int = 0) -> LoadLease:
        """Pin blocks [first, num_blocks) that are in host memory, make room for the rest, send the fetches."""
        steps = self.in_steps.prepare_load(self.new_lease_id(), request, num_blocks, now, owner, first)
        return load_lease(at_once(steps), self.layout.block_size)

    def poll(self, lease_id: int) -> LeaseStatus:
        """How far a load lease is. A lease that ended has no usable block."""
        load = self.loader.loads.get(lease_id)
        if load is None or load.state is LeaseState.CLOSED:
            return LeaseStatus(LeaseState.CLOSED, 0, 0)
        usable = load.usable_blocks(self.windows)
        return LeaseStatus(load.state, usable, usable * self.layout.block_size)

    def is_waiting(self, lease_id: int) -> bool:
        """True while a load lease waits for pages."""
        load = self.loader.loads.get(lease_id)
        return load is not None and load.waiting > 0

    def prefetch(self, request: Request, now: float) -> int:
        """Start bringing the known prefix into host memory; returns a ticket."""
        return at_once(self.in_steps.prefetch(self.new_lease_id(), request, now))

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
        return at_once(self.in_steps.prepare_save(self.new_lease_id(), request, first, num_blocks, now, owner))

    def complete(self, lease_id: int, now: float, filled: Sequence[bool] | None = None) -> None:
        """End a lease well: unpin after a load, publish after a save."""
        at_once(self.in_steps.complete(lease_id, now, filled))

    def release(self, lease_id: int, now: float) -> None:
        """End a lease badly: unpin, or drop what was being filled."""
        at_once(self.in_steps.release(lease_id, now))

    def release_owner(self, owner: str, now: float) -> int:
        """Release every lease of an owner that died."""
        return at_once(self.in_steps.release_owner(owner, now))

    # ---- the end of a request, and what is said about it ------------------------------------------------------

    def finished(self, request: Request, now: float, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """Refresh the request's path in every tier, or let its private part go first if no turn will follow."""
        at_once(self.in_steps.finished(request, now, finish_reason, last_turn=last_turn))

    def abandon(self, request: Request, now: float) -> bool:
        """Nobody will go on with the request; True if others waited, or might have waited, for it to compute."""
        self.scout.end(request)
        return self.turns.end(request, now)

    def pin(self, request: Request, now: float) -> int:
        """Keep the request's blocks in host memory until unpin, as many as the budget holds and as long as may be."""
        return at_once(self.in_steps.pin(request))

    def unpin(self, request: Request, now: float) -> int:
        """Undo pin."""
        return at_once(self.in_steps.unpin(request))

    def forget(self, request: Request, first: int, now: float) -> int:
        """Delete blocks from `first` on and all that is known to continue them."""
        return at_once(self.in_steps.forget(request, first, now))

    def clear(self, now: float) -> int:
        """Delete every block that is known, and all that tiers know themselves of; returns how many were known."""
        return at_once(self.in_steps.clear(now))

    def set_ttl(self, request: Request, ttl_s: float, now: float) -> int:
        """Give the known blocks of a request a time to live from now on, in every tier; returns how many."""
        return at_once(self.in_steps.set_ttl(request, ttl_s, now))

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
        at_once(self.detaching_tier(name))

    def detaching_tier(self, name: str) -> Steps[None]:
        """The same in steps."""
        self._book.detach(name)
        return self.in_steps.detach_tier(self._book.named(name))

    def resize_host(self, num_slots: int) -> None:
        """Use fewer or more of the host slots."""
        at_once(self.in_steps.resize_host(num_slots))

    def tick(self, now: float) -> bool:
        """Do what only time makes due: deadlines, promises that end. True if somebody need not wait any more."""
        return at_once(self.in_steps.tick(now))

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
        """The transfers that the lanes have to carry now."""
        return self.flights.take()

    def take_promotions(self) -> list[int]:
        """Transfers sent as prefetches that a request now waits for."""
        return self.loader.take_promotions()

    def told(self) -> Told:
        """The notes of a caller whose flushes begin now."""
        return told_of(self.tiers)

    def flush_result(self, told: Told) -> FlushResult:
        """The pages owed to tiers, or lost to them; `told` notes that its caller knows."""
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
        published = [page for save in self.saver.saves.values() if save.is_ending for page in save.pages]
        for page in [*held, *published]:
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
        """The highest number of a lease that was made."""
        return self.in_steps.last_lease

    def new_lease_id(self) -> int:
        """A number for a lease or a ticket. Any thread."""
        return next(self._lease_ids)

    def mend(self, last_lease: int, now: float) -> None:
        """Put the books right after an exception in the middle of a call of one of these methods (see mend.py)."""
        self._mender.mend(last_lease, now)

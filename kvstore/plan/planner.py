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

from eviction.policy import Ending
from eviction.ttl import Ttl
from kvstore.clock import SYSTEM_CLOCK, Clock
from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.hints.outcome import HintOutcome
from kvstore.layout import Layout
from kvstore.page import PageKey, PageMeta
from kvstore.plan.audience import Audience
from kvstore.plan.books import Books
from kvstore.plan.catalog import Catalog
from kvstore.plan.cost import CostModel
from kvstore.plan.ended import ABANDONED
from kvstore.plan.fetches import PREFETCH, Fetches
from kvstore.plan.flushing import Flushing, Told, report, told_of
from kvstore.plan.hints import Hints
from kvstore.plan.host import HostMemory
from kvstore.plan.in_steps import InSteps
from kvstore.plan.loads import Loader, load_lease
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.lower_tiers import LowerTiers
from kvstore.plan.margin import Margin
from kvstore.plan.mend import Mender
from kvstore.plan.records import (
    Explanation,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Op,
    Outcome,
    PlanSettings,
    Request,
    SaveLease,
    Transfer,
)
from kvstore.plan.retention import Retention
from kvstore.plan.saves import Saver
from kvstore.plan.single_flight import SingleFlight
from kvstore.plan.speculation import Speculation
from kvstore.plan.state import Page, PageState
from kvstore.plan.steps import Steps, at_once
from kvstore.plan.tier_check import check_tier
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.transfers import InFlight, TransferBook
from kvstore.plan.wishes import Wish


class Planner:
    """Prefix index, host slots, lower tiers, leases: one state machine over plain records."""

    def __init__(
        self,
        layout: Layout,
        settings: PlanSettings,
        policy: Ttl[Page],
        tiers: Sequence[TierPlan] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        transfers, catalog = TransferBook(), Catalog(layout.block_groups, len(layout.groups))
        most = max(layout.stored_bytes(group) for group in range(len(layout.groups)))
        self.books = books = Books(
            layout,
            settings,
            clock,
            catalog,
            HostMemory(settings.num_slots, policy, catalog, clock.boot),
            transfers,
            CostModel({}, settings.batch_pages * most),
        )
        self._lower_tiers = LowerTiers(books, tiers)
        self.lookups = PrefixLookup(books)
        self.fetches = Fetches(books, self.lookups)
        self.loader = Loader(books, self.lookups, self.fetches)
        self.single_flight = SingleFlight(books, self.lookups)
        self.retention = Retention(books)
        self.margin = Margin(books)
        self.saver = Saver(books, self.lookups, self.single_flight, self.retention, self.margin)
        self.audience = Audience(books)
        self.in_steps = InSteps(
            books,
            self.lookups,
            self.fetches,
            self.loader,
            self.saver,
            self.single_flight,
            self.retention,
            self.audience,
        )
        self.hints = Hints(books, self.lookups, self.fetches, self.retention, self.in_steps)
        self.speculation: Speculation | None = None
        if settings.speculation is not None:
            self.speculation = Speculation(books, self.lookups, self.fetches, settings.speculation)
            self.in_steps.speculation = self.speculation
        self._mender = Mender(
            books, self.lookups, self.fetches, self.loader, self.saver, self.single_flight, self.retention
        )

    # ---- looking up and loading -------------------------------------------------------------------------------

    def lookup(self, request: Request, now: float) -> Match:
        """The longest prefix worth loading, and whether asking again may show more."""
        if self.audience.listeners:
            self.audience.tell(request)
        self.lookups.expire(request)
        judge = self.single_flight.judge if request.options.single_flight else None
        match, stale = self.lookups.lookup(request, now, judge)
        if self.speculation is not None:
            self.speculation.came(request, now)
        if stale is not None:
            self.fetches.sample(request, stale, now)
        return match

    def ask(self, request: Request, now: float) -> bool:
        """Ask shared tiers about a request without looking it up; True until they have answered."""
        self.lookups.expire(request)
        return self.lookups.ask(request, now)

    def explain(self, request: Request) -> Explanation:
        """Why a request matches what it matches."""
        self.lookups.expire(request)
        return self.lookups.explain(request)

    def prepare_load(self, request: Request, num_blocks: int, now: float, owner: str = "", first: int = 0) -> LoadLease:
        """Pin blocks [first, num_blocks) that are in host memory, make room for the rest, send the fetches."""
        steps = self.in_steps.prepare_load(self.in_steps.new_lease_id(), request, num_blocks, now, owner, first)
        return load_lease(at_once(steps), self.books.layout.block_size)

    def poll(self, lease_id: int) -> LeaseStatus:
        """How far a load lease is. A lease that ended has no usable block."""
        load = self.loader.loads.get(lease_id)
        if load is None or load.state is LeaseState.CLOSED:
            return LeaseStatus(LeaseState.CLOSED, 0, 0)
        usable = load.usable_blocks(self.books.windows)
        return LeaseStatus(load.state, usable, usable * self.books.layout.block_size)

    def is_waiting(self, lease_id: int) -> bool:
        """True while a load lease waits for pages."""
        load = self.loader.loads.get(lease_id)
        return load is not None and load.waiting > 0

    def prefetch(self, request: Request, now: float) -> int:
        """Start bringing the known prefix into host memory; returns a ticket."""
        return at_once(self.in_steps.prefetch(self.in_steps.new_lease_id(), request, now))

    def cancel(self, ticket: int) -> list[int]:
        """End a prefetch; returns the transfers that need not be carried out any more."""
        return self.fetches.cancel(ticket)

    @property
    def num_leases(self) -> int:
        return len(self.loader.loads) + len(self.saver.saves)

    # ---- saving -----------------------------------------------------------------------------------------------

    def prepare_save(
        self,
        request: Request,
        first: int,
        num_blocks: int,
        now: float,
        owner: str = "",
        states: Sequence[int] = (),
    ) -> SaveLease:
        """Slots for the pages of blocks [first, first + num_blocks) that host memory does not have.

        states: the blocks among them at whose end there is a state to be saved.

        Never waits: where no slot is free and nothing can be evicted, the rest is skipped and counted.
        """
        lease_id = self.in_steps.new_lease_id()
        return at_once(self.in_steps.prepare_save(lease_id, request, first, num_blocks, now, owner, states))

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

    def finished(
        self,
        request: Request,
        now: float,
        *,
        finish_reason: str = "",
        last_turn: bool = False,
        reply_tokens: int = -1,
    ) -> None:
        """Refresh the request's path in every tier, or let its private part go first if no turn will follow."""
        at_once(self.in_steps.finished(request, now, finish_reason, last_turn=last_turn, reply_tokens=reply_tokens))

    def abandon(self, request: Request, now: float) -> bool:
        """Nobody will go on with the request; True if others waited, or might have waited, for it to compute."""
        self.lookups.end(request, now, ABANDONED)
        self.audience.tell_end(request, Ending("cancelled"))
        return self.single_flight.end(request, now)

    def pin(self, request: Request, now: float) -> int:
        """Keep the request's blocks in host memory until unpin, as many as the budget holds and as long as may be."""
        return at_once(self.in_steps.pin(request))

    def unpin(self, request: Request, now: float) -> int:
        """Undo pin."""
        return at_once(self.in_steps.unpin(request))

    def obey(self, request: Request, wish: Wish, now: float) -> HintOutcome:
        """Do what a hint says about a request."""
        return at_once(self.hints.obey(self.in_steps.new_lease_id(), request, wish, now))

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
        flight = self.books.transfers.land(outcome.transfer_id)
        if flight is None:
            return
        tier = self._lower_tiers.named(flight.transfer.tier)
        if outcome.error is None and outcome.seconds > 0 and flight.transfer.op in (Op.FETCH, Op.PROBE):
            self.books.costs.tiers[tier.plan.name].observe(outcome.seconds, outcome.num_bytes, now)
        match flight.transfer.op:
            case Op.FETCH:
                self._fetched(tier, flight, outcome, now)
            case Op.SPILL:
                tier.spilled(flight, outcome, now)
                if self.retention.demotions.leaving:
                    self.retention.demotions.written(flight.pages)
                self.margin.keep(now)
                self.retention.drop_idle(flight.pages)
            case Op.PROBE:
                self.fetches.resume_prefetches(self.lookups.answered(flight, outcome), now)
            case Op.TOUCH:
                tier.touched(flight, outcome, now)
            case Op.DELETE | Op.CLEAR:
                tier.deleted(flight, outcome, now)
            case Op.CLAIM:
                self.single_flight.answered(flight, outcome, now)
            case Op.UNCLAIM:
                pass  # what could not be taken back expires

    def _fetched(self, tier: LowerTier, flight: InFlight, outcome: Outcome, now: float) -> None:
        self.fetches.fetched(tier, flight, outcome, now)
        if self.retention.keeper.coming:
            self.retention.keeper.arrived(flight.pages)
        self.margin.keep(now)
        arrived = [page for page in flight.pages if page.state == PageState.READY and not page.block.is_removed]
        for other in self.books.tiers:
            if other is not tier and arrived:
                other.owe(arrived, used=True)
                other.pump(now)
        self.retention.drop_idle(flight.pages)
        if self.speculation is not None and flight.context is PREFETCH:
            self.speculation.arrived(flight.pages, now)
        if len(arrived) < len(flight.pages):
            for page in reversed(flight.pages):
                self.books.catalog.prune(page.block)

    def set_tier_up(
        self, name: str, is_up: bool, now: float, directions: Collection[Direction] = ALL_DIRECTIONS
    ) -> None:
        """Breakers opened or closed: lookups leave the tier out, or its debts are paid again."""
        self._lower_tiers.set_up(name, is_up, now, directions)

    def attach_tier(self, plan: TierPlan) -> None:
        """A tier is there from now on, or is back; `restore` tells what it holds. Its lane must be there."""
        if self._lower_tiers.add(plan):
            self.lookups.add_tier(plan.name)
            self.fetches.add_tier(plan.name)
            self.loader.add_tier(plan.name)
        self.audience.gather()

    def detach_tier(self, name: str) -> None:
        """A tier is taken away: what it holds is forgotten, and nothing is sent there any more."""
        at_once(self.detaching_tier(name))

    def detaching_tier(self, name: str) -> Steps[None]:
        """The same in steps."""
        self._lower_tiers.detach(name)
        return self.in_steps.detach_tier(self._lower_tiers.named(name))

    def resize_host(self, num_slots: int) -> None:
        """Use fewer or more of the host slots."""
        at_once(self.in_steps.resize_host(num_slots))

    def tick(self, now: float) -> bool:
        """Do what only time makes due: deadlines, promises that end. True if somebody need not wait any more."""
        return at_once(self.in_steps.tick(now))

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """The engine computed `num_tokens` in `seconds`."""
        self.books.costs.observe_prefill(num_tokens, seconds)

    def restore(self, name: str, stored: Sequence[tuple[PageKey, PageMeta]]) -> int:
        """Book what a tier held when it was opened, least recently used first; returns the pages taken in."""
        return sum(self.restoring(name, stored))

    def restoring(self, name: str, stored: Sequence[tuple[PageKey, PageMeta]]) -> Iterator[int]:
        """The same in steps of milliseconds, each of which leaves the books in order; pages taken in by each."""
        return self._lower_tiers.restoring(name, stored)

    def take_transfers(self) -> list[Transfer]:
        """The transfers that the lanes have to carry now."""
        return self.books.transfers.take()

    def told(self) -> Told:
        """The notes of a caller whose flushes begin now."""
        return told_of(self.books.tiers)

    def flush_result(self, told: Told) -> FlushResult:
        """The pages owed to tiers, or lost to them; `told` notes that its caller knows."""
        return report(self.books.tiers, told)

    def flushing(self) -> Flushing:
        """A flush that begins now."""
        return Flushing(self.books.tiers)

    def check(self) -> None:
        """Assert what must always hold. For tests; walks everything."""
        pages = list(self.books.catalog.pages())
        known = set(pages)
        held = [page for load in self.loader.loads.values() for page in load.pages if page not in load.lost]
        filling = [page for save in self.saver.saves.values() for page in save.pages]
        flying = [page for flight in self.books.transfers.under_way() for page in flight.pages]
        self.books.host.check({*pages, *(page for page in [*held, *filling, *flying] if page not in known)})
        pins: dict[Page, int] = {}
        published = [page for save in self.saver.saves.values() if save.is_ending for page in save.pages]
        for page in [*held, *published]:
            if page.state == PageState.READY:
                pins[page] = pins.get(page, 0) + 1
        for page in {*pages, *held}:
            expected = pins.get(page, 0) + page.kept
            assert page.pins == expected, f"page has {page.pins} pins, {expected} holders"
        sizes = {self.books.catalog.num_groups, self.books.catalog.num_all_groups}
        assert all(len(block.pages) in sizes for block in self.books.catalog.tree.values()), "a part of a state's pages"
        for tier in self.books.tiers:
            check_tier(tier, known)
        self.books.catalog.tree.check()
        self.single_flight.claims.check()
        self.retention.keeper.check()
        self.retention.raises.check()
        if self.speculation is not None:
            self.speculation.check()

    def mend(self, last_lease: int, now: float) -> None:
        """Put the books right after an exception in the middle of a call of one of these methods (see mend.py)."""
        self._mender.mend(last_lease, now)
        if self.speculation is not None:
            self.speculation.clear()

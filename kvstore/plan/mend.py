"""Putting the books right after an exception in the middle of a step.

An exception may come from outside at any line: Ctrl-C in the thread that plans, a signal's handler that raises, an
exception set by another thread, no memory. Whatever it has cut short, these hold by themselves and are believed:

    blocks and their parents     wherever one is named: the tree, a policy, a lease, a transfer, a promise
    slots of pages               a page that says READY has its bytes in its slot
    leases                       but for those whose caller never heard of them, which end
    transfers under way          each with its pages; the lanes have those that were handed to them

All else is made anew from these: the tree, pins and promises, free slots, the policies, sums. A lease that was being
ended has ended; a prefix that was being forgotten is forgotten if its first block is.

The hard thing is what it costs: it walks over everything (about 4 s for a million blocks), where undoing would need a
note of each change that every step made. Interrupts inside a step are rare, steps are not.

Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from eviction.policy import EvictionPolicy
from kvstore.page import PageKey
from kvstore.plan.books import Books
from kvstore.plan.fetches import PREFETCH, Fetches
from kvstore.plan.journal import Left
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import HOST, Op
from kvstore.plan.retention import Retention
from kvstore.plan.saves import Saver
from kvstore.plan.single_flight import SingleFlight
from kvstore.plan.state import Block, Load, Page, PageState, Save


class Mender:
    """Puts the books right. Under the store's lock."""

    def __init__(
        self,
        books: Books,
        lookups: PrefixLookup,
        fetches: Fetches,
        loader: Loader,
        saver: Saver,
        single_flight: SingleFlight,
        retention: Retention,
    ) -> None:
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._clock = books.clock
        self._lookups = lookups
        self._fetches = fetches
        self._loader = loader
        self._saver = saver
        self._single_flight = single_flight
        self._keeper = retention.keeper
        self._raises = retention.raises
        self._demotions = retention.demotions

    def mend(self, last_lease: int, now: float) -> None:
        """Make the books agree. last_lease: leases of a higher number are known to nobody but the planner, and end."""
        for leases in (self._loader.loads, self._saver.saves):
            for lease_id in [lease_id for lease_id in leases if lease_id > last_lease]:
                del leases[lease_id]
        blocks = self._blocks()
        pages = [page for block in blocks for page in block.pages]
        self._catalog.rebuild([block for block in blocks if not block.is_removed])
        self._settle_pages(pages)
        self._settle_loads(pages, now)
        self._keeper.rebuild(pages)
        self._raises.rebuild()
        holders = _holders(self._loader.loads.values(), self._saver.saves.values())
        for page in pages:
            page.pins = holders.get(page, 0) + page.kept
        self._settle_host(pages)
        self._demotions.rebuild()
        for tier in self._tiers:
            self._settle_tier(tier, pages, now)
        for block in reversed(blocks):  # deepest first
            self._catalog.prune(block)
        while self._host.shrink():
            pass
        self._single_flight.claims.rebuild()
        self._lookups.forget_answers()
        self._transfers.rebuild()

    def _blocks(self) -> list[Block]:
        """Every block there is, by depth; of one that is forgotten, so is all that continues it."""
        flights = self._transfers.under_way()
        tiers = self._tiers
        pages = chain(
            self._host.policy.members(),
            *(tier.plan.policy.members() for tier in tiers if tier.plan.policy is not None),
            *(tier.debts.pages() for tier in tiers),
            *(load.pages for load in self._loader.loads.values()),
            *(save.pages for save in self._saver.saves.values()),
            *(flight.pages for flight in flights),
        )
        found: dict[Block, None] = {}
        for named in chain(self._catalog.blocks(), self._keeper.blocks, (page.block for page in pages)):
            block: Block | None = named
            while block is not None and block not in found:
                found[block] = None
                block = block.parent
        blocks = sorted(found, key=lambda block: block.depth)
        for block in blocks:
            block.is_removed = block.is_removed or (block.parent is not None and block.parent.is_removed)
        return blocks

    def _settle_pages(self, pages: list[Page]) -> None:
        """State and slot of every page, and what is on its way to or from it."""
        fetching: dict[Page, int] = {}
        spilling: dict[Page, int] = {}
        bits = {tier.plan.name: tier.bit for tier in self._tiers}
        self._fetches.prefetching = 0
        for flight in self._transfers.under_way():
            if flight.transfer.op is Op.FETCH:
                fetching.update(dict.fromkeys(flight.pages, flight.transfer.id))
                self._fetches.prefetching += len(flight.pages) * (flight.context is PREFETCH)
            elif flight.transfer.op is Op.SPILL:
                for page in flight.pages:
                    spilling[page] = spilling.get(page, 0) | bits[flight.transfer.tier]
        # What a save that is ending has published is READY; the rest is as if it had not begun to end.
        saves = self._saver.saves.values()
        saving = {
            page for save in saves for page in save.pages if not save.is_ending or page.state == PageState.FILLING
        }
        saving.update(page for load in self._loader.loads.values() for page in load.reserved)
        for page in pages:
            page.spilling = spilling.get(page, 0)
            page.flight = fetching.get(page, 0)
            if page.flight or page in saving:
                page.state = PageState.FILLING
            elif page.state == PageState.FILLING or page.slot < 0:
                page.state = PageState.ABSENT  # nobody fills it, or it had no slot yet
            elif page.state == PageState.EXPIRED and not page.spilling:
                page.state = PageState.ABSENT  # nobody reads it
            if page.state == PageState.ABSENT:
                page.slot = -1

    def _settle_loads(self, pages: list[Page], now: float) -> None:
        for page in pages:
            page.waiters = None
        for load in self._loader.loads.values():
            load.waiting = int(load.is_preparing)
            for page in load.pages:
                if page in load.lost:
                    continue
                if page.state == PageState.ABSENT:
                    load.lost.add(page)
                elif page.state == PageState.FILLING:
                    load.waiting += 1
                    page.waiters = [*(page.waiters or ()), load]
            self._fetches.note_progress(load, now)

    def _settle_host(self, pages: list[Page]) -> None:
        """Slots, who is resident, and the order in which pages leave."""
        host, journal = self._host, self._catalog.journal
        idle = [page for page in pages if page.state == PageState.READY and not page.pins]
        gone = [page for page in idle if page.block.is_removed and not page.spilling]
        if journal is not None and gone:
            journal.removed(HOST, gone, Left.DELETED)
        for page in gone:
            page.state, page.slot = PageState.ABSENT, -1
        host.pool.rebuild(page.slot for page in pages if page.state != PageState.ABSENT)
        host.num_filling = sum(page.state == PageState.FILLING for page in pages)
        host.num_resident = sum(page.state in (PageState.READY, PageState.EXPIRED) for page in pages)
        evictable = dict.fromkeys(page for page in idle if not page.block.is_removed)
        _rebuild(host.policy, evictable, self._clock.boot())

    def _settle_tier(self, tier: LowerTier, pages: list[Page], now: float) -> None:
        """The books of a lower tier: its pages, its debts, and the order in which they leave."""
        bit, policy = tier.bit, tier.plan.policy
        flights = [flight for flight in self._transfers.under_way() if flight.transfer.tier == tier.plan.name]
        held = {page for flight in flights if flight.transfer.op is Op.FETCH for page in flight.pages}
        tier.in_flight = sum(len(flight.pages) for flight in flights if flight.transfer.op is Op.SPILL)
        written: dict[PageKey, int] = {}
        for flight in flights:
            for page in flight.pages if flight.transfer.op is Op.SPILL else ():
                if page.block.is_removed:
                    written[page.key] = written.get(page.key, 0) + 1
        tier.deletes.rebuild(written)
        copies = [page for page in pages if (page.homes | page.spilling) & bit]
        tier.used_pages = len(copies)
        if policy is not None:
            _rebuild(policy, dict.fromkeys(page for page in copies if page not in held), tier.wall())
        there = {page.key for page in copies} if tier.dropping else set()
        forgotten = [page for page in copies if page.block.is_removed and page.homes & bit]
        tier.forget_copies(forgotten)
        tier.debts.rebuild()
        tier.deletes.owe([*(page.key for page in forgotten), *(key for key in tier.dropping if key not in there)])
        tier.dropping = ()
        # Their books never learned of the pages that were published last; what they have already is not owed. Nobody
        # knows which of them saves brought: no flush passes any over.
        blocks = list(dict.fromkeys(page.block for page in pages if not page.block.is_removed))
        tier.make_up(blocks, now, is_saved=True)


def _holders(loads: Iterable[Load], saves: Iterable[Save]) -> dict[Page, int]:
    holders = {page: 1 for save in saves if save.is_ending for page in save.pages if page.state == PageState.READY}
    for load in loads:
        for page in load.pages:
            if page.state == PageState.READY and page not in load.lost:
                holders[page] = holders.get(page, 0) + 1
    return holders


def _rebuild(policy: EvictionPolicy[Page], members: dict[Page, None], now: float) -> None:
    """Make a policy hold exactly these pages, in the order in which it has them; others are the most recent ones."""
    ordered = [page for page in policy.members() if page in members]
    known = set(ordered)
    fresh = [page for page in members if page not in known]
    policy.rebuild([(page, page.block.hint) for page in [*ordered, *reversed(fresh)]], now)

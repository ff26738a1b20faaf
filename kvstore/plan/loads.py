"""Loads and prefetches: bringing pages into host memory and holding them there while somebody copies.

The order of a load matters: first everything that is in host memory already is pinned, only then is room made for
the rest; otherwise making room may evict the very pages that are about to be read. A copy in a lower tier that a
fetch reads is held in the same way.

Concurrent loads of one page share one fetch: the second lease waits for the first one's transfer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvstore.plan.catalog import Catalog
from kvstore.plan.holding import Holder
from kvstore.plan.host import HostSpace
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.match import FIRST_LOWER, IN_HOST, Survey
from kvstore.plan.records import HOST, LeaseState, Op, Outcome, Priority, Request
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.settings import PlanSettings
from kvstore.plan.state import Load, Page, PageState
from kvstore.plan.steps import STEP_PAGES, Steps
from kvstore.plan.transfers import Flight, Flights

PREFETCH = "prefetch"  # context of a flight that counts against the prefetch bound


class Loader:
    """Load leases and prefetch tickets. Under the store's lock."""

    def __init__(
        self,
        settings: PlanSettings,
        host: HostSpace,
        catalog: Catalog,
        tiers: Sequence[LowerTier],
        flights: Flights,
        scout: Scout,
        windows: Sequence[int | None],
        page_bytes: Sequence[int],
    ) -> None:
        self.loads: dict[int, Load] = {}
        self.counters = {"loads": 0, "load_failures": 0, "shared_fetches": 0, "prefetches": 0}
        self.hit_blocks = {HOST: 0} | {tier.plan.name: 0 for tier in tiers}
        self.failures = {tier.plan.name: 0 for tier in tiers}
        self.prefetching = 0
        self._settings = settings
        self._host = host
        self._catalog = catalog
        self._tiers = tiers
        self._flights = flights
        self._scout = scout
        self._windows = windows
        self._page_bytes = page_bytes
        self._tickets: dict[int, list[int]] = {}
        self._asked: dict[int, Request] = {}  # prefetches waiting for a probe
        self._promotions: list[int] = []
        self._holder = Holder(host, scout, windows, self._join, self._elsewhere, self._fetch)

    def preparing(
        self, lease_id: int, request: Request, num_blocks: int, now: float, owner: str, first: int = 0
    ) -> Steps[Load]:
        """Make a load lease over as many of the first `num_blocks` blocks as are stored and find room.

        first: blocks before it are in the engine already: they count as present and get no page.
        """
        load = Load(lease_id, request, 0, [], [], [], (), owner, now, waiting=1, is_preparing=True)
        self.loads[lease_id] = load
        survey = self._scout.survey(request)
        limit = min(num_blocks, survey.known)
        while True:
            granted = longest_resume(survey.sources, self._windows, limit)
            cut = yield from self._holder.hold(load, survey, granted, first, now)
            if cut is None or not self._is_open(load):
                break
            # Not all can be had: give back, and try for what ends before the first page without a slot.
            while not self._let_go_part(load, used=False):
                yield
            load.lost.clear()
            self._prune_tail(request, granted)
            limit = cut
        if self._is_open(load):
            load.num_blocks, load.first = granted, min(first, granted)
            load.sources = self._sources(survey, granted)
            load.is_preparing = False
            load.waiting -= 1
            self.counters["loads"] += 1
            self.note_progress(load, now)
        return load

    def close(self, lease_id: int, *, is_well: bool) -> Load | None:
        """A load ends from now on: `let_go` until it is over. None if there is none, or its end has begun."""
        load = self.loads.get(lease_id)
        if load is None or load.state is LeaseState.CLOSED:
            return None
        if is_well:
            usable = load.usable_blocks(self._windows)
            for name, num_blocks in Counter(load.sources[load.first : usable]).items():
                self.hit_blocks[name] += num_blocks
            load.is_used = usable > 0
        load.state = LeaseState.CLOSED
        return load

    def let_go(self, load: Load) -> bool:
        """Unpin the last pages of a load that is closed; True at its end."""
        if not self._let_go_part(load, used=load.is_used):
            return False
        if load.is_preparing:
            self._prune_tail(load.request, len(load.request.keys))
        self.loads.pop(load.id, None)
        return True

    def fetched(self, tier: LowerTier, flight: Flight, outcome: Outcome, now: float) -> None:
        """Book the outcome of a FETCH: pages become ready, are tried elsewhere, or are lost to those who wait."""
        if flight.context is PREFETCH:
            self.prefetching -= len(flight.pages)
        arrived: list[Page] = []
        missing: list[Page] = []
        retry: list[Page] = []
        retry_codes: list[int] = []
        for page, ok in zip(flight.pages, outcome.ok, strict=True):
            page.flight = 0
            if ok and not page.block.is_removed:
                tier.learn(page)
                arrived.append(page)
            else:
                self.failures[tier.plan.name] += 1
                if outcome.error is None and tier.has(page):
                    tier.forget_copies((page,))
                elsewhere = self._elsewhere(page, tier)
                if elsewhere and page.waiters and now < flight.transfer.deadline:
                    retry.append(page)
                    retry_codes.append(elsewhere)
                else:
                    missing.append(page)
            tier.let_go(page)
        self._host.ready(arrived)
        for page in arrived:
            page.pins += len(page.waiters or ())
        self._host.enter([page for page in arrived if not page.pins], used=False)
        self._host.abandon(missing)
        for page in missing:
            for load in page.waiters or ():
                load.lost.add(page)
        for page in flight.pages if not retry else [*arrived, *missing]:
            self._tell(page, now)
        self._fetch(retry, retry_codes, now)

    def give_up(self, pages: Sequence[Page], now: float) -> bool:
        """End the waiting for the fetch of these pages; True if anything waited.

        Their slots stay taken until the fetch comes back.
        """
        awaited = [page for page in pages if page.waiters]
        for page in awaited:
            for load in page.waiters or ():
                load.lost.add(page)
            self._tell(page, now)
        return bool(awaited)

    def ask(self, ticket: int, request: Request, now: float) -> bool:
        """Look up what is worth prefetching; False if a shared tier has to answer first, `resume_prefetches` then."""
        match, _ = self._scout.lookup(request, now)
        if match.pending:
            self._asked[ticket] = request
        return not match.pending

    def bring(self, ticket: int, request: Request, now: float) -> None:
        """Fetch what is worth loading of a request, within the prefetch bound."""
        survey = self._scout.survey(request)
        self._tickets[ticket] = self._bring(request, survey, survey.worth, self._settings.max_prefetch_slots, now)

    def resume_prefetches(self, now: float) -> None:
        """A probe was answered: go on with the prefetches that waited for one."""
        asked, self._asked = self._asked, {}
        for ticket, request in asked.items():
            if self.ask(ticket, request, now):
                self.bring(ticket, request, now)

    def cancel(self, ticket: int) -> list[int]:
        """Forget a prefetch; returns its transfers that no request waits for."""
        self._asked.pop(ticket, None)
        found = [self._flights.get(transfer_id) for transfer_id in self._tickets.pop(ticket, ())]
        own = [flight for flight in found if flight is not None]
        return [flight.transfer.id for flight in own if not any(page.waiters for page in flight.pages)]

    def sample(self, request: Request, tier: str, now: float) -> None:
        """Fetch a few pages of a tier that is avoided, in the background, to learn whether it has become faster."""
        survey = self._scout.survey(request)
        code = next(FIRST_LOWER + i for i, lower in enumerate(self._tiers) if lower.plan.name == tier)
        end = survey.worth
        while end < survey.known and survey.source(end, 0) == code and end - survey.worth < self._settings.batch_pages:
            end += 1
        self._bring(request, survey, end, self._settings.batch_pages, now)

    def note_progress(self, load: Load, now: float) -> None:
        """See whether a load waits for nothing any more."""
        if not load.waiting and load.state is LeaseState.WAITING:
            self._set_ready(load, now)

    def add_tier(self, name: str) -> None:
        """One more lower tier; the list of tiers is the planner's."""
        self.hit_blocks[name] = 0
        self.failures[name] = 0

    def take_promotions(self) -> list[int]:
        promotions, self._promotions = self._promotions, []
        return promotions

    def _is_open(self, load: Load) -> bool:
        return load.state is not LeaseState.CLOSED and load.id in self.loads

    def _sources(self, survey: Survey, granted: int) -> list[str]:
        worth, survey.worth = survey.worth, granted
        names = survey.block_sources(self._scout.names, self._windows)
        survey.worth = worth
        return names

    def _join(self, load: Load, pages: Sequence[Page]) -> None:
        """Make a load wait for fetches that are under way."""
        for page in pages:
            if page.waiters is None:
                page.waiters = []
            page.waiters.append(load)
            self._promotions.append(page.flight)
        load.waiting += len(pages)
        self.counters["shared_fetches"] += len(pages)

    def _fetch(
        self,
        pages: Sequence[Page],
        codes: Sequence[int],
        now: float,
        context: str | None = None,
    ) -> list[int]:
        """Send filling pages to be fetched, in batches by tier; returns the transfers."""
        by_tier: dict[int, list[Page]] = {}
        for page, code in zip(pages, codes, strict=True):
            by_tier.setdefault(code, []).append(page)
        priority = Priority.LOAD if context is None else Priority.PREFETCH
        sent: list[int] = []
        for code, members in by_tier.items():
            tier = self._tiers[code - FIRST_LOWER]
            for start in range(0, len(members), self._settings.batch_pages):
                batch = members[start : start + self._settings.batch_pages]
                transfer = self._flights.send(
                    Op.FETCH,
                    tier.plan.name,
                    [page.key for page in batch],
                    batch,
                    priority=priority,
                    deadline=now + self._settings.load_deadline_s,
                    slots=[page.slot for page in batch],
                    metas=[page.block.meta(self._page_bytes[page.group], 0.0) for page in batch],
                    context=context,
                )
                for page in batch:
                    page.flight = transfer.id
                    tier.hold(page)
                sent.append(transfer.id)
        return sent

    def _bring(self, request: Request, survey: Survey, end: int, bound: int, now: float) -> list[int]:
        """Prefetch pages of blocks [0, end) that lie below host memory."""
        end = longest_resume(survey.sources, self._windows, end)
        room = max(0, min(bound, self._settings.max_prefetch_slots - self.prefetching))
        starts = [needed_from(end, window) for window in self._windows]
        below = sorted(
            (block, group, code)
            for group, start in enumerate(starts)
            for block, code in enumerate(survey.sources[group][start:end], start)
            if code > IN_HOST
        )[:room]
        path = self._scout.insert(request, below[-1][0] + 1) if below else []
        wanted = [(path[block].pages[group], code) for block, group, code in below if block < len(path)]
        slots = self._host.take_for([page for page, _ in wanted], request.keys[:end])
        wanted = wanted[: len(slots)]
        self.prefetching += len(wanted)
        self.counters["prefetches"] += bool(wanted)
        return self._fetch([p for p, _ in wanted], [c for _, c in wanted], now, PREFETCH)

    def _elsewhere(self, page: Page, failed: LowerTier | None = None) -> int:
        """Source code of a tier that has a copy, another than the one where it failed; 0 if there is none."""
        if page.block.is_removed:
            return 0
        for index, tier in enumerate(self._tiers):
            if tier is not failed and tier.is_up and tier.has(page):
                return FIRST_LOWER + index
        return 0

    def _tell(self, page: Page, now: float) -> None:
        waiters, page.waiters = page.waiters, None
        for load in waiters or ():
            load.waiting -= 1
            if not load.waiting:
                self._set_ready(load, now)

    def _set_ready(self, load: Load, now: float) -> None:
        load.state = LeaseState.READY
        load.ready_at = now
        if load.lost:
            self.counters["load_failures"] += 1

    def _let_go_part(self, load: Load, *, used: bool) -> bool:
        """Unpin the last pages that a load holds, in whatever way; True when it holds no more. Tail first."""
        pages = load.pages[-STEP_PAGES:]
        del load.pages[-STEP_PAGES:]
        kept = pages if not load.lost else [page for page in pages if page not in load.lost]
        held = [page for page in kept if page.state == PageState.READY]
        if len(held) < len(kept):
            for page in kept:
                if page.state != PageState.READY and page.waiters is not None:
                    page.waiters.remove(load)
                    load.waiting -= 1
            unsent = [page for page in kept if page in load.reserved]
            load.reserved.difference_update(unsent)
            self._host.abandon(unsent)
            for page in reversed(unsent):
                self._catalog.prune(page.block)
        self._host.unpin(held, used=used)
        return not load.pages

    def _prune_tail(self, request: Request, end: int) -> None:
        """Forget the blocks that were made known for pages which are not brought."""
        path = self._catalog.match(request.keys[:end])
        if path:
            self._catalog.prune(path[-1])

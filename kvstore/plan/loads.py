"""Loads and prefetches: bringing pages into host memory and holding them there while somebody copies.

The order of a load matters: first everything that is in host memory already is pinned, only then is room made for
the rest; otherwise making room may evict the very pages that are about to be read. A copy in a lower tier that a
fetch reads is held in the same way.

Concurrent loads of one page share one fetch: the second lease waits for the first one's transfer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.plan.catalog import Block, Catalog, Page, PageState
from kvstore.plan.host import HostSpace
from kvstore.plan.leases import Load
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.match import FIRST_LOWER, IN_HOST, Survey
from kvstore.plan.records import HOST, LeaseState, Op, Outcome, Priority, Request
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.settings import PlanSettings
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

    def prepare(self, lease_id: int, request: Request, num_blocks: int, now: float, owner: str, first: int = 0) -> Load:
        """Make a load lease over as many of the first `num_blocks` blocks as are stored and find room.

        first: blocks before it are in the engine already: they count as present and get no page.
        """
        survey = self._scout.survey(request)
        limit = min(num_blocks, survey.known)
        while True:
            granted = longest_resume(survey.sources, self._windows, limit)
            path = self._scout.insert(request, granted)
            if len(path) < granted:
                limit = len(path)
                continue
            blocks, pages, codes = self._needed(survey, path, granted, first)
            absent = [index for index, page in enumerate(pages) if page.state == PageState.ABSENT]
            ready = [page for page in pages if page.state == PageState.READY]
            self._host.pin(ready)
            slots = self._host.take_for([pages[index] for index in absent], request.keys[:granted])
            if len(slots) == len(absent):
                break
            # No room for all: give back, and try for what ends before the first page without a slot.
            self._host.abandon([pages[index] for index in absent[: len(slots)]])
            self._host.unpin(ready, used=False)
            self._catalog.prune(path[-1])
            limit = blocks[absent[len(slots)]]
        load = Load(
            lease_id,
            request,
            granted,
            pages,
            blocks,
            self._sources(survey, granted),
            owner,
            now,
            first=min(first, granted),
        )
        self._join(load)
        self._fetch([pages[i] for i in absent], [codes[i] for i in absent], now)
        self.loads[lease_id] = load
        self.counters["loads"] += 1
        if not load.waiting:
            self._set_ready(load, now)
        return load

    def complete(self, lease_id: int, now: float) -> Load | None:
        """End a load whose pages were used; None if there is no such load."""
        load = self.loads.get(lease_id)
        if load is None:
            return None
        usable = load.usable_blocks(self._windows)
        for name in load.sources[load.first : usable]:
            self.hit_blocks[name] += 1
        self._end(load, now, used=usable > 0)
        return load

    def release(self, lease_id: int, now: float) -> bool:
        """End a load whose pages were not used; False if there is no such load."""
        load = self.loads.get(lease_id)
        if load is None:
            return False
        self._end(load, now, used=False)
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
        """Let who waits for the fetch of these pages go on without them; True if anybody did.

        Their slots stay taken until the fetch comes back.
        """
        awaited = [page for page in pages if page.waiters]
        for page in awaited:
            for load in page.waiters or ():
                load.lost.add(page)
            self._tell(page, now)
        return bool(awaited)

    def prefetch(self, ticket: int, request: Request, now: float) -> int:
        """Fetch what is worth loading of a request, within the prefetch bound; waits for a probe if one is needed."""
        match, _ = self._scout.lookup(request, now)
        if match.pending:
            self._asked[ticket] = request
            return ticket
        survey = self._scout.survey(request)
        self._tickets[ticket] = self._bring(request, survey, survey.worth, self._settings.max_prefetch_slots, now)
        return ticket

    def resume_prefetches(self, now: float) -> None:
        """A probe was answered: go on with the prefetches that waited for one."""
        asked, self._asked = self._asked, {}
        for ticket, request in asked.items():
            self.prefetch(ticket, request, now)

    def cancel(self, ticket: int) -> list[int]:
        """Forget a prefetch; returns its transfers that no request waits for."""
        self._asked.pop(ticket, None)
        own = set(self._tickets.pop(ticket, ()))
        return [
            flight.transfer.id
            for flight in self._flights.under_way()
            if flight.transfer.id in own and not any(page.waiters for page in flight.pages)
        ]

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

    def _needed(
        self, survey: Survey, path: Sequence[Block], granted: int, first: int = 0
    ) -> tuple[list[int], list[Page], list[int]]:
        """Block index, page and source code of every page a resume after `granted` blocks needs, in path order."""
        starts = [max(first, needed_from(granted, window)) for window in self._windows]
        blocks: list[int] = []
        pages: list[Page] = []
        codes: list[int] = []
        for index in range(first, granted):
            block_pages = path[index].pages
            for group, start in enumerate(starts):
                if index >= start:
                    blocks.append(index)
                    pages.append(block_pages[group])
                    codes.append(survey.source(index, group))
        return blocks, pages, codes

    def _sources(self, survey: Survey, granted: int) -> list[str]:
        worth, survey.worth = survey.worth, granted
        names = survey.block_sources(self._scout.names, self._windows)
        survey.worth = worth
        return names

    def _join(self, load: Load) -> None:
        for page in load.pages:
            if page.state == PageState.FILLING:
                if page.waiters is None:
                    page.waiters = []
                page.waiters.append(load)
                load.waiting += 1
                if page.flight:
                    self.counters["shared_fetches"] += 1
                    self._promotions.append(page.flight)

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
        path = self._scout.insert(request, end)
        _, pages, codes = self._needed(survey, path, min(end, len(path)))
        room = max(0, min(bound, self._settings.max_prefetch_slots - self.prefetching))
        wanted = [(p, c) for p, c in zip(pages, codes, strict=True) if p.state == PageState.ABSENT and c > IN_HOST]
        wanted = wanted[:room]
        slots = self._host.take_for([page for page, _ in wanted], request.keys[:end])
        wanted = wanted[: len(slots)]
        self.prefetching += len(wanted)
        self.counters["prefetches"] += bool(wanted)
        return self._fetch([p for p, _ in wanted], [c for _, c in wanted], now, PREFETCH)

    def _elsewhere(self, page: Page, failed: LowerTier) -> int:
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

    def _end(self, load: Load, now: float, *, used: bool) -> None:
        del self.loads[load.id]
        held: list[Page] = []
        for page in load.pages:
            if page in load.lost:
                continue
            if page.state == PageState.READY:
                held.append(page)
            elif page.waiters is not None:
                page.waiters.remove(load)
        load.state = LeaseState.CLOSED
        self._host.unpin(held, used=used)

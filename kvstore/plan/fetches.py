"""Fetches: pages that are brought from lower tiers into host memory, for loads that wait for them or as prefetches.

Concurrent loads of one page share one fetch: the second lease waits for the first one's transfer. A fetch that fails is
tried on another tier that has the page; where there is none, the page is lost to the loads that wait for it. The copy
that a fetch reads is held in its tier, or making room there might evict it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.plan.books import Books
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.match import FIRST_LOWER, IN_HOST, Survey
from kvstore.plan.records import LeaseState, Op, Outcome, Priority, Request
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.state import Load, Page
from kvstore.plan.transfers import InFlight

MAX_TICKETS = 16_384  # of prefetches that nobody has cancelled; those begun first cannot be any more

Brought = Callable[[Sequence[Page], float], None]  # told of the pages on their way, and of the planner's time

PREFETCH = "prefetch"  # context of a transfer that counts against the prefetch bound


class Fetches:
    """Fetches and prefetch tickets. Under the store's lock.

    failures:    pages that a tier did not give, by its name.
    prefetching: pages of prefetches that are under way.
    """

    def __init__(self, books: Books, lookups: PrefixLookup) -> None:
        self.counters = {"load_failures": 0, "shared_fetches": 0, "prefetches": 0}
        self.failures = {tier.plan.name: 0 for tier in books.tiers}
        self.prefetching = 0
        self._lookups = lookups
        self._settings = books.settings
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._windows = books.windows
        self._page_bytes = books.page_bytes
        self._tickets: dict[int, list[int]] = {}
        self._asked: dict[int, tuple[Request, Brought | None]] = {}  # prefetches waiting for a probe

    # ---- for loads ----------------------------------------------------------------------------------------------

    def fetch(
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
                transfer = self._transfers.send(
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

    def join(self, load: Load, pages: Sequence[Page]) -> None:
        """Make a load wait for fetches that are under way."""
        for page in pages:
            if page.waiters is None:
                page.waiters = []
            page.waiters.append(load)
            self._transfers.promoted.append(page.flight)
        load.waiting += len(pages)
        self.counters["shared_fetches"] += len(pages)

    def elsewhere(self, page: Page, failed: LowerTier | None = None) -> int:
        """Source code of a tier that has a copy, another than the one where it failed; 0 if there is none."""
        if page.block.is_removed:
            return 0
        for index, tier in enumerate(self._tiers):
            if tier is not failed and tier.is_up and tier.has(page):
                return FIRST_LOWER + index
        return 0

    def note_progress(self, load: Load, now: float) -> None:
        """See whether a load waits for nothing any more."""
        if not load.waiting and load.state is LeaseState.WAITING:
            self._set_ready(load, now)

    def fetched(self, tier: LowerTier, flight: InFlight, outcome: Outcome, now: float) -> None:
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
                for load in page.waiters or ():
                    self._lookups.missed(load.request, tier, page)
                elsewhere = self.elsewhere(page, tier)
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
        self.fetch(retry, retry_codes, now)

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

    # ---- prefetches ---------------------------------------------------------------------------------------------

    def ask(self, ticket: int, request: Request, now: float, brought: Brought | None = None) -> bool:
        """Look up what is worth prefetching; False if a shared tier has to answer first, `resume_prefetches` then.

        brought: as of `bring`, for what goes on then.
        """
        is_pending = self._lookups.ask(request, now)
        if is_pending:
            self._asked[ticket] = request, brought
            if len(self._asked) > MAX_TICKETS:
                del self._asked[next(iter(self._asked))]
        return not is_pending

    def bring(self, ticket: int, request: Request, now: float, brought: Brought | None = None) -> None:
        """Fetch what is worth loading of a request, within the prefetch bound; tell `brought` of it."""
        survey = self._lookups.survey(request)
        pages, sent = self._bring(request, survey, survey.worth, self._settings.max_prefetch_slots, now)
        self._tickets[ticket] = sent
        if len(self._tickets) > MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        if brought is not None:
            brought(pages, now)

    def bring_ahead(self, request: Request, survey: Survey, bound: int, now: float) -> list[Page]:
        """Fetch up to `bound` pages of what a survey found worth loading, though nobody asked; those on their way."""
        return self._bring(request, survey, survey.worth, bound, now)[0]

    def resume_prefetches(self, asked: Request, now: float) -> None:
        """A probe about a request was answered: go on with its prefetches that waited for one."""
        for ticket in [ticket for ticket, (request, _) in self._asked.items() if request.id == asked.id]:
            request, brought = self._asked.pop(ticket)
            if self.ask(ticket, request, now, brought):
                self.bring(ticket, request, now, brought)

    def cancel(self, ticket: int) -> list[int]:
        """Forget a prefetch; returns its transfers that no request waits for."""
        self._asked.pop(ticket, None)
        found = [self._transfers.get(transfer_id) for transfer_id in self._tickets.pop(ticket, ())]
        own = [flight for flight in found if flight is not None]
        return [flight.transfer.id for flight in own if not any(page.waiters for page in flight.pages)]

    def sample(self, request: Request, tier: str, now: float) -> None:
        """Fetch a few pages of a tier that is avoided, in the background, to learn whether it has become faster."""
        survey = self._lookups.survey(request)
        code = next(FIRST_LOWER + i for i, lower in enumerate(self._tiers) if lower.plan.name == tier)
        below = [one for one in self._below(survey, survey.known) if one[0] >= survey.worth and one[2] == code]
        self._send(request, survey, below[: self._room(self._settings.batch_pages)], now)

    def add_tier(self, name: str) -> None:
        """One more lower tier; the list of tiers is the planner's."""
        self.failures[name] = 0

    def _bring(
        self, request: Request, survey: Survey, end: int, bound: int, now: float
    ) -> tuple[list[Page], list[int]]:
        """Prefetch pages of blocks [0, end) that lie below host memory; returns them, and the transfers."""
        end = longest_resume(survey.sources, self._windows, end)
        return self._send(request, survey, self._below(survey, end)[: self._room(bound)], now)

    def _below(self, survey: Survey, end: int) -> list[tuple[int, int, int]]:
        """Block, group and source of the pages below host memory that a resume after `end` blocks needs."""
        starts = [needed_from(end, window) for window in self._windows]
        return sorted(
            (block, group, code)
            for group, start in enumerate(starts)
            for block, code in enumerate(survey.sources[group][start:end], start)
            if code > IN_HOST
        )

    def _room(self, bound: int) -> int:
        """How many pages may be prefetched now, of `bound` that are wanted."""
        return max(0, min(bound, self._settings.max_prefetch_slots - self.prefetching))

    def _send(
        self, request: Request, survey: Survey, below: Sequence[tuple[int, int, int]], now: float
    ) -> tuple[list[Page], list[int]]:
        """Prefetch pages of a request (see `_below`), as many as find room; returns them, and the transfers."""
        end = below[-1][0] + 1 if below else 0
        path = self._lookups.insert(request, end) if below else []
        if survey.num_states and below and below[-1][1] >= self._catalog.num_groups:
            self._catalog.make_states(path[end - 1 :])
        wanted = [(path[block].pages[group], code) for block, group, code in below if block < len(path)]
        slots = self._host.take_for([page for page, _ in wanted], request.keys)
        wanted = wanted[: len(slots)]
        self.prefetching += len(wanted)
        self.counters["prefetches"] += bool(wanted)
        pages = [page for page, _ in wanted]
        return pages, self.fetch(pages, [code for _, code in wanted], now, PREFETCH)

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

"""Lookups: what is stored of a prompt, where, and how much of it is worth loading.

A lookup walks the catalog, asks shared tiers by probes, and weighs. It changes nothing but its own notes about
requests. What is past its deadline is not stored: the planner has it dropped (`expire`) before it looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

from eviction.policy import Hint
from kvstore.plan.books import Books
from kvstore.plan.ended import EndedRequest, Observer
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.match import (
    ABSENT,
    FIRST_LOWER,
    IN_HOST,
    RequestState,
    Survey,
    loadable_blocks,
    locate,
    locate_states,
    tier_names,
)
from kvstore.plan.probes import Probes
from kvstore.plan.records import HOST, CutReason, Explanation, Match, Outcome, Request
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.steps import STEP_BLOCKS
from kvstore.plan.transfers import InFlight

MAX_REQUESTS = 16_384  # notes kept about requests whose callers never say that they are over
MAX_ENDS = 16  # of a load that are weighed, where finding one takes a walk


class PrefixLookup:
    """Answers lookups. Under the store's lock."""

    def __init__(self, books: Books) -> None:
        self.requests: dict[int, RequestState] = {}
        self.names = tier_names([tier.plan.name for tier in books.tiers])
        self.counters = {"lookups": 0, "pending": 0, "collisions": 0, "matched_tokens": 0, "missed_tokens": 0}
        self.counters["stateless_tokens"] = 0
        self.cuts = {reason.value: 0 for reason in CutReason}
        self.probes = Probes(books)
        self.observer: Observer | None = None  # told of every request that was looked up and is over
        self._block_size = books.layout.block_size
        self._windows = books.windows
        self._has_full = None in books.windows
        self._has_windows = any([window is not None for window in books.windows])
        self._num_groups = books.num_groups
        self._states = range(books.num_groups, len(books.windows))
        self._page_bytes = books.page_bytes
        self._settings = books.settings
        self._catalog = books.catalog
        self._host = books.host
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._costs = books.costs

    def lookup(
        self, request: Request, now: float, judge: Callable[[Request, Match, float], Match] | None = None
    ) -> tuple[Match, str | None]:
        """The match, and the name of a tier that is avoided by an estimate so old that it should be measured again.

        judge: may make the match pending; a lookup is counted when it is not.
        """
        state = self._state(request)
        if not state.asked_at:
            state.asked_at = now
        survey = self.survey(request)
        pending = self._ask(state, survey, now)
        match = self._match(survey, pending)
        if judge is not None:
            match = judge(request, match, now)
        if match.pending:
            self.counters["pending"] += 1
            state.unsettled = survey, match
        else:
            self._settle(state, survey, match)
        return match, self._stale_tier(survey, now)

    def end(self, request: Request, now: float, reason: str) -> None:
        """Forget the request. A lookup that was given up while it was pending counts as what it had found by then.

        reason: for the observer.
        """
        state = self.requests.pop(request.id, None)
        if state is None:
            return
        if state.unsettled is not None:
            self._settle(state, *state.unsettled)
        if self.observer is not None and state.first is not None:
            num_tokens, match = state.first
            hits = {tier: num_blocks * self._block_size for tier, num_blocks in match.by_tier.items()}
            self.observer(EndedRequest(request, num_tokens, hits, now - state.asked_at, reason))

    def survey(self, request: Request) -> Survey:
        """The place of every page of the request, as far as is known now."""
        limit = loadable_blocks(request, self._block_size)
        if self._states:
            self._catalog.adopt_on(request.keys[:limit])
        blocks = self.verified(request, self._catalog.match(request.keys[:limit]))
        order = self._readable()
        stalled = self._transfers.stalled
        survey = Survey(blocks, [locate(blocks, group, order, stalled) for group in range(self._num_groups)])
        if self._states:
            survey.sources += locate_states(blocks, self._states, order, stalled)
            survey.num_states = len(self._states)
        state = self.requests.get(request.id)
        if state is not None and state.probes:
            self.probes.overlay(survey, state, limit)
        survey.known = survey.worth = longest_resume(survey.sources, self._windows, limit)
        if self._states:
            num_groups = self._num_groups
            pages = longest_resume(survey.sources[:num_groups], self._windows[:num_groups], limit)
            survey.without_state = pages if num_groups else survey.known
        if limit == 0:
            survey.cut = CutReason.TOO_SHORT
            return survey
        if survey.known < limit:
            survey.cut = self._reason(survey)
        self._weigh(survey, request.held)
        if 0 < survey.worth < self._settings.min_hit_blocks:
            survey.worth, survey.cut = 0, CutReason.BELOW_MINIMUM
        return survey

    def ask(self, request: Request, now: float) -> bool:
        """Ask shared tiers about what is not known to be here; True until they have answered. Counts nothing."""
        return self._ask(self._state(request), self.survey(request), now)

    def ask_again(self, request: Request, first: int, end: int, now: float) -> bool:
        """Ask shared tiers once more about blocks [first, end); False if there is none to ask."""
        state = self.requests.get(request.id)
        return state is not None and self.probes.ask_again(state, first, end, now)

    def explain(self, request: Request) -> Explanation:
        """Why the match ends where it does. Counts nothing, asks nobody (see `ask`)."""
        survey = self.survey(request)
        return self._explanation(request, survey, self._match(survey, False))

    def expire(self, request: Request | None = None) -> None:
        """Drop what is past its deadline. Called wherever it matters, and not by `tick` alone: ticks may be late.

        As many as a step may take. If there are more, those that the request would find.
        """
        host = self._host
        if host.is_late or host.policy.has_deadlines:
            host.expire()
        for tier in self._tiers:
            policy = tier.plan.policy
            if policy is not None and (tier.is_late or policy.has_deadlines):
                tier.expire()
        if request is not None and self.is_late:
            limit = STEP_BLOCKS if self._has_full else None  # the first that is missing ends a match then
            path = self.known_path(request)
            pages = [page for block in path for page in block.pages]
            host.expire_of(pages, limit)
            for tier in self._tiers:
                tier.expire_of(pages, limit)

    @property
    def is_late(self) -> bool:
        """True if `expire` left some, being as many as a step may take."""
        return self._host.is_late or any([tier.is_late for tier in self._tiers])

    def _ask(self, state: RequestState, survey: Survey, now: float) -> bool:
        """Probe shared tiers; True until they have answered. There is nothing to ask about a prompt that is here."""
        if survey.known >= loadable_blocks(state.request, self._block_size) and not state.probes:
            return False
        return self.probes.ask(state, survey, now)

    def _match(self, survey: Survey, pending: bool) -> Match:
        worth, by_tier = survey.worth, survey.by_tier(self.names, self._windows)
        return Match(
            worth,
            worth * self._block_size,
            pending,
            by_tier,
            survey.known,
            survey.cut,
            without_state=max(survey.without_state, survey.known),
        )

    def _explanation(self, request: Request, survey: Survey, match: Match) -> Explanation:
        if survey.cut in (CutReason.NONE, CutReason.TOO_SHORT):
            return Explanation(match)
        is_missing = survey.cut in (CutReason.NEVER_STORED, CutReason.TIER_DOWN, CutReason.NO_STATE)
        at = survey.known if is_missing else survey.worth
        block = survey.blocks[at] if at < len(survey.blocks) else None
        tiers: dict[str, bool] = {}
        if block is not None:
            if any(page.state == PageState.READY for page in block.pages):
                tiers[HOST] = True
            tiers |= {t.plan.name: t.is_up for t in self._tiers if any(t.has(page) for page in block.pages)}
        journal = self._catalog.journal
        left = None if journal is None else journal.departure(request.keys[at])
        return Explanation(
            match,
            at,
            request.keys[at],
            tiers,
            None if left is None else (left.at, left.tier, left.why.value),
            self._asked(request, at),
        )

    def _asked(self, request: Request, block: int) -> dict[str, bool | None]:
        state, num_asked = self.requests.get(request.id), self.probes.num_asked
        asked: dict[str, bool | None] = {}
        for index, tier in enumerate(self._tiers):
            if not tier.plan.is_shared or tier.is_detached:
                continue
            probe = None if state is None else state.probes.get(index)
            if probe is None or probe.transfer_id or probe.has_failed or not probe.first <= block < probe.end:
                asked[tier.plan.name] = None
            else:
                start = (block - probe.first) * num_asked
                asked[tier.plan.name] = all(probe.answer[start : start + num_asked])
        return asked

    def insert(self, request: Request, end: int) -> list[Block]:
        """Make blocks [0, end) of the request known; fewer where a hash collides. Returns them, root first."""
        keys = request.keys[:end]
        if self._settings.compare_tokens:
            known = self._catalog.match(keys)
            good = self.verified(request, known)
            if len(good) < len(known):
                return good
            # A key known below another parent is a collision too: nothing from there on is saved.
            tree = self._catalog.tree
            keys = keys[: next((i for i in range(len(known), len(keys)) if keys[i] in tree), len(keys))]
        path = self._catalog.insert(keys)
        self._describe(request, path)
        return path

    def insert_from(self, request: Request, above: Block | None, end: int) -> list[Block]:
        """The same for the blocks behind `above`, in steps of a long prompt; O(answer). Returns those."""
        if self._settings.compare_tokens:  # TODO: O(end) each time, once somebody has long prompts with xxh3_128
            return self.insert(request, end)[0 if above is None else above.depth + 1 :]
        blocks = self._catalog.insert_from(request.keys, above, end)
        self._describe(request, blocks)
        return blocks

    def _describe(self, request: Request, path: Sequence[Block]) -> None:
        """Note with blocks what the request says about them."""
        options = request.options
        if options.priority or options.ttl_s is not None:
            hint = Hint(options.priority, options.ttl_s)
            for block in path:
                if hint.priority >= block.hint.priority:
                    block.hint = hint
        if self._settings.compare_tokens:
            for block in path:
                if not block.tokens:
                    block.tokens = self._block_tokens(request, block.depth)

    def forget_answers(self) -> None:
        """Ask shared tiers again, at each request's next lookup."""
        for state in self.requests.values():
            state.probes.clear()

    def add_tier(self, name: str) -> None:
        """One more lower tier, behind those that are known; the list of tiers is the planner's."""
        self.names.append(name)
        self.probes.counters[name] = 0

    def known_path(self, request: Request) -> list[Block]:
        """The blocks of the request that are known, root first."""
        return self.verified(request, self._catalog.match(request.keys))

    def verified(self, request: Request, blocks: list[Block]) -> list[Block]:
        """Cut known blocks at the first whose tokens are not the request's (only where hashes may collide)."""
        if not self._settings.compare_tokens:
            return blocks
        for index, block in enumerate(blocks):
            if block.tokens and block.tokens != self._block_tokens(request, index):
                self.counters["collisions"] += 1
                return blocks[:index]
        return blocks

    def answered(self, flight: InFlight, outcome: Outcome) -> Request:
        """Book the outcome of a PROBE; returns the request that it was about."""
        assert isinstance(flight.context, tuple)
        request: Request = flight.context[0]
        self.probes.answered(self.requests.get(request.id), flight, outcome)
        return request

    def missed(self, request: Request, tier: LowerTier, page: Page) -> None:
        """A tier did not give a page that a request needs: its next lookup does not count on it."""
        self.probes.missed(self.requests.get(request.id), tier, page)

    def _state(self, request: Request) -> RequestState:
        state = self.requests.get(request.id)
        if state is None:
            while len(self.requests) >= MAX_REQUESTS:
                del self.requests[next(iter(self.requests))]
            state = self.requests[request.id] = RequestState(request)
        return state

    def _readable(self) -> list[tuple[int, int]]:
        """(bit, source code) of the tiers whose catalog entries count, the fastest first."""
        tiers = [
            (self._costs.tiers[tier.plan.name].seconds_per_byte or 0.0, tier.bit, FIRST_LOWER + index)
            for index, tier in enumerate(self._tiers)
            if tier.is_up and tier.plan.is_indexed
        ]
        return [(bit, code) for _, bit, code in sorted(tiers)]

    def _reason(self, survey: Survey) -> CutReason:
        down = sum(tier.bit for tier in self._tiers if not tier.is_up)
        following = survey.blocks[survey.known : survey.known + 1]
        if any(page.homes & down for block in following for page in block.pages):
            return CutReason.TIER_DOWN
        if survey.without_state > survey.known:
            behind = survey.blocks[survey.known : survey.without_state]
            is_down = any(page.homes & down for block in behind for page in block.pages[self._num_groups :])
            return CutReason.TIER_DOWN if is_down else CutReason.NO_STATE
        return CutReason.NEVER_STORED

    def _weigh(self, survey: Survey, held: int) -> None:
        """Cut the match where loading would be slower than computing; the first `held` blocks need neither."""
        if not self._settings.load_or_recompute or self._costs.prefill_tokens_per_s is None:
            return
        codes = self._slowest(survey, held)
        if not codes or max(codes) <= IN_HOST:
            return
        borders = list(accumulate((len(list(run)) for _, run in groupby(codes)), initial=held))[1:]
        best = held + self._costs.best_end(self._ends(survey, held, borders), self._block_size)
        if best < survey.known:
            survey.worth = longest_resume(survey.sources, self._windows, best)
            survey.cut = CutReason.NOT_WORTH

    def _ends(self, survey: Survey, held: int, borders: Sequence[int]) -> list[tuple[int, dict[str, int]]]:
        """The points before some borders that can be resumed from: blocks behind `held`, and bytes to load, by tier.

        Where a model has windows or a state, that may be long before the border; so no more than MAX_ENDS are looked
        at, of which the last is the end of what is known.
        """
        windows, sources = self._windows, survey.sources
        if self._has_windows:
            step = -(-len(borders) // MAX_ENDS)
            found = {longest_resume(sources, windows, border) for border in borders[::-1][::step]}
            borders = sorted(end for end in found if end > held)
        ends: list[tuple[int, dict[str, int]]] = []
        loaded: Counter[str] = Counter()
        at = held
        for end in borders:
            needed = Counter[str]()
            for group, window in enumerate(windows):
                start, book = (at, loaded) if window is None else (max(held, needed_from(end, window)), needed)
                for code, num_blocks in Counter(sources[group][start:end]).items():
                    if code > IN_HOST:
                        book[self.names[code]] += num_blocks * self._page_bytes[group]
            ends.append((end - held, loaded + needed))
            at = end
        return ends

    def _slowest(self, survey: Survey, first: int) -> list[int]:
        """The source code of the slowest page of each block from `first` on, as far as the match is known."""
        columns = [column[first : survey.known] for column in survey.sources]
        if len(columns) == 1:
            return columns[0]
        codes = [max(codes) for codes in zip(*columns[: self._num_groups], strict=True)] or [IN_HOST] * len(columns[0])
        return codes[:-1] + [max([column[-1] for column in columns]) for _ in codes[-1:]]

    def _stale_tier(self, survey: Survey, now: float) -> str | None:
        if survey.cut is not CutReason.NOT_WORTH:
            return None
        code = next((code for code in self._slowest(survey, survey.worth) if code > IN_HOST), ABSENT)
        name = self.names[code]
        return name if name in self._costs.tiers and self._costs.wants_sample(name, now) else None

    def _settle(self, state: RequestState, survey: Survey, match: Match) -> None:
        state.unsettled = None
        if state.num_counted != state.request.num_tokens:
            state.num_counted = state.request.num_tokens
            state.first = state.first or (state.num_counted, match)
            self._count(state.request, survey, match)

    def _count(self, request: Request, survey: Survey, match: Match) -> None:
        self.counters["lookups"] += 1
        self.counters["matched_tokens"] += survey.worth * self._block_size
        self.counters["missed_tokens"] += request.num_tokens - survey.worth * self._block_size
        self.cuts[survey.cut.value] += 1
        self.counters["stateless_tokens"] += max(0, survey.without_state - survey.known) * self._block_size
        journal = self._catalog.journal
        if journal is not None and survey.cut not in (CutReason.NONE, CutReason.TOO_SHORT):
            journal.fell_short(request, self._explanation(request, survey, match))

    def _block_tokens(self, request: Request, index: int) -> bytes:
        if request.tokens is None:
            return b""
        width = 4 * self._block_size
        return bytes(request.tokens[index * width : (index + 1) * width])

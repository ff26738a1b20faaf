"""Hints, carried out: what each action of one becomes in host memory and on the tiers below.

    pin        held in host memory for a time, within a budget; what lies below is brought up first (keeper.py)
    retain     a higher priority for a time, in every order that we keep (raises.py)
    prefetch   brought into host memory, within the bound of prefetches (fetches.py)
    demote     written down, then dropped from host memory (demotions.py)
    release    the end of pins and raises
    forget     deleted from everywhere, with all that continues it
    share      nothing: what is stored is shared

A wish about the prompt of the hint's own request is done to what is stored, and stays with the request: what is saved
of it later is treated likewise, and once more when it is finished. A wish is nothing that a lookup could see, but by
what is stored.

In steps, under the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from kvstore.hints.actions import HintKind
from kvstore.hints.envelope import ENVELOPE, UNKNOWN
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.plan.books import Books
from kvstore.plan.demotions import Demoted
from kvstore.plan.fetches import Brought, Fetches
from kvstore.plan.in_steps import InSteps, alive
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.records import Request
from kvstore.plan.retention import Retention
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.steps import STEP_BLOCKS, STEP_PAGES, Steps, parts, parts_from_tail
from kvstore.plan.wishes import MAX_WISHES, Wish

FIRST_ID = -(1 << 62)  # and below: numbers that no request of a caller has

ON_ITS_WAY = "the rest is on its way from a tier below"
ASKED = "a shared tier is being asked"
NOT_STORED = "nothing of it is stored here"
REST_NOT_STORED = "the rest is not stored here"
NO_BUDGET = "the budget for pins ends there (store.max_pinned_fraction, hints.max_tenant_fraction)"
WHEN_SAVED = "the rest when it is saved"
WHEN_FINISHED = "and once more when the request is finished"

KEPT = (HintKind.PIN, HintKind.RETAIN)  # what ends, and can be taken back
WORDS = {*(kind.value for kind in HintKind), ENVELOPE}

Doing = Callable[[int, Request, Wish, float], Steps[HintOutcome]]


class Hints:
    """Carries out wishes, and counts what became of them: by action, and by outcome. Under the store's lock."""

    def __init__(
        self, books: Books, lookups: PrefixLookup, fetches: Fetches, retention: Retention, in_steps: InSteps
    ) -> None:
        self.counters: dict[str, dict[str, int]] = {}
        self._limits = books.settings.hints
        self._block_size = books.layout.block_size
        self._num_groups = max(1, books.num_groups)
        self._clock = books.clock
        self._tiers = books.tiers
        self._lookups = lookups
        self._fetches = fetches
        self._retention = retention
        self._in_steps = in_steps
        self._doings: dict[HintKind, Doing] = {
            HintKind.PIN: self._pin,
            HintKind.RETAIN: self._retain,
            HintKind.PREFETCH: self._prefetch,
            HintKind.DEMOTE: self._demote,
            HintKind.RELEASE: self._release,
            HintKind.FORGET: self._forget,
            HintKind.SHARE: self._share,
        }
        retention.closing = self._closing

    def obey(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        """Do what a wish says about a request. Of one that is not the hint's own, no note is kept.

        ticket: a number for a prefetch.
        """
        if not self._limits.enabled:
            outcome = wish.outcome(HintStatus.REJECTED, reason="hints are off here (hints.enabled)")
        else:
            if wish.ttl_s > self._limits.max_ttl_s:
                wish = wish._replace(ttl_s=self._limits.max_ttl_s, is_clipped=True)
            self._lookups.expire(request)
            outcome = yield from self._doings[wish.kind](ticket, request, wish, now)
        self.count((outcome,))
        return outcome

    def count(self, outcomes: Iterable[HintOutcome]) -> None:
        """Count what became of actions. A client of a daemon tells of its own: words that are none of ours are one."""
        for outcome in outcomes:
            counts = self.counters.setdefault(outcome.action if outcome.action in WORDS else UNKNOWN, {})
            counts[outcome.status.value] = counts.get(outcome.status.value, 0) + 1

    # ---- one action each --------------------------------------------------------------------------------------

    def _pin(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        keeper = self._retention.keeper
        word, refused = self._retention.word(request, wish), keeper.refused_pages
        num_held = yield from self._each(request, wish, lambda blocks: keeper.keep(blocks, word))
        missing = self._num_meant(request, wish) - num_held
        is_coming = False
        if missing and not wish.is_own and keeper.room(request.payer):

            def brought(pages: Sequence[Page], at: float) -> None:
                keeper.expect([page for page in pages if page.block.depth >= wish.first], word)

            is_coming = yield from self._bring(ticket, request, now, brought)
            flying = [page for block in self._meant(request, wish) for page in block.pages if page.flight]
            keeper.expect(flying, word)
            is_coming = is_coming or any(page in keeper.coming for page in flying)
        if wish.is_own and not self._remember(request, wish):
            return wish.outcome(HintStatus.REJECTED, reason=f"a request may have {MAX_WISHES} wishes")
        rest = NO_BUDGET if keeper.refused_pages > refused or not keeper.room(request.payer) else REST_NOT_STORED
        until = self._unix(word.until) if num_held else None
        return self._judged(wish, num_held, missing, until, ON_ITS_WAY if is_coming else "", rest)

    def _retain(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        if not wish.priority:  # no longer retained
            return (yield from self._end(request, wish, (HintKind.RETAIN,), self._retention.raises.let_go))
        ends: list[float] = []
        refused: list[int] = []

        def lift(blocks: Sequence[Block]) -> int:
            num_raised, until = self._retention.lift(blocks, request, wish)
            ends.append(until)
            refused.append(len(blocks) - num_raised)
            return num_raised

        num_raised = yield from self._each(request, wish, lift)
        if wish.is_own and not self._remember(request, wish):
            return wish.outcome(HintStatus.REJECTED, reason=f"a request may have {MAX_WISHES} wishes")
        missing = self._num_meant(request, wish) - num_raised
        rest = NO_BUDGET if any(refused) else REST_NOT_STORED
        return self._judged(wish, num_raised, missing, self._unix(ends[-1]) if num_raised else None, "", rest)

    def _prefetch(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        if (yield from self._bring(ticket, request, now)):
            return wish.outcome(HintStatus.DEFERRED, reason=ASKED)
        num_there = 0
        path = self._lookups.known_path(request)
        for part in parts(path):
            if part is not path:
                yield
            num_here = sum(1 for _ in takewhile(_is_here, part))
            num_there += num_here
            if num_here < len(part):
                break
        missing = len(request.keys) - num_there
        reason = "" if not missing else REST_NOT_STORED if num_there else NOT_STORED
        if missing and self._lookups.survey(request).known > num_there:
            reason = "the rest is slower to load than to compute, or the bound of prefetches is reached"
        status = HintStatus.ACCEPTED if not missing else HintStatus.CLIPPED if num_there else HintStatus.REJECTED
        return wish.outcome(status, num_there * self._block_size, reason=reason)

    def _demote(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        if wish.is_own:
            is_remembered = self._remember(request, wish)
            status = HintStatus.DEFERRED if is_remembered else HintStatus.REJECTED
            return wish.outcome(status, reason="when the request is finished" if is_remembered else "too many wishes")
        gone, leaving, held = yield from self._demoting(request, wish, now)
        # Pieces of a state are pages, too, and no tokens of their own.
        tokens = min(gone * self._block_size // self._num_groups, len(self._meant(request, wish)) * self._block_size)
        if leaving:
            return wish.outcome(HintStatus.DEFERRED, tokens, reason="the rest leaves as soon as it is written")
        if held:
            status = HintStatus.CLIPPED if gone else HintStatus.REJECTED
            return wish.outcome(status, tokens, reason="the rest is in use or pinned")
        left = any(page.state == PageState.READY for block in self._meant(request, wish) for page in block.pages)
        if left:
            return wish.outcome(HintStatus.CLIPPED, tokens, reason="no tier below takes the rest: it is evicted first")
        return wish.outcome(HintStatus.ACCEPTED, tokens, reason="" if gone else "nothing of it is in host memory")

    def _release(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        return (yield from self._end(request, wish, KEPT, self._retention.release))

    def _forget(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        tokens = self._block_size * (yield from self._in_steps.forget(request, wish.first, now))
        if wish.is_own:
            if not self._remember(request, wish):
                return wish.outcome(HintStatus.CLIPPED, tokens, reason="what is saved of it later stays")
            return wish.outcome(HintStatus.DEFERRED, tokens, reason=WHEN_FINISHED)
        if any(len(tier.deletes) for tier in self._tiers):
            return wish.outcome(HintStatus.ACCEPTED, tokens, reason="tiers delete their copies as soon as they can")
        return wish.outcome(HintStatus.ACCEPTED, tokens, reason="" if tokens else NOT_STORED)

    def _share(self, ticket: int, request: Request, wish: Wish, now: float) -> Steps[HintOutcome]:
        yield from ()
        return wish.outcome(HintStatus.ACCEPTED, reason="what is stored is shared already")

    # ---- what they have in common -----------------------------------------------------------------------------

    def _closing(self, request: Request, now: float) -> Steps[None]:
        """A request is finished: do what its wishes ask for then."""
        for wish in request.wishes:
            if wish.kind is HintKind.DEMOTE:
                yield from self._demoting(request, wish, now)
            elif wish.kind is HintKind.FORGET:
                yield from self._in_steps.forget(request, wish.first, now)

    def _demoting(self, request: Request, wish: Wish, now: float) -> Steps[Demoted]:
        demotions = self._retention.demotions
        gone = leaving = held = 0
        meant = self._meant(request, wish)
        for part in parts_from_tail(meant, STEP_BLOCKS):  # the tail first: what is left is a prefix
            if part is not meant:
                yield
            blocks = alive(part)
            self._retention.raises.let_go(blocks)
            result = demotions.demote(blocks, now)
            gone, leaving, held = gone + result.num_gone, leaving + result.num_leaving, held + result.num_held
        return Demoted(gone, leaving, held)

    def _each(
        self, request: Request, wish: Wish, verb: Callable[[Sequence[Block]], int], *, from_tail: bool = False
    ) -> Steps[int]:
        """Apply a verb to the known blocks that a wish means, in steps; returns the sum of its answers."""
        total = 0
        meant = self._meant(request, wish)
        for part in (parts_from_tail if from_tail else parts)(meant, STEP_BLOCKS):
            if part is not meant:
                yield
            total += verb(alive(part))
        return total

    def _end(
        self,
        request: Request,
        wish: Wish,
        kinds: Sequence[HintKind],
        let_go: Callable[[Sequence[Block], str], int],
    ) -> Steps[HintOutcome]:
        """Take back what a session wished of these kinds, and what became of it; of all without a session."""
        session, own = wish.session or request.options.session, request.options.session
        left = [one for one in request.wishes if one.kind not in kinds or session not in ("", one.session or own)]
        num_taken_back = len(request.wishes) - len(left)
        request.wishes = tuple(left)
        num_ended = yield from self._each(request, wish, lambda blocks: let_go(blocks, session), from_tail=True)
        if num_ended or num_taken_back:
            return wish.outcome(HintStatus.ACCEPTED, num_ended * self._block_size)
        return wish.outcome(HintStatus.REJECTED, reason="nothing of it is pinned or retained")

    def _bring(self, ticket: int, request: Request, now: float, brought: Brought | None = None) -> Steps[bool]:
        """Begin to bring what lies below host memory; True if a shared tier has to answer first.

        brought: told of the pages on their way, now or when that tier has answered.
        """
        # The notes of a request that goes on are not to be ended with those of its prefetch.
        asking = replace(request, id=FIRST_ID - ticket)

        def told(pages: Sequence[Page], at: float) -> None:
            self._lookups.requests.pop(asking.id, None)
            if brought is not None:
                brought(pages, at)

        is_known = self._fetches.ask(ticket, asking, now, told)
        if is_known:
            if len(request.keys) > STEP_PAGES:
                yield
            self._fetches.bring(ticket, asking, now, told)
        return not is_known

    def _remember(self, request: Request, wish: Wish) -> bool:
        """Keep a wish with its request, to be done to what is saved of it; False if it has too many."""
        if len(request.wishes) >= MAX_WISHES:
            return False
        request.wishes += (wish,)
        return True

    def _meant(self, request: Request, wish: Wish) -> list[Block]:
        return self._lookups.known_path(request)[wish.first : wish.end]

    def _num_meant(self, request: Request, wish: Wish) -> int:
        return max(0, min(wish.end, len(request.keys)) - wish.first)

    def _judged(
        self, wish: Wish, num_done: int, missing: int, until: float | None, later: str, rest: str
    ) -> HintOutcome:
        """Return what became of a wish for a time. later, rest: why what is missing comes later, or does not."""
        tokens = num_done * self._block_size
        if wish.is_own and (missing > 0 or not num_done):
            return wish.outcome(HintStatus.DEFERRED, tokens, until, WHEN_SAVED)
        if missing <= 0:
            told = f"for {wish.ttl_s:g} s" if wish.is_clipped else ""
            return wish.outcome(HintStatus.CLIPPED if wish.is_clipped else HintStatus.ACCEPTED, tokens, until, told)
        if later:
            return wish.outcome(HintStatus.DEFERRED, tokens, until, later)
        if num_done:
            return wish.outcome(HintStatus.CLIPPED, tokens, until, rest)
        return wish.outcome(HintStatus.REJECTED, reason=NOT_STORED if rest == REST_NOT_STORED else rest)

    def _unix(self, boot: float) -> float:
        return boot + self._clock.wall() - self._clock.boot()


def _is_here(block: Block) -> bool:
    """Whether host memory has something of a block, or is about to."""
    return any(page.state is not PageState.ABSENT for page in block.pages)

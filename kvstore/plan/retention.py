"""Retention: the effect of a path's use on every tier's order, and of callers' wishes to keep it.

Retention has five words: recency and how a use ends (`ending`), time to live (`set_ttl`), promises to keep in host
memory and raised priorities (`promise`), and the opposite (`let_go_first`, `leave`, demotions). The planner finds the
blocks; here it is said to whom it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from eviction.policy import Ending, Hint
from kvstore.hints.actions import HintKind
from kvstore.hints.limits import MAX_SESSION
from kvstore.plan.books import Books
from kvstore.plan.demotions import Demotions
from kvstore.plan.keeper import Keeper, Word
from kvstore.plan.raises import Raises
from kvstore.plan.records import Request
from kvstore.plan.state import SHARED_SESSION, Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES, Steps, parts, parts_from_tail
from kvstore.plan.wishes import Wish


class Retention:
    """Tells host memory and the lower tiers what is worth keeping. Under the store's lock.

    keeper:    who promised to keep what. raises: what has a higher priority for a time. demotions: what leaves as soon
               as it is written.
    closing:   what wishes of a request ask for when it is finished, after all else.
    """

    closing: Callable[[Request, float], Steps[None]]

    def __init__(self, books: Books) -> None:
        self.keeper = Keeper(books)
        self.raises = Raises(books)
        self.demotions = Demotions(books)
        self._host = books.host
        self._tiers = books.tiers
        self._touch_interval_s = books.settings.touch_interval_s  # media are told of a use at most this often
        self._ttl_after = books.settings.ttl_after

    def ending(self, path: Sequence[Block], request: Request, ending: Ending, now: float) -> Steps[None]:
        """A request is over: refresh its path, promise what it asked for, let go of what no turn will come back to."""
        yield from self._using(path, request, self._ttl_after.get(ending.finish_reason, inf), now)
        if request.options.pin or request.options.retain_until or request.wishes:
            for part in parts(path):
                if part is not path:
                    yield
                self.promise(part, request)
        if ending.last_turn:
            for part in parts(path):  # what comes last is the first to go
                if part is not path:
                    yield
                self.let_go_first(part, request)
        if request.wishes:
            yield from self.closing(request, now)

    def _using(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> Steps[None]:
        """Refresh a path: in the policies always, at the media not more often than every touch_interval_s.

        left_s: the longest that what only this session has used lives from now on, until its next use.
        """
        used_before: list[Block] = []
        for part in parts_from_tail(path, 2 * STEP_PAGES):  # a use costs half of what other bookings do
            if part is not path:
                yield
                part = [block for block in part if not block.is_removed]
            used_before[:0] = self._use(part, request, left_s, now)
        for part in parts(used_before):
            if part is not used_before:
                yield
                part = [block for block in part if not block.is_removed]
            for tier in self._tiers:
                tier.make_up(part, now)

    def _use(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> list[Block]:
        """The same of a part of a path; returns the blocks that a medium should have had for some time."""
        self.note_session(path, request)
        self._host.touch(path)
        ending = self._limit(path, request, left_s, now) if self._ttl_after else ()
        fresh = [block for block in path if now - block.touched_at > self._touch_interval_s]
        used_before = [block for block in fresh if block.touched_at > float("-inf")]
        for block in fresh:
            block.touched_at = now
        for tier in self._tiers:
            tier.touch(path, fresh, now, is_limited=bool(self._ttl_after))
        if ending:
            pages = [page for block in reversed(ending) for page in block.pages]
            self._host.shorten(pages, left_s)
            for tier in self._tiers:
                tier.shorten(pages, left_s)
        return used_before

    def _limit(self, path: Sequence[Block], request: Request, left_s: float, now: float) -> list[Block]:
        """Note with blocks how long they live from this use on; returns those whose time is limited by the session's.

        The media are told of those where that is another time than before, however lately they were told of a use.
        """
        session, long_ago = _session(request), now - self._touch_interval_s - 1.0
        ending: list[Block] = []
        for block in path:
            own_s = left_s if block.session == session else inf
            if own_s != block.left_s:
                block.left_s = own_s
                block.touched_at = min(block.touched_at, long_ago)
            if own_s != inf:
                ending.append(block)
        return ending

    def note_session(self, blocks: Sequence[Block], request: Request) -> None:
        """Remember whose blocks these are, for `let_go_first`."""
        session = _session(request)
        for block in blocks:
            if block.session != session:
                block.session = SHARED_SESSION if block.session else session

    def promise(self, blocks: Sequence[Block], request: Request) -> None:
        """Keep blocks as the request's options and wishes say, as far as the budget for that goes."""
        options, keeper = request.options, self.keeper
        if options.pin or options.retain_until:
            until = inf if options.pin else options.retain_until
            word = keeper.word(until, holder=request.holder, payer=request.payer, session=options.session)
            keeper.keep(blocks, word)
        for wish in request.wishes:
            meant = [block for block in blocks if wish.first <= block.depth < wish.end]
            if wish.kind is HintKind.PIN:
                keeper.keep(meant, self.word(request, wish))
            elif wish.kind is HintKind.RETAIN:
                self.lift(meant, request, wish)

    def word(self, request: Request, wish: Wish) -> Word:
        """Return the word that a wish to pin gives, from now on."""
        session = wish.session or request.options.session
        holder = ", ".join(filter(None, (request.holder, session and f"session {session[:MAX_SESSION]}")))
        return self.keeper.word(most_s=wish.ttl_s, holder=holder, payer=request.payer, session=session)

    def lift(self, blocks: Sequence[Block], request: Request, wish: Wish) -> tuple[int, float]:
        """Raise blocks as a wish to retain says; returns how many are, and until when by the boot clock."""
        session = wish.session or request.options.session
        return self.raises.lift(blocks, wish.priority, wish.ttl_s, payer=request.payer, session=session)

    def release(self, blocks: Sequence[Block], session: str = "") -> int:
        """Take back promises and raises about blocks; returns how many blocks had one. session: those of it alone."""
        return max(self.keeper.let_go(blocks, session), self.raises.let_go(blocks, session))

    def let_go_first(self, path: Sequence[Block], request: Request) -> None:
        """No turn will follow: what only this session has used is the first to make room."""
        session = _session(request)
        leaving = [page for block in reversed(path) if block.session == session for page in block.pages]
        self._host.policy.demote(leaving)
        for tier in self._tiers:
            if tier.plan.policy is not None:
                tier.plan.policy.demote(leaving)

    def set_ttl(self, path: Sequence[Block], ttl_s: float, now: float) -> None:
        """Give blocks a time to live from now on, in every tier."""
        hints: dict[Hint, Hint] = {}  # one object for all that have the same: a policy is told of them together
        for block in path:
            hint = hints.get(block.hint)
            if hint is None:
                hint = hints[block.hint] = block.hint._replace(ttl_s=ttl_s)
            block.hint = hint
            block.touched_at = now
        pages = [page for block in path for page in block.pages]
        self._host.enter([page for page in pages if page in self._host.policy], used=False)
        for tier in self._tiers:
            tier.set_ttl(pages)
            tier.touch(path, path, now)

    def leave(self, removed: Sequence[Block]) -> list[Page]:
        """Blocks are forgotten: their pages leave host memory, those in use as soon as they are not; returns all."""
        self.release(removed)
        pages = [page for block in removed for page in block.pages]
        if not pages:
            return pages
        self.drop_idle(pages)
        self._host.doom([page for page in pages if page.state == PageState.READY])
        return pages

    def drop_idle(self, pages: Sequence[Page]) -> None:
        """Those of the pages of forgotten blocks, and of expired pages, that nothing uses give their slots back."""
        idle = [
            page
            for page in pages
            if not page.spilling and (page.block.is_removed or page.state is PageState.EXPIRED) and not page.pins
        ]
        if idle:
            self._host.drop_expired([page for page in idle if page.state is PageState.EXPIRED])
            self._host.drop([page for page in idle if page.state is PageState.READY])


def _session(request: Request) -> str:
    return request.options.session or f"\0request {request.id}"

"""Retention: the effect of a path's use on every tier's order, and of callers' wishes to keep it.

Retention has four words on all tiers: recency (`use`), time to live (`set_ttl`), promises to keep in host memory
(`promise`), and the opposite (`let_go_first`, `leave`). The planner finds the blocks; here it is said to whom it
matters.
"""

from __future__ import annotations

from collections.abc import Sequence

from eviction.policy import Hint
from kvstore.plan.host import HostSpace
from kvstore.plan.keeper import Keeper
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import Request
from kvstore.plan.state import SHARED_SESSION, Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES, Steps, parts, parts_from_tail


class Retention:
    """Tells host memory and the lower tiers what is worth keeping. Under the store's lock.

    tiers:            the planner's own list, which may grow.
    touch_interval_s: media are told of a use at most this often.
    """

    def __init__(self, host: HostSpace, tiers: Sequence[LowerTier], keeper: Keeper, touch_interval_s: float) -> None:
        self._host = host
        self._tiers = tiers
        self._keeper = keeper
        self._touch_interval_s = touch_interval_s

    def using(self, path: Sequence[Block], request: Request, now: float) -> Steps[None]:
        """Refresh a path: in the policies always, at the media not more often than every touch_interval_s."""
        used_before: list[Block] = []
        for part in parts_from_tail(path, 2 * STEP_PAGES):  # a use costs half of what other bookings do
            if part is not path:
                yield
                part = [block for block in part if not block.is_removed]
            used_before[:0] = self._use(part, request, now)
        for part in parts(used_before):
            if part is not used_before:
                yield
                part = [block for block in part if not block.is_removed]
            for tier in self._tiers:
                tier.make_up(part, now)

    def _use(self, path: Sequence[Block], request: Request, now: float) -> list[Block]:
        """The same of a part of a path; returns the blocks that a medium should have had for some time."""
        self.note_session(path, request)
        self._host.touch(path)
        fresh = [block for block in path if now - block.touched_at > self._touch_interval_s]
        used_before = [block for block in fresh if block.touched_at > float("-inf")]
        for block in fresh:
            block.touched_at = now
        for tier in self._tiers:
            tier.touch(path, fresh, now)
        return used_before

    def note_session(self, blocks: Sequence[Block], request: Request) -> None:
        """Remember whose blocks these are, for `let_go_first`."""
        session = _session(request)
        for block in blocks:
            if block.session != session:
                block.session = SHARED_SESSION if block.session else session

    def promise(self, blocks: Sequence[Block], request: Request) -> None:
        """Keep blocks in host memory as the request's options say, as far as the budget for that goes."""
        if request.options.pin:
            self._keeper.keep(blocks, float("inf"), request.holder)
        elif request.options.retain_until:
            self._keeper.keep(blocks, request.options.retain_until, request.holder)

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
        self._keeper.let_go(removed)
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

"""What a use of a path does to every tier's order, and what callers say about keeping it.

Retention has four words on all tiers: recency (`use`), time to live (`set_ttl`), promises to keep in host memory
(`promise`), and the opposite (`let_go_first`, `leave`). The planner finds the blocks; here it is said to whom it
matters.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.plan.catalog import SHARED_SESSION, Block, Page, PageState
from kvstore.plan.host import HostSpace
from kvstore.plan.keeper import Keeper
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import Request


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

    def use(self, path: Sequence[Block], request: Request, now: float) -> None:
        """Refresh a path: in the policies always, at the media not more often than every touch_interval_s."""
        self.note_session(path, request)
        self._host.touch(path)
        fresh = [block for block in path if now - block.touched_at > self._touch_interval_s]
        used_before = [block for block in fresh if block.touched_at > float("-inf")]
        for block in fresh:
            block.touched_at = now
        for tier in self._tiers:
            tier.touch(path, fresh, now)
            tier.make_up(used_before, now)

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
        for block in path:
            block.hint = block.hint._replace(ttl_s=ttl_s)
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
        self.drop_idle(pages)
        self._host.doom([page for page in pages if page.state == PageState.READY])
        return pages

    def drop_idle(self, pages: Sequence[Page]) -> None:
        """Those of the pages of forgotten blocks, and of expired pages, that nothing uses give their slots back."""
        for page in pages:
            if page.spilling:
                continue
            if page.state == PageState.EXPIRED:
                self._host.drop_expired((page,))
            elif page.block.is_removed and page.state == PageState.READY and page.pins == 0:
                self._host.drop((page,))


def _session(request: Request) -> str:
    return request.options.session or f"\0request {request.id}"

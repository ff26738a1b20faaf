"""The planner's verbs whose work grows with a prompt, or with all that is stored, as steps (see steps.py).

The store lets go of its lock between two steps; whoever has no lock to let go of calls the planner's own verbs, which
carry all steps out at once. Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

from eviction.policy import Ending
from kvstore.page import page_key
from kvstore.plan.audience import Audience
from kvstore.plan.books import Books
from kvstore.plan.endings import one_word
from kvstore.plan.fetches import Fetches
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import LeaseState, Request, SaveLease
from kvstore.plan.retention import Retention
from kvstore.plan.saves import Saver
from kvstore.plan.single_flight import SingleFlight
from kvstore.plan.speculation import Speculation
from kvstore.plan.state import Block, Load, Save
from kvstore.plan.steps import STEP_BLOCKS, STEP_PAGES, Steps, parts, parts_from_tail
from radix.hashing import BlockHash

MAX_REASONS = 16


class InSteps:
    """Verbs in steps, over the planner's own parts.

    last_lease:     the highest number of a lease that was made.
    speculation:    is told of ends and ticks; None where nothing is brought ahead of need.
    finish_reasons: how many requests ended with each; it predicts whether a turn follows (tool calls nearly always
                    bring one). Callers choose the words: those after MAX_REASONS are "other".
    """

    def __init__(
        self,
        books: Books,
        lookups: PrefixLookup,
        fetches: Fetches,
        loader: Loader,
        saver: Saver,
        single_flight: SingleFlight,
        retention: Retention,
        audience: Audience,
    ) -> None:
        self.last_lease = 1
        self.speculation: Speculation | None = None
        self.finish_reasons: dict[str, int] = {}
        self._lease_ids = count(2)
        self._groups = range(len(books.layout.groups))
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._lookups = lookups
        self._fetches = fetches
        self._loader = loader
        self._saver = saver
        self._single_flight = single_flight
        self._retention = retention
        self._audience = audience

    # ---- leases -----------------------------------------------------------------------------------------------

    def new_lease_id(self) -> int:
        """A number for a lease or a ticket. Any thread."""
        return next(self._lease_ids)

    def prepare_load(
        self, lease_id: int, request: Request, num_blocks: int, now: float, owner: str, first: int
    ) -> Steps[Load]:
        """Pin blocks [first, num_blocks) that are in host memory, make room for the rest, send the fetches."""
        self._lookups.expire(request)
        self.last_lease = max(self.last_lease, lease_id)
        return (yield from self._loader.preparing(lease_id, request, num_blocks, now, owner, first))

    def prepare_save(
        self,
        lease_id: int,
        request: Request,
        first: int,
        num_blocks: int,
        now: float,
        owner: str,
        states: Sequence[int] = (),
    ) -> Steps[SaveLease]:
        """Slots for the pages of blocks [first, first + num_blocks), and for `states`, that host memory lacks."""
        self._lookups.expire(request)  # else what is over would count as stored, and not be saved again
        self.last_lease = max(self.last_lease, lease_id)
        self._audience.tell(request)
        lease = yield from self._saver.preparing(lease_id, request, first, num_blocks, owner, states)
        if lease.skipped:
            self._single_flight.end(request, now)  # nobody should wait for what will not be there
        return lease

    def complete(self, lease_id: int, now: float, filled: Sequence[bool] | None = None) -> Steps[None]:
        """End a lease well: unpin after a load, publish after a save."""
        if lease_id in self._loader.loads:
            self._loader.close(lease_id, now, is_well=True)
        elif lease_id in self._saver.saves:
            self._saver.close(lease_id, filled)
        yield from self._end(lease_id, now)

    def release(self, lease_id: int, now: float) -> Steps[None]:
        """End a lease badly: unpin, or drop what was being filled."""
        self._loader.close(lease_id, now, is_well=False)
        self._saver.drop(lease_id)
        yield from self._end(lease_id, now)

    def release_owner(self, owner: str, now: float) -> Steps[int]:
        """Release every lease of an owner that died."""
        leases: list[Load | Save] = [*self._loader.loads.values(), *self._saver.saves.values()]
        own = [lease for lease in leases if lease.owner == owner]
        num_pages = 0
        for lease in own:
            if num_pages > STEP_PAGES:
                yield
                num_pages = 0
            num_pages += len(lease.pages) + 1
            yield from self.release(lease.id, now)
            self._single_flight.end(lease.request, now)
        return len(own)

    def finished(
        self,
        request: Request,
        now: float,
        finish_reason: str = "",
        *,
        last_turn: bool = False,
        reply_tokens: int = -1,
    ) -> Steps[None]:
        """Refresh the request's path in every tier, or let its private part go first if no turn will follow."""
        reason = one_word(finish_reason)
        self._lookups.end(request, now, finish_reason)
        if finish_reason:
            if finish_reason not in self.finish_reasons and len(self.finish_reasons) >= MAX_REASONS:
                finish_reason = "other"
            self.finish_reasons[finish_reason] = self.finish_reasons.get(finish_reason, 0) + 1
        ending = Ending(reason, True if last_turn or request.options.last_turn else None, reply_tokens)
        self._audience.tell(request)
        self._audience.tell_end(request, ending)
        self._saver.finished(request, ending, now)
        yield from self._retention.ending(self._lookups.known_path(request), request, ending, now)
        if self.speculation is not None:
            self.speculation.ended(request, now, ending)

    def _end(self, lease_id: int, now: float) -> Steps[None]:
        """Carry on with the end of a lease, if it has begun."""
        load = self._loader.loads.get(lease_id)
        if load is not None and load.state is LeaseState.CLOSED:
            yield from self._loader.end(load, now)
        save = self._saver.saves.get(lease_id)
        if save is not None and save.is_ending:
            yield from self._saver.end(save, now)

    # ---- what is said about blocks ----------------------------------------------------------------------------

    def prefetch(self, ticket: int, request: Request, now: float) -> Steps[int]:
        """Start bringing the known prefix into host memory; returns the ticket."""
        self._lookups.expire(request)
        if self._fetches.ask(ticket, request, now):
            if len(request.keys) > STEP_PAGES:
                yield
            self._fetches.bring(ticket, request, now)
        return ticket

    def pin(self, request: Request) -> Steps[int]:
        """Keep the request's blocks in host memory until unpin, as many as the budget holds and as long as may be."""
        self._lookups.expire(request)
        num_kept = 0
        path = self._lookups.known_path(request)
        session = request.options.session
        word = self._retention.keeper.word(holder=request.holder, payer=request.payer, session=session)
        for part in parts(path, STEP_BLOCKS):
            if part is not path:
                yield
            num_kept += self._retention.keeper.keep(alive(part), word)
        return num_kept

    def unpin(self, request: Request) -> Steps[int]:
        """Undo pin."""
        num_ended = 0
        path = self._lookups.known_path(request)
        for part in parts_from_tail(path):
            if part is not path:
                yield
            num_ended += self._retention.keeper.let_go(part)
        return num_ended

    def set_ttl(self, request: Request, ttl_s: float, now: float) -> Steps[int]:
        """Give the known blocks of a request a time to live from now on, in every tier; returns how many."""
        self._lookups.expire(request)
        path = self._lookups.known_path(request)
        for part in parts_from_tail(path, STEP_BLOCKS):
            if part is not path:
                yield
            self._retention.set_ttl(alive(part), ttl_s, now)
        return len(path)

    def forget(self, request: Request, first: int, now: float) -> Steps[int]:
        """Delete blocks from `first` on and all that is known to continue them."""
        self._single_flight.end(request, now)
        if first >= len(request.keys):
            return 0
        num_removed = yield from self._trim(request.keys[first], now)
        # There may be what the catalog does not remember, or what others wrote.
        doubtful = [tier for tier in self._tiers if tier.plan.is_shared or not tier.plan.is_indexed]
        own = request.keys[first:]
        for part in parts(own) if doubtful else ():
            if part is not own:
                yield
                num_removed += yield from self._trim(own[0], now)  # what came meanwhile is forgotten, too
            strays = self._catalog.take_strays(part)
            pages = self._retention.leave(strays)
            keys = [page_key(key, group) for key in part for group in self._groups]
            for tier in self._tiers:
                tier.delete(pages, [key for key in keys if not tier.deletes.holds(key)] if tier in doubtful else ())
                tier.pump(now)
            self._catalog.take_apart(strays)
        self._pump(now)
        return num_removed

    def _trim(self, key: BlockHash, now: float) -> Steps[int]:
        """Delete a block and all that is known to continue it; returns how many those are."""
        num_removed = 0
        while removed := self._catalog.trim(key, STEP_BLOCKS):
            num_removed += len(removed)
            pages = self._retention.leave(removed)
            for tier in self._tiers:
                tier.delete(pages)
            self._catalog.take_apart(removed)
            if len(removed) == STEP_BLOCKS:
                self._pump(now)
                yield
        return num_removed

    def clear(self, now: float) -> Steps[int]:
        """Delete every block that is known, and all that tiers know themselves of; returns how many were known."""
        for tier in self._tiers:
            tier.clear()
        num_removed = num_told = 0
        for key in self._catalog.tree.children(None):
            while removed := self._catalog.trim(key, STEP_BLOCKS):
                num_removed += self._clear_away(removed)
                if num_removed - num_told >= STEP_BLOCKS:
                    num_told = num_removed
                    self._pump(now)
                    yield
        while removed := self._catalog.take_strays(list(islice(self._catalog.strays, STEP_BLOCKS))):
            num_removed += self._clear_away(removed)
            if len(removed) == STEP_BLOCKS:
                self._pump(now)
                yield
        self._pump(now)
        if self._catalog.journal is not None and not self._catalog.blocks():  # else others have saved some meanwhile
            self._catalog.journal.cleared()
        return num_removed

    def _clear_away(self, removed: Sequence[Block]) -> int:
        pages = self._retention.leave(removed)
        for tier in self._tiers:
            tier.clear_away(pages)
        self._catalog.take_apart(removed)
        return len(removed)

    def _pump(self, now: float) -> None:
        for tier in self._tiers:
            tier.pump(now)

    # ---- operators --------------------------------------------------------------------------------------------

    def resize_host(self, num_slots: int) -> Steps[None]:
        """Use fewer or more of the host slots."""
        self._host.resize(num_slots)
        while self._host.shrink():
            yield

    def detach_tier(self, tier: LowerTier) -> Steps[None]:
        """Forget what a tier holds that was taken away."""
        for part in parts(self._catalog.blocks()):
            if not tier.is_detached:
                return  # it is back
            tier.forget_all([page for block in part for page in block.pages])
            yield

    # ---- what time makes due ----------------------------------------------------------------------------------

    def tick(self, now: float) -> Steps[bool]:
        """Do what only time makes due: deadlines, promises that end. True if somebody need not wait any more."""
        self._lookups.expire()
        while self._lookups.is_late:
            yield
            self._lookups.expire()
        while self._retention.keeper.expire() | self._retention.raises.expire():
            yield
        self._retention.demotions.tick(now)
        while self._host.shrink():
            yield
        for tier in self._tiers:
            tier.pump(now)
        if self.speculation is not None:
            self.speculation.tick(now)
        # Ends whose callers were interrupted between two steps.
        for load in [load for load in self._loader.loads.values() if load.state is LeaseState.CLOSED]:
            yield from self._end(load.id, now)
        for save in [save for save in self._saver.saves.values() if save.is_ending]:
            yield from self._end(save.id, now)
        # What had not begun when its tier went down has been answered for by now, and may be on its way from another
        # tier; the rest is inside and may never come back.
        stalled = [page for flight in self._transfers.take_stalled() for page in flight.pages]
        return self._fetches.give_up(stalled, now) | self._single_flight.tick(now)


def alive(blocks: Sequence[Block]) -> Sequence[Block]:
    """Those of a path that was found before the last step which are still known."""
    return [block for block in blocks if not block.is_removed]

"""A tier below host memory as the planner sees it: what it holds, what it is owed, and who leaves it.

What it is owed is kept in two books: pages to be written (debts.py) and pages to be deleted (deletes.py). Pages are
written behind: soon after they are whole in host memory they are *owed* to every lower tier that admits them, and
leave the queue in batches as fast as the lane takes them. So eviction from host memory is a plain drop. Only the
batches under way hold their slots; a page that is merely owed may still be evicted, and is then lost to that tier and
counted. One that is down, or refuses writes, keeps its queue and is paid later. Each write names its victims, by the
plan's policy, whatever order the medium has (docs/design.md, "One ruler of the disk").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.direction import Direction
from kvstore.page import PageKey
from kvstore.plan.admission import worthier
from kvstore.plan.catalog import Catalog
from kvstore.plan.deadlines import begin_life, deadline, time_to_live
from kvstore.plan.debts import Debts, SpillCounters
from kvstore.plan.deletes import Deletes
from kvstore.plan.journal import Left
from kvstore.plan.records import Op, Outcome, Priority
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.states import refreshed
from kvstore.plan.steps import STEP_BLOCKS
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.touches import send_touches
from kvstore.plan.transfers import InFlight, TransferBook
from kvstore.plan.write_budget import WriteBudget

MAX_OWED_DELETES = 65_536  # keys that a tier which cannot be reached is owed; about 10 MB


@dataclass(slots=True)
class LowerTier:
    """The planner's book of one lower tier. Under the store's lock.

    on_parted: see HostMemory.
    wall: clock of the deadlines on the medium, Unix time. Asked whenever one is made or judged, so that the policy says
          what the medium says, also after somebody has set the clock.
    """

    plan: TierPlan
    bit: int
    batch_pages: int
    transfers: TransferBook
    catalog: Catalog
    wall: Callable[[], float]
    page_bytes: Sequence[int]
    on_parted: Callable[[Sequence[Page]], None] | None
    out: frozenset[Direction] = frozenset()  # what its breakers keep out
    is_late: bool = False  # copies past their deadline may be left, see `expire`
    is_detached: bool = False  # taken away by an operator: it has nothing, and gets nothing
    used_pages: int = 0
    in_flight: int = 0
    dropping: Sequence[PageKey] = ()  # of copies that are forgotten in this step, until their deletes are owed
    counters: SpillCounters = field(default_factory=SpillCounters)
    debts: Debts = field(init=False)
    deletes: Deletes = field(init=False)
    budget: WriteBudget | None = field(init=False)

    def __post_init__(self) -> None:
        self.debts = Debts()
        self.deletes = Deletes(self.plan.name, self.transfers, max(MAX_OWED_DELETES, self.plan.capacity_pages or 0))
        self.budget = WriteBudget(self.plan.max_writes_per_day) if self.plan.max_writes_per_day else None

    def owe(self, pages: Sequence[Page], *, used: bool, is_saved: bool = False) -> None:
        """Pages are whole in host memory: remember those this tier should have. is_saved: a save brought them."""
        if self.is_detached or (self.plan.admit == "second_use" and not used):
            return
        bit = self.bit
        wanted = [page for page in pages if not (page.homes | page.spilling) & bit and not page.block.is_removed]
        if (has_room := self.plan.has_room_for) is not None:
            wanted = [page for page in wanted if has_room(page.key)]
        if self.plan.exclusive:
            self.debts.set_aside(wanted, is_saved=is_saved)
        else:
            self.debts.owe(wanted, is_saved=is_saved)

    def pump(self, now: float) -> None:
        """Send what is owed, as far as the window allows: deletes first, since writes may wait for them."""
        if self.deletes.is_any and self.takes(Direction.DELETE):
            self.deletes.pump(now, may_clear=not self.in_flight)
        if self.budget is not None:
            self.budget.fill(now)  # also where nothing is owed: operators look at it
        if not self.takes(Direction.WRITE):
            return
        while self.debts.waiting and self.in_flight < self.plan.window_pages and not self.deletes.must_clear:
            if self.is_spent:
                break
            batch = self.debts.take(self.batch_pages, self.deletes.keeps_back if self.deletes.is_any else None)
            for page in [page for page in batch if (page.homes | page.spilling) & self.bit]:
                del batch[page]  # it is there by now
            if self.plan.admit == "predicted":
                num_owed, victims = len(batch), self._victims(self._excess(len(batch)))
                batch = worthier(batch, victims, self.plan.policy, self.wall())
                self.counters.refused_pages += num_owed - len(batch)
            if batch and not self._spill(batch):
                break
        if self.debts.held and self.takes(Direction.DELETE):
            self.deletes.pump(now, may_clear=False)  # those that writes turned out to wait for

    def spilled(self, flight: InFlight, outcome: Outcome, now: float) -> None:
        """Book the outcome of a SPILL."""
        self.in_flight -= len(flight.pages)
        num_ok = sum(outcome.ok)
        self.counters.spilled_pages += num_ok
        self.counters.failed_pages += len(flight.pages) - num_ok
        for page, ok in zip(flight.pages, outcome.ok, strict=True):
            page.spilling &= ~self.bit
            if ok and not self.is_detached and not page.block.is_removed:
                page.homes |= self.bit
                if self.catalog.journal is not None:
                    self.catalog.journal.stored(self.plan.name, (page,))
                continue
            self.forget_copies((page,))
            if page.block.is_removed:
                self.deletes.wrote(page.key)  # also if it failed: a write that was given up may still have been done
            elif not self.is_detached:
                self.debts.fail(page, is_saved=_is_saved(flight, page))
            self.catalog.prune(page.block)
        self.pump(now)

    def has(self, page: Page) -> bool:
        return bool(page.homes & self.bit)

    def learn(self, page: Page, left_s: float | None = None) -> None:
        """The tier turned out to hold a page that was not booked; `left_s` of its time are left, if it has a limit."""
        if not page.homes & self.bit and not self.is_detached:
            page.homes |= self.bit
            if self.debts.failed:
                self.debts.failed.pop(page)
            if self.catalog.journal is not None:
                self.catalog.journal.stored(self.plan.name, (page,))
            if not page.spilling & self.bit:
                self.used_pages += 1
            if self.plan.policy is not None:
                hint = page.block.hint if left_s is None else page.block.hint._replace(left_s=left_s)
                self.plan.policy.add((page,), self.wall(), hint)
            if victims := self._victims(self._excess(0)):  # others have written there, and what is oldest made room
                self.forget_copies(victims, Left.EVICTED)
                for page in victims:
                    self.catalog.prune(page.block)

    def forget_copies(self, pages: Sequence[Page], why: Left | None = Left.LOST) -> None:
        """The tier no longer holds pages, or the spill of them failed. why: None if it may well still hold them."""
        if self.catalog.journal is not None and why is not None:
            self.catalog.journal.removed(self.plan.name, self.copies(pages), why)
        keep = ~self.bit
        for page in pages:
            page.homes &= keep
        self.used_pages -= len(pages)
        if self.plan.policy is not None:
            self.plan.policy.discard(pages)

    def copies(self, pages: Sequence[Page]) -> list[Page]:
        """Those of `pages` that the tier holds."""
        return [page for page in pages if page.homes & self.bit]

    def delete(self, pages: Sequence[Page], also: Sequence[PageKey] = (), why: Left = Left.DELETED) -> None:
        """Delete copies, and whatever the medium may have under the keys `also`.

        A copy that is being written goes after it is there.
        """
        if self.is_detached:
            return
        copies = self.copies(pages)
        # A write that failed may have been done nevertheless; and of a tier without an index not all is remembered.
        doubtful = [page for page in pages if page in self.debts.failed or not self.plan.is_indexed]
        keys = list(dict.fromkeys([*(page.key for page in [*copies, *doubtful]), *also]))
        self.dropping = keys
        self.forget_copies(copies, why)
        self.deletes.owe_after_write(page.key for page in pages if page.spilling & self.bit)
        self.debts.settle(pages)
        self.deletes.owe(keys)
        self.dropping = ()

    def clear(self) -> None:
        """Delete all that the tier finds itself. Pages that are known are dropped by `clear_away` after that."""
        if self.plan.can_clear and not self.is_detached:
            self.deletes.owe_all()

    def clear_away(self, pages: Sequence[Page]) -> None:
        """Pages of blocks that were known leave in a clear: those that the tier does not clear itself are deleted.

        It does as long as its clear is owed, since nothing is written until that is done.
        """
        if not (self.plan.can_clear and self.deletes.must_clear):
            self.delete(pages)
            return
        self.forget_copies(self.copies(pages), Left.DELETED)
        self.debts.settle(pages)

    def deleted(self, flight: InFlight, outcome: Outcome, now: float) -> None:
        """Book the outcome of a DELETE or a CLEAR."""
        self.deletes.landed(flight, outcome, now, takes_writes=self.takes(Direction.WRITE))
        if self.is_detached:
            self.deletes.drop()
        self.debts.let_go()
        self.pump(now)

    def hold(self, page: Page) -> None:
        """A fetch reads the copy: it must not be evicted."""
        if self.plan.policy is not None:
            self.plan.policy.discard((page,))

    def let_go(self, page: Page) -> None:
        """The fetch is over."""
        if self.plan.policy is not None and page.homes & self.bit:
            self.plan.policy.add((page,), self.wall(), page.block.hint)

    def touch(self, blocks: Sequence[Block], fresh: Sequence[Block], now: float, *, is_limited: bool = False) -> None:
        """Note a use of a path (root first); tell the medium of the blocks it was not told of lately (`fresh`).

        is_limited: it may have been told of a time to live that they do not have any more."""
        if self.plan.policy is not None:
            pages = refreshed(blocks, self.catalog)
            self.plan.policy.touch(pages, self.wall())
            if self.plan.exclusive:
                self.plan.policy.demote([page for page in pages if page.state is PageState.READY and not page.kept])
        copies = self.copies(refreshed(fresh, self.catalog))
        send_touches(self.transfers, self.plan, copies, self.wall(), now, is_limited=is_limited)

    def shorten(self, pages: Sequence[Page], left_s: float) -> None:
        """Pages, given tail first, live for `left_s` from now at most, until their next use."""
        if self.plan.policy is not None:
            self.plan.policy.shorten(pages, self.wall(), left_s)

    def set_ttl(self, pages: Sequence[Page]) -> None:
        """The hints of pages, given in path order, have another time to live, which begins now."""
        if self.plan.policy is not None:
            now = self.wall()
            for page in reversed(pages):
                if page in self.plan.policy:
                    self.plan.policy.add((page,), now, page.block.hint)

    def make_up(self, blocks: Sequence[Block], now: float, *, is_saved: bool = False) -> None:
        """Owe what the tier should have had for some time: a write may have failed, or the copy turned out bad."""
        pages = [page for block in blocks for page in block.pages if page.state == PageState.READY]
        self.owe(pages, used=False, is_saved=is_saved)
        self.pump(now)

    def touched(self, flight: InFlight, outcome: Outcome, now: float) -> None:
        """Book the outcome of a TOUCH: pages that are gone (a flushed Redis) are owed again."""
        if outcome.error is not None:
            return
        gone = [page for page, ok in zip(flight.pages, outcome.ok, strict=True) if not ok and page.homes & self.bit]
        self.forget_copies(gone)
        self.owe([page for page in reversed(gone) if page.state == PageState.READY], used=True)
        for page in gone:
            self.catalog.prune(page.block)
        self.pump(now)

    def expire(self) -> None:
        """Delete copies past their deadline, as many as a step may take; `is_late` says whether there may be more.

        One that is still being written goes when it is there.
        """
        if self.plan.policy is not None:
            limit = STEP_BLOCKS + self.in_flight
            expired = self.plan.policy.expired(self.wall(), limit)
            self.is_late = len(expired) == limit
            self._expire(expired)

    def expire_of(self, pages: Sequence[Page], limit: int | None) -> None:
        """Delete the first `limit` of those of `pages` that are past their deadline; all for None."""
        if self.plan.policy is not None:
            self._expire(self.plan.policy.overdue(pages, self.wall(), limit))

    def _expire(self, pages: Sequence[Page]) -> None:
        expired = [page for page in pages if not page.spilling & self.bit]
        if expired:
            self.delete(expired, why=Left.EXPIRED)
            self.counters.expired_pages += len(expired)
        for page in expired:
            self.catalog.prune(page.block)

    def detach(self) -> None:
        """The tier is taken away. What is on its way there fails, or counts for nothing; the rest by `forget_all`."""
        self.is_detached = True
        self.debts.clear()
        self.deletes.drop()

    def forget_all(self, pages: Sequence[Page]) -> None:
        """Forget what a tier that was taken away holds of some pages."""
        self.forget_copies(self.copies(pages), Left.DETACHED)
        for page in pages:
            self.catalog.prune(page.block)

    def attach(self, plan: TierPlan) -> None:
        """The tier is back, perhaps another one; nothing is known of what it holds."""
        self.plan = plan
        self.out, self.is_detached = frozenset(), False

    def retry(self, now: float) -> None:
        """Try again, at once, what failed: somebody wants to know, or the tier is back."""
        self.debts.retry()
        self.deletes.retry()
        self.pump(now)

    def is_settled(self, now: float) -> bool:
        """True if nothing is under way, and nothing is owed or what is owed cannot be paid now."""
        if self.in_flight or self.is_deleting(now):
            return False
        # What is left waits for a delete that cannot be done, or can be written.
        is_ready = self.debts.waiting and not self.deletes.must_clear and not self.is_spent
        return not (is_ready and self.takes(Direction.WRITE))

    def is_deleting(self, now: float) -> bool:
        """True if a delete is under way, or one that is owed can be sent now."""
        deletes = self.deletes
        can_delete = self.takes(Direction.DELETE) and not deletes.is_waiting_in_vain(now)
        return deletes.num_under_way > 0 or (deletes.is_any and can_delete)

    def takes(self, way: Direction) -> bool:
        """True if the tier is there and can be used in this direction."""
        return way not in self.out and not self.is_detached

    @property
    def is_spent(self) -> bool:
        """True if its write budget keeps writes back."""
        return self.budget is not None and self.budget.is_spent

    @property
    def is_up(self) -> bool:
        """True if lookups may count on its pages."""
        return self.takes(Direction.READ)

    def _spill(self, batch: dict[Page, bool]) -> bool:
        """Send a batch, pages with whether a save brought them; what finds no room stays owed, and False returns."""
        now, pages = self.wall(), list(batch)
        evict = self._make_room(len(pages))
        room = len(pages) if self.plan.capacity_pages is None else self.plan.capacity_pages - self.used_pages
        if room < len(pages):
            self.debts.give_back({page: batch[page] for page in pages[max(0, room) :]})
            pages = pages[: max(0, room)]
            if not pages:
                self.deletes.owe(evict)
                self.dropping = ()
                return False
        for page in pages:
            page.spilling |= self.bit
        self.used_pages += len(pages)
        self.in_flight += len(pages)
        if self.budget is not None:
            self.budget.spend(sum([self.page_bytes[page.group] for page in pages]))
        if self.plan.policy is not None:
            # Now, not when the outcome arrives: they come in any order, and the end of the request touches the path.
            begin_life(self.plan.policy, pages, now)
        self.transfers.send(
            Op.SPILL,
            self.plan.name,
            [page.key for page in pages],
            pages,
            priority=Priority.SAVE,
            deadline=float("inf"),
            slots=[page.slot for page in pages],
            metas=[page.block.meta(self.page_bytes[page.group], deadline(now, self._ttl_s(page))) for page in pages],
            evict=evict,
            context=None if all(batch.values()) else frozenset(page for page in pages if not batch[page]),
        )
        self.dropping = ()
        return True

    def _make_room(self, n: int) -> list[PageKey]:
        victims = self._victims(self._excess(n))
        keys = self.dropping = [page.key for page in victims]
        self.forget_copies(victims, Left.EVICTED)
        for page in victims:
            self.catalog.prune(page.block)
        self.counters.evicted_pages += len(victims)
        if self.on_parted is not None:
            self.on_parted(victims)
        if self.plan.exclusive:
            self.owe([page for page in victims if page.state is PageState.READY], used=True, is_saved=True)
        return keys

    def _excess(self, n: int) -> int:
        """How many copies are too many if `n` more come."""
        capacity = self.plan.capacity_pages
        return 0 if capacity is None else max(0, self.used_pages + n - capacity)

    def _victims(self, n: int) -> list[Page]:
        """Up to `n` copies that may leave, the first to go first."""
        if not n or self.plan.policy is None:
            return []
        ranked = self.plan.policy.victims(n + self.in_flight)
        return [page for page in ranked if not page.spilling & self.bit][:n]

    def _ttl_s(self, page: Page) -> float:
        return time_to_live(page.block, self.plan.ttl_s)


def _is_saved(flight: InFlight, page: Page) -> bool:
    """Whether a save brought a page that was sent; a flight remembers those that none did."""
    return not isinstance(flight.context, frozenset) or page not in flight.context

"""Host memory as the planner sees it: slots, who is in them, and who leaves.

Every slot is in one of three states, and `check` holds the sum to the capacity:

    free        in the pool
    filling     a fetch or a save lease writes it
    resident    holds a page: either pinned (held by the policy, no member of it) or a member of the policy

A page under way to a lower tier stays in the policy, so that the order of its path is kept, but is passed over when
victims are taken: its bytes are being read. If it outlives its time to live meanwhile, it leaves the policy and is
EXPIRED: no lookup sees it, and its slot comes free when the tier has read it.

Times to live are counted by a clock that goes on while the machine sleeps and is never set (`Clock.boot`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from eviction.policy import Hint
from eviction.ttl import Ttl
from kvstore.plan.catalog import Catalog
from kvstore.plan.journal import Left
from kvstore.plan.records import HOST, Request
from kvstore.plan.slots import SlotPool
from kvstore.plan.state import NEVER, Block, Page, PageState, name_of
from kvstore.plan.states import refreshed, whole_states
from kvstore.plan.steps import STEP_BLOCKS
from radix.hashing import BlockHash

REUSED = Hint(hits=1)


class HostMemory:
    """Slots of host memory and the order in which their pages leave.

    boot:    clock of times to live, in seconds.
    on_loss: is told of pages that leave against their will, while they are still known.
    on_parted: is told of pages that were evicted, where some are pieces of states; else None.
    """

    def __init__(self, num_slots: int, policy: Ttl[Page], catalog: Catalog, boot: Callable[[], float]) -> None:
        self.pool = SlotPool(num_slots)
        self.policy = policy
        policy.name_by(name_of)
        self.num_resident = 0
        self.num_filling = 0
        self.evicted_pages = 0
        self.expired_pages = 0
        self.stranded_blocks = 0  # that lost their states, or pages before them: they leave next
        self.is_late = False  # pages past their deadline may be left, see `expire`
        self.on_loss: Callable[[Sequence[Page]], None] | None = None
        self.on_parted: Callable[[Sequence[Page]], None] | None = None
        self._catalog = catalog
        self._boot = boot

    def take(self, n: int, path: Sequence[BlockHash] = ()) -> list[int]:
        """Slots for up to `n` pages, evicting pages that nobody holds; fewer when all else is held.

        Blocks of `path`, given root first, do not leave: a prompt larger than the cache would else push out its own
        head, without which its tail is worth nothing.
        """
        slots = self.pool.take(n)
        missing = n - len(slots)
        if missing and self._evict(missing, path):
            slots += self.pool.take(missing)
        return slots

    def take_for(self, pages: Sequence[Page], path: Sequence[BlockHash]) -> list[int]:
        """Give slots to the first of `pages` (absent ones, in the order of their worth): those are FILLING then."""
        for page in pages:
            page.state = PageState.FILLING  # before making room, which prunes blocks that are nowhere
        slots = self.take(len(pages), path)
        for page, slot in zip(pages, slots, strict=False):
            page.slot = slot
        self.num_filling += len(slots)
        for page in pages[len(slots) :]:
            page.state = PageState.ABSENT
        return slots

    def take_worthy(self, pages: Sequence[Page], request: Request) -> list[int]:
        """As `take_for`, for pages that a request brings, up to the first that is worth less than what it pushes out.

        Where the policy has no forecast, all are worth it.
        """
        num_free = self.pool.num_free
        if pages and len(pages) > num_free and self.policy.forecasts:
            victims = self._victims(len(pages) - num_free, request.keys)
            priority = pages[0].block.hint.priority
            num = self.policy.num_worthy(request.id, pages[num_free:], victims, self._boot(), priority)
            pages = pages[: num_free + num]
        return self.take_for(pages, request.keys)

    def ready(self, pages: Sequence[Page]) -> None:
        """The slots of filling pages are whole. The caller pins them or enters them in the policy."""
        for page in pages:
            page.state = PageState.READY
        self.num_filling -= len(pages)
        self.num_resident += len(pages)
        if self._catalog.journal is not None:
            self._catalog.journal.stored(HOST, pages)

    def abandon(self, pages: Sequence[Page]) -> None:
        """Filling pages will not become whole: their slots are free again."""
        self.num_filling -= len(pages)
        self._free(pages)

    def drop(self, pages: Sequence[Page], why: Left = Left.DELETED) -> None:
        """Resident pages that nobody holds leave."""
        if not pages:
            return
        self.policy.discard(pages)
        if self.on_loss is not None and why is not Left.DELETED:
            self.on_loss(pages)
        self.num_resident -= len(pages)
        if self._catalog.journal is not None:
            self._catalog.journal.removed(HOST, pages, why)
        self._free(pages)

    def doom(self, pages: Sequence[Page]) -> None:
        """Pages of forgotten blocks, which are dropped as soon as nobody uses them, are as good as gone."""
        if self._catalog.journal is not None:
            self._catalog.journal.leaving(HOST, pages, Left.DELETED)

    def pin(self, pages: Sequence[Page]) -> None:
        """Hold resident pages."""
        self.policy.hold([page for page in pages if not page.pins])
        for page in pages:
            page.pins += 1

    def unpin(self, pages: Sequence[Page], *, used: bool) -> None:
        """Unpin resident pages, given in path order; those without another holder become evictable again."""
        for page in pages:
            page.pins -= 1
        loose = [page for page in pages if not page.pins]
        gone = [page for page in loose if page.block.is_removed]
        if gone:
            loose = [page for page in loose if not page.block.is_removed]
            self.drop([page for page in gone if not page.spilling])
        self.enter(loose, used=used)

    def enter(self, pages: Sequence[Page], *, used: bool) -> None:
        """Make resident pages, given in path order, known to the policy."""
        now = self._boot()
        # Tail first: a leaf must look older than its parent, so that plain LRU evicts leaves before what they hang on.
        group: list[Page] = []
        hint: Hint | None = None
        for page in reversed(pages):
            if page.block.hint is not hint:
                if group and hint is not None:
                    self.policy.release(group, now, _with_use(hint, used))
                group, hint = [], page.block.hint
            group.append(page)
        if group and hint is not None:
            self.policy.release(group, now, _with_use(hint, used))

    def touch(self, blocks: Sequence[Block]) -> None:
        """Note a use of a path, given root first, at the end of a request; what it brought itself is not used."""
        now = self._boot()
        # What continues a block is not known for longer than the block itself.
        num_known = bisect_left(blocks, True, key=_is_new)
        if num_known < len(blocks):
            self.policy.renew((page for block in reversed(blocks[num_known:]) for page in block.pages), now)
            blocks = blocks[:num_known]
        self.policy.touch(refreshed(blocks, self._catalog), now)

    def shorten(self, pages: Sequence[Page], left_s: float) -> None:
        """Pages, given tail first, live for `left_s` from now at most, until their next use."""
        self.policy.shorten(pages, self._boot(), left_s)

    def expire(self) -> None:
        """Drop pages past their deadline, as many as a step may take; `is_late` says whether there may be more."""
        expired = self.policy.expired(self._boot(), STEP_BLOCKS)
        self.is_late = len(expired) == STEP_BLOCKS
        if expired:
            self._expire(expired)

    def expire_of(self, pages: Sequence[Page], limit: int | None) -> None:
        """Drop the first `limit` of those of `pages` that are past their deadline; all for None."""
        expired = self.policy.overdue(pages, self._boot(), limit)
        if expired:
            self._expire(expired)

    def _expire(self, expired: list[Page]) -> None:
        """Drop pages; those that a tier is reading are EXPIRED until it has done so."""
        self.expired_pages += len(expired)
        reading = [page for page in expired if page.spilling]
        if reading:
            self.policy.discard(reading)
            if self.on_loss is not None:
                self.on_loss(reading)
            for page in reading:
                page.state = PageState.EXPIRED
            if self._catalog.journal is not None:
                self._catalog.journal.leaving(HOST, reading, Left.EXPIRED)
            expired = [page for page in expired if not page.spilling]
        self.drop_expired(expired)

    def drop_expired(self, pages: Sequence[Page]) -> None:
        """Pages past their deadline, which nobody reads, leave."""
        if not pages:
            return
        self.drop(pages, Left.EXPIRED)
        for page in pages:
            self._catalog.prune(page.block)

    def resize(self, num_slots: int) -> None:
        """Use `num_slots` of the slots from now on; by `shrink` pages leave that nobody holds, in time the others."""
        self.pool.resize(num_slots)

    def shrink(self) -> bool:
        """Evict what nobody holds any more as long as slots have to retire; True if there is more than a step takes."""
        wanted = min(self.pool.num_retiring, STEP_BLOCKS)
        return bool(wanted) and self._evict(wanted, ()) and self.pool.num_retiring > 0

    @property
    def num_evictable(self) -> int:
        return len(self.policy)

    def check(self, pages: Iterable[Page]) -> None:
        """Assert conservation of slots and agreement of policy and pins. For tests."""
        resident = filling = 0
        seen: set[int] = set()
        for page in pages:
            if page.state == PageState.ABSENT:
                assert page.slot == -1, "an absent page has a slot"
                assert page.pins == 0, "an absent page is pinned"
                assert page not in self.policy, "an absent page is in the policy"
                continue
            assert page.slot not in seen, f"slot {page.slot} holds two pages"
            seen.add(page.slot)
            if page.state == PageState.EXPIRED:
                resident += 1
                assert page.spilling, "an expired page stays though nobody reads it"
                assert page.pins == 0, "an expired page is pinned"
                assert page not in self.policy, "an expired page is in the policy"
            elif page.state == PageState.READY:
                resident += 1
                if not page.block.is_removed:
                    held = page.pins > 0
                    assert held != (page in self.policy), f"pins {page.pins}, in policy {page in self.policy}"
            else:
                filling += 1
                assert page not in self.policy, "a filling page is in the policy"
        assert (resident, filling) == (self.num_resident, self.num_filling), (
            f"counted {resident} resident and {filling} filling, booked {self.num_resident} and {self.num_filling}"
        )
        total = self.pool.num_free + self.pool.num_retired + self.num_filling + self.num_resident
        assert total == self.pool.num_slots, f"{total} slots accounted for, {self.pool.num_slots} exist"

    def _evict(self, n: int, path: Sequence[BlockHash]) -> bool:
        victims = self._victims(n, path)
        if self.on_parted is not None:
            victims = whole_states(victims, self._catalog.num_groups)
        self.drop(victims, Left.EVICTED)
        for page in victims:
            self._catalog.prune(page.block)
        self.evicted_pages += len(victims)
        if self.on_parted is not None:
            self.on_parted(victims)
        return bool(victims)

    def _victims(self, n: int, path: Sequence[BlockHash]) -> list[Page]:
        ask = n
        while True:
            ranked = self.policy.victims(ask)
            free = [page for page in ranked if not page.spilling and not _is_on(path, page.block)]
            if len(free) >= n or len(ranked) < ask:
                return free[:n]
            ask *= 2  # some of the oldest are being written behind: look further

    def _free(self, pages: Sequence[Page]) -> None:
        self.pool.give([page.slot for page in pages])
        for page in pages:
            page.slot = -1
            page.state = PageState.ABSENT


def _is_new(block: Block) -> bool:
    return block.touched_at == NEVER


def _is_on(path: Sequence[BlockHash], block: Block) -> bool:
    return block.depth < len(path) and path[block.depth] == block.key


def _with_use(hint: Hint, used: bool) -> Hint:
    if not used:
        return hint
    return REUSED if hint == Hint() else hint._replace(hits=max(1, hint.hits))

"""The lower tiers of a planner, as they come and go. Their list is in the books.

A tier has one bit in the page's sets of homes and one place in the list, for ever: a tier that is taken away keeps
both, empty, and gets them back when it returns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.page import PageKey, PageMeta, split_key
from kvstore.plan.books import Books
from kvstore.plan.cost import TierCost
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.state import Block, Page, name_of
from kvstore.plan.states import behind, stranded
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

RESTORE_STEP = 256  # pages; about 5 ms where each costs 20 us


class LowerTiers:
    """Adds lower tiers to the books, and takes them away. Under the store's lock."""

    def __init__(self, books: Books, plans: Sequence[TierPlan]) -> None:
        self._books = books
        self._catalog = books.catalog
        self._catalog.on_prune = self._pruned
        books.host.on_loss = self._lose
        if books.num_groups < len(books.windows):
            books.host.on_parted = self._part_pairs
        for plan in plans:
            self.add(plan)

    def named(self, name: str) -> LowerTier:
        """The tier of that name."""
        return next(tier for tier in self._books.tiers if tier.plan.name == name)

    def add(self, plan: TierPlan) -> bool:
        """A tier is there from now on, or is back; True if its name is new."""
        if plan.policy is not None:
            plan.policy.name_by(name_of)
        known = next((tier for tier in self._books.tiers if tier.plan.name == plan.name), None)
        if known is not None:
            known.attach(plan)
        else:
            books = self._books
            books.tiers.append(
                LowerTier(
                    plan,
                    1 << len(books.tiers),
                    books.settings.batch_pages,
                    books.transfers,
                    books.catalog,
                    books.clock.wall,
                    books.page_bytes,
                    books.host.on_parted,
                )
            )
            books.costs.tiers[plan.name] = TierCost(plan.workers)
        self._count_homes()
        return known is None

    def set_up(self, name: str, is_up: bool, now: float, directions: Collection[Direction] = ALL_DIRECTIONS) -> None:
        """Breakers opened or closed: lookups leave the tier out, or its debts are paid again.

        directions: those that changed; the others stay as they are.
        """
        tier = self.named(name)
        tier.out = tier.out - set(directions) if is_up else tier.out | set(directions)
        if is_up:
            tier.retry(now)
        if not is_up and Direction.READ in directions:
            self._books.transfers.stall(name)

    def detach(self, name: str) -> None:
        """A tier is taken away: what it holds is forgotten, and nobody waits for what is under way there."""
        self.named(name).detach()
        self._books.transfers.stall(name)
        self._count_homes()

    def restoring(self, name: str, stored: Sequence[tuple[PageKey, PageMeta]]) -> Iterator[int]:
        """Book what a tier held when it was opened, least recently used first, RESTORE_STEP pages at a time.

        Each step yields how many pages it took in; between two of them the books are in order.
        """
        tier = self.named(name)
        now = self._books.clock.wall()
        taken: list[Page | None] = [None] * len(stored)
        by_depth = sorted(range(len(stored)), key=lambda i: stored[i][1].depth)
        for start in range(0, len(stored), RESTORE_STEP):
            for index in by_depth[start : start + RESTORE_STEP]:
                taken[index] = self._place(*stored[index])
            yield 0
        for start in range(0, len(stored), RESTORE_STEP):
            num_taken = 0
            for index in range(start, min(start + RESTORE_STEP, len(stored))):
                page, meta = taken[index], stored[index][1]
                if page is not None and not page.block.is_removed:
                    # What is left of its time; the tier itself refuses it after that anyway.
                    tier.learn(page, meta.expires_at - now if meta.expires_at else None)
                    num_taken += 1
            yield num_taken

    def _place(self, key: PageKey, meta: PageMeta) -> Page | None:
        """The page of a stored key, its block made known; None if this layout has no such group."""
        block_key, group, _ = split_key(key)
        if group >= len(self._books.page_bytes):
            return None
        hash_bytes = self._books.settings.hash_bytes
        parent = BlockHash(meta.parent[:hash_bytes]) if meta.depth else None
        block = self._catalog.attach(BlockHash(block_key[:hash_bytes]), parent, meta.depth)
        block.tokens = meta.tokens
        if group >= self._books.num_groups:
            self._catalog.make_states([block])
        return block.pages[group]

    def _lose(self, pages: Sequence[Page]) -> None:
        """Pages leave host memory: what tiers are owed of them is lost."""
        for tier in self._books.tiers:
            if tier.debts:
                tier.debts.lose(pages)
            if tier.plan.exclusive and tier.plan.policy is not None:  # their copies are not the first to leave any more
                tier.plan.policy.promote(tier.copies(pages), tier.wall())

    def _part_pairs(self, pages: Sequence[Page]) -> None:
        """A tier has evicted pages or states: what is worth nothing without them leaves next, everywhere."""
        books = self._books
        num_groups = books.num_groups
        for block, is_state in dict.fromkeys((page.block, page.group >= num_groups) for page in pages):
            idle = stranded(self._catalog, block) if is_state else behind(self._catalog, block)
            if idle:
                books.host.stranded_blocks += len(idle)
                pages = [page for block in reversed(idle) for page in reversed(block.pages)]
                for _, policy in books.policies():
                    policy.demote([page for page in pages if page in policy])

    def _pruned(self, block: Block) -> None:
        """The catalog forgets a block; tiers that are not indexed may well still have it."""
        for tier in self._books.tiers:
            tier.forget_copies(tier.copies(block.pages), None)

    def _count_homes(self) -> None:
        self._catalog.homes_that_count = sum(
            t.bit for t in self._books.tiers if t.plan.is_indexed and not t.is_detached
        )

"""Demotions: pages that give their host memory to others as soon as a tier below has them (Demote of a hint).

A page that is written already leaves at once. The others are owed to every tier that takes writes, are the next victims
meanwhile, and leave when their write has ended. Where no tier takes them in time they stay, as the next victims. What
anybody holds, by a lease or a word, is passed over: it is in use.

Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from kvstore.direction import Direction
from kvstore.plan.books import Books
from kvstore.plan.journal import Left
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES

PATIENCE_S = 60.0  # for a page to be written; a guess: a tier that is back within a minute is asked


class Demoted(NamedTuple):
    """What became of pages: gone from host memory, leaving, and held by somebody."""

    num_gone: int
    num_leaving: int
    num_held: int


class Demotions:
    """leaving: pages that leave when they are written, until a time of the planner's clock; after it they stay."""

    def __init__(self, books: Books) -> None:
        self.leaving: dict[Page, float] = {}
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers

    def demote(self, blocks: Sequence[Block], now: float) -> Demoted:
        """Demote the resident pages of blocks, given in path order."""
        resident = [page for block in blocks for page in block.pages if page.state is PageState.READY]
        loose = [page for page in resident if not page.pins]
        gone = [page for page in loose if self._is_safe(page)]
        self._drop(gone)
        left = [page for page in loose if page.state is PageState.READY]
        leaving: list[Page] = []
        takers = [tier for tier in self._tiers if tier.takes(Direction.WRITE)]
        if takers:
            leaving = left
            for page in left:
                self.leaving.pop(page, None)  # the order is that of their times
                self.leaving[page] = now + PATIENCE_S
        self._host.policy.demote(reversed(left))
        for tier in takers:
            tier.owe(left, used=True)
            tier.debts.hurry(left)
            tier.pump(now)
        return Demoted(len(gone), len(leaving), len(resident) - len(loose))

    def written(self, pages: Sequence[Page]) -> None:
        """Writes of pages have ended, well or badly."""
        found = [page for page in pages if page in self.leaving and self._is_safe(page)]
        self._drop([page for page in found if not page.pins])
        for page in found:
            self.leaving.pop(page, None)  # one that is in use again stays

    def tick(self, now: float) -> None:
        """Forget pages that no tier has taken in time."""
        for page in list(takewhile(lambda page: self.leaving[page] <= now, islice(self.leaving, STEP_PAGES))):
            del self.leaving[page]

    def rebuild(self) -> None:
        """Put right what an exception in the middle of another call has left."""
        self.leaving = {page: until for page, until in self.leaving.items() if page.state is PageState.READY}

    def _is_safe(self, page: Page) -> bool:
        """True if a tier that is up has the page, and none is to get it still."""
        if page.state is not PageState.READY or page.spilling or page.block.is_removed:
            return False
        return any(tier.is_up and tier.has(page) for tier in self._tiers) and not any(
            tier.takes(Direction.WRITE) and _is_owed(tier, page) for tier in self._tiers
        )

    def _drop(self, pages: Sequence[Page]) -> None:
        self._host.drop(pages, Left.EVICTED)
        self._host.evicted_pages += len(pages)
        for page in reversed(pages):
            self._catalog.prune(page.block)


def _is_owed(tier: LowerTier, page: Page) -> bool:
    return page in tier.debts.waiting.pages or page in tier.debts.held.pages

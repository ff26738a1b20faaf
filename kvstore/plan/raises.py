"""Raises: blocks that have a higher priority for a time (Retain of a hint).

A raise holds no memory. Pages of a raised block leave after all others, in every tier that has an order of ours, until
the raise ends; then the block has the priority that its requests gave it, and is as recent as if it had been used at
that moment. Times to live are not touched. Raised blocks have a budget, the share of the slots that pins may keep: were
everything raised, nothing would be.

Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from kvstore.plan.books import Books
from kvstore.plan.ends import Ends
from kvstore.plan.state import Block
from kvstore.plan.steps import STEP_PAGES

LEVEL = 25  # priorities 1 to 100 are four levels: each priority in use is an order of its own, which every use asks


@dataclass(slots=True)
class _Raise:
    """until: by the boot clock. own: the priority that the block had, and is given back."""

    until: float
    level: int
    own: int
    payer: str
    session: str


class Raises:
    """All blocks that are raised, and until when."""

    def __init__(self, books: Books) -> None:
        self._host = books.host
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._clock = books.clock
        self._num_groups = max(1, books.num_groups)
        self._budget = books.settings.max_pinned_fraction
        self._payer_budget = books.settings.max_payer_fraction
        self._longest_s = books.settings.pin_max_s
        self._raised: dict[Block, _Raise] = {}
        self._payers: dict[str, int] = {}  # blocks raised
        self._ends = Ends(self._until_of)
        self._is_watching = False

    def lift(
        self, blocks: Sequence[Block], priority: int, ttl_s: float, *, payer: str = "", session: str = ""
    ) -> tuple[int, float]:
        """Raise blocks, given in path order, for a time; returns how many are raised now, and until when.

        priority: 1 to 100. A block that is raised already keeps the higher level, and the later end.
        """
        until = self._clock.boot() + min(ttl_s, self._longest_s)
        level = -(-priority // LEVEL)
        if not self._is_watching:
            self._watch()
        changed: list[Block] = []
        num_raised = 0
        for block in blocks:
            known = self._raised.get(block)
            if known is None:
                if not self._room(payer):
                    break
                self._raised[block] = known = _Raise(-inf, level, block.hint.priority, payer, session)
                self._pay(payer, 1)
            num_raised += 1
            known.level = max(known.level, level)
            if until > known.until:
                known.until, known.session = until, session
                self._note_end(block, until)
            if block.hint.priority < known.level:
                block.hint = block.hint._replace(priority=known.level)
                changed.append(block)
        self._rank(changed)
        return num_raised, until

    def let_go(self, blocks: Sequence[Block], session: str = "") -> int:
        """End the raises of blocks given in path order; returns how many had one.

        session: those of that session only; "" all.
        """
        changed: list[Block] = []
        num_ended = 0
        for block in blocks:
            known = self._raised.get(block)
            if known is None or (session and known.session != session):
                continue
            # First, so that an interrupt leaves no block raised without an end.
            if not block.is_removed and block.hint.priority == known.level:
                block.hint = block.hint._replace(priority=known.own)
                changed.append(block)
            del self._raised[block]
            self._pay(known.payer, -1)
            num_ended += 1
        self._rank(changed)
        return num_ended

    def expire(self) -> bool:
        """End raises whose time is over; True if there may be more of them than a step takes."""
        if not self._raised:
            return False
        over = self._ends.over(self._clock.boot(), STEP_PAGES)
        if over:
            over.sort(key=lambda block: block.depth)
            self.let_go(over)
        return len(over) == STEP_PAGES

    def rebuild(self) -> None:
        """Put right what an exception in the middle of another call has left."""
        self._raised = {block: known for block, known in self._raised.items() if not block.is_removed}
        self._payers = {}
        for block, known in self._raised.items():
            self._pay(known.payer, 1)
            known.until = max(known.until, self._clock.boot())  # one that was being made ends at once
            if block.hint.priority < known.level:
                block.hint = block.hint._replace(priority=known.level)
        self._ends.rebuild(self._raised)

    def check(self) -> None:
        """Assert that the books agree. For tests."""
        assert sum(self._payers.values()) == len(self._raised), f"{len(self._raised)} blocks, {self._payers}"
        assert len(self._raised) <= self._host.pool.num_slots, "more is raised than could be here"
        latest = self._clock.boot() + self._longest_s
        for block, known in self._raised.items():
            assert not block.is_removed, "a block that is forgotten is raised"
            assert block.hint.priority >= known.level, "a raised block has a low priority"
            assert known.until <= latest, "a raise has no end"

    def __len__(self) -> int:
        return len(self._raised)

    def _room(self, payer: str) -> bool:
        num_slots = self._host.pool.num_in_use // self._num_groups
        is_free = len(self._raised) < int(self._budget * num_slots)
        return is_free and (not payer or self._payers.get(payer, 0) < int(self._payer_budget * num_slots))

    def _pay(self, payer: str, num_blocks: int) -> None:
        paid = self._payers.get(payer, 0) + num_blocks
        self._payers[payer] = paid
        if not paid:
            del self._payers[payer]

    def _watch(self) -> None:
        """Hear of blocks that are forgotten as long as any is raised: evictions of others need not ask."""
        inner, self._is_watching = self._catalog.on_prune, True

        def pruned(block: Block) -> None:
            inner(block)
            if block in self._raised:
                self.let_go((block,))
            if not self._raised:
                self._catalog.on_prune, self._is_watching = inner, False

        self._catalog.on_prune = pruned

    def _rank(self, blocks: Sequence[Block]) -> None:
        """Tell every order that we keep of the priorities that blocks have now. Tail first, as of any use."""
        now, wall = self._clock.boot(), self._clock.wall()
        for block in reversed(blocks):
            self._host.policy.rank(block.pages, now, block.hint)
            for tier in self._tiers:
                if tier.plan.policy is not None:
                    tier.plan.policy.rank(block.pages, wall, block.hint)

    def _until_of(self, block: Block) -> float:
        known = self._raised.get(block)
        return -inf if known is None else known.until

    def _note_end(self, block: Block, until: float) -> None:
        if self._ends.is_bloated(len(self._raised)):
            self._ends.rebuild(self._raised)
        else:
            self._ends.note(block, until)

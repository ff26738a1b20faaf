"""An engine without bytes: it plays requests on a planner under a clock of its own.

The planner and the policies are those of a server. What an engine computes and what lanes carry is done at once, so a
day of traffic is played in seconds: a trace (replay.py), or made-up prompts (workloads/planner.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from eviction.ttl import Ttl
from kvstore.clock import Clock
from kvstore.lab.shared_tier import SharedTier
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.planner import Planner
from kvstore.plan.records import Match, Op, Outcome, PlanSettings, Request, RequestOptions
from kvstore.plan.state import Page, PageState
from kvstore.plan.tier_plan import TierPlan
from radix.namespace import BlockHash

PAGE_BYTES = 4096  # nothing is stored; a layout must have a size
CARRIED_IN_S = 0.001  # a batch, as lanes are said to take
TICK_S = 0.05  # between two looks of a store's housekeeper


class VirtualEngine:
    """One engine, and the planner of its store.

    now:         seconds, as all of the planner's clocks tell it; the caller moves it, never back.
    num_fetched: pages brought from lower tiers.
    """

    def __init__(
        self,
        block_size: int,
        settings: PlanSettings,
        policy: Ttl[Page],
        tiers: Sequence[TierPlan] = (),
        shared: SharedTier | None = None,
    ) -> None:
        """Make an empty store: host memory of `settings.num_slots` blocks and, below it, the tiers that are given.

        shared: what answers for those of the tiers that are shared with other engines.
        """
        layout = Layout(block_size, (LayerGroup(GroupKind.FULL, (0,), PAGE_BYTES),), "virtual", "uint8")
        self.now = 0.0
        clock = Clock(wall=self._time, steady=self._time, boot=self._time)
        self.planner = Planner(layout, settings, policy, tiers, clock)
        self.num_fetched = 0
        self._shared = shared
        self._ids = count(1)

    def request(self, keys: Sequence[BlockHash], options: RequestOptions | None = None) -> Request:
        """Return a new request for a prompt of these blocks."""
        # One token more than the blocks hold: an engine has to compute at least one.
        num_tokens = len(keys) * self.planner.books.layout.block_size + 1
        return Request(next(self._ids), list(keys), num_tokens, options or RequestOptions())

    def num_stored(self, keys: Sequence[BlockHash]) -> int:
        """Return how many leading blocks of a prompt the store has; asking is no use of them."""
        request = self.request(keys)
        match = self.planner.lookup(request, self.now)
        self.planner.abandon(request, self.now)
        return match.num_blocks

    def num_in_host(self, keys: Sequence[BlockHash]) -> int:
        """Return how many leading blocks of a prompt are whole in host memory, without a lookup."""
        get = self.planner.books.catalog.tree.get
        for number, key in enumerate(keys):
            block = get(key)
            if block is None or any(page.state != PageState.READY for page in block.pages):
                return number
        return len(keys)

    def serve(self, request: Request, finish_reason: str = "", reply_tokens: int = -1) -> Match:
        """Look up, load what matches, save the rest, finish; return the match."""
        planner, now = self.planner, self.now
        match = planner.lookup(request, now)
        if match.pending:  # a shared tier has been asked
            self.carry()
            match = planner.lookup(request, now)
        if match.num_blocks:
            lease = planner.prepare_load(request, match.num_blocks, now)
            self.carry()  # pages of lower tiers
            planner.complete(lease.id, now)
        planner.complete(planner.prepare_save(request, match.num_blocks, len(request.keys), now).id, now)
        planner.finished(request, now, finish_reason=finish_reason, reply_tokens=reply_tokens)
        self.carry()
        return match

    def run_until(self, at: float) -> None:
        """Let time pass, with the ticks in which speculation has something to do."""
        speculation = self.planner.speculation
        while speculation is not None:
            due = max(speculation.due_at(self.now), self.now + TICK_S)
            if due >= at:
                break
            self.now = due
            self.planner.tick(due)
            self.carry()
        self.now = at

    def carry(self) -> None:
        """Answer every transfer at once, as a lane would in time."""
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                num_pages = len(transfer.keys)
                if transfer.op is Op.FETCH:
                    self.num_fetched += num_pages
                ok = (True,) * num_pages
                if self._shared is not None:
                    ok = self._shared.answer(transfer, self.now)
                outcome = Outcome(transfer.id, ok, CARRIED_IN_S, PAGE_BYTES * num_pages)
                self.planner.outcome(outcome, self.now)

    def _time(self) -> float:
        return self.now

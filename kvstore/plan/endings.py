"""The consequences of the end of a lease or of a request.

    a save ends       its pages are published: written behind, kept as its request asked; others may have waited
    a load ends       its pages were used: tiers that admit on second use get them; the time that was saved is booked
    a request ends    its path becomes the most recent one in every tier, or the first to go

The hard thing: a request ends while its last pages are still being copied. They join their path when they are
published, so the path is refreshed once more then, and until then others go on waiting for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.plan.cost import CostModel
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import Request
from kvstore.plan.retention import Retention
from kvstore.plan.saves import Saver
from kvstore.plan.single_flight import Turns
from kvstore.plan.state import Load, PageState, Save
from kvstore.plan.steps import STEP_PAGES, Steps, parts

MAX_REASONS = 16


class Endings:
    """Tells of ends. Under the store's lock.

    seconds_saved:  by loading instead of computing, in all loads so far.
    finish_reasons: how many requests ended with each; it predicts whether a turn follows (tool calls nearly always
                    bring one), for policies to come. Callers choose the words: those after MAX_REASONS are "other".
    tiers:          the planner's own list, which may grow.
    """

    def __init__(
        self,
        block_size: int,
        tiers: Sequence[LowerTier],
        costs: CostModel,
        scout: Scout,
        loader: Loader,
        saver: Saver,
        turns: Turns,
        retention: Retention,
    ) -> None:
        self.seconds_saved = 0.0
        self.finish_reasons: dict[str, int] = {}
        self._block_size = block_size
        self._tiers = tiers
        self._costs = costs
        self._scout = scout
        self._loader = loader
        self._saver = saver
        self._turns = turns
        self._retention = retention
        self._finishing: set[int] = set()  # requests that ended while they were being saved

    def saving(self, save: Save, now: float) -> Steps[None]:
        """Carry on with the end of a save (see `Saver.close`) until it is over."""
        saver = self._saver
        while save.num_published < save.num_pages:
            self._publish(save, now)
            if save.num_pages > STEP_PAGES:
                yield
                if save.id not in saver.saves:
                    return  # somebody else has carried it on
        while not saver.let_go(save):
            yield
            if save.id not in saver.saves:
                return
        request = save.request
        if save.num_whole < save.num_pages:
            self._turns.end(request, now)
        for tier in self._tiers:
            tier.pump(now)
        if request.id in self._finishing:
            if not saver.is_saving(request):
                self._finishing.discard(request.id)
                self._turns.end(request, now)
            yield from self._retention.using(self._scout.known_path(request), request, now)

    def _publish(self, save: Save, now: float) -> None:
        request = save.request
        whole = self._saver.publish(save)
        blocks = list(dict.fromkeys(page.block for page in whole))
        self._retention.note_session(blocks, request)
        self._retention.promise(blocks, request)
        self._turns.published((block.key for block in blocks), now)
        for tier in self._tiers:
            tier.owe(whole, used=False, is_saved=True)
            tier.pump(now)

    def loaded(self, load: Load, now: float) -> None:
        """A load ends, and its pages were used."""
        for page in reversed(load.pages):
            if page.state == PageState.READY and page not in load.lost:
                page.block.num_loads += 1
                page.block.loaded_at = now
                break
        rate = self._costs.prefill_tokens_per_s
        if rate and not load.lost:
            computing = load.num_blocks * self._block_size / rate
            self.seconds_saved += computing - max(0.0, load.ready_at - load.started_at)

    def loading(self, load: Load, now: float) -> Steps[None]:
        """Carry on with the end of a load (see `Loader.close`) until it is over."""
        loads = self._loader.loads
        choosy = [tier for tier in self._tiers if tier.plan.admit == "second_use"] if load.is_used else []
        while choosy and load.num_owed < len(load.pages):
            pages = load.pages[load.num_owed : load.num_owed + STEP_PAGES]
            load.num_owed += len(pages)
            used = [page for page in pages if page.state == PageState.READY and page not in load.lost]
            for tier in choosy:
                tier.owe(used, used=True)
                tier.pump(now)
            if load.num_owed < len(load.pages):
                yield
                if load.id not in loads:
                    return
        while not self._loader.let_go(load):
            yield
            if load.id not in loads:
                return

    def finished(self, request: Request, now: float, finish_reason: str, *, last_turn: bool) -> Steps[None]:
        """A request is over; with `last_turn` its private part goes first."""
        if finish_reason:
            if finish_reason not in self.finish_reasons and len(self.finish_reasons) >= MAX_REASONS:
                finish_reason = "other"
            self.finish_reasons[finish_reason] = self.finish_reasons.get(finish_reason, 0) + 1
        self._scout.end(request)
        if self._saver.is_saving(request):
            self._finishing.add(request.id)
        else:
            self._turns.end(request, now)
        path = self._scout.known_path(request)
        yield from self._retention.using(path, request, now)
        if request.options.pin or request.options.retain_until:
            for part in parts(path):
                if part is not path:
                    yield
                self._retention.promise(part, request)
        if last_turn:
            for part in parts(path):  # what comes last is the first to go
                if part is not path:
                    yield
                self._retention.let_go_first(part, request)

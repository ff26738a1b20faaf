"""Asking shared tiers what they have of a prompt, since a catalog of what others write would be wrong.

A lookup asks each shared tier once per request about what is not known to be here, in one round trip; the answer is
kept with the request until that is over. A request that waits for another one to compute asks again.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.page import page_key
from kvstore.plan.books import Books
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.match import ABSENT, FIRST_LOWER, Probe, RequestState, Survey, loadable_blocks
from kvstore.plan.records import Op, Outcome, Priority, Request
from kvstore.plan.resume import longest_resume, needed_from
from kvstore.plan.state import Page, PageState
from kvstore.plan.transfers import InFlight


class Probes:
    """Questions to shared tiers and their answers. Under the store's lock."""

    def __init__(self, books: Books) -> None:
        self.counters = {tier.plan.name: 0 for tier in books.tiers}
        self._deadline_s = books.settings.lookup_deadline_s
        self._catalog = books.catalog
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._windows = books.windows
        # Of a state its first piece is asked for only: the others were written with it; a load shows if one is gone.
        self.num_asked = min(books.num_groups + 1, len(books.windows))
        self._num_groups = books.num_groups
        self._block_size = books.layout.block_size

    def ask(self, state: RequestState, survey: Survey, now: float) -> bool:
        """Ask about what is missing and was not asked before; True while an answer is outstanding."""
        limit = loadable_blocks(state.request, self._block_size)
        first = self._first_missing(survey, limit)
        pending = False
        for index, tier in enumerate(self._tiers):
            if not (tier.is_up and tier.plan.is_shared):
                continue
            probe = state.probes.get(index)
            if (probe is None or probe.end < limit) and first < limit:
                probe = state.probes[index] = Probe(first, limit, [False] * ((limit - first) * self.num_asked))
                self._send(state.request, index, probe, first, limit, now)
            pending = pending or (probe is not None and probe.transfer_id != 0)
        return pending

    def ask_again(self, state: RequestState, first: int, end: int, now: float) -> bool:
        """Ask once more about blocks [first, end): others may have written them since. False if nobody is asked."""
        asked = False
        for index, probe in state.probes.items():
            tier = self._tiers[index]
            start, stop = max(first, probe.first), min(end, probe.end)
            if tier.is_up and tier.plan.is_shared and not probe.transfer_id and start < stop:
                self._send(state.request, index, probe, start, stop, now)
                asked = True
        return asked

    def answered(self, state: RequestState | None, flight: InFlight, outcome: Outcome) -> None:
        """Book the outcome of a PROBE. A tier that did not answer has nothing, as far as this request is concerned."""
        assert isinstance(flight.context, tuple)
        _, index, first = flight.context
        probe = None if state is None else state.probes.get(index)
        if state is None or probe is None or probe.transfer_id != flight.transfer.id:
            return
        probe.transfer_id, probe.has_failed = 0, outcome.error is not None
        if outcome.error is None:
            # A probe may overtake a delete: what is leaving is not there any more.
            deletes, answer = self._tiers[index].deletes, list(outcome.ok)
            if deletes.is_any:
                keys = flight.transfer.keys
                answer = [ok and not deletes.holds(key) for key, ok in zip(keys, outcome.ok, strict=True)]
            at = (first - probe.first) * self.num_asked
            probe.answer[at : at + len(answer)] = answer
            self._unlearn(self._tiers[index], state.request, first, answer)

    def missed(self, state: RequestState | None, tier: LowerTier, page: Page) -> None:
        """A tier did not give a page to a request: for that one it has it no more, whatever it answered."""
        index = self._tiers.index(tier)
        probe = None if state is None else state.probes.get(index)
        if probe is not None and probe.first <= page.block.depth < probe.end:
            # Without one of its pieces a state is none.
            at = (page.block.depth - probe.first) * self.num_asked + min(page.group, self.num_asked - 1)
            probe.answer[at] = False

    def overlay(self, survey: Survey, state: RequestState, limit: int) -> None:
        """Enter what probes answered where the catalog knows nothing better."""
        num_asked, last = self.num_asked, self.num_asked - 1
        for index, probe in state.probes.items():
            if True not in probe.answer or not self._tiers[index].is_up:
                continue
            code = FIRST_LOWER + index
            end = min(probe.end, limit)
            there: list[int] = []
            for group, column in enumerate(survey.sources):
                if len(column) < end:
                    column.extend([ABSENT] * (end - len(column)))
                if group <= last:
                    answer = probe.answer[group : (end - probe.first) * num_asked : num_asked]
                    there = [block for block, is_there in enumerate(answer, probe.first) if is_there]
                for block in there:
                    if column[block] == ABSENT:
                        pages = survey.blocks[block].pages if block < len(survey.blocks) else ()
                        if group >= len(pages) or pages[group].state == PageState.ABSENT:
                            column[block] = code

    def _send(self, request: Request, index: int, probe: Probe, first: int, end: int, now: float) -> None:
        tier = self._tiers[index].plan.name
        keys = [page_key(key, group) for key in request.keys[first:end] for group in range(self.num_asked)]
        deadline = now + self._deadline_s
        context = (request, index, first)
        transfer = self._transfers.send(
            Op.PROBE, tier, keys, priority=Priority.LOAD, deadline=deadline, context=context
        )
        probe.transfer_id = transfer.id
        self.counters[tier] += 1

    def _first_missing(self, survey: Survey, limit: int) -> int:
        if None not in self._windows or self.num_asked > self._num_groups:
            # Nothing but windows, or states: any later resume point may be there, with what it needs.
            return survey.known
        full = longest_resume(
            [column for column, window in zip(survey.sources, self._windows, strict=True) if window is None],
            [None for window in self._windows if window is None],
            limit,
        )
        first = full
        for column, window in zip(survey.sources, self._windows, strict=True):
            if window is not None:
                start = needed_from(full, window)
                first = min(first, next((b for b in range(start, full) if b >= len(column) or not column[b]), full))
        return first

    def _unlearn(self, tier: LowerTier, request: Request, first: int, answer: Sequence[bool]) -> None:
        """Forget copies that the catalog believed in and the tier no longer has."""
        num_asked = self.num_asked
        blocks = self._catalog.match(request.keys[: first + len(answer) // num_asked])
        for block in reversed(blocks[first:]):
            for group, page in enumerate(block.pages):
                there = answer[(block.depth - first) * num_asked + min(group, num_asked - 1)]
                if not there and tier.has(page) and not page.flight and not page.spilling & tier.bit:
                    tier.forget_copies((page,))
            self._catalog.prune(block)

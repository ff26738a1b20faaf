"""Single flight of computing: of requests that miss the same blocks, one computes them and the others wait for it.

Asked at the end of a lookup, for requests that want it (`RequestOptions.single_flight`). Is the next missing step ...

    computed by nobody?                     it is this request's turn: it claims that step and what follows it
    computed by another of this store?      wait
    computed by a machine that shares       wait, and ask that tier again every POLL_S
    a tier with us?

A wait is over when the blocks are stored, when who computes them gives up or dies, or when it has shown no progress for
longer than computing them here would take. Then the waiting request looks further: the next missing step may be its own
to compute, so two prompts with a common head wait for the head and never for each other's tails.

The hard thing: no request waits while others wait for what it computes. A request that was granted its claim never
waits again, and one that waits holds claims only on steps that it cannot compute before its wait is over. So waiting
never goes in circles.

On shared tiers a claim is a key with a short life, made when a lookup has missed there; a hit costs nothing more. A
tier that fails knows of no claims: then each machine computes for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvstore.direction import Direction
from kvstore.page import page_key
from kvstore.plan.books import Books
from kvstore.plan.claims import Claim, Claims
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.match import loadable_blocks
from kvstore.plan.records import CutReason, Match, Op, Outcome, Priority, Request
from kvstore.plan.transfers import InFlight
from radix.hashing import BlockHash

POLL_S = 0.1  # a fraction of a chunk's computing, and ten small questions a second
POLL_BLOCKS = 64  # asked about at first; all the rest once these are there
# Waiting this many times as long as computing would take: saving takes time too, and who computes may share its cores.
PATIENCE = 2.0
MIN_PATIENCE_S = 0.2  # shorter is not computing but a save, a message and a tick of the housekeeper (a guess)
MAX_WAITS = 16_384  # of callers who never say that they have gone


@dataclass(slots=True)
class ComputeWait:
    """A request that waits for another one to compute.

    known:       blocks that were stored when it last looked.
    progress_at: when that had grown last.
    until:       when it goes on by itself.
    poll_at:     when shared tiers are asked again; inf while there is no reason to.
    polled_to:   up to which block they were asked.
    is_fresh:    they were asked since who computed in this store has gone.
    """

    began: float
    known: int
    progress_at: float
    until: float = float("inf")
    poll_at: float = float("inf")
    polled_to: int = 0
    is_fresh: bool = False
    was_told: bool = False


class SingleFlight:
    """Whose turn it is to compute. Under the store's lock."""

    def __init__(self, books: Books, lookups: PrefixLookup) -> None:
        self.claims = Claims(books.settings.compute_wait_s)
        self.counters = {"compute_claims": 0, "compute_waits": 0, "compute_waits_given_up": 0}
        self.seconds_waited = 0.0
        # How long a claim lives, and a request waits, without progress; 0 turns all of this off.
        self._lease_s = books.settings.compute_wait_s
        self._deadline_s = books.settings.lookup_deadline_s
        self._claimer = books.settings.claimer
        self._block_size = books.layout.block_size
        self._tiers = books.tiers
        self._transfers = books.transfers
        self._costs = books.costs
        self._lookups = lookups
        self._waits: dict[int, tuple[Request, ComputeWait]] = {}

    def judge(self, request: Request, match: Match, now: float) -> Match:
        """The match, pending if what comes after it is being computed elsewhere; else the request has its turn."""
        if not (request.options.single_flight and self._lease_s):
            return match
        _, wait = self._waits.get(request.id, (request, None))
        if match.pending:  # shared tiers have not answered
            return self._computing(match) if wait is not None and now < wait.until else match
        claim = self.claims.of(request)
        if claim is not None and claim.is_granted:
            return self._go_on(request, match, now)
        steps, wanted = self._missing_steps(request, match)
        if not wanted or match.cut is CutReason.NOT_WORTH:
            found = self._go_on(request, match, now)
            self.end(request, now)
            if steps and not wanted:  # it computes the last step all the same, for the last token
                self._grant(self.claims.make(request, steps, now))
            return found
        if claim is not None:
            # Who waits for steps that turned out to be stored shall look for them.
            self.claims.published(claim.steps.keys() - set(steps), now)
        holder = self.claims.holder(steps[0])
        if holder is not None and holder is not claim:
            common = next(
                (i for i, step in enumerate(steps[:wanted]) if self.claims.holder(step) is not holder), wanted
            )
            return self._wait(request, match, steps, common, now, holder)
        if claim is None or holder is None:
            if wait is not None and not wait.is_fresh:
                # It has gone without our seeing the blocks: a machine that waited here may have found them elsewhere.
                wait.is_fresh = True
                if self._lookups.ask_again(request, match.known, len(request.keys), now):
                    return self._computing(match)
            claim = self.claims.make(request, steps, now)
        return self._ask_turn(request, match, claim, steps, wanted, now)

    def answered(self, flight: InFlight, outcome: Outcome, now: float) -> None:
        """Book the outcome of a CLAIM."""
        claim = flight.context
        assert isinstance(claim, Claim)
        if claim.asked != flight.transfer.id:
            return
        claim.asked = 0
        is_ours = outcome.error is None and outcome.ok[0]
        claim.tier = flight.transfer.tier if is_ours else claim.tier
        if self.claims.of(claim.request) is not claim:
            self._unclaim(claim, now)
        elif outcome.error is None and not is_ours and not claim.is_granted:
            claim.is_refused = True
        else:
            self._grant(claim)

    def published(self, blocks: Iterable[BlockHash], now: float) -> None:
        """Blocks are stored in this store now."""
        if not self.claims.by_step:
            return
        for claim in self.claims.published(blocks, now):
            if not claim.steps:
                self.claims.end(claim.request)
            elif claim.tier and not claim.asked and now > claim.renewed_at + self._lease_s / 3:
                self._say_claim(claim, claim.tier, now)

    def end(self, request: Request, now: float) -> bool:
        """The request computes nothing more, or nothing that can be saved; True if it had a claim."""
        self._waits.pop(request.id, None)
        claim = self.claims.end(request)
        if claim is not None and not claim.asked:
            self._unclaim(claim, now)
        return claim is not None

    def tick(self, now: float) -> bool:
        """Do what only time makes due; True if somebody who waits should look again."""
        is_due = False
        for claim in self.claims.expired(now):
            self.claims.end(claim.request)
            is_due = True
        for request, wait in list(self._waits.values()):
            if now >= wait.until:
                is_due = is_due or not wait.was_told
                wait.was_told = True
                if now >= wait.until + self._lease_s:
                    del self._waits[request.id]  # nobody looks any more
            elif now >= wait.poll_at:
                is_due = not self._poll(request, wait, now) or is_due
        return is_due

    def _missing_steps(self, request: Request, match: Match) -> tuple[list[BlockHash], int]:
        """The names of the steps neither stored nor held, and how many of them the request's lookup could match."""
        size = request.options.step_blocks
        first = max(match.known, request.held) // size
        steps = request.keys[(first + 1) * size - 1 :: size]
        return steps, max(0, loadable_blocks(request, self._block_size) // size - first)

    def _ask_turn(
        self, request: Request, match: Match, claim: Claim, steps: Sequence[BlockHash], wanted: int, now: float
    ) -> Match:
        """The claim is free here; is it elsewhere?"""
        _, wait = self._waits.get(request.id, (request, None))
        tier = next((tier for tier in self._tiers if tier.plan.can_claim and tier.takes(Direction.CLAIM)), None)
        if tier is None:
            self._grant(claim)
        elif not (claim.is_refused or claim.asked):
            if wait is not None and match.known >= wait.polled_to > 0:
                wait.polled_to = len(request.keys)
                if self._lookups.ask_again(request, match.known, len(request.keys), now):
                    return self._computing(match)
            self._say_claim(claim, tier.plan.name, now)
        if claim.is_granted:
            return self._go_on(request, match, now)
        if claim.is_refused:
            return self._wait(request, match, steps, wanted, now)
        return replace(match, pending=True) if wait is None else self._computing(match)

    def _wait(
        self,
        request: Request,
        match: Match,
        steps: Sequence[BlockHash],
        num_steps: int,
        now: float,
        holder: Claim | None = None,
    ) -> Match:
        """Wait for `num_steps` steps, unless it has been too long. holder: None on another machine."""
        _, wait = self._waits.get(request.id, (request, None))
        if wait is None:
            while len(self._waits) >= MAX_WAITS:
                del self._waits[next(iter(self._waits))]
            wait = ComputeWait(now, match.known, now)
            self._waits[request.id] = (request, wait)
            self.counters["compute_waits"] += 1
        if match.known > wait.known:
            wait.known, wait.progress_at = match.known, now
        patience_s = self._patience_s(num_steps * request.options.step_blocks * self._block_size)
        if holder is None:
            wait.until = wait.progress_at + patience_s
            wait.poll_at = min(wait.poll_at, now + POLL_S)
        else:
            wait.until = max(wait.progress_at, holder.progress_at) + patience_s
            wait.until = min(wait.until, self.claims.expires_at(holder))
            wait.poll_at, wait.is_fresh = float("inf"), False
        wait.was_told = now >= wait.until
        if now < wait.until:
            return self._computing(match)
        # Others that wait for the same blocks wait for this request from now on, and do not all compute.
        self.counters["compute_waits_given_up"] += 1
        self._grant(self.claims.make(request, steps, now, take_over=True))
        return self._go_on(request, match, now)

    def _poll(self, request: Request, wait: ComputeWait, now: float) -> bool:
        """Ask shared tiers whether there is more by now; its next look asks for the turn. False if there is no tier."""
        wait.poll_at = float("inf")
        wait.polled_to = min(wait.known + POLL_BLOCKS, len(request.keys))
        claim = self.claims.of(request)
        if claim is not None:
            claim.is_refused = False
        return self._lookups.ask_again(request, wait.known, wait.polled_to, now)

    def _patience_s(self, num_tokens: int) -> float:
        rate = self._costs.prefill_tokens_per_s
        return self._lease_s if not rate else min(self._lease_s, max(MIN_PATIENCE_S, PATIENCE * num_tokens / rate))

    def _say_claim(self, claim: Claim, tier: str, now: float) -> None:
        """Claim on a shared tier what is left of a claim, or renew it there."""
        transfer = self._transfers.send(
            Op.CLAIM,
            tier,
            [page_key(step, 0) for step in claim.steps],
            priority=Priority.LOAD,
            deadline=now + self._deadline_s,
            token=self._token(claim),
            lease_s=self._lease_s,
            context=claim,
        )
        claim.asked, claim.renewed_at = transfer.id, now

    def _unclaim(self, claim: Claim, now: float) -> None:
        if claim.tier and claim.steps:
            self._transfers.send(
                Op.UNCLAIM,
                claim.tier,
                [page_key(step, 0) for step in claim.steps],
                priority=Priority.SAVE,
                deadline=now + self._lease_s,  # by then it is over anyway
                token=self._token(claim),
            )
            claim.tier = ""

    def _token(self, claim: Claim) -> bytes:
        return self._claimer + claim.request.id.to_bytes(8, "little")

    def _computing(self, match: Match) -> Match:
        return replace(match, pending=True, cut=CutReason.COMPUTING)

    def _grant(self, claim: Claim) -> None:
        self.counters["compute_claims"] += not claim.is_granted
        claim.is_granted, claim.is_refused = True, False

    def _go_on(self, request: Request, match: Match, now: float) -> Match:
        """The request waits no more."""
        _, wait = self._waits.pop(request.id, (request, None))
        if wait is None:
            return match
        self.seconds_waited += now - wait.began
        return replace(match, compute_wait_s=now - wait.began)

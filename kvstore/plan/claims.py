"""Claims on blocks that are stored nowhere, so that one request computes them for all.

A claim is made in *steps*: as many blocks as the engine computes and saves at once. A step is named by the hash of its
last block, which says all of its tokens; so two prompts that fork inside a step do not wait for each other there.

The hard thing: a claim must never outlive its maker. It ends when its last step is published, when the request ends,
when its client dies, and in any case `lease_s` after the last sign of progress. A claim only makes others wait: losing
one costs a second computation and nothing else, so whatever is in doubt ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.plan.records import Request
from radix.hashing import BlockHash

MAX_STEPS = 1 << 18  # claimed at once; 64 prompts of a million tokens in steps of 256


@dataclass(slots=True, eq=False)
class Claim:
    """The blocks that one request is going to compute.

    steps:       names of the steps that are not published yet, in path order.
    progress_at: when it was made, or a step of it was published last.
    is_granted:  the request computes; False while other machines are asked, or one of them computes.
    is_refused:  another machine computes.
    asked:       the transfer that asks a shared tier; 0 if none is under way.
    tier:        the shared tier where it was claimed, if any.
    renewed_at:  when that was last said there.
    """

    request: Request
    steps: dict[BlockHash, None]
    progress_at: float
    is_granted: bool = False
    is_refused: bool = False
    asked: int = 0
    tier: str = ""
    renewed_at: float = 0.0


class Claims:
    """The claims of one store. Under its lock.

    lease_s: how long a claim lives without progress.
    by_step: the claim that each step belongs to.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._by_request: dict[int, Claim] = {}
        self.by_step: dict[BlockHash, Claim] = {}

    def make(self, request: Request, steps: Sequence[BlockHash], now: float, *, take_over: bool = False) -> Claim:
        """Claim `steps` for a request, as far as there is room; those of others only by `take_over`."""
        self.end(request)
        if take_over:
            self._remove(steps)
        room = max(0, MAX_STEPS - len(self.by_step))
        free = [step for step in steps if step not in self.by_step][:room]
        claim = self._by_request[request.id] = Claim(request, dict.fromkeys(free), now)
        self.by_step.update(dict.fromkeys(free, claim))
        return claim

    def of(self, request: Request) -> Claim | None:
        """The claim of a request."""
        return self._by_request.get(request.id)

    def holder(self, step: BlockHash) -> Claim | None:
        """The claim that a step belongs to."""
        return self.by_step.get(step)

    def expires_at(self, claim: Claim) -> float:
        """When a claim ends unless there is progress."""
        return claim.progress_at + self.lease_s

    def published(self, steps: Iterable[BlockHash], now: float) -> list[Claim]:
        """Steps are stored now, whoever did it; returns the claims that have progressed."""
        progressed = self._remove(steps)
        for claim in progressed:
            claim.progress_at = now
        return progressed

    def end(self, request: Request) -> Claim | None:
        """Take a request's claim away; returns it, with what was not published, if there was one."""
        claim = self._by_request.pop(request.id, None)
        if claim is not None:
            for step in claim.steps:
                del self.by_step[step]
        return claim

    def expired(self, now: float) -> list[Claim]:
        """The claims whose time is over."""
        return [claim for claim in self._by_request.values() if self.expires_at(claim) <= now]

    def rebuild(self) -> None:
        """Make the index by step anew, from the claims there are: an exception may have come between the two."""
        self.by_step = {step: claim for claim in self._by_request.values() for step in claim.steps}
        for claim in self._by_request.values():
            claim.steps = {step: None for step in claim.steps if self.by_step[step] is claim}

    def check(self) -> None:
        """Assert that the two indexes agree. For tests."""
        listed = {step: claim for claim in self._by_request.values() for step in claim.steps}
        assert listed == self.by_step, f"{len(listed)} steps in claims, {len(self.by_step)} in the index"

    def __len__(self) -> int:
        return len(self._by_request)

    def _remove(self, steps: Iterable[BlockHash]) -> list[Claim]:
        changed: dict[Claim, None] = {}
        for step in steps:
            claim = self.by_step.pop(step, None)
            if claim is not None:
                del claim.steps[step]
                changed[claim] = None
        return list(changed)

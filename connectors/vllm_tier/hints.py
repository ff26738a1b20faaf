"""KV hints in the seat of a secondary tier, where host memory is vLLM's own and no planner of ours decides.

    retain    chunks are told to the tiers as used, again and again until it ends: they are evicted last, and live so
    release   ends that
    prefetch  of blocks named by their hashes: looked up now and told as used, so that they are there and known when a
              request asks for them; the bytes come when it does
    forget    deleted on all tiers; vLLM's own memory keeps what it has
    share     what is in Redis is shared
    pin, demote   rejected: they are about host memory

A hint about its own request's prompt is done when the request is over, for then its chunks are known: vLLM names them
one by one as it looks them up and stores them. One thread, the scheduler's; nothing raises, nothing waits.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from connectors.vllm_tier.chunks import GROUP_BYTES, Chunks, Touches
from connectors.vllm_tier.jobs import TierJobs
from connectors.vllm_tier.lookup import Lookups
from kvstore.hints.actions import HintAction, HintKind
from kvstore.hints.envelope import parse
from kvstore.hints.limits import HintLimits
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.move.rows import RowMover
from kvstore.plan.records import Op, Outcome
from kvstore.tiers import registry

log = logging.getLogger("vllm.kvstore")

MAX_NAMED = 4096  # chunks that the hints of one request may name: a scheduler's step pays for them
MAX_LATER = 8  # actions about a request's own prompt, each of which is done to all its chunks at its end
MAX_RETAINED = 1 << 16  # chunks, some 10 MB
MAX_FORGETTING = 1 << 16
FORGET_BATCH = 512  # keys; a few milliseconds in one transaction
FORGET_DEADLINE_S = 30.0

REASONS = {
    HintKind.PIN: "host memory is vLLM's own here; retain keeps chunks on the tiers below",
    HintKind.DEMOTE: "host memory is vLLM's own here, and chunks are written down as they are computed",
}


@dataclass(slots=True)
class RequestHints:
    """What is to be done when a request is over, and the chunks of its prompt that have been named so far."""

    actions: list[HintAction]
    keys: dict[bytes, None] = field(default_factory=dict)

    def saw(self, keys: Iterable[bytes]) -> None:
        """Note chunks of the request."""
        for key in keys:
            self.keys[bytes(key)] = None


class TierHints:
    """Does what hints say, and counts it.

    num_groups, chunk_tokens: of vLLM's layer groups, and of one chunk.
    wall: Unix seconds.

    counts: actions by what became of them.
    """

    def __init__(
        self,
        mover: RowMover,
        lookups: Lookups,
        chunks: Chunks,
        touches: Touches,
        jobs: TierJobs,
        *,
        num_groups: int,
        chunk_tokens: int,
        limits: HintLimits,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.counts: Counter[HintStatus] = Counter()
        self._mover = mover
        self._lookups = lookups
        self._chunks = chunks
        self._touches = touches
        self._jobs = jobs
        self._num_groups = num_groups
        self._chunk_tokens = chunk_tokens
        self._limits = limits
        self._now = now
        self._wall = wall
        self._forgetting: dict[str, dict[bytes, None]] = {tier: {} for tier in mover.tiers}
        self._deleting: dict[int, tuple[str, list[bytes]]] = {}  # by transfer
        self._num_named = 0  # chunks, by the request that is coming

    def came(self, messages: Sequence[object]) -> RequestHints | None:
        """A request came with hints: do what can be done; what its end is waited for with, None if with nothing."""
        later: list[HintAction] = []
        self._num_named = 0
        for message in messages:
            for item in parse(message, self._limits).items:
                outcome = item if isinstance(item, HintOutcome) else self._begin(item, later)
                self.counts[outcome.status] += 1
                log.debug("kvstore tier: %s", outcome)
        return RequestHints(later) if later else None

    def finished(self, asked: RequestHints, end_of: Callable[[bytes], int | None]) -> None:
        """A request with hints is over. end_of: the position at which a chunk of it ends, in tokens, if it is known."""
        for action in asked.actions:
            self._do(action, [key for key in asked.keys if self._is_meant(action, end_of(key))])

    def end_step(self) -> None:
        """The end of a scheduler's step: retained chunks are told as used again, chunks to be forgotten deleted."""
        self._touches.again()
        if self.is_forgetting:
            self._forget()

    def landed(self, outcome: Outcome) -> None:
        """Book what became of a transfer; nothing if it is no delete of ours. What was not deleted is tried again."""
        tier, keys = self._deleting.pop(outcome.transfer_id, ("", []))
        if keys and outcome.error is not None:
            self._note_forget(tier, keys)

    @property
    def is_forgetting(self) -> bool:
        """True while there are chunks to be deleted from a tier that takes deletes."""
        return bool(self._deleting) or any(
            keys and self._mover.takes(tier, Op.DELETE) for tier, keys in self._forgetting.items()
        )

    # ---- private ------------------------------------------------------------------------------------------------

    def _begin(self, action: HintAction, later: list[HintAction]) -> HintOutcome:
        """Do an action about named blocks; put off one about the request's own prompt."""
        if action.kind in REASONS:
            return action.outcome(HintStatus.REJECTED, REASONS[action.kind])
        if action.kind is HintKind.SHARE:
            if all(registry.medium(tier) == "storage" for tier in self._mover.tiers):
                return action.outcome(HintStatus.REJECTED, "there is no shared tier here")
            return action.outcome(HintStatus.ACCEPTED, "already shared")
        if action.tokens is not None:
            return action.outcome(
                HintStatus.REJECTED, "vLLM names blocks by hashes of its own; give block_hashes, or nothing"
            )
        if action.hashes is None:
            if action.kind is HintKind.PREFETCH:
                return action.outcome(HintStatus.REJECTED, "the request is being looked up already")
            if len(later) == MAX_LATER:
                return action.outcome(HintStatus.REJECTED, f"{MAX_LATER} actions may be about a request's own prompt")
            later.append(action)
            return action.outcome(HintStatus.DEFERRED)
        num_named = self._num_named + len(action.hashes) * self._num_groups
        if num_named > MAX_NAMED:
            most = MAX_NAMED // self._num_groups
            return action.outcome(
                HintStatus.REJECTED, f"{len(action.hashes)} blocks; the hints of a request may name {most}"
            )
        self._num_named = num_named
        ends = [(number + 1) * self._chunk_tokens for number in range(len(action.hashes))]
        meant = [one for one, end in zip(action.hashes, ends, strict=True) if self._is_meant(action, end)]
        num_done = self._do(action, [self._key(one, group) for one in meant for group in range(self._num_groups)])
        return self._outcome(action, num_done // self._num_groups, len(meant))

    def _outcome(self, action: HintAction, num_done: int, num_meant: int) -> HintOutcome:
        tokens = num_done * self._chunk_tokens
        until = self._wall() + action.ttl_s if action.kind is HintKind.RETAIN else None
        match action.kind:
            case HintKind.FORGET:
                reason = "on the tiers below; vLLM's own memory keeps what it has"
            case HintKind.PREFETCH:
                reason = "looked up; vLLM brings chunks to host memory when a request asks for them"
            case _:
                reason = "" if num_done == num_meant else f"{MAX_RETAINED} chunks are retained already"
        is_clipped = bool(reason) or action.is_clipped
        status = HintStatus.CLIPPED if is_clipped else HintStatus.ACCEPTED
        return action.outcome(status, reason, tokens=tokens, until=until)

    def _do(self, action: HintAction, keys: Sequence[bytes]) -> int:
        """Do an action about chunks; returns for how many there was room."""
        match action.kind:
            case HintKind.RETAIN:
                return self._touches.retain(keys, self._wall() + action.ttl_s, MAX_RETAINED)
            case HintKind.RELEASE:
                self._touches.release(keys)
            case HintKind.PREFETCH:
                up = [tier for tier in self._mover.tiers if self._mover.is_up(tier)]
                for key in keys:
                    self._lookups.lookup(key, up)
                for tier in up:
                    self._touches.later(tier, keys)
            case HintKind.FORGET:
                self._touches.release(keys)
                self._lookups.forget(keys)
                for tier in self._mover.tiers:
                    self._note_forget(tier, keys)
        return len(keys)

    def _forget(self) -> None:
        """Delete what no save of ours is about to write."""
        saving = self._jobs.saving()
        for tier, waiting in self._forgetting.items():
            if not self._mover.takes(tier, Op.DELETE):
                continue
            keys = list(islice((key for key in waiting if key not in saving), FORGET_BATCH))  # not all: it is a step
            if not keys:
                continue
            for key in keys:
                del waiting[key]
            self._lookups.forget(keys)
            names = [self._chunks.name(key) for key in keys]
            transfer = self._mover.delete(tier, names, deadline=self._now() + FORGET_DEADLINE_S)
            self._deleting[transfer] = (tier, keys)

    def _note_forget(self, tier: str, keys: Sequence[bytes]) -> None:
        waiting = self._forgetting[tier]
        waiting.update(dict.fromkeys(keys[: max(0, MAX_FORGETTING - len(waiting))]))

    def _is_meant(self, action: HintAction, end: int | None) -> bool:
        """Whether a chunk that ends there lies in the action's range, if in part only. An unknown end lies in all."""
        if end is None:
            return action.start == 0 and action.end is None
        return end > action.start and (action.end is None or end - self._chunk_tokens < action.end)

    @staticmethod
    def _key(block_hash: bytes, group: int) -> bytes:
        """The chunk of a block and layer group, as vLLM names it."""
        return block_hash + group.to_bytes(GROUP_BYTES, "big")

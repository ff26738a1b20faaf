"""The known places of chunks: the answers behind a lookup that never waits.

A chunk is asked about once, on all tiers that are up, in one batch for everything that a scheduler step wanted to know;
until the answers are in, the lookup says "ask again". An answer is good for ANSWER_S: a request that waits in the queue
is looked up in every step, and its last, missing chunk must not cost a probe each time.

    first lookup      -> ASK_AGAIN, and the chunk goes into the next probe
    a tier has it     -> HIT, whatever the others say later
    all have answered -> MISS
    deadline_s passed -> MISS; what is said later counts from then on
    a load failed     -> MISS for FAILED_S, or until it is stored anew: the engine would ask for it again at once

No I/O, no thread, no engine; times are of an injected clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

ANSWER_S = 2.0  # a guess: longer than requests usually wait, shorter than an operator's patience with a stale miss
FAILED_S = 30.0  # as long as a breaker stays open at most
MAX_ANSWERS = 1 << 17  # about 40 MB; a prompt of 128K tokens in blocks of 16 has 8192


class LookupAnswer(Enum):
    """The three answers of a lookup."""

    HIT = "hit"
    MISS = "miss"
    ASK_AGAIN = "ask_again"


@dataclass(slots=True)
class Known:
    """The answers about one chunk.

    where:   tiers that have it, in the order in which they answered.
    waiting: tiers that have not answered.
    """

    asked_at: float
    good_until: float
    where: list[str] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)


class Lookups:
    """Answers lookups from what was heard. One thread.

    deadline_s: longest wait for an answer, from the first lookup on.
    """

    def __init__(self, deadline_s: float, now: Callable[[], float]) -> None:
        self._deadline_s = deadline_s
        self._now = now
        self._known: dict[bytes, Known] = {}
        self._failed: dict[bytes, float] = {}  # key -> until when it is not offered
        self._to_ask: dict[bytes, None] = {}
        self.num_late = 0  # lookups that were a miss because nobody answered in time

    def lookup(self, key: bytes, tiers: Collection[str]) -> LookupAnswer:
        """Is this chunk on one of `tiers`, those that are up?"""
        now = self._now()
        if self._failed and self._is_failed(key, now):
            return LookupAnswer.MISS
        known = self._known.get(key)
        if known is None or (now > known.good_until and not known.waiting):
            if not tiers:
                return LookupAnswer.MISS
            self._remember(key, Known(now, now + max(ANSWER_S, self._deadline_s), waiting=set(tiers)))
            self._to_ask[key] = None
            return LookupAnswer.ASK_AGAIN
        if known.where and any(tier in tiers for tier in known.where):
            return LookupAnswer.HIT
        if not known.waiting:
            return LookupAnswer.MISS
        if now <= known.asked_at + self._deadline_s:
            return LookupAnswer.ASK_AGAIN
        known.waiting.clear()
        self.num_late += 1
        return LookupAnswer.MISS

    def take_questions(self) -> list[bytes]:
        """Chunks to ask all tiers about, each once."""
        keys = list(self._to_ask)
        self._to_ask.clear()
        return keys

    def heard(self, tier: str, keys: Sequence[bytes], has: Sequence[bool]) -> None:
        """A tier has answered."""
        for key, is_there in zip(keys, has, strict=True):
            known = self._known.get(key)
            if known is not None:
                known.waiting.discard(tier)
                if is_there and tier not in known.where:
                    known.where.append(tier)

    def stored(self, tier: str, keys: Iterable[bytes]) -> None:
        """A tier has taken these chunks just now."""
        now = self._now()
        for key in keys:
            self._failed.pop(key, None)
            known = self._known.get(key)
            if known is None:
                continue  # nobody has asked; the tier will say so when somebody does
            known.good_until = now + ANSWER_S
            if tier not in known.where:
                known.where.append(tier)

    def where(self, key: bytes, tiers: Sequence[str]) -> list[str]:
        """Tiers among `tiers` to load a chunk from: those that have it, then those that have not answered yet.

        All of them if nothing is known any more.
        """
        known = self._known.get(key)
        if known is None or not known.where:
            return list(tiers)
        sure = [tier for tier in tiers if tier in known.where]
        return sure + [tier for tier in tiers if tier in known.waiting]

    def lacks(self, key: bytes, tier: str) -> bool:
        """True if the tier was asked and does not have this chunk."""
        known = self._known.get(key)
        return known is not None and tier not in known.where and tier not in known.waiting

    def lost(self, tier: str, key: bytes) -> None:
        """A tier did not give a chunk it had."""
        known = self._known.get(key)
        if known is not None and tier in known.where:
            known.where.remove(tier)

    def failed(self, keys: Iterable[bytes]) -> None:
        """No tier gave these chunks: do not offer them for a while."""
        until = self._now() + FAILED_S
        for key in keys:
            self._known.pop(key, None)
            self._failed[key] = until
        while len(self._failed) > MAX_ANSWERS:
            del self._failed[next(iter(self._failed))]

    def forget(self, keys: Iterable[bytes]) -> None:
        """These chunks are being deleted: what was heard of them counts no longer."""
        for key in keys:
            self._known.pop(key, None)

    @property
    def num_known(self) -> int:
        """Answers held now."""
        return len(self._known)

    @property
    def is_asking(self) -> bool:
        """True if there are chunks to ask about."""
        return bool(self._to_ask)

    def _is_failed(self, key: bytes, now: float) -> bool:
        until = self._failed.get(key)
        if until is None:
            return False
        if now < until:
            return True
        del self._failed[key]
        return False

    def _remember(self, key: bytes, known: Known) -> None:
        self._known.pop(key, None)  # to the end: the oldest answer leaves first
        self._known[key] = known
        while len(self._known) > MAX_ANSWERS:
            del self._known[next(iter(self._known))]

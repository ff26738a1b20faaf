"""A time to live on top of any policy.

A bound for privacy or cost, not a good order by itself: keys past their deadline leave first, the rest as the inner
policy says. A deadline is set when a key is added and moved when it is touched.

The hard thing: deadlines in order without a heap over keys. Keys of one ttl form a class, and in a class the order of
uses is the order of deadlines, so a use moves a key to the end. A heap over classes (mostly one) finds those that are
due. Keys that come with what is left of an earlier life (`Hint.left_s`) are on loan from their class until their next
use, in a heap of their own.

A clock that is set back would break that order, and let keys live for as long as it was wrong. So no key ever has more
left than its ttl: when time goes back, deadlines further away than that come nearer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count, groupby, islice, repeat, takewhile
from math import inf, isnan
from typing import Any, Generic, NamedTuple

from eviction.forecast import has_forecast, has_prospects
from eviction.policy import NO_HINT, Ending, EvictionPolicy, Hint, K, Learner, PromptUse, learner
from radix.ordered import OrderedMap

NEVER = 0.0  # a ttl that sets no deadline
MAX_OVER = 1024  # loans that are over and still in the heap, beside as many as there are
SET_BACK_S = 1.0  # time that goes back by less stands still: clocks of several cores, a correction in small steps


class _Loan(NamedTuple):
    """The rest of a key's earlier life. ttl_s: the life it gets from its next use on."""

    deadline: float
    number: int
    left_s: float
    ttl_s: float


class Ttl(Generic[K]):
    """An EvictionPolicy that adds deadlines to `inner`.

    name:  of the inner policy, as it is configured.
    ttl_s: seconds from a key's last add or touch to its deadline, for keys whose hint has none; None or 0 means never.
           A hint's ttl_s of 0 means never too, and a negative one a deadline that has passed.

    has_deadlines: False while no key has one: then `expired` need not be asked.

    hold, release, renew, name_by, used and ended are passed on where the inner policy has them, see `PolicyListener`.

    `now` may go back between calls, see the module: O(keys) then. Otherwise O(1) per key, and O(log classes) for each
    class that is due.
    """

    def __init__(self, inner: EvictionPolicy[K], ttl_s: float | None = None, name: str = "") -> None:
        if ttl_s is not None and not ttl_s >= 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be at least 0 seconds, where 0 or None means never")
        self.name = name or type(inner).__name__.lower()
        self._inner = inner
        self._hold: Callable[[Iterable[K]], None] = getattr(inner, "hold", inner.discard)
        self._release: Callable[[Iterable[K], float, Hint], None] = getattr(inner, "release", inner.add)
        self._renew: Callable[[Iterable[K], float], None] = getattr(inner, "renew", inner.touch)
        self._ttl_s = NEVER if ttl_s is None or ttl_s == inf else ttl_s
        self.has_deadlines = False
        self._now = -inf
        self._classes: dict[float, OrderedMap[K, float]] = {}  # by ttl; key -> deadline, earliest first
        self._usual: OrderedMap[K, float] = self._classes.setdefault(self._ttl_s, OrderedMap())
        self._unusual: dict[K, float] = {}  # the ttl of keys in other classes
        # One entry per class with keys: (a time not after its earliest deadline, ttl). Uses and discards only move that
        # deadline away, so an entry is looked at again when its time has come, and not before.
        self._due: list[tuple[float, float]] = []
        self._in_due: set[float] = set()
        self._lent: dict[K, _Loan] = {}
        self._lent_due: list[tuple[float, int, K]] = []  # a heap of their deadlines, and of loans that are over
        self._order = count()

    def add(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Take keys in and set their deadlines by this hint. A known key is touched."""
        keys = list(keys)
        ttl_s = self._checked_ttl(hint)
        self._inner.add(keys, now, hint)
        self._begin_life(keys, now, hint, ttl_s)

    def hold(self, keys: Iterable[K]) -> None:
        """Keys are in use: no members, and without a deadline, until they are released. Unknown keys are ignored."""
        keys = list(keys)
        self._hold(keys)
        self._leave_classes(keys)

    def release(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Make held keys members again, and set their deadlines by this hint. Keys that are not held are added."""
        keys = list(keys)
        ttl_s = self._checked_ttl(hint)
        self._release(keys, now, hint)
        self._begin_life(keys, now, hint, ttl_s)

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Tell the inner policy, if it cares, how keys are named."""
        getattr(self._inner, "name_by", _unheard)(name_of)

    @property
    def listens(self) -> bool:
        """True if the inner policy wants to know of requests or of their ends."""
        return hasattr(self._inner, "used") or hasattr(self._inner, "ended")

    def used(self, use: PromptUse, now: float) -> None:
        """Tell the inner policy, if it cares, of a request."""
        getattr(self._inner, "used", _unheard)(use, now)

    def ended(self, request_id: int, ending: Ending, now: float) -> None:
        """Tell the inner policy, if it cares, of the end of an answer."""
        getattr(self._inner, "ended", _unheard)(request_id, ending, now)

    @property
    def learner(self) -> Learner | None:
        """The inner policy, if it learns."""
        return learner(self._inner)

    def touch(self, keys: Iterable[K], now: float) -> None:
        """Note a use of keys and move their deadlines. Unknown keys are ignored."""
        keys = list(keys)
        self._inner.touch(keys, now)
        self._move_deadlines(keys, now)

    def renew(self, keys: Iterable[K], now: float) -> None:
        """The request that brought these keys ends: their deadlines move, but it is no use."""
        keys = list(keys)
        self._renew(keys, now)
        self._move_deadlines(keys, now)

    def shorten(self, keys: Iterable[K], now: float, left_s: float) -> None:
        """Let keys live for `left_s` from now at most, until their next use; that is none. Unknown keys are ignored."""
        now = self._seen(now)
        for key in filter(self._inner.__contains__, keys):
            loan = self._lent.get(key)
            ttl_s = self._unusual.get(key, self._ttl_s) if loan is None else loan.ttl_s
            left = min(left_s, self._deadline(key) - now)
            self._leave_classes([key])
            self._lend([key], now, left, ttl_s)

    def promote(self, keys: Sequence[K], now: float) -> None:
        """Make keys as recent as if they were used, with the deadlines they have. Unknown keys are ignored."""
        self._inner.touch(keys, now)

    def rank(self, keys: Iterable[K], now: float, hint: Hint) -> None:
        """Give keys the priority of this hint; they are as recent as if used. Deadlines stay. Unknown ones: ignored."""
        known = [key for key in keys if key in self._inner]
        if known:
            self._inner.add(known, now, hint)

    def worth(self, keys: Sequence[K], now: float) -> list[float]:
        """Return what copies are worth by the inner policy's forecast; all alike where it has none."""
        if not has_forecast(self._inner):
            return [0.0] * len(keys)
        inner: Any = self._inner
        worth: list[float] = inner.worth(keys, now)
        return worth

    @property
    def forecasts(self) -> bool:
        """True if the inner policy can tell what a copy that is not there yet is worth."""
        return has_prospects(self._inner)

    def num_worthy(
        self, request_id: int, keys: Sequence[K], victims: Sequence[K], now: float, priority: int = 0
    ) -> int:
        """Return how many of the first of `keys` are worth what the inner policy says of the victims beside them.

        victims: as `victims` named them. Those that have expired are worth nothing. Without a forecast all keys are.
        """
        if not has_prospects(self._inner):
            return len(keys)
        inner: Any = self._inner
        due = min(len(self._expired(len(victims))), len(keys))
        worthy: int = inner.num_worthy(request_id, keys[due:], victims[due:], now, priority)
        return due + worthy

    def demote(self, keys: Iterable[K]) -> None:
        """Make keys the next victims after the expired ones."""
        self._inner.demote(keys)

    def discard(self, keys: Iterable[K]) -> None:
        """Forget keys. Unknown keys are ignored."""
        keys = list(keys)
        self._inner.discard(keys)
        self._leave_classes(keys)

    def victims(self, n: int) -> list[K]:
        """Return up to `n` keys: those that had expired at the latest time seen, then as the inner policy says."""
        due = self._expired(max(n, 0))
        if not due:
            return self._inner.victims(n)
        chosen = set(due)
        return due + [key for key in self._inner.victims(n) if key not in chosen][: n - len(due)]

    def expired(self, now: float, limit: int | None = None) -> list[K]:
        """Return the keys whose deadline is `now` or before, earliest first. They stay until discarded."""
        self._seen(now)
        expired = self._expired(limit)
        self.has_deadlines = bool(self._due or self._lent_due)
        return expired

    def overdue(self, keys: Iterable[K], now: float, limit: int | None = None) -> list[K]:
        """Return those of `keys` whose deadline is `now` or before, the first `limit` of them."""
        now = self._seen(now)
        return list(islice((key for key in keys if self._deadline(key) <= now), limit))

    def members(self) -> list[K]:
        """Return every key, roughly the next to leave first."""
        return list(dict.fromkeys([*self._inner.members(), *(key for keys in self._classes.values() for key in keys)]))

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys, in this order; deadlines that are known stay."""
        known = {key: deadline for keys in self._classes.values() for key, deadline in keys.items()}
        lent, self._lent, self._lent_due = self._lent, {}, []
        self._classes, self._unusual, self._due, self._in_due = {}, {}, [], set()
        self._usual = self._classes.setdefault(self._ttl_s, OrderedMap())
        self._inner.rebuild(keys, now)
        now = self._seen(now)
        deadlines: list[tuple[float, K, float]] = []
        for key, hint in keys:
            ttl_s = self._ttl_of(hint)
            if key in lent:
                self._lend([key], now, lent[key].deadline - now, lent[key].ttl_s)
            elif ttl_s != NEVER:
                deadlines.append((min(known.get(key, inf), now + ttl_s), key, ttl_s))
        for deadline, key, ttl_s in sorted(deadlines, key=lambda item: item[0]):  # a class is in this order
            self._set_deadlines([key], deadline - ttl_s, ttl_s)

    def __len__(self) -> int:
        return len(self._inner)

    def __contains__(self, key: object) -> bool:
        return key in self._inner

    def _begin_life(self, keys: list[K], now: float, hint: Hint, ttl_s: float) -> None:
        if self._unusual or self._lent or ttl_s != self._ttl_s or hint.left_s is not None:
            self._leave_classes(keys)
        if hint.left_s is not None:
            self._lend(keys, self._seen(now), hint.left_s, ttl_s)
        elif ttl_s != NEVER:
            self._set_deadlines(keys, self._seen(now), ttl_s)

    def _checked_ttl(self, hint: Hint) -> float:
        if hint.left_s is not None and isnan(hint.left_s):
            raise ValueError("hint: left_s is nan; it must be a number of seconds or None")
        return self._ttl_of(hint)

    def _ttl_of(self, hint: Hint) -> float:
        ttl_s = self._ttl_s if hint.ttl_s is None else hint.ttl_s
        if isnan(ttl_s):
            raise ValueError("hint: ttl_s is nan; it must be a number of seconds, None or 0")
        return NEVER if ttl_s == inf else ttl_s

    def _seen(self, now: float) -> float:
        if now > self._now:
            self._now = now
        elif now < self._now - SET_BACK_S:
            self._now = now
            self._bring_near(now)
        return self._now

    def _bring_near(self, now: float) -> None:
        """Time went back: no key has more left than its ttl. What is in order stays in order."""
        for ttl_s, deadlines in self._classes.items():
            latest = now + ttl_s
            for key in reversed(deadlines):
                if deadlines[key] <= latest:
                    break
                deadlines[key] = latest
        self._due = [(next(iter(deadlines.values())), ttl_s) for ttl_s, deadlines in self._classes.items() if deadlines]
        heapify(self._due)
        self._in_due = {ttl_s for _, ttl_s in self._due}
        self._lent = {
            key: loan._replace(deadline=min(loan.deadline, now + loan.left_s)) for key, loan in self._lent.items()
        }
        self._lent_due = [(loan.deadline, loan.number, key) for key, loan in self._lent.items()]
        heapify(self._lent_due)

    def _lend(self, keys: list[K], now: float, left_s: float, ttl_s: float) -> None:
        self.has_deadlines = True
        for key in keys:
            loan = self._lent[key] = _Loan(now + left_s, next(self._order), left_s, ttl_s)
            heappush(self._lent_due, (loan.deadline, loan.number, key))
        if len(self._lent_due) > 2 * len(self._lent) + MAX_OVER:  # the same keys, lent again and again
            self._lent_due = [(loan.deadline, loan.number, key) for key, loan in self._lent.items()]
            heapify(self._lent_due)

    def _take_back(self, keys: list[K], now: float) -> None:
        """Keys with a rest are used: from now on they live as long as others of their ttl."""
        for key in filter(self._lent.__contains__, keys):
            ttl_s = self._lent.pop(key).ttl_s
            if ttl_s != NEVER:
                self._set_deadlines([key], now, ttl_s)

    def _set_deadlines(self, keys: list[K], now: float, ttl_s: float) -> None:
        if not keys:
            return
        deadlines = self._classes.setdefault(ttl_s, OrderedMap())
        deadlines.update(dict.fromkeys(keys, now + ttl_s))
        deque(map(deadlines.move_to_end, keys), maxlen=0)
        if ttl_s != self._ttl_s:
            self._unusual.update(dict.fromkeys(keys, ttl_s))
        if ttl_s not in self._in_due:
            self.has_deadlines = True
            self._in_due.add(ttl_s)
            heappush(self._due, (now + ttl_s, ttl_s))

    def _move_deadlines(self, keys: list[K], now: float) -> None:
        now = self._seen(now)
        if self._lent:
            self._take_back(keys, now)
        if self._usual:
            self._set_deadlines(list(filter(self._usual.__contains__, keys)), now, self._ttl_s)
        if self._unusual:
            unusual = filter(self._unusual.__contains__, keys)
            for ttl_s, group in groupby(unusual, key=self._unusual.__getitem__):
                self._set_deadlines(list(group), now, ttl_s)

    def _leave_classes(self, keys: list[K]) -> None:
        if self._lent:
            deque(map(self._lent.pop, keys, repeat(None)), maxlen=0)
        if self._usual:
            deque(map(self._usual.pop, keys, repeat(None)), maxlen=0)
        if self._unusual:
            for key in keys:
                ttl_s = self._unusual.pop(key, None)
                if ttl_s is not None:
                    deadlines = self._classes[ttl_s]
                    del deadlines[key]
                    if not deadlines:
                        del self._classes[ttl_s]

    def _deadline(self, key: K) -> float:
        loan = self._lent.get(key)
        if loan is not None:
            return loan.deadline
        ttl_s = self._unusual.get(key, self._ttl_s)
        return self._classes[ttl_s].get(key, inf)

    def _expired(self, limit: int | None) -> list[K]:
        """Return expired keys, earliest first: all, or at least the first `limit` cut to that many."""
        now = self._now
        found: list[tuple[float, K]] = []
        looked_at: list[tuple[float, float]] = []
        while self._due and self._due[0][0] <= now:
            _, ttl_s = heappop(self._due)
            deadlines = self._classes.get(ttl_s)
            if not deadlines:
                self._in_due.remove(ttl_s)
                continue
            looked_at.append((next(iter(deadlines.values())), ttl_s))
            past = takewhile(lambda item: item[1] <= now, deadlines.items())
            found += [(deadline, key) for key, deadline in islice(past, limit)]
        for entry in looked_at:
            heappush(self._due, entry)
        lent = self._expired_lent(limit)
        found += lent
        if len(looked_at) > 1 or lent:
            found.sort(key=lambda item: item[0])
        return [key for _, key in found[:limit]]

    def _expired_lent(self, limit: int | None) -> list[tuple[float, K]]:
        """Return the expired ones of the keys with a rest, earliest first, at most `limit`."""
        found: list[tuple[float, K]] = []
        kept: list[tuple[float, int, K]] = []
        while self._lent_due and self._lent_due[0][0] <= self._now and (limit is None or len(found) < limit):
            entry = heappop(self._lent_due)
            deadline, number, key = entry
            loan = self._lent.get(key)
            if loan is not None and loan.number == number:
                found.append((deadline, key))
                kept.append(entry)
        for entry in kept:
            heappush(self._lent_due, entry)
        return found


def _unheard(*_: object) -> None:
    """The inner policy does not care."""

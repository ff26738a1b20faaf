"""Outlook: evict what is least likely to be used again for the time that it would be held.

What the policy is told of requests (`used`, `ended`) says who used which blocks last (visits.py); what becomes of
blocks of a kind says what the others are worth (survival.py). The least worth leaves first, and of one request's blocks
the deepest first, so that prefixes stay whole.

Worth is by the hour, so nothing is left of the idea that what is used often is worth keeping: what was used often and
was not used lately is of a kind of its own, and leaves when blocks of that kind do not come back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from itertools import chain, repeat
from typing import Any, Generic

from eviction.beliefs import beliefs, reasons_of
from eviction.policy import Belief, Ending, Hint, K, PromptUse
from eviction.ranked import Ranked
from eviction.survival import counts_of, tables_of
from eviction.visits import MOST_REASONS, UNKNOWN
from radix.ordered import OrderedMap

try:
    from eviction._visits import Visits
except ImportError:  # not built on this machine
    from eviction.visits import Visits  # type: ignore[assignment]

NO_BLOCK = 0
MOST_OPEN = 4096  # requests whose end is awaited


class BlockTable(Generic[K]):
    """The blocks that `visits` remembers, by name and by number, and the keys of each.

    keys: by number. NO_BLOCK is nobody's number.
    """

    def __init__(self) -> None:
        self.visits = Visits()
        self.keys: list[tuple[K, ...]] = [()]
        self._names: list[Hashable] = [None]
        self._numbers: OrderedMap[Hashable, int] = OrderedMap()
        self._free: list[int] = []

    def numbers_of(self, names: list[Hashable]) -> list[int]:
        """Return the numbers of names, new ones where there are none."""
        numbers = list(map(self._numbers.get, names, repeat(NO_BLOCK)))
        if NO_BLOCK in numbers:
            for at, name in enumerate(names):
                if not numbers[at]:
                    numbers[at] = self._numbers.get(name) or self._new_number(name)
        return numbers

    def known(self, names: Iterable[Hashable]) -> list[int]:
        """Return the numbers of names, NO_BLOCK where there are none."""
        return list(map(self._numbers.get, names, repeat(NO_BLOCK)))

    def last_known(self, names: Sequence[Hashable]) -> tuple[int, int]:
        """Return the number of the last leading name that is known, and how many these are.

        By halves, as `visits` does: who knows a block mostly knows all before it.
        """
        num = bisect_left(names, True, key=lambda name: name not in self._numbers)
        return (self._numbers[names[num - 1]] if num else NO_BLOCK), num

    def forget(self, numbers: list[int]) -> None:
        """Visits remembers them no more."""
        for number in numbers:
            del self._numbers[self._names[number]]
            self._names[number] = None
        self._free += numbers

    def _new_number(self, name: Hashable) -> int:
        if self._free:
            number = self._free.pop()
            self._names[number] = name
        else:
            number = len(self._names)
            self._names.append(name)
            self.keys.append(())
        self._numbers[name] = number
        return number


class OutlookOrder(Generic[K]):
    """The keys of one priority, in the order of what their blocks are worth. table: shared by all priorities."""

    def __init__(self, table: BlockTable[K]) -> None:
        self._table = table
        self._numbers: OrderedMap[K, int] = OrderedMap()  # of the members' blocks
        self._name_of: Callable[[K], Hashable] | None = None

    def add(self, keys: list[K], hits: int) -> None:
        """Take keys in, deepest first. Their blocks' uses are told elsewhere."""
        if any(map(self._numbers.__contains__, keys)):
            keys = [key for key in keys if key not in self._numbers]
        names: list[Hashable] = list(keys if self._name_of is None else map(self._name_of, keys))
        keys_of, fresh = self._table.keys, []
        self._numbers.update(dict(zip(keys, self._table.numbers_of(names), strict=True)))
        for key, number in zip(keys, map(self._numbers.__getitem__, keys), strict=True):
            others = keys_of[number]
            if not others:
                fresh.append(number)
                keys_of[number] = (key,)
            elif key not in others:  # else it was given twice
                keys_of[number] = (*others, key)
        fresh.reverse()
        self._table.visits.arrive(fresh)

    def touch(self, keys: list[K]) -> None:
        """Blocks that a request told of stay as they are; others are the newest of their kind again."""
        numbers = dict.fromkeys(number for number in map(self._numbers.get, keys) if number is not None)
        self._table.visits.touch(list(reversed(numbers)))

    def renew(self, keys: list[K]) -> None:
        """The same: it is the request's end that tells."""
        self.touch(keys)

    def discard(self, keys: list[K]) -> None:
        """Forget keys; their blocks are remembered for a while."""
        keys_of, gone = self._table.keys, []
        for key, number in zip(keys, list(map(self._numbers.pop, keys, repeat(None))), strict=True):
            if number is None:
                continue
            others = keys_of[number]
            if len(others) == 1:
                keys_of[number] = ()
                gone.append(number)
            else:
                keys_of[number] = tuple([other for other in others if other is not key])
        if gone:
            self._table.forget(self._table.visits.leave(gone))

    hold = discard

    def release(self, keys: list[K], hits: int) -> None:
        """Make held keys members again."""
        self.add(keys, hits)

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Take what names the block of a key."""
        self._name_of = name_of

    def victims(self, n: int) -> list[K]:
        """Return the `n` keys that are worth least. O(n) where most blocks have keys here."""
        n = min(n, len(self._numbers))
        keys_of, ask = self._table.keys, n
        while n > 0:
            numbers = self._table.visits.victims(ask)
            found = list(filter(self._numbers.__contains__, chain.from_iterable(map(keys_of.__getitem__, numbers))))
            if len(found) >= n:
                return found[:n]
            ask *= 2
        return []

    def members(self) -> list[K]:
        """Return every key."""
        return list(self._numbers)

    def is_empty(self) -> bool:
        """True if it has no key."""
        return not self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers


class Outlook(Ranked[K]):
    """Evict what is least likely to be used again in the time it would be held, lower priorities first."""

    def __init__(self) -> None:
        self._table: BlockTable[K] = BlockTable()
        self._open: OrderedMap[int, PromptUse] = OrderedMap()
        self._reasons: dict[str, int] = {}
        super().__init__(self._new_outlook_order)

    def used(self, use: PromptUse, now: float) -> None:
        """Remember a request until it ends; when there are too many, the end of the oldest is not awaited."""
        self._table.visits.advance(now)
        self._open[use.id] = use
        if len(self._open) > MOST_OPEN:
            _, oldest = self._open.popitem(last=False)
            self._visit(oldest, Ending(), now)

    def ended(self, request_id: int, ending: Ending, now: float) -> None:
        """Learn from a request, which has ended. O(blocks of its prompt)."""
        use = self._open.pop(request_id, None)
        if use is not None:
            self._visit(use, ending, now)

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys; what was learned stays, who used what last is forgotten."""
        learned = self._table.visits.counts()
        self._open.clear()
        self._table = BlockTable()
        with suppress(ValueError):  # an exception may have come into the middle of anything
            self._table.visits.restore(*learned)
        super().rebuild(keys, now)

    def worth(self, keys: Sequence[K], now: float) -> list[float]:
        """Return the uses per second, at best, that are to be expected of each key's block."""
        names = keys if self._name_of is None else map(self._name_of, keys)
        return self._table.visits.worth(self._table.known(names), now)

    def num_worthy(
        self, request_id: int, keys: Sequence[K], victims: Sequence[K], now: float, priority: int = 0
    ) -> int:
        """Return how many of the first of `keys` are worth what the victims beside them are."""
        use = self._open.get(request_id)
        if use is None:
            return len(keys)
        names = list(keys if self._name_of is None else map(self._name_of, keys))
        visits, last_turn = self._table.visits, UNKNOWN if use.last_turn is None else int(use.last_turn)
        prospects = visits.prospects(*self._table.last_known(use.path), self._table.known(names), now, last_turn)
        bars = self.worth(victims, now)
        order = self._orders.get(priority, ())
        for at, (prospect, bar, victim) in enumerate(zip(prospects, bars, victims, strict=False)):
            if prospect < bar and victim in order:
                return at
        return len(keys)

    def tables(self) -> dict[str, Any]:
        """Return what was learned, for JSON."""
        return tables_of(self._table.visits.counts()) | {"finish_reasons": dict(self._reasons)}

    def restore(self, tables: dict[str, Any]) -> None:
        """Take in what `tables` gave, in place of all that was learned; who used what last is forgotten.

        Raises ValueError for anything else.
        """
        reasons, table = reasons_of(tables), BlockTable[K]()
        table.visits.restore(*counts_of(tables))
        self._table, self._reasons = table, reasons
        for priority, order in list(self._orders.items()):
            self._orders[priority] = self._make_order()
            self._orders[priority].add(order.members(), 0)

    def beliefs(self, tables: dict[str, Any]) -> list[Belief]:
        """Say what such tables mean, the classes that were seen most first."""
        return beliefs(tables)

    def _new_outlook_order(self) -> OutlookOrder[K]:
        return OutlookOrder(self._table)

    def _visit(self, use: PromptUse, ending: Ending, now: float) -> None:
        last_turn = use.last_turn if ending.last_turn is None else ending.last_turn
        forgotten = self._table.visits.visit(
            self._table.numbers_of(list(use.path)),
            now,
            self._number_of(ending.finish_reason) if ending.finish_reason else UNKNOWN,
            UNKNOWN if last_turn is None else int(last_turn),
            ending.reply_tokens,
        )
        if forgotten:
            self._table.forget(forgotten)

    def _number_of(self, reason: str) -> int:
        """The number of a finish reason; callers choose the words, so those after MOST_REASONS share one."""
        if reason not in self._reasons:
            if len(self._reasons) >= MOST_REASONS:
                return MOST_REASONS
            self._reasons[reason] = len(self._reasons)
        return self._reasons[reason]

"""The base of all policies here: priorities, and keys that were told to leave first.

A policy is a stack of orders, one for each priority in use, the lowest asked first. An `Order` is the algorithm proper
(recency, SIEVE, ...) and knows of neither priorities nor time. Nearly always there is one order, of priority 0, and
each call here is one call there.

    demoted        [k k k]          leave before all others; a use brings them back to their order
    priority -1    order            an order lives while it has keys (0 always)
    priority  0    order
    priority  7    order
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Generic, Protocol, TypeVar

from eviction.policy import NO_HINT, Hint, K
from radix.ordered import OrderedMap

KeyT = TypeVar("KeyT")


class Order(Protocol[KeyT]):
    """A ranking of keys that all have one priority. One that inherits from it may leave out what has a body here."""

    def add(self, keys: list[KeyT], hits: int) -> None:
        """Take keys in, in this order. A known key is touched. `hits`: uses before, see `Hint`."""

    def touch(self, keys: list[KeyT]) -> None:
        """Note a use of keys, in this order. Unknown keys are ignored."""

    def discard(self, keys: list[KeyT]) -> None:
        """Forget keys. Unknown keys are ignored."""

    def hold(self, keys: list[KeyT]) -> None:
        """Known keys are in use: no members until released."""
        self.discard(keys)

    def release(self, keys: list[KeyT], hits: int) -> None:
        """Make held keys members again; add the others."""
        self.add(keys, hits)

    def renew(self, keys: list[KeyT]) -> None:
        """Make known keys as young as if they came now, without counting a use."""
        self.touch(keys)

    def name_by(self, name_of: Callable[[KeyT], Hashable]) -> None:
        """Take what names keys for longer than they live."""

    def victims(self, n: int) -> list[KeyT]:
        """Return up to `n` keys in the order in which they should leave; asking again gives the same."""

    def members(self) -> list[KeyT]:
        """Return every key, roughly the next to leave first."""

    def is_empty(self) -> bool:
        """True if it has no key, not even a held one."""
        return not len(self)

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...


def all_new(keys: list[KeyT], *queues: Mapping[KeyT, object]) -> bool:
    """True if none of the queues has one of the keys: nearly always so, and seen in C."""
    return not any(any(map(queue.__contains__, keys)) for queue in queues)


class Ranked(Generic[K]):
    """An EvictionPolicy over orders of one kind. Subclasses say which. O(1) per key for each priority in use."""

    def __init__(self, new_order: Callable[[], Order[K]]) -> None:
        self._new_order = new_order
        self._name_of: Callable[[K], Hashable] | None = None
        self._orders: dict[int, Order[K]] = {0: new_order()}  # lowest priority first
        self._demoted: OrderedMap[K, int] = OrderedMap()  # next to leave first; the priority to come back to

    def add(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Take keys in, in this order. A known key is touched, and gets the priority of this hint."""
        keys = list(keys)
        order = self._order(hint.priority)
        if self._demoted or len(self._orders) > 1:
            self._leave_others(keys, order)
        order.add(keys, hint.hits)

    def touch(self, keys: Iterable[K], now: float) -> None:
        """Note a use of keys, in this order. Unknown keys are ignored; demoted ones are no longer demoted."""
        keys = list(keys)
        if self._demoted:
            for key in keys:
                priority = self._demoted.pop(key, None)
                if priority is not None:
                    self._order(priority).add([key], 0)
        for order in self._orders.values():
            order.touch(keys)

    def demote(self, keys: Iterable[K]) -> None:
        """Make keys the next victims whatever their priority, the first of them first. Unknown keys are ignored."""
        known = [key for key in dict.fromkeys(keys) if key in self]
        for key in reversed(known):
            if key not in self._demoted:
                priority, order = next((p, order) for p, order in self._orders.items() if key in order)
                order.discard([key])
                self._demoted[key] = priority
            self._demoted.move_to_end(key, last=False)

    def discard(self, keys: Iterable[K]) -> None:
        """Forget keys. Unknown keys are ignored."""
        keys = list(keys)
        for key in keys if self._demoted else ():
            self._demoted.pop(key, None)
        for order in self._orders.values():
            order.discard(keys)
        self._drop_empty()

    def hold(self, keys: Iterable[K]) -> None:
        """Keys are in use: no members until released. Demoted ones are forgotten: it is a use."""
        keys = list(keys)
        for key in keys if self._demoted else ():
            self._demoted.pop(key, None)
        for order in self._orders.values():
            order.hold(keys)

    def release(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Make held keys members again, with the priority of this hint; add those that are not held."""
        keys = list(keys)
        order = self._order(hint.priority)
        if self._demoted or len(self._orders) > 1:
            self._leave_others(keys, order)
        order.release(keys, hint.hits)

    def renew(self, keys: Iterable[K], now: float) -> None:
        """Make known keys as young as if they came now, without counting a use."""
        keys = list(keys)
        if self._demoted:
            self.touch(list(filter(self._demoted.__contains__, keys)), now)
        for order in self._orders.values():
            order.renew(keys)

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Take what names keys for longer than they live; before any key comes."""
        self._name_of = name_of
        for order in self._orders.values():
            order.name_by(name_of)

    def victims(self, n: int) -> list[K]:
        """Return up to `n` keys in the order in which they should leave; membership does not change."""
        found = list(islice(self._demoted, max(n, 0)))
        for order in self._orders.values():
            if len(found) >= n:
                break
            found += order.victims(n - len(found))
        return found

    def members(self) -> list[K]:
        """Return every key, roughly the next to leave first."""
        return [*self._demoted, *(key for order in self._orders.values() for key in order.members())]

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys, in this order; what was told to leave first still does."""
        kept = dict(keys)
        demoted = [key for key in self._demoted if key in kept]
        self._orders, self._demoted = {0: self._make_order()}, OrderedMap()
        for hint, group in groupby(keys, key=lambda item: item[1]):
            self.add([key for key, _ in group], now, hint)
        self.demote(demoted)

    def expired(self, now: float, limit: int | None = None) -> list[K]:
        """Return nothing: no deadlines here, see `Ttl`."""
        return []

    def overdue(self, keys: Iterable[K], now: float, limit: int | None = None) -> list[K]:
        """Return nothing."""
        return []

    def __len__(self) -> int:
        return len(self._demoted) + sum(map(len, self._orders.values()))

    def __contains__(self, key: object) -> bool:
        return key in self._demoted or any(key in order for order in self._orders.values())

    def _order(self, priority: int) -> Order[K]:
        order = self._orders.get(priority)
        if order is None:
            order = self._make_order()
            self._orders = dict(sorted([*self._orders.items(), (priority, order)], key=lambda item: item[0]))
        return order

    def _make_order(self) -> Order[K]:
        order = self._new_order()
        if self._name_of is not None:
            order.name_by(self._name_of)
        return order

    def _leave_others(self, keys: list[K], target: Order[K]) -> None:
        for key in keys:
            self._demoted.pop(key, None)
        for order in self._orders.values():
            if order is not target:
                order.discard(keys)

    def _drop_empty(self) -> None:
        if len(self._orders) > 1:
            self._orders = {p: order for p, order in self._orders.items() if p == 0 or not order.is_empty()}

"""The breakers of one lane: one for the tier as a whole, and one for each direction.

    no answer (a timeout, a connection that breaks)   counts against the whole tier, and against its direction
    a refusal, an error of the medium, a bug          counts against its direction alone
    an answer                                         speaks for the whole tier, and for its own operation

While the whole tier is open nothing goes there; while a direction is, the others go on. Each is tested by itself: the
tier by its ping, a direction by the tier's `probe`, since a ping proves nothing about writes.

The hard thing: a direction has several operations (a lookup asks, a load fetches), and one may be refused while the
other is answered. So failures in a row are counted for each operation. And a probe may be answered where the work is
not (a value is larger than any probe): after a direction has been closed again, the first failure of what had failed
opens it at once, with a longer back-off. Pure; under the lane's lock.
"""

from __future__ import annotations

from kvstore.direction import Direction
from kvstore.move.breaker import Breaker
from kvstore.plan.records import Op

DIRECTION_OF = {
    Op.PROBE: Direction.READ,
    Op.FETCH: Direction.READ,
    Op.SPILL: Direction.WRITE,
    Op.TOUCH: Direction.TOUCH,
    Op.DELETE: Direction.DELETE,
    Op.CLEAR: Direction.DELETE,
    Op.CLAIM: Direction.CLAIM,
    Op.UNCLAIM: Direction.CLAIM,
}
OPS_OF = {way: tuple(op for op, its in DIRECTION_OF.items() if its is way) for way in Direction}


class Directions:
    """The directions in which transfers may be sent to a tier. Under the lane's lock.

    whole:    the breaker of the tier; nothing passes while it is not closed.
    breakers: those of the directions, with the same numbers.
    """

    def __init__(self, whole: Breaker) -> None:
        self.whole = whole
        self.breakers = {way: whole.sibling() for way in Direction}
        self.reasons: dict[Direction, str] = {}
        self._in_row: dict[Op, int] = {}  # failures since the last answer

    def allows(self, op: Op) -> bool:
        """True if transfers of this kind may be sent."""
        return self.whole.allow() and self.breakers[DIRECTION_OF[op]].allow()

    @property
    def open_ways(self) -> frozenset[Direction]:
        """The directions in which transfers may be sent now."""
        if not self.whole.allow():
            return frozenset()
        return frozenset(way for way, breaker in self.breakers.items() if breaker.allow())

    @property
    def num_opened(self) -> int:
        """How often the tier, or a direction of it, was taken out."""
        return self.whole.num_opened + sum(breaker.num_opened for breaker in self.breakers.values())

    def answered(self, op: Op) -> None:
        """Note that a transfer was answered."""
        if not self.allows(op):
            return  # an answer to what began before it opened says nothing about now
        self.whole.success()
        self._in_row.pop(op, None)
        way = DIRECTION_OF[op]
        if not any(other in self._in_row for other in OPS_OF[way]):
            self.breakers[way].success()

    def refused(self, op: Op, reason: str) -> None:
        """Note that the tier answered and did not do it; the last of several in a row opens the direction.

        reason: the words in which the medium said so.
        """
        self.whole.success()
        self._count(op, reason)

    def unanswered(self, op: Op, reason: str) -> None:
        """Note that no answer came; several in a row open the tier, or the direction if others are answered."""
        if not self.allows(op):
            return
        self.whole.failure()
        if self.whole.allow():
            self._count(op, reason)

    def due(self, now: float) -> list[Direction]:
        """The directions that it is time to test; none while the whole tier is out."""
        return [way for way, breaker in self.breakers.items() if breaker.due(now)] if self.whole.allow() else []

    def probed(self, way: Direction, reason: str | None) -> None:
        """Note how the test of a direction ended; reason: None if it was done."""
        self.breakers[way].probed(reason is None)
        if reason is None:
            self.reasons.pop(way, None)
        else:
            self.reasons[way] = reason

    def _count(self, op: Op, reason: str) -> None:
        if not self.allows(op):
            return
        way = DIRECTION_OF[op]
        limit = self.whole.failures_to_open
        count = self._in_row[op] = self._in_row.get(op, 0) + 1
        if count >= limit:
            self._in_row[op] = limit - 1  # closed again, it is on probation until this operation is answered
            self.reasons[way] = reason
            self.breakers[way].trip()

"""Which connections a server has, and which of them goes when there are too many.

A connection that says nothing costs a descriptor. There may be so many, and when one more comes, the one goes that is
least of a loss: one that has not sent a whole request yet, else one that waits for its next request, else one whose
body is still on its way, else one that takes nothing of its answer. One that is being worked for never goes; if there
are only such, the new one is refused. So silent connections push each other out, and whoever really asks is answered.

One address may have half of the places, and pushes out its own first. The event loop only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import IntEnum


class State(IntEnum):
    """The use of a connection; a lower one is less of a loss."""

    NEW = 0
    IDLE = 1
    READING = 2
    STALLED = 3
    BUSY = 4


class Connection:
    """One connection, from its accept to its end. drop: ends it at once."""

    __slots__ = ("_among", "drop", "peer", "state")

    def __init__(self, among: Connections, peer: str, drop: Callable[[], object]) -> None:
        self.peer = peer
        self.drop = drop
        self.state = State.NEW
        self._among = among

    def move(self, state: State) -> None:
        """It does something else now. Nothing after `leave`."""
        self._among.move(self, state)

    def leave(self) -> None:
        """It has ended, or is counted elsewhere from now on. Idempotent."""
        self._among.leave(self)


class Connections:
    """All connections of one kind.

    most:         so many there may be; most_of_peer of one address.
    num_dropped:  those that had to make room; num_refused: those that found none.
    """

    def __init__(self, most: int, most_of_peer: int | None = None) -> None:
        self.most = most
        self.num_dropped = 0
        self.num_refused = 0
        self._most_of_peer = most if most_of_peer is None else most_of_peer
        self._in: list[dict[Connection, None]] = [{} for _ in State]  # each in the order in which they came there
        self._of_peer: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._in))

    def enter(self, peer: str, drop: Callable[[], object]) -> Connection | None:
        """One more; None if there is no room for it, and none can be made."""
        crowded = self._of_peer[peer] >= self._most_of_peer
        if (crowded or len(self) >= self.most) and not self.drop_one(peer if crowded else None):
            self.num_refused += 1
            return None
        connection = Connection(self, peer, drop)
        self._in[connection.state][connection] = None
        self._of_peer[peer] += 1
        return connection

    def drop_one(self, peer: str | None = None) -> bool:
        """End the connection that is least of a loss, of this address if one is given; False if there is none."""
        for state in range(State.BUSY):
            for connection in self._in[state]:
                if peer is None or connection.peer == peer:
                    self.leave(connection)
                    self.num_dropped += 1
                    connection.drop()
                    return True
        return False

    def move(self, connection: Connection, state: State) -> None:
        """See Connection.move."""
        if connection in self._in[connection.state]:
            del self._in[connection.state][connection]
            connection.state = state
            self._in[state][connection] = None

    def leave(self, connection: Connection) -> None:
        """See Connection.leave."""
        if connection in self._in[connection.state]:
            del self._in[connection.state][connection]
            self._of_peer[connection.peer] -= 1
            if not self._of_peer[connection.peer]:
                del self._of_peer[connection.peer]

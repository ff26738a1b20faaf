"""The transfers that wait in a lane: by priority, then first come first served.

Pure; under the lane's lock. One ordered dictionary per priority makes every operation O(1), cancelling included, and
leaves nothing behind of what was cancelled or expired while no worker was there to pop it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from kvstore.plan.records import Op, Priority, Transfer


class Backlog:
    """Bounded waiting lines, one per priority: many saves that wait never keep a load out.

    max_per_priority: transfers of one priority that may wait.
    """

    def __init__(self, max_per_priority: int) -> None:
        self._max = max_per_priority
        self._lines: dict[Priority, OrderedDict[int, Transfer]] = {p: OrderedDict() for p in sorted(Priority)}

    def push(self, transfer: Transfer) -> bool:
        """Add at the end of its line; False if the line is full. One that waits there already is left where it is."""
        line = self._lines[transfer.priority]
        if transfer.id in line:
            return True
        if len(line) >= self._max:
            return False
        line[transfer.id] = transfer
        return True

    def pop(self, without: Collection[Priority] = ()) -> Transfer | None:
        """Remove and return the next transfer, of a priority that is not in `without`; None if there is none."""
        for priority, line in self._lines.items():
            if line and priority not in without:
                return line.popitem(last=False)[1]
        return None

    def remove(self, transfer_id: int) -> Transfer | None:
        """Remove one by its id; None if it does not wait here."""
        for line in self._lines.values():
            if transfer_id in line:
                return line.pop(transfer_id)
        return None

    def promote(self, transfer_id: int) -> None:
        """Move a waiting prefetch to the end of the loads: a request waits for it now. Unknown ids are ignored."""
        transfer = self._lines[Priority.PREFETCH].pop(transfer_id, None)
        if transfer is not None:
            self._lines[Priority.LOAD][transfer_id] = transfer

    def remove_expired(self, now: float) -> list[Transfer]:
        """Remove and return those whose deadline has come. O(n)."""
        expired = [t for line in self._lines.values() for t in line.values() if t.deadline <= now]
        for transfer in expired:
            self.remove(transfer.id)
        return expired

    def clear(self, ops: Collection[Op] = tuple(Op)) -> list[Transfer]:
        """Remove and return all, or those of some operations. O(n)."""
        waiting = [t for line in self._lines.values() for t in line.values() if t.op in ops]
        for transfer in waiting:
            self.remove(transfer.id)
        return waiting

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

"""What tests of lanes and movers share: makers of transfers, and a recorder of what becomes of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from kvstore.direction import Direction
from kvstore.move.lane import Event, TierState
from kvstore.page import PageKey, PageMeta
from kvstore.plan.records import Op, Outcome, Priority, Transfer
from kvstore.testing.pages import keys_of
from tests.helpers.waiting import WAIT_S as WAIT_S
from tests.helpers.waiting import wait_until as wait_until

SLOT_BYTES = 4096
PAGE_BYTES = 1000
NUM_SLOTS = 64
FOREVER = float("inf")


class Recorder:
    """Collects outcomes and tier states from any thread."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.threads: list[str] = []
        self.states: list[tuple[str, bool]] = []
        self.reasons: list[str] = []
        self.directions: list[frozenset[Direction]] = []
        self.changes: list[TierState] = []
        self._changed = threading.Condition()

    def outcome(self, outcome: Outcome) -> None:
        with self._changed:
            self.outcomes.append(outcome)
            self.threads.append(threading.current_thread().name)
            self._changed.notify_all()

    def state(self, state: TierState) -> None:
        with self._changed:
            self.reasons.append(state.reason)
            self.states.append((state.tier, state.is_up))
            self.directions.append(state.directions)
            self.changes.append(state)
            self._changed.notify_all()

    def event(self, event: Event) -> None:
        if isinstance(event, TierState):
            self.state(event)
        else:
            self.outcome(event)

    def wait(self, num_outcomes: int = 0, num_states: int = 0) -> list[Outcome]:
        """Block until so many came; AssertionError if they do not."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: len(self.outcomes) >= num_outcomes and len(self.states) >= num_states, WAIT_S
            )
            assert came, f"{len(self.outcomes)} outcomes and {len(self.states)} states: {self.outcomes}"
            return list(self.outcomes)

    def of(self, transfer_id: int) -> Outcome:
        """The one outcome of a transfer."""
        (outcome,) = [o for o in self.outcomes if o.transfer_id == transfer_id]
        return outcome


class Transfers:
    """Makes transfers with ids of their own."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._ids = itertools.count(1)

    def __call__(
        self,
        op: Op,
        keys: Sequence[PageKey] | int = 1,
        *,
        priority: Priority | None = None,
        deadline: float = FOREVER,
        first_slot: int = 0,
        tier: str | None = None,
    ) -> Transfer:
        keys = tuple(keys_of("page", keys) if isinstance(keys, int) else keys)
        moves = op in (Op.FETCH, Op.SPILL)
        if priority is None:
            priority = Priority.SAVE if op is Op.SPILL else Priority.LOAD
        return Transfer(
            id=next(self._ids),
            op=op,
            tier=tier or self._tier,
            keys=keys,
            priority=priority,
            deadline=deadline,
            slots=tuple(range(first_slot, first_slot + len(keys))) if moves else (),
            metas=(PageMeta(PAGE_BYTES),) * len(keys) if moves else (),
        )

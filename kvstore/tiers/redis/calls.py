"""One call of the tier, carried to the nodes that its keys lie on.

The call is repeated where the cluster has changed meanwhile. A node that refuses says nothing about the others: their
keys are served. What breaks a connection puts all of them in doubt, and the next call starts with new ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvstore.errors import TierRefused, TierUnavailable
from kvstore.tiers.redis.connection import Wire
from kvstore.tiers.redis.refusal import STALE, SlotMoved
from kvstore.tiers.redis.route import Node, Route

TRIES = 3  # while slots move: the old table, the new one, and once more where nodes do not agree yet

Work = Callable[[Wire, list[int]], None]


class Calls:
    """Calls work with a wire to each node. Any thread.

    count: notes refused, redirects, timeouts and failures.
    """

    def __init__(self, route: Route, count: Callable[[str], None]) -> None:
        self._route = route
        self._count = count

    def on_each_node(
        self,
        heads: Sequence[bytes],
        timeout_s: float,
        work: Work,
        *,
        all_nodes: bool = False,
        repeatable: bool = True,
    ) -> None:
        """Call `work` with a wire to each node and the indexes of its keys; again if the cluster has changed.

        all_nodes:  it is an error if one node refuses; otherwise only if all do, and the others' keys are served.
        repeatable: what `work` asks first may be asked twice, when an idle connection turns out to be dead.

        Raises TierRefused, or TierUnavailable.
        """
        if not heads:
            return
        deadline = time.monotonic() + timeout_s
        try:
            for _ in range(TRIES):
                if self._try_nodes(heads, deadline, work, all_nodes, repeatable):
                    return
            raise TierUnavailable(f"redis cluster: slots moved {TRIES} times during one call")
        except TierRefused:
            raise  # the server answered: its connections are as good as they were
        except TierUnavailable:
            # Whatever went wrong, connections and the table of slots are in doubt: the next call starts afresh.
            self._route.forget()
            self._count("timeouts" if time.monotonic() >= deadline else "failures")
            raise

    def _try_nodes(
        self, heads: Sequence[bytes], deadline: float, work: Work, all_nodes: bool, repeatable: bool
    ) -> bool:
        groups = self._route.split(heads, deadline)
        try:
            tried = [self._try(node, indexes, deadline, work, repeatable) for node, indexes in groups]
        except SlotMoved:
            return False
        refusals = [refusal for refusal in tried if refusal is not None]
        if any(refusal.reason in STALE for refusal in refusals):
            self._route.forget()
        if refusals and (all_nodes or len(refusals) == len(groups)):
            raise refusals[0]
        return True

    def _try(self, node: Node, indexes: list[int], deadline: float, work: Work, repeatable: bool) -> TierRefused | None:
        try:
            with node.lease(deadline, repeatable=repeatable) as wire:
                work(wire, indexes)
        except SlotMoved as moved:
            self._count("redirects")
            self._route.moved(moved.address, node)
            raise
        except TierRefused as refusal:
            self._count("refused")
            return refusal
        return None

"""One call of the tier, carried to the nodes that its keys lie on.

The call is repeated where the cluster has changed meanwhile. A node that refuses, or is not reached, says nothing about
the others: their keys are served, and its own are not there. What breaks a connection puts all of them in doubt, and
the next call starts with new ones. A node that was not reached is left alone for a while, or each call would wait for
it; only where none is reached the tier is out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.errors import TierRefused, TierUnavailable
from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.node import Node
from kvstore.tiers.redis.refusal import STALE, SlotMoved
from kvstore.tiers.redis.route import ServerRoute

OUT_S = 1.0  # doubles while a node is not reached
MAX_OUT_S = 30.0
UNREACHED = "UNREACHED"  # reason of a refusal: a node of several
TRIES = 3  # while slots move: the old table, the new one, and once more where nodes do not agree yet

Work = Callable[[RedisConnection, list[int]], None]


@dataclass(frozen=True, slots=True)
class _Out:
    """A node that was not reached: why, for how long it is left alone, and until when."""

    error: TierUnavailable
    for_s: float
    until: float


class NodeCalls:
    """Calls work with a wire to each node. Any thread.

    count: notes refused, redirects, timeouts and failures.
    """

    def __init__(self, route: ServerRoute, count: Callable[[str], None]) -> None:
        self._route = route
        self._count = count
        self._out: dict[str, _Out] = {}  # nodes that were not reached, by name
        self._ask_again_at = 0.0  # for the table of slots, where it has gaps or names a node that is not reached

    def on_a_node(self, timeout_s: float, work: Callable[[RedisConnection], None]) -> None:
        """Call `work` with a wire to one node after the other, until one has done it. Raises TierUnavailable.

        Somebody wants to know: the next call tries those again that were left alone.
        """
        for name, out in list(self._out.items()):
            self._out[name] = replace(out, until=0.0)
        deadline = time.monotonic() + timeout_s
        try:
            nodes = self._route.nodes(deadline)
            for place, node in enumerate(nodes):
                now = time.monotonic()
                try:
                    with node.lease(now + (deadline - now) / (len(nodes) - place), repeatable=True) as wire:
                        work(wire)
                    return
                except TierUnavailable:
                    if place + 1 == len(nodes):
                        raise
        except TierUnavailable:
            self._route.forget()
            raise

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

        all_nodes:  it is an error if one node refuses or is not reached; otherwise only if all do, or none is, and the
                    others' keys are served.
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
        tried: list[TierRefused | None] = []
        unreached: list[TierUnavailable] = []
        if sum(len(indexes) for _, indexes in groups) < len(heads):
            unreached.append(TierUnavailable("redis cluster: some slots have no node"))
            self._ask_again()
        try:
            # Those in doubt last, and each with its share of the time: one that does not answer takes all it has.
            groups.sort(key=lambda group: group[0].where in self._out)
            for place, (node, indexes) in enumerate(groups):
                now = time.monotonic()
                out = self._out.get(node.where)
                if out is not None and now < out.until:
                    unreached.append(out.error)
                    self._ask_again()
                    continue
                until = now + (deadline - now) / (len(groups) - place)
                try:
                    tried.append(self._try(node, indexes, until, work, repeatable))
                except TierUnavailable as error:
                    unreached.append(error)
                    self._leave_alone(node, error)
                else:
                    self._out.pop(node.where, None)
        except SlotMoved:
            return False
        refusals = [refusal for refusal in tried if refusal is not None]
        if any(refusal.reason in STALE for refusal in refusals):
            self._route.forget()
        if unreached and not tried and self._route.names <= set(self._out):
            raise unreached[0]
        if unreached and all_nodes:
            raise TierRefused(str(unreached[0]), UNREACHED)  # the others are there: it judges this direction alone
        if refusals and (all_nodes or len(refusals) == len(groups)):
            raise refusals[0]
        return True

    def _ask_again(self) -> None:
        """Slots are served by nobody: they may have been given to another node by now. Asked for once a second."""
        if time.monotonic() >= self._ask_again_at:
            self._ask_again_at = time.monotonic() + OUT_S
            self._route.relearn()

    def _leave_alone(self, node: Node, error: TierUnavailable) -> None:
        """A node was not reached. The table of slots is in doubt as well: another may have taken its place."""
        before = self._out.get(node.where)
        for_s = OUT_S if before is None else min(2 * before.for_s, MAX_OUT_S)
        if self._route.names <= {node.where}:
            for_s = 0.0  # the only one: the lane's breaker is enough
        else:
            self._route.relearn()
            self._count("failures")
        self._out[node.where] = _Out(error, for_s, time.monotonic() + for_s)

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

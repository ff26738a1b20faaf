"""Questions and changes of operators to a store while requests run: `store.admin`.

The daemon's API and dashboard are made of it; no connector needs it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from eviction.policy import Belief
from kvstore.dispatcher import Dispatcher
from kvstore.errors import ConfigError
from kvstore.forks import forbid
from kvstore.move.lane import Lane
from kvstore.plan.journal import Shortfall
from kvstore.plan.keeper import Kept
from kvstore.plan.prefixes import Tour
from kvstore.plan.records import Explanation, Request
from kvstore.plan.tier_plan import TierPlan
from kvstore.tiers.base import CLEARED, Sweepable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PolicyView:
    """The policy of a tier.

    beliefs: what it has learned of each class, the most seen first; None if it learns nothing.
    """

    tier: str
    policy: str
    beliefs: list[Belief] | None


class Admin:
    """The operator's verbs. Any thread."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._planner = dispatcher.planner
        self._lock = dispatcher.lock
        forbid(self)

    # ---- what is asked ----------------------------------------------------------------------------------------

    def explain(self, request: Request) -> Explanation:
        """Why a request matches what it matches, and not more."""
        with self._lock:
            self._dispatcher.check_open()
            return self._planner.explain(request)

    def shortfalls(self) -> list[Shortfall]:
        """The last lookups that fell short, oldest first; nothing without a journal."""
        with self._lock:
            journal = self._planner.books.catalog.journal
            return [] if journal is None else list(journal.shortfalls)

    def kept(self) -> list[Kept]:
        """The pages that pins and `retain_until` keep in host memory: whose, how many, until when (Unix time)."""
        with self._lock:
            self._dispatcher.settle()
            clock = self._planner.books.clock
            ahead_s = clock.wall() - clock.boot()
            return [replace(one, until=one.until + ahead_s) for one in self._planner.retention.keeper.holders]

    def beliefs(self) -> list[PolicyView]:
        """The policy of each tier and what it believes. Some 0.1 s of CPU where much was learned, without the lock."""
        with self._lock:
            self._dispatcher.check_open()
            found = [
                (tier, policy, policy.learner, None if policy.learner is None else policy.learner.tables())
                for tier, policy in self._planner.books.policies()
            ]
        views = []
        for tier, policy, learner, tables in found:
            beliefs: list[Belief] | None = None
            if learner is not None and tables is not None:
                try:
                    beliefs = learner.beliefs(tables)
                except Exception:  # somebody else's policy may raise anything
                    log.exception("policy %s of tier %s does not say what it believes", policy.name, tier)
                    beliefs = []
            views.append(PolicyView(tier, policy.name, beliefs))
        return views

    def guide(self, tour: Tour, max_blocks: int = 2048) -> bool:
        """One step of a walk over everything that is stored; True when it is over. See kvstore/plan/prefixes.py."""
        with self._lock:
            self._dispatcher.check_open()
            return tour.step(self._planner.books, max_blocks, self._dispatcher.now())

    # ---- what is changed --------------------------------------------------------------------------------------

    def clear(self) -> int:
        """Delete everything that is stored; returns how many blocks were known.

        Tiers without an index (Redis) delete what they find of this namespace, whoever wrote it; that takes a walk over
        the whole server. As with `forget`, a delete is acknowledged by the next true `flush`, and owed until then.
        """
        return self._dispatcher.carry_out(self._planner.in_steps.clear(self._dispatcher.now()), tell=True)

    def undeleted(self, *, at_once: bool = False) -> dict[str, int] | None:
        """How many deletes tiers are owed, by tier, a clear counting as one; none where all is deleted.

        None while some can be done that are not, unless it is asked for `at_once`. Ask after each change (`listen`).
        """
        with self._lock:
            tiers, now = self._planner.books.tiers, self._dispatcher.now()
            if not at_once and any(tier.is_deleting(now) for tier in tiers):
                return None
            return {tier.plan.name: len(tier.deletes) for tier in tiers if len(tier.deletes)}

    def cleared_keys(self) -> dict[str, int]:
        """How many keys the clears of tiers have deleted that know themselves what they have."""
        tiers = [lane.tier for lane in self._dispatcher.lanes.values()]
        return {tier.name: tier.counters.extra.get(CLEARED, 0) for tier in tiers if isinstance(tier, Sweepable)}

    def resize_host(self, num_slots: int) -> None:
        """Use `num_slots` of the slots; memory of the others goes back to the system as they come free."""
        most = self._planner.books.host.pool.num_slots
        if not 1 <= num_slots <= most:
            raise ConfigError(f"host: {num_slots} slots are asked for; the slab has 1 to {most}")
        self._dispatcher.carry_out(self._planner.in_steps.resize_host(num_slots))
        with self._lock:
            self._dispatcher.free_retired()

    def attach_tier(self, lane: Lane, plan: TierPlan) -> None:
        """Take up one more tier. Raises ConfigError if there is one of its name."""
        stored = [(page.key, page.meta) for page in lane.tier.scan()]
        with self._lock:
            self._dispatcher.check_open()
            self._dispatcher.mover.add(lane)
            with self._dispatcher.step():
                self._planner.attach_tier(plan)
        steps = self._planner.restoring(lane.name, stored)
        is_over = False
        while not is_over:
            with self._lock, self._dispatcher.step(tell=True):
                is_over = next(steps, None) is None

    def detach_tier(self, name: str, timeout_s: float = 5.0) -> bool:
        """Take a tier away; its pages stay in the medium, and are a miss until it is back.

        False if a transfer still hangs in it after `timeout_s`: the tier is out of use, but not closed; call again.
        Raises ConfigError if there is no such tier.
        """
        with self._lock:
            self._dispatcher.check_open()
            lane = self._dispatcher.lanes.get(name)
            if lane is None:
                there = ", ".join(sorted(self._dispatcher.lanes)) or "none"
                raise ConfigError(f"there is no tier {name!r}; there are {there}")
            with self._dispatcher.step(tell=True):
                steps = self._planner.detaching_tier(name)
        self._dispatcher.carry_out(steps)
        if not self._dispatcher.mover.remove(name, timeout_s):
            return False
        lane.tier.close()
        return True

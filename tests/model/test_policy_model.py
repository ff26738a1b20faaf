"""Every eviction policy against a naive one: lists, sorting and pointers, written from the papers, slow and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from eviction.policy import Hint
from eviction.registry import make_policy

KEYS = "abcdefghij"
key_lists = st.lists(st.sampled_from(KEYS), max_size=5, unique=True)


class Naive(Protocol):
    """An order of one priority."""

    def add(self, key: str, hits: int) -> None: ...
    def touch(self, key: str) -> None: ...
    def drop(self, key: str) -> None: ...
    def victims(self, n: int) -> list[str]: ...


class NaiveLru:
    def __init__(self) -> None:
        self.keys: list[str] = []

    def add(self, key: str, hits: int) -> None:
        self.keys.append(key)

    def touch(self, key: str) -> None:
        self.keys.remove(key)
        self.keys.append(key)

    def drop(self, key: str) -> None:
        self.keys.remove(key)

    def victims(self, n: int) -> list[str]:
        return self.keys[:n]


class NaiveSieve:
    """One list from oldest to newest and the index of the hand, as in the paper."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.bit: dict[str, bool] = {}
        self.hand = 0
        self.condemned: list[str] = []

    def add(self, key: str, hits: int) -> None:
        self.queue.append(key)
        self.bit[key] = hits > 0

    def touch(self, key: str) -> None:
        if key not in self.condemned:
            self.bit[key] = True
            return
        self.condemned.remove(key)
        self.queue.insert(self.hand, key)  # just behind the hand, as if it had been passed over
        self.hand += 1
        self.bit[key] = False
        self.wrap()

    def drop(self, key: str) -> None:
        if key in self.condemned:
            self.condemned.remove(key)
            return
        at = self.queue.index(key)
        del self.queue[at]
        self.hand -= at < self.hand
        self.wrap()

    def victims(self, n: int) -> list[str]:
        while len(self.condemned) < n and self.queue:
            key = self.queue[self.hand]
            if self.bit[key]:
                self.bit[key] = False
                self.hand += 1
            else:
                self.condemned.append(self.queue.pop(self.hand))
            self.wrap()
        return self.condemned[:n]

    def wrap(self) -> None:
        if self.hand >= len(self.queue):
            self.hand = 0


class NaiveS3Fifo:
    """Queues as lists of [key, uses], oldest first."""

    def __init__(self) -> None:
        self.small: list[list[Any]] = []
        self.main: list[list[Any]] = []
        self.condemned: list[list[Any]] = []  # [key, came from small]
        self.ghost: list[str] = []
        self.most = 0

    def add(self, key: str, hits: int) -> None:
        if hits:
            self.main.append([key, min(hits, 3)])
        elif key in self.ghost:
            self.main.append([key, 0])
        else:
            self.small.append([key, 0])
        self.ghost = [ghost for ghost in self.ghost if ghost != key]
        self.most = max(self.most, len(self.small) + len(self.main) + len(self.condemned))

    def touch(self, key: str) -> None:
        for queue in (self.small, self.main):
            for entry in queue:
                if entry[0] == key:
                    entry[1] = min(entry[1] + 1, 3)
        if any(entry[0] == key for entry in self.condemned):
            self.condemned = [entry for entry in self.condemned if entry[0] != key]
            self.main.append([key, 0])

    def drop(self, key: str) -> None:
        if [key, True] in self.condemned:
            self.ghost = [*self.ghost, key][-self.most :]
        self.small = [entry for entry in self.small if entry[0] != key]
        self.main = [entry for entry in self.main if entry[0] != key]
        self.condemned = [entry for entry in self.condemned if entry[0] != key]

    def victims(self, n: int) -> list[str]:
        while len(self.condemned) < n and self.small + self.main:
            total = len(self.small) + len(self.main)
            if self.small and (10 * len(self.small) > total or not self.main):
                key, uses = self.small.pop(0)
                if uses >= 2:
                    self.main.append([key, 0])
                else:
                    self.condemned.append([key, True])
            else:
                key, uses = self.main.pop(0)
                if uses:
                    self.main.append([key, uses - 1])
                else:
                    self.condemned.append([key, False])
        return [key for key, _ in self.condemned[:n]]


class NaivePolicy:
    """Priorities, demotion and deadlines over naive orders, with a step for every key."""

    def __init__(self, order: Callable[[], Naive], ttl_s: float | None) -> None:
        self.new_order = order
        self.orders: dict[int, Naive] = {0: order()}
        self.priority: dict[str, int] = {}
        self.demoted: list[str] = []
        self.ttl_s = ttl_s
        self.ttl: dict[str, float] = {}
        self.most: dict[str, float] = {}  # what it had when its life, or what was left of it, began
        self.deadline: dict[str, float] = {}

    def add(self, key: str, now: float, hint: Hint) -> None:
        if key in self.demoted or (key in self.priority and self.priority[key] != hint.priority):
            self.leave(key)
        if key in self.priority:
            self.orders[hint.priority].touch(key)
        else:
            self.orders.setdefault(hint.priority, self.new_order()).add(key, hint.hits)
            self.priority[key] = hint.priority
        ttl = self.ttl_s if hint.ttl_s is None else hint.ttl_s
        self.ttl[key] = ttl or 0.0
        self.most[key] = (ttl or float("inf")) if hint.left_s is None else hint.left_s
        self.deadline[key] = now + self.most[key]

    def touch(self, key: str, now: float) -> None:
        if key not in self.priority:
            return
        order = self.orders.setdefault(self.priority[key], self.new_order())
        if key in self.demoted:
            self.demoted.remove(key)
            order.add(key, 0)
        order.touch(key)
        self.most[key] = self.ttl[key] or float("inf")
        self.deadline[key] = now + self.most[key]

    def set_back(self, now: float) -> None:
        """The clock was set back: nothing has more left than it began with."""
        self.deadline = {key: min(deadline, now + self.most[key]) for key, deadline in self.deadline.items()}

    def demote(self, keys: list[str]) -> None:
        for key in reversed(keys):
            if key in self.demoted:
                self.demoted.remove(key)
            elif key in self.priority:
                self.orders[self.priority[key]].drop(key)
            else:
                continue
            self.demoted.insert(0, key)

    def discard(self, key: str) -> None:
        if key in self.priority:
            self.leave(key)
            del self.ttl[key], self.most[key], self.deadline[key]

    def leave(self, key: str) -> None:
        priority = self.priority.pop(key)
        if key in self.demoted:
            self.demoted.remove(key)
        else:
            self.orders[priority].drop(key)

    def forget_empty(self) -> None:
        """What an order remembers of keys that left goes with its last key, unless it is the usual one."""
        used = {0} | {p for key, p in self.priority.items() if key not in self.demoted}
        self.orders = {p: order for p, order in self.orders.items() if p in used}

    def expired(self, now: float) -> dict[str, float]:
        return {key: deadline for key, deadline in self.deadline.items() if deadline <= now}

    def victims(self, n: int) -> list[str]:
        """As the order says, without regard to deadlines."""
        found = self.demoted[:n]
        for _, order in sorted(self.orders.items()):
            if len(found) < n:
                found = found + order.victims(n - len(found))
        return found


NAIVE: dict[str, Callable[[], Naive]] = {"lru": NaiveLru, "sieve": NaiveSieve, "s3fifo": NaiveS3Fifo}


class PolicyMachine(RuleBasedStateMachine):
    """The policy and its model see the same history; what they answer is compared at every question."""

    name = ""

    @initialize(ttl_s=st.sampled_from([None, 10.0]))
    def start(self, ttl_s: float | None) -> None:
        self.policy = make_policy(self.name, ttl_s)
        self.model = NaivePolicy(NAIVE[self.name], ttl_s)
        self.now = 0.0

    @rule(keys=key_lists, hits=st.integers(0, 4))
    def add(self, keys: list[str], hits: int) -> None:
        self.add_with(keys, Hint(hits=hits))

    @rule(
        keys=key_lists,
        hint=st.builds(
            Hint,
            st.integers(-1, 1),
            st.sampled_from([None, 0.0, 3.0, 25.0]),
            st.integers(0, 2),
            st.sampled_from([None, None, None, 2.0, 7.0]),
        ),
    )
    def add_with(self, keys: list[str], hint: Hint) -> None:
        self.policy.add(keys, self.now, hint)
        for key in keys:
            self.model.add(key, self.now, hint)

    @rule(keys=key_lists)
    def touch(self, keys: list[str]) -> None:
        self.policy.touch(keys, self.now)
        for key in keys:
            self.model.touch(key, self.now)

    @rule(keys=key_lists)
    def demote(self, keys: list[str]) -> None:
        self.policy.demote(keys)
        self.model.demote(keys)

    @rule(keys=key_lists)
    def discard(self, keys: list[str]) -> None:
        self.policy.discard(keys)
        for key in keys:
            self.model.discard(key)
        self.model.forget_empty()

    @rule(keys=key_lists)
    def come_back_from_a_pin(self, keys: list[str]) -> None:
        self.discard([key for key in keys if key in self.policy])
        self.add_with(keys, Hint(hits=1))

    @rule(n=st.integers(0, 12))
    def peek(self, n: int) -> None:
        self.victims(n)

    @rule(n=st.integers(0, 6))
    def evict(self, n: int) -> None:
        self.discard(self.victims(n))

    def victims(self, n: int) -> list[str]:
        due = self.model.expired(self.now)
        in_order = [key for key in self.model.victims(n) if key not in due]
        self.policy.touch([], self.now)  # tells the time

        victims = self.policy.victims(n)

        head, rest = victims[: len(due)], victims[len(due) :]
        assert [due.get(key) for key in head] == sorted(due.values())[:n]
        assert rest == in_order[: max(n - len(due), 0)]
        assert len(set(victims)) == len(victims)
        return victims

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([5.0, 40.0]))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.now -= seconds
        self.policy.touch([], self.now)  # tells the time
        self.model.set_back(self.now)

    @rule()
    def expire(self) -> None:
        due = self.model.expired(self.now)
        assert self.policy.has_deadlines or not self.model.expired(1e300)

        expired = self.policy.expired(self.now)

        assert {key: due.get(key) for key in expired} == due
        assert [due[key] for key in expired] == sorted(due.values())
        self.discard(expired)

    @invariant()
    def same_members(self) -> None:
        assert len(self.policy) == len(self.model.priority)
        assert {key for key in KEYS if key in self.policy} == set(self.model.priority)


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_policy_answers_as_its_naive_model(name: str) -> None:
    machine = type(f"{name}Machine", (PolicyMachine,), {"name": name})

    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None))

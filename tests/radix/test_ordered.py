"""The map in order of insertion: an OrderedDict in all that it can do, but for copying itself."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from eviction.registry import make_policy
from radix.ordered import OrderedMap
from radix.tree import RadixTree

is_built = OrderedMap is not OrderedDict
needs_extension = pytest.mark.skipif(not is_built, reason="needs the C extension")
KEYS = st.one_of(st.integers(-3, 40), st.binary(max_size=2), st.sampled_from(["a", "b", -1, 2**70]))


def answer(call: Callable[[Any], Any], one: Any) -> Any:
    try:
        return call(one)
    except KeyError:
        return KeyError


class TwoMaps(RuleBasedStateMachine):
    """The map and an OrderedDict are told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.map: Any = OrderedMap()
        self.twin: Any = OrderedDict()

    def both(self, call: Callable[[Any], Any]) -> None:
        assert answer(call, self.map) == answer(call, self.twin)

    @rule(key=KEYS, value=st.integers())
    def put(self, key: Any, value: int) -> None:
        self.both(lambda one: one.__setitem__(key, value))

    @rule(keys=st.lists(KEYS, max_size=30), value=st.integers())
    def update(self, keys: list[Any], value: int) -> None:
        self.both(lambda one: one.update(dict.fromkeys(keys, value)))
        self.both(lambda one: one.update(zip(keys, range(len(keys)), strict=True)))

    @rule(key=KEYS)
    def get(self, key: Any) -> None:
        self.both(lambda one: (one.get(key), one.get(key, 7), key in one))
        self.both(lambda one: one[key])

    @rule(key=KEYS)
    def delete(self, key: Any) -> None:
        self.both(lambda one: one.__delitem__(key))

    @rule(keys=st.lists(KEYS, max_size=30))
    def pop(self, keys: list[Any]) -> None:
        self.both(lambda one: [one.pop(key, None) for key in keys[1:]])
        if keys:
            self.both(lambda one: one.pop(keys[0]))

    @rule(last=st.booleans())
    def popitem(self, last: bool) -> None:
        self.both(lambda one: one.popitem(last=last))
        self.both(lambda one: one.popitem())

    @rule(key=KEYS, last=st.booleans())
    def move(self, key: Any, last: bool) -> None:
        self.both(lambda one: one.move_to_end(key, last=last))
        self.both(lambda one: one.move_to_end(key))

    @rule()
    def clear(self) -> None:
        self.both(lambda one: one.clear())

    @invariant()
    def agree(self) -> None:
        assert list(self.map) == list(self.twin)
        assert list(reversed(self.map)) == list(reversed(self.twin))
        assert list(self.map.items()) == list(self.twin.items())
        assert list(self.map.values()) == list(self.twin.values())
        assert len(self.map) == len(self.twin)
        assert bool(self.map) == bool(self.twin)


TestTwoMaps = TwoMaps.TestCase


def test_it_is_the_same_while_a_hundred_thousand_keys_come_and_go() -> None:
    rng = random.Random(0)
    one: OrderedMap[int, int] = OrderedMap()
    twin: OrderedDict[int, int] = OrderedDict()
    for goal in (100_000, 50, 20_000, 0):
        while len(twin) != goal:
            if len(twin) < goal:
                key = rng.randrange(1 << 60)
                one[key] = twin[key] = goal
            elif rng.random() < 0.5:
                assert one.popitem(last=False) == twin.popitem(last=False)
            else:
                assert one.pop(key, None) == twin.pop(key, None)
                key = next(reversed(twin), 0)
        assert list(one.items()) == list(twin.items())
        assert all(map(one.__contains__, twin))


@needs_extension
def test_every_reference_is_given_back() -> None:
    key, value = object(), object()
    before = sys.getrefcount(key), sys.getrefcount(value)
    one: OrderedMap[object, object] = OrderedMap()
    for _ in range(3):
        one[key] = value
        one.update({key: value})
        one.update([(key, value)])
        one.move_to_end(key, last=False)
        assert (list(one), list(one.values()), list(one.items())) == ([key], [value], [(key, value)])
        assert one.get(key) is value
        assert one.popitem() == (key, value)
        one[key] = value
        assert one.pop(key) is value
        one[key] = value
        one.clear()
    one[key] = value
    walk = iter(one)
    del one, walk
    gc.collect()

    assert (sys.getrefcount(key), sys.getrefcount(value)) == before


class Breaker:
    """Garbage in a cycle, which empties the map when it is collected."""

    def __init__(self, one: Any) -> None:
        self.one, self.me = one, self

    def __del__(self) -> None:
        self.one.clear()


@needs_extension
def test_garbage_that_is_collected_in_a_call_may_change_the_map() -> None:
    """Making a pair may collect; with a threshold of 1 it does so at once."""
    before = gc.get_threshold()
    for is_walk in (False, True):
        one: OrderedMap[object, object] = OrderedMap()
        one.update([(object(), object()) for _ in range(9)])
        call = one.items().__next__ if is_walk else one.popitem
        kept = [tuple([number, 0]) for number in range(5000)]  # none is left over that could be used again
        gc.disable()
        try:
            Breaker(one)
            gc.set_threshold(1)
            with contextlib.suppress(KeyError, RuntimeError):
                gc.enable()
                kept += [call(), call(), call(), call()]
        finally:
            gc.set_threshold(*before)
            gc.enable()
        gc.collect()
        assert list(one) == []


@needs_extension
@pytest.mark.parametrize("walk", [iter, reversed, lambda one: one.items(), lambda one: one.values()])
def test_a_walk_over_a_map_that_changes_ends_with_an_error(walk: Callable[[Any], Any]) -> None:
    one: OrderedMap[int, int] = OrderedMap()
    one.update(dict.fromkeys(range(5), 0))
    walking = walk(one)
    next(walking)

    one[2] = 3  # a value may change
    next(walking)
    del one[4]

    with pytest.raises(RuntimeError, match="changed"):
        next(walking)


class Clinging:
    """A key that changes the map when it is compared."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.change = change

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        change, self.change = self.change, lambda: None
        change()
        return False


def test_a_key_whose_comparison_changes_the_map_finds_it_as_it_is_then() -> None:
    one: OrderedMap[object, int] = OrderedMap()
    key = Clinging(lambda: one.update(dict.fromkeys(range(2, 400), 0)))
    one[1] = 5

    assert key not in one
    assert list(one) == list(range(1, 400))
    one[Clinging(one.clear)] = 6
    assert list(one.values()) == [6]


@pytest.mark.parametrize("call", [lambda one: one.get([]), lambda one: one.update([[1, 2]]), lambda one: one.update(3)])
@needs_extension
def test_what_cannot_be_is_an_error_and_changes_nothing(call: Callable[[Any], Any]) -> None:
    one: OrderedMap[int, int] = OrderedMap()
    one[1] = 2

    with pytest.raises(TypeError):
        call(one)
    assert list(one.items()) == [(1, 2)]


def largest_step(step: Callable[[int], object], num_steps: int) -> int:
    """The most memory that one of the steps asked for on top of what there was, in bytes."""
    largest = 0
    tracemalloc.start()
    try:
        for number in range(num_steps):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            step(number)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return largest


STEP = 256
MOST_BYTES = 512 * STEP  # a dict of so many keys that grows asks for 5 MB


@needs_extension
def test_a_tree_that_grows_never_copies_what_it_has() -> None:
    tree: RadixTree[int] = RadixTree()

    def add(number: int) -> None:
        tree.insert([b"%d %d" % (number, i) for i in range(STEP)], range(STEP))

    assert largest_step(add, 200) < MOST_BYTES


@needs_extension
@pytest.mark.parametrize("name", ["lru", "sieve", "s3fifo"])
def test_a_policy_whose_keys_come_and_go_never_copies_what_it_has(name: str) -> None:
    policy = make_policy(name, ttl_s=60.0)

    def turn(number: int) -> None:
        keys = range(number * STEP, (number + 1) * STEP)
        policy.add(keys, float(number))
        policy.touch(keys[::2], float(number))
        if len(policy) > 100 * STEP:
            policy.discard(policy.victims(STEP))

    assert largest_step(turn, 400) < MOST_BYTES

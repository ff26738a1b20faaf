from __future__ import annotations

import pytest

from kvstore.cluster.routing import POLICIES, PrefixAware, ReplicaView, RoundRobin, make_policy
from kvstore.errors import ConfigError

URLS = ["a", "b", "c"]


def view(hit: int = 0, queued: int = 0, shared: int = 0) -> ReplicaView:
    return ReplicaView(prompt_tokens=100, hit_tokens=hit, queued_tokens=queued, shared_tokens=shared)


def test_round_robin_takes_each_in_its_turn_and_names_the_others_after_it() -> None:
    policy = RoundRobin()

    orders = [policy.order(URLS, {}) for _ in range(4)]

    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_round_robin_goes_on_when_replicas_come_and_go() -> None:
    policy = RoundRobin()
    policy.order(URLS, {})

    assert policy.order(["a", "c"], {}) == ["c", "a"]
    assert policy.order([], {}) == []


def test_the_replica_that_has_the_prefix_comes_first() -> None:
    views = {"a": view(hit=0), "b": view(hit=90), "c": view(hit=50)}

    assert PrefixAware().order(URLS, views) == ["b", "c", "a"]


def test_a_hit_is_not_worth_a_queue_that_is_longer() -> None:
    views = {"a": view(hit=0, queued=10), "b": view(hit=90, queued=101), "c": view(hit=90, queued=99)}

    assert PrefixAware().order(URLS, views) == ["c", "a", "b"]


def test_of_two_that_hit_alike_the_one_that_has_the_pages_itself_comes_first() -> None:
    views = {"a": view(hit=90, shared=90), "b": view(hit=90, shared=30), "c": view(hit=60)}

    assert PrefixAware().order(URLS, views) == ["b", "a", "c"]


def test_pages_of_ones_own_are_not_worth_a_queue_that_costs_more_than_a_shared_tier() -> None:
    views = {"a": view(hit=100, shared=100), "b": view(hit=100, queued=11), "c": view(hit=100, queued=9)}

    assert PrefixAware().order(URLS, views) == ["c", "a", "b"]


def test_equal_replicas_take_turns() -> None:
    policy = PrefixAware()
    views = {url: view(hit=64) for url in URLS}

    assert [policy.order(URLS, views)[0] for _ in range(4)] == ["a", "b", "c", "a"]


def test_a_replica_without_a_view_comes_last_and_they_take_turns_too() -> None:
    policy = PrefixAware()

    orders = [policy.order(URLS, {"b": view(queued=10_000)}) for _ in range(3)]

    assert orders == [["b", "a", "c"], ["b", "c", "a"], ["b", "c", "a"]]


def test_policies_are_made_by_name() -> None:
    assert {name: make_policy(name).asks for name in POLICIES} == {"round-robin": False, "prefix": True}
    with pytest.raises(ConfigError, match=r"--policy is 'best'; it must be one of round-robin, prefix"):
        make_policy("best")

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eviction.lru import Lru
from eviction.policy import EvictionPolicy, Hint
from eviction.registry import POLICIES, make_policy, register_policy
from kvstore.testing.contracts.policy import EvictionPolicyContract


@pytest.fixture(autouse=True)
def unchanged_registry() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


class TestMadeByName(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return make_policy("lru")


@pytest.mark.parametrize("name", ["lru", "sieve", "s3fifo"])
def test_every_named_policy_has_deadlines(name: str) -> None:
    policy = make_policy(name, ttl_s=5.0)
    policy.add(["a"], 0.0)
    policy.add(["b"], 0.0, Hint(ttl_s=1.0))

    assert policy.expired(1.0) == ["b"]
    assert policy.expired(5.0) == ["b", "a"]


def test_each_call_makes_a_policy_of_its_own() -> None:
    one, other = make_policy("lru"), make_policy("lru")
    one.add(["a"], 0.0)

    assert len(other) == 0


def test_a_third_party_can_register_a_policy() -> None:
    class Newest(Lru[str]):
        def victims(self, n: int) -> list[str]:
            return super().victims(len(self))[::-1][:n]

    register_policy("newest", Newest)
    policy = make_policy("newest")
    policy.add(["a", "b"], 0.0)

    assert policy.victims(1) == ["b"]


def test_a_name_that_is_taken_is_refused() -> None:
    register_policy("lru", Lru)  # the same again does no harm

    with pytest.raises(ValueError, match="eviction policy 'lru' is registered already"):
        register_policy("lru", lambda: Lru())


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="eviction policy is 'LRU'; it must be one of lru, outlook, s3fifo, sieve"):
        make_policy("LRU")


def test_a_negative_ttl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ttl_s is -1\.0"):
        make_policy("lru", ttl_s=-1.0)

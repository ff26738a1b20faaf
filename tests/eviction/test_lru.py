from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eviction.lru import Lru
from eviction.policy import EvictionPolicy, Hint
from kvstore.testing.contracts.policy import EvictionPolicyContract


class TestLru(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Lru()


def test_the_key_used_longest_ago_leaves_first() -> None:
    policy: Lru[str] = Lru()
    policy.add("abcd", 0.0)
    policy.touch("ca", 1.0)

    assert policy.victims(4) == ["b", "d", "c", "a"]


def test_a_key_given_twice_counts_at_its_last_place() -> None:
    policy: Lru[str] = Lru()
    policy.add("aba", 0.0)
    assert policy.victims(2) == ["b", "a"]

    policy.touch("bab", 1.0)
    assert policy.victims(2) == ["a", "b"]


def test_hits_make_no_difference() -> None:
    policy: Lru[str] = Lru()
    policy.add("a", 0.0, Hint(hits=100))
    policy.add("b", 0.0)

    assert policy.victims(1) == ["a"]


def test_within_a_priority_recency_decides() -> None:
    policy: Lru[str] = Lru()
    policy.add("ab", 0.0, Hint(priority=1))
    policy.add("xy", 0.0)
    policy.touch("xa", 1.0)

    assert policy.victims(4) == ["y", "x", "b", "a"]


paths = st.text("ab", min_size=1, max_size=6)


def prefixes(text: str) -> list[str]:
    return [text[: i + 1] for i in range(len(text))]


@given(st.lists(paths, min_size=1, max_size=12), st.integers(0, 30))
def test_touched_tail_first_lru_evicts_leaves_before_what_they_hang_on(used: list[str], num_evicted: int) -> None:
    policy: Lru[str] = Lru()
    for now, text in enumerate(used):
        keys = prefixes(text)
        policy.touch(reversed(keys), now)
        policy.add([key for key in reversed(keys) if key not in policy], now)
        policy.touch(reversed(keys), now)

    policy.discard(policy.victims(num_evicted))

    left = set(policy.victims(len(policy)))
    assert all(text[:-1] in left for text in left if len(text) > 1), "a block was left without the one before it"


def test_touched_root_first_it_would_evict_the_root_before_the_leaf() -> None:
    """Why the order of touching matters: the other way round the first victim is what all hang on."""
    policy: Lru[str] = Lru()
    policy.add(prefixes("abc"), 0.0)

    assert policy.victims(1) == ["a"]

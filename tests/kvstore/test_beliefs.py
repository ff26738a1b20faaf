"""Beliefs as a tree of classes."""

from __future__ import annotations

from eviction.policy import Belief
from kvstore.beliefs import as_tree


def belief(seen: float, *words: str) -> Belief:
    return Belief(words, seen, (0.1, 0.2, 0.3), 5.0)


def test_each_class_comes_after_the_one_it_is_a_part_of_the_most_seen_first() -> None:
    every = [belief(3, "b", "x"), belief(9), belief(4, "a"), belief(5, "b"), belief(1, "a", "y"), belief(2, "a", "z")]

    assert [one.words for one in as_tree(every, 9)] == [(), ("b",), ("b", "x"), ("a",), ("a", "z"), ("a", "y")]
    assert [one.words for one in as_tree(every, 3)] == [(), ("b",), ("a",)]


def test_a_class_whose_wider_one_is_missing_is_left_out() -> None:
    assert as_tree([belief(3, "b", "x"), belief(9)], 9) == [belief(9)]
    assert as_tree([], 9) == []

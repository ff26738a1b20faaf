"""Beliefs of policies in the order in which people read them: a tree of classes, the most seen first."""

from __future__ import annotations

from collections.abc import Sequence

from eviction.policy import Belief


def as_tree(beliefs: Sequence[Belief], most: int) -> list[Belief]:
    """Return the `most` classes that were seen most, each after the one that it is a part of. O(n log n).

    A class whose wider one is not among them is left out.
    """
    chosen = sorted(beliefs, key=lambda one: (-one.seen, len(one.words)))[:most]
    below: dict[tuple[str, ...], list[Belief]] = {}
    for one in chosen:
        if one.words:
            below.setdefault(one.words[:-1], []).append(one)
    found: list[Belief] = []
    ahead = [one for one in chosen if not one.words]
    while ahead:
        one = ahead.pop()
        found.append(one)
        ahead += reversed(below.get(one.words, []))
    return found

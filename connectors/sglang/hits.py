"""How much of a prefix can be restored where several pools must have their share of it.

SGLang asks for the longest prefix of a chain of pages: its keys and values, and beside them what other pools hold of
the same tokens (an indexer, sliding windows, recurrent states), each by a rule of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class PoolRule(Enum):
    """Which pages of a pool a prefix needs; the values are SGLang's."""

    ALL = "all_pages"
    TRAILING = "trailing_pages"
    GROUPS = "block_groups"


@dataclass(frozen=True, slots=True)
class Share:
    """The pages of one pool.

    has:         which of the chain's pages the pool has; with GROUPS, which of the pool's own keys.
    trailing:    pages before the end of a prefix that it needs, with TRAILING.
    block_pages, group_pages: with GROUPS, the chain's pages of a block, and the keys that hold them.
    """

    name: str
    rule: PoolRule
    has: Sequence[bool]
    trailing: int = 1
    block_pages: int = 0
    group_pages: int = 0


@dataclass(frozen=True, slots=True)
class Restorable:
    """Lengths of prefixes in pages: the longest, each pool's own, and all."""

    longest: int
    by_pool: dict[str, int]
    lengths: list[int]


def leading(has: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((index for index, one in enumerate(has) if not one), len(has))


def restorable(kv: Sequence[bool], shares: Sequence[Share], kv_name: str = "kv") -> Restorable:
    """The prefixes of which every pool has what they need.

    >>> restorable([True, True, True, False], [Share("swa", PoolRule.TRAILING, [False, True, False])])
    Restorable(longest=2, by_pool={'kv': 3, 'swa': 2}, lengths=[2])
    """
    most = leading(kv)
    by_pool = {kv_name: most} if most else {}
    lengths = list(range(1, most + 1))
    for share in shares:
        if share.rule is PoolRule.GROUPS:
            # Another form of the same pages: what it has is its own verdict, and bounds nothing.
            own, some = _groups(share) * share.block_pages, set(lengths)
        else:
            some = _lengths(share, most)
            own = max(some, default=0)
        if own:
            by_pool[share.name] = own
        lengths = [length for length in lengths if length in some]
    return Restorable(lengths[-1] if lengths else 0, by_pool, lengths)


def _lengths(share: Share, most: int) -> set[int]:
    if share.rule is PoolRule.ALL:
        return set(range(1, min(most, leading(share.has)) + 1))
    needed = max(1, share.trailing)
    ends = range(1, min(most, len(share.has)) + 1)
    return {end for end in ends if all(share.has[max(0, end - needed) : end])}


def _groups(share: Share) -> int:
    return 0 if share.group_pages < 1 else leading(share.has) // share.group_pages

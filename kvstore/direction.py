"""The ways in which a tier is used, each of which may fail while the others work.

A replica answers reads and refuses writes; an account may be allowed to store and not to delete; a filesystem that has
become read-only still has its pages. So what a tier refuses is judged by direction: lanes have a breaker for each, and
the planner leaves out only what is refused.
"""

from __future__ import annotations

from enum import Enum


class Direction(Enum):
    """A way of using a tier."""

    READ = "read"  # asking for pages and fetching them
    WRITE = "write"
    TOUCH = "touch"  # refreshing recency and deadlines
    DELETE = "delete"
    CLAIM = "claim"  # telling other machines what is being computed


ALL_DIRECTIONS = frozenset(Direction)

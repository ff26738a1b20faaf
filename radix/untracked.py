"""Objects that the garbage collector need not walk.

A full collection visits every container there is: with a million blocks in a store 1.8 s, in which no thread runs,
whoever's garbage it was looking for. What a store keeps by the million never is such garbage, as long as its owner
takes it apart when it lets it go. So it is taken from the collector's list, where the C extension is built; elsewhere
these functions do nothing and the collector walks.

Whoever untracks an object promises: no cycle of references through it is left when it is dropped.

Considered: gc.freeze keeps all there is in the process from being collected, an engine's garbage included, for ever;
gc.set_threshold changes when the engine's own garbage is collected. A library must not do either.
"""

from __future__ import annotations

from typing import Any

try:
    from radix._chain import track as _track
    from radix._chain import untrack as _untrack
except ImportError:  # not built on this machine
    _track = _untrack = None  # type: ignore[assignment]


def untrack(objects: list[Any]) -> None:
    """Take objects from the collector's list. 10 ns each."""
    if _untrack is not None:
        _untrack(objects)


def untrack_with(objects: list[Any], name: str) -> None:
    """The same, and the tuple that each object has by that name, and what is in it."""
    if _untrack is not None:
        _untrack(objects, name)


def track_with(objects: list[Any], name: str) -> None:
    """Undo `untrack_with`: from now on the collector sees to cycles through them."""
    if _track is not None:
        _track(objects, name)

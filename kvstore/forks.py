"""Forked processes: a child may use nothing that its parent had opened.

A child has the objects and none of the threads behind them; locks that other threads held stay locked for ever, and
slots, descriptors and connections are the parent's. So everything that holds such a thing says so when it is made:

    forbid(self)             in a child every use raises StoreForked at once; `close` does nothing
    in_child(self, act)      in a child `act(self)` runs before anything else can: new locks, memory let go

An object is bound once: the later call counts.

The parent pays nothing for it: the child's copy of a forbidden object gets another class, in the hook that Python runs
after os.fork, multiprocessing's "fork" and a `preexec_fn`. So not even a lock is looked at there, and a method that was
taken from the object before the fork raises as well.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from kvstore.errors import StoreForked

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

# By id: not everything that is bound can be hashed (arrays). The reference takes its entry out when the object goes.
_bound: dict[int, tuple[weakref.ref[Any], Callable[[Any], object]]] = {}


def in_child(owner: T, act: Callable[[T], object]) -> None:
    """Register `act(owner)` for every child that is forked while `owner` lives. It must not wait, nor raise."""
    at = id(owner)
    _bound[at] = weakref.ref(owner, lambda _: _bound.pop(at, None)), act


def forbid(owner: T, let_go: Callable[[T], object] = lambda owner: None) -> None:
    """Make every use of `owner` raise StoreForked in a forked child, except `close` and leaving a `with`.

    let_go: gives up first what the child holds for nothing, as a descriptor.
    """
    pid = os.getpid()

    def end(owner: T) -> None:
        let_go(owner)
        turn_away(owner, pid)

    in_child(owner, end)


def turn_away(owner: Any, pid: int) -> None:
    """Make an object unusable that process `pid` had opened. Called in its child."""
    kind = type(owner)
    message = (
        f"{kind.__name__} was opened in process {pid}, and this one, {os.getpid()}, was forked from it: open another "
        f"here, after the fork"
    )

    def refuse(self: object, name: str) -> object:
        if name == "close":
            return _do_nothing
        if name.startswith("__"):  # what Python itself asks of every object
            return object.__getattribute__(self, name)
        raise StoreForked(message)

    def refuse_to_set(self: object, name: str, value: object) -> NoReturn:
        raise StoreForked(message)

    body = {"__slots__": (), "__getattribute__": refuse, "__setattr__": refuse_to_set, "__module__": kind.__module__}
    owner.__class__ = type(kind.__name__, (kind,), body)


def harmless(close: Callable[P, R]) -> Callable[P, R]:
    """For a `close` of what is forbidden: it does nothing in a child though it was taken from the object before.

    As it is with atexit, finalizers and exit stacks: they run in a child that ends as programs do.
    """

    @functools.wraps(close)
    def closes(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return close(*args, **kwargs)
        except StoreForked:
            return cast("R", 0)

    return closes


def _do_nothing(*_: object, **__: object) -> int:
    return 0  # some say how much they dropped


def _after_fork() -> None:
    for owner, act in list(_bound.values()):
        alive = owner()
        if alive is not None:
            act(alive)


os.register_at_fork(after_in_child=_after_fork)

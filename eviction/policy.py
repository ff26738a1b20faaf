"""The interface of an eviction policy: an order over keys, holding no data.

The planner owns one policy per bounded tier. A page that is pinned is *held*: it is no member, so no victim, but the
policy may remember its place and what it learned of it. A key is an object of its owner's, and another one when a page
comes back; what outlives a key goes by its name. Paths are handed over *tail first*: a leaf then looks older than its
parent, and plain recency evicts leaves before what they hang on. Not thread-safe; called under the store's lock. Time
is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Hint(NamedTuple):
    """The caller's knowledge of a key, which an order cannot guess.

    priority: higher stays longer; all keys of a lower priority leave first.
    ttl_s:    time to live, overriding the policy's own; None keeps the policy's.
    hits:     uses before the key came here, for a policy that counts them; of a held key the policy knows itself.
    left_s:   seconds until the deadline of a key that has lived before; from its next use on it has its ttl again.
              None: the key begins to live now.
    """

    priority: int = 0
    ttl_s: float | None = None
    hits: int = 0
    left_s: float | None = None


NO_HINT = Hint()


class PromptUse(NamedTuple):
    """A request, as a policy is told of it.

    id:        its number, by which `ended` names it.
    path:      names of all blocks of the prompt, root first, whether their keys are members or not.
    session:   "" if unknown.
    last_turn: the caller knows whether its session will go on; None if it does not.
    """

    id: int
    path: Sequence[Hashable]
    session: str = ""
    last_turn: bool | None = None


class Ending(NamedTuple):
    """The end of a request's answer.

    finish_reason: the engine's word for it, such as "stop" or "tool_calls"; "" if unknown.
    last_turn:     as in `Use`, where it became known later.
    reply_tokens:  tokens of the answer; -1 if unknown.
    """

    finish_reason: str = ""
    last_turn: bool | None = None
    reply_tokens: int = -1


BELIEF_SPANS_S = (60.0, 300.0, 3600.0)  # as people ask: is it back within a minute, five, an hour?


class Belief(NamedTuple):
    """What a policy has learned of one class of keys, for people to read.

    words:  what makes the class, widest first, such as ("used once", "after tool_use"); () is all keys. It is a part of
            the class that lacks its last word.
    seen:   observations that it rests on.
    within: probability of a next use within each of BELIEF_SPANS_S.
    mean_s: mean time until the next use, of those that come within the longest of these spans; None if none does.
    """

    words: tuple[str, ...]
    seen: float
    within: tuple[float, ...]
    mean_s: float | None


class EvictionPolicy(Protocol[K]):
    """Ranks keys by how little their loss would cost. All operations are O(1) per key."""

    def add(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Take keys in, in this order: the last one is the most recent. A known key is touched."""

    def touch(self, keys: Iterable[K], now: float) -> None:
        """Note a use of keys, in this order. Unknown keys are ignored."""

    def demote(self, keys: Iterable[K]) -> None:
        """Make keys the next victims, the first of them first. Unknown keys are ignored."""

    def discard(self, keys: Iterable[K]) -> None:
        """Forget keys. Unknown keys are ignored."""

    def victims(self, n: int) -> list[K]:
        """Return up to `n` keys in the order in which they should leave.

        Changes no membership: the caller discards the keys that really left. Amortised O(n).
        """

    def expired(self, now: float, limit: int | None = None) -> list[K]:
        """Return keys past their deadline, at most `limit`; empty for a policy without deadlines. O(answer).

        `now` may have gone back since the last call: a wall clock can be set.
        """

    def overdue(self, keys: Iterable[K], now: float, limit: int | None = None) -> list[K]:
        """Return those of `keys` that are past their deadline, the first `limit` of them. Unknown keys are not."""

    def members(self) -> list[K]:
        """Return every key, roughly the next to leave first; also after an exception in the middle of a call."""

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys, in this order, as if added `now`; deadlines that are known stay.

        Puts right what an exception in the middle of another call has left. O(n log n).
        """

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...


class PolicyListener(Protocol[K]):
    """The parts of a policy that it may have or lack, each by itself; `Ttl` makes up for those that are not there."""

    def hold(self, keys: Iterable[K]) -> None:
        """Keys are in use: no members until they are released. Unknown keys are ignored. Lacking: `discard`."""

    def release(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Make held keys members again; add those that are not held. Lacking: `add`.

        That they were used is told at the end of the request, by `touch`.
        """

    def renew(self, keys: Iterable[K], now: float) -> None:
        """The request that brought these keys ends: they are new, and nothing has used them. Lacking: `touch`."""

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Take what names a key for longer than it lives; called before any key comes. Without it a key is its name.

        Keys may share a name: pages of one block do. Lacking: nothing is said.
        """

    def used(self, use: PromptUse, now: float) -> None:
        """A request has come; told once, before any of its keys is touched, held or added. Lacking: nothing is said."""

    def ended(self, request_id: int, ending: Ending, now: float) -> None:
        """Its answer has ended; ids that were never told of are ignored. Lacking: nothing is said."""


class Learner(Protocol):
    """A policy that learns what outlives its keys. One that does not lacks all three; see `learner`."""

    def tables(self) -> dict[str, Any]:
        """Return what was learned: for JSON, where numpy's arrays count as lists. Within a millisecond or two.

        Bounded, whatever was seen, and no longer the policy's: nothing changes in it afterwards.
        """

    def restore(self, tables: dict[str, Any]) -> None:
        """Take in what `tables` of any process gave, as JSON gives it back, in place of what was learned; keys stay.

        Raises ValueError for anything else, and then nothing has changed.
        """

    def beliefs(self, tables: dict[str, Any]) -> list[Belief]:
        """Say what such tables mean. Any thread, without the lock: it looks at nothing of the policy's own.

        Raises ValueError as `restore` does.
        """


def learner(policy: object) -> Learner | None:
    """Return the policy as one that learns, if it does."""
    found: Any = policy
    return found if all(hasattr(policy, name) for name in ("tables", "restore", "beliefs")) else None

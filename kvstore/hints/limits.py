"""Bounds on hints: they come from outside, and must cost no more than what they are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

MAX_NAME = 128  # characters of an action's id, type or version, and of a message's id
MAX_SESSION = 64  # characters; operators are shown it


def is_text(value: object, most: int) -> TypeGuard[str]:
    """Return whether a value is text of at most so many characters. Half of a surrogate pair is none: no answer and
    no metric could be sent that repeats it.
    """
    if not isinstance(value, str) or len(value) > most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class HintLimits:
    """The settings of hints (section `[hints]`).

    enabled:       False: each action is rejected.
    max_bytes:     of an envelope that comes as text.
    max_actions:   of one envelope; those behind are rejected.
    max_tokens:    token ids, or tokens that block hashes stand for, that one action may name.
    default_ttl_s: how long a Pin or Retain lasts that does not say.
    max_ttl_s:     the longest; what asks for more is clipped to it.
    """

    enabled: bool = True
    max_bytes: int = 2 << 20
    max_actions: int = 16
    max_tokens: int = 1 << 20
    default_ttl_s: float = 300.0
    max_ttl_s: float = 3600.0

"""An answer that is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pending:
    """The value that a handler returns instead of waiting in the daemon's event loop.

    look:      returns the answer, or None to be asked again after the store has changed.
    give_up:   the answer after `timeout_s`.
    """

    look: Callable[[], bytes | None]
    give_up: Callable[[], bytes]
    timeout_s: float

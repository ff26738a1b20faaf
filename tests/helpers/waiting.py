"""The one way in which tests wait for what another thread, process or machine does.

A machine that runs tests is busy: what takes a millisecond on a quiet one may take many seconds there. So a wait polls
for its condition and goes on at once when it holds, and its deadline is far above all that a busy machine needs: it
ends tests that would hang, and judges nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

WAIT_S = 240.0  # below pytest's own limit, so that what did not happen is named
POLL_S = 0.01

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    told: str | Callable[[], str] = "it did not come true",
    *,
    timeout_s: float = WAIT_S,
    poll_s: float = POLL_S,
) -> T:
    """Return what `condition` gives as soon as that is true.

    told:   what is said if it never is; a function says what the state was at the end.
    poll_s: between two looks; more where a look is expensive.

    Raises AssertionError after `timeout_s`.
    """
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > until:  # after a look that began before: a machine that stood still is not to blame
            raise AssertionError(f"not within {timeout_s:g} s: {told if isinstance(told, str) else told()}")
        time.sleep(poll_s)
    return found

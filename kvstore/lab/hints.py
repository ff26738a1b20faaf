"""The hints that clients of a recorded trace could have given: what an agent framework knows and a cache cannot guess.

    hints = hints_of(trace, 0.25)

Two of them: of a session's last request, that no turn will follow; of a request whose reply calls a tool, that its
prefix will be asked for again soon. A share of the requests gives them, the others tell the name of their session only.
Equal seeds choose alike: the requests that give hints at 25 % are among those that give them at 50 %.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from kvstore.hints.actions import USUAL_PRIORITY, HintKind
from kvstore.lab.traces import ReplayTrace
from kvstore.plan.endings import one_word
from kvstore.plan.records import RequestOptions
from kvstore.plan.wishes import Wish

TOOL_PAUSE_S = 30.0  # seven of ten tool calls of recorded coding agents take no longer; docs/hints.md has others
TOOL_CALL = "tool_use"  # the one word for it (plan/endings.py)


class TraceHint(NamedTuple):
    """What a store is told of one request beside its prompt."""

    options: RequestOptions
    wishes: tuple[Wish, ...] = ()


def hints_of(
    trace: ReplayTrace, share: float, seed: int = 0, *, names_sessions: bool = False
) -> list[TraceHint] | None:
    """Return what the store is told of each request of a trace; None where it is told nothing.

    names_sessions: tell it the sessions' names where nobody gives hints, too.
    share: of the requests whose clients give hints, 0 to 1. A trace without sessions and finish reasons has none.
    """
    if not share and not names_sessions:
        return None
    draw = random.Random(seed).random
    last = {request.session: number for number, request in enumerate(trace.requests) if request.session >= 0}
    told = []
    for number, request in enumerate(trace.requests):
        speaks = draw() < share
        session = str(request.session) if request.session >= 0 else ""
        is_last = last.get(request.session) == number
        is_pausing = not is_last and one_word(request.finish_reason) == TOOL_CALL
        retain = Wish("", HintKind.RETAIN, ttl_s=TOOL_PAUSE_S, priority=USUAL_PRIORITY, session=session, is_own=True)
        told.append(
            TraceHint(
                RequestOptions(session=session, last_turn=speaks and is_last),
                (retain,) if speaks and is_pausing else (),
            )
        )
    return told

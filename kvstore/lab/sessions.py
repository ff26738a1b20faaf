"""How many sessions a trace has: as it says, else as its prompts grow out of each other.

A prompt that has all full blocks of an earlier one, or all but one, goes on with that one's session: the last block
may be filled in part, and is then another one when the prompt grows.
"""

from __future__ import annotations

from kvstore.lab.traces import ReplayTrace


def num_sessions(trace: ReplayTrace) -> int:
    """Return how many sessions there are."""
    named = {request.session for request in trace.requests if request.session >= 0}
    ends: set[int] = set()  # of sessions without a name: where the last prompts ended
    num_more = 0
    for request in trace.requests:
        if request.session >= 0:
            continue
        num_full = request.num_prompt_tokens // trace.block_tokens
        path = request.blocks[:num_full] or request.blocks
        found = next((block for block in reversed(path) if block in ends), None)
        num_more += found is None
        # The first block of all is a system prompt that everybody shares: no session is known by it.
        ends.update(path[-2:] if len(path) > 2 else path[1:])
    return len(named) + num_more

"""The books of a front: who is inside, how many of them wait, and how fast the engine works.

The engine batches, so no request has a speed of its own. What counts for when there is room again is how much prompt
and answer the engine does in a second, all requests together. It is measured from outside: tokens that it has counted
over seconds in which it had something to do. An interval has both kinds of work in it; its seconds are divided among
them in the ratio that the rates so far foretell, and each rate is then corrected by its share (intervals with one kind
only put that one right).
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.cluster.admission import Admission, Ticket
from kvstore.vllm.counters import EngineCounters


class EngineBooks:
    """Tickets of one engine. max_running: requests that it computes at once. The loop's thread only."""

    def __init__(self, admission: Admission, max_running: int, now: Callable[[], float]) -> None:
        self.admission = admission
        self.max_running = max_running
        self._now = now
        self._inside = 0
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._last: EngineCounters | None = None

    @property
    def num_inside(self) -> int:
        """Requests that were let in and are not over."""
        return self._inside

    @property
    def num_running(self) -> int:
        """Those of them that the engine may compute."""
        return min(self._inside, self.max_running)

    @property
    def num_queued(self) -> int:
        """Those of them that wait."""
        return max(0, self._inside - self.max_running)

    def enter(self, prompt_tokens: int, new_tokens: int) -> Ticket:
        """Let a request in, or raise Refused."""
        ticket = self.admission.enter(prompt_tokens, new_tokens, self.num_queued)
        if not self._inside:
            self._busy_since = self._now()
        self._inside += 1
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A request is over. Once for each."""
        self.admission.leave(ticket)
        self._inside -= 1
        if not self._inside and self._busy_since is not None:
            self._busy_s += self._now() - self._busy_since
            self._busy_since = None

    def observe(self, counters: EngineCounters) -> None:
        """Measure by what the engine has done since the last time. Without tokens the seconds count for the next."""
        last, now = self._last, self._now()
        self._last = counters
        if last is None or counters.prompt_tokens < last.prompt_tokens:  # it is another server now
            self._busy_s, self._busy_since = 0.0, None if self._busy_since is None else now
            return
        prompt = max(0, counters.computed_tokens - last.computed_tokens)
        new = max(0, counters.new_tokens - last.new_tokens)
        if not prompt and not new:
            self._last = last
            return
        busy_s, self._busy_s = self._busy_s, 0.0
        if self._busy_since is not None:
            busy_s += now - self._busy_since
            self._busy_since = now
        prefill, decode = self.admission.prefill, self.admission.decode
        foretold_s = prompt / prefill.tokens_per_s, new / decode.tokens_per_s
        for rate, tokens, seconds in ((prefill, prompt, foretold_s[0]), (decode, new, foretold_s[1])):
            rate.observe(tokens, busy_s * seconds / sum(foretold_s))

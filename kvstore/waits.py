"""The waits of a store, written once: loops over what its core answers at once or within a time.

A store says how long it looks by itself (`_lookup_within`, `_peek_within`, `_poll_within`): the one in this process
sleeps until something has changed, the client of a daemon lets the daemon do that.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from kvstore.plan.records import CutReason, FlushResult, LeaseStatus, LoadLease, Match, Request

COMPUTING_CALL_S = 5.0  # how long one look waits for another request's computing


class Deadlines(NamedTuple):
    """The configured deadlines, in seconds: of lookups for tiers, and of loads."""

    lookup_s: float
    load_s: float


class Waits(Protocol):
    """The waits of a KVStore (see base.py)."""

    def wait_lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        """Lookup, waiting while it is pending, at most `timeout_s`.

        None: at most the configured lookup deadline for tiers; for another request's computing (single flight) until
        that is done, has ended, or has made no progress for longer than computing here would take.
        """
        deadline_s = self._deadlines.lookup_s if timeout_s is None else timeout_s
        until = time.monotonic() + deadline_s
        wait_s, was_computing = deadline_s, False
        while True:
            match = self._lookup_within(request, wait_s)
            if not match.pending:
                return match
            is_computing = timeout_s is None and match.cut is CutReason.COMPUTING  # the store ends that in good time
            if was_computing and not is_computing:
                until = time.monotonic() + deadline_s  # the deadline is that of tiers, which are asked again after it
            wait_s, was_computing = COMPUTING_CALL_S if is_computing else until - time.monotonic(), is_computing
            if not wait_s > 0:  # nor if it is no number
                return match

    def peek(self, request: Request, timeout_s: float | None = None) -> Match:
        """The match that a lookup would give, for callers that only ask: nothing is counted, claimed or remembered.

        Waits at most `timeout_s` for tiers (default: the configured lookup deadline). The request is over afterwards.
        """
        return self._peek_within(request, self._deadlines.lookup_s if timeout_s is None else timeout_s)

    def wait(self, lease: LoadLease, timeout_s: float | None = None) -> LeaseStatus:
        """Wait until the lease is ready, at most `timeout_s` (default: the configured load deadline)."""
        return self._poll_within(lease, self._deadlines.load_s if timeout_s is None else timeout_s)

    def flush(self, timeout_s: float) -> FlushResult:
        """Wait until everything saved, and everything deleted, so far is so on every tier that should have it.

        The result is true if it is, and says what is missing if not: because the time ran out, because a tier is out or
        refuses it (then without waiting: a later flush tries again), or because it was lost. Only a true result is an
        acknowledgement. What a caller was told to be lost for good is not told again.
        """

    # ---- of each store ----------------------------------------------------------------------------------------

    @property
    def _deadlines(self) -> Deadlines: ...

    def _lookup_within(self, request: Request, wait_s: float) -> Match:
        """Look up; while that is pending, wait until the answer is another one, at most `wait_s`."""

    def _peek_within(self, request: Request, wait_s: float) -> Match:
        """Peek; while tiers are asked, wait at most `wait_s`."""

    def _poll_within(self, lease: LoadLease, wait_s: float) -> LeaseStatus:
        """Poll; while pages are on their way, wait at most `wait_s`."""

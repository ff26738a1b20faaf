"""The policies that want to know of requests: of each when it comes, and of its end.

Each request is told once, before its pages are touched, with all the blocks of its prompt, be they stored or not: by
its first lookup, or by its save or its end where none was made. A prefetch is no request. Policies that do not care
cost nothing (see `eviction.policy.PolicyListener`).
"""

from __future__ import annotations

from collections.abc import Callable

from eviction.policy import Ending, PromptUse
from eviction.ttl import Ttl
from kvstore.plan.books import Books
from kvstore.plan.records import Request
from kvstore.plan.state import Page


class Audience:
    """Tells policies of requests. Under the store's lock.

    listeners: the policies that want to know, each with the clock of its times.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self.listeners: list[tuple[Ttl[Page], Callable[[], float]]] = []
        self.gather()

    def gather(self) -> None:
        """Find who listens; again when a tier has come."""
        books = self._books
        found = [(books.host.policy, books.clock.boot)]
        found += [(t.plan.policy, books.clock.wall) for t in books.tiers if t.plan.policy is not None]
        self.listeners = [(policy, clock) for policy, clock in found if policy.listens]

    def tell(self, request: Request) -> None:
        """A request has come; of no effect if it was told before."""
        if request.is_told or not self.listeners:
            return
        request.is_told = True
        options = request.options
        use = PromptUse(request.id, request.keys, options.session, True if options.last_turn else None)
        for policy, clock in self.listeners:
            policy.used(use, clock())

    def tell_end(self, request: Request, ending: Ending) -> None:
        """A request has ended; of no effect if it was never told, or has ended before."""
        if not request.is_told:
            return
        request.is_told = False
        for policy, clock in self.listeners:
            policy.ended(request.id, ending, clock())

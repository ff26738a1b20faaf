"""How many block hashes a store has had kept for its clients, all together. The daemon's event loop only."""

from __future__ import annotations

from typing import Protocol

MAX_KEYS = 1 << 22  # about 380 MiB with the planner's notes


class RequestOwner(Protocol):
    """Whose requests are known.

    num_keys: of all of them.
    """

    num_keys: int

    def forget_oldest(self) -> bool:
        """Forget the request that was unused for longest; False if it is the only one."""


class Ledger:
    """The keys of all clients of one store."""

    def __init__(self) -> None:
        self.num_keys = 0
        self._clients: set[RequestOwner] = set()

    def add(self, client: RequestOwner, num_keys: int) -> None:
        """A client has so many more, or fewer. If there are too many in all, the client with most forgets some."""
        self.num_keys += num_keys
        if client.num_keys:
            self._clients.add(client)
        else:
            self._clients.discard(client)
        while self.num_keys > MAX_KEYS and max(self._clients, key=lambda one: one.num_keys).forget_oldest():
            pass

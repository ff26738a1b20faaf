"""A thread of a client's own that talks to its daemon, and ends at once when it is told to, whatever it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvstore.forks import in_child
from kvstore.service.client.connection import DaemonConnection

JOIN_S = 5.0  # for a dial that hangs, as in asking for a host's address; all else is cut short


class Errand:
    """Runs `run(errand)` in a thread. `rest` and `hold` are that thread's, `end` any other's."""

    def __init__(self, name: str, run: Callable[[Errand], None]) -> None:
        self._is_over = threading.Event()
        self._wire: DaemonConnection | None = None
        self._thread = threading.Thread(target=run, args=(self,), name=f"kvstore-{name}", daemon=True)
        self._thread.start()
        in_child(self, Errand._begin_anew)

    def rest(self, seconds: float) -> bool:
        """Do nothing for a while; True, at once, if the errand is to end."""
        return self._is_over.wait(seconds)

    def hold(self, wire: DaemonConnection) -> DaemonConnection:
        """Note the connection that is waited on from here on. Raises ConnectionAbortedError if the errand is to end."""
        # Either this thread sees that it is over, or `end` sees the connection: both write before they look.
        self._wire = wire
        if self._is_over.is_set():
            wire.close()
            raise ConnectionAbortedError("the store is closed")
        return wire

    def _begin_anew(self) -> None:
        """In a forked child, where the thread is not."""
        self._is_over = threading.Event()
        self._wire = None

    def end(self) -> None:
        """Cut short what it waits for, and join it. Idempotent."""
        self._is_over.set()
        if self._wire is not None:
            self._wire.interrupt()
        self._thread.join(JOIN_S)

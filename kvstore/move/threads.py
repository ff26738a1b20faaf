"""Starts threads where the system may refuse one: a container has a limit, which counts all its processes' threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvstore.errors import ConfigError
from kvstore.limits import thread_limit


def start_thread(thread: threading.Thread) -> bool:
    """Start a thread; False if the system gives none."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def start_all(threads: Sequence[threading.Thread], give_up: Callable[[], object] = lambda: None) -> None:
    """Start all threads or none.

    give_up: makes those that were started end; they are joined. Raises ConfigError with the limit that was met.
    """
    for at, thread in enumerate(threads):
        if not start_thread(thread):
            limit = thread_limit()  # before the others end
            give_up()
            for started in threads[:at]:
                started.join()
            raise ConfigError(
                f"thread {thread.name} cannot be started, {threading.active_count()} of this process run: {limit}. "
                f"A store needs {len(threads)} here and one for each worker of its tiers (disk.workers, "
                f"redis.connections) and one more; raise the limit"
            )

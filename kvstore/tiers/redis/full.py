"""Servers that take no pages for want of memory, told in the log.

An OOM reply is an answer and judges no direction: reads are as good as before. A server whose policy is `noeviction`
gives it to every page from some day on, though, and the only sign would be a counter. So the first of them is a line
in the log, and so is the first page that is stored afterwards; a server that is at its limit goes to and fro many times
a second, so there is one line per server in `QUIET_S`.
"""

from __future__ import annotations

import logging
import threading
import time

from kvstore.forks import in_child

QUIET_S = 600.0

_log = logging.getLogger(__name__)


class FullServers:
    """What is known about which server is full. Any thread."""

    def __init__(self) -> None:
        self._told_at: dict[str, float] = {}  # of servers that are full, as far as is known
        self._begin_anew()
        in_child(self, FullServers._begin_anew)

    def refused(self, where: str, words: str) -> None:
        """`where` has refused a page, with these words."""
        now = time.monotonic()
        with self._lock:
            told_at = self._told_at.get(where)
            if told_at is not None and now - told_at < QUIET_S:
                return
            self._told_at[where] = now
        _log.warning(
            "redis %s is full and takes no pages (%s): let it evict (maxmemory-policy allkeys-lfu), give it more "
            "maxmemory, or bound what is kept there (redis.capacity_bytes); `kvstore redis check` looks at it",
            where,
            words,
        )

    def stored(self, where: str) -> None:
        """`where` has stored a page."""
        if where not in self._told_at:
            return
        with self._lock:
            told_at = self._told_at.get(where)
            if told_at is None or time.monotonic() - told_at < QUIET_S:
                return
            del self._told_at[where]
        _log.info("redis %s takes pages again", where)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()  # in a forked child: another thread of the parent may have held it

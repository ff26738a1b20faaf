"""Who may do what in a disk tier's directory: advisory locks on bytes of one file, which die with their process.

    byte 0          shared by every process that has the directory open; exclusive while the first of them sets it up
    byte 1          held during a write transaction
    byte 16 + id    held by writer `id` as long as it lives, so that slots a dead writer was filling can be taken back

Unlike process ids, locks are not fooled by a reused number or by containers that cannot see each other's processes, and
the kernel lets go only when the last write of a killed process has ended. Unlike LMDB's own mutex, they can be waited
for with a deadline: a process that is stopped in the middle of a transaction does not stop the others for ever.

POSIX locks belong to the process and vanish when it closes *any* descriptor of the file. So a process opens the file
once per directory (kvstore/tiers/directory.py sees to it). Any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kvstore.errors import TierUnavailable
from kvstore.tiers.slab_file import FILE_MODE

_USERS, _WRITE, _WRITERS = 0, 1, 16  # byte offsets
_POLL_S = 0.001  # fcntl has no wait with a deadline; a transaction takes about this long


class DirectoryLock:
    """The lock file of one directory, as this process has it open."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the file, creating it unless `read_only`. Raises OSError."""
        self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT) | os.O_CLOEXEC, FILE_MODE)
        self._threads = threading.Lock()  # POSIX locks do not tell threads of one process apart

    def enter(self, deadline: float, *, may_set_up: bool = True) -> bool:
        """Become a user of the directory; True if this is the only process, which then holds it exclusively.

        With `may_set_up` False it is never exclusive. `deadline` is on time.monotonic. Raises TierUnavailable if
        another process is still setting up by then.
        """
        while True:
            if may_set_up and self._take(fcntl.LOCK_EX, _USERS):
                return True
            if self._take(fcntl.LOCK_SH, _USERS):
                return False
            if time.monotonic() >= deadline:
                raise TierUnavailable("disk tier: another process has been setting up the directory for too long")
            time.sleep(_POLL_S)

    def share(self) -> None:
        """End being exclusive: let other processes in."""
        fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _USERS)

    @contextlib.contextmanager
    def writing(self, deadline: float) -> Iterator[None]:
        """Be the only writer of all processes and threads. Raises TierUnavailable if not so by `deadline`."""
        if not self._threads.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierUnavailable("disk tier: another thread has held the index's write lock for too long")
        try:
            while not self._take(fcntl.LOCK_EX, _WRITE):
                if time.monotonic() >= deadline:
                    raise TierUnavailable("disk tier: another process has held the index's write lock for too long")
                time.sleep(_POLL_S)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _WRITE)
        finally:
            self._threads.release()

    def live(self, writer: int) -> None:
        """Mark writer `writer` as living in this process."""
        if not self._take(fcntl.LOCK_EX, _WRITERS + writer):
            raise TierUnavailable(f"disk tier: writer number {writer} is taken; the index gave it out twice")

    def is_alive(self, writer: int) -> bool:
        """True if another process lives as `writer`. Never ask about a writer of this process."""
        if not self._take(fcntl.LOCK_EX, _WRITERS + writer):
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _WRITERS + writer)
        return False

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self, kind: int, byte: int) -> bool:
        try:
            fcntl.lockf(self._fd, kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the kernel likes
            return False
        return True

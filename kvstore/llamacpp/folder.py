"""The folder of slot files of a llama-server that we start: in memory if there is enough, and gone with its process.

A process that is killed removes nothing, and memory would fill. So each holds a lock in its folder as long as it lives,
which the kernel lets go with it, and the next one to start removes those of its user that nobody holds. Unlike process
ids, locks are not fooled by a number that came back, or by containers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY_FOLDER = Path("/dev/shm")
ENOUGH_MEMORY_BYTES = 1 << 30  # in it, for slot files; else they go to the folder for temporary files
PREFIX, LOCK = "kvstore-slots-", "lock"


class SlotsFolder:
    """One such folder, at `path`."""

    def __init__(self, parents: tuple[Path, ...] | None = None) -> None:
        """Remove those that were left behind in any of `parents`, and make one in the first with enough room."""
        parents = (MEMORY_FOLDER, Path(tempfile.gettempdir())) if parents is None else parents
        for parent in parents:
            remove_left(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=next((p for p in parents if _is_enough(p)), parents[-1])))
        self._lock = os.open(self.path / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It has its name only when it is held: whoever finds it free finds a dead one's.
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_left(parent: Path) -> None:
    """Remove the folders in `parent` that processes of this user left behind when they were killed."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError), _held(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises OSError if it is another's, or no such folder of this user's."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NotADirectoryError(path)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _is_enough(parent: Path) -> bool:
    try:
        return shutil.disk_usage(parent).free >= ENOUGH_MEMORY_BYTES
    except OSError:
        return False

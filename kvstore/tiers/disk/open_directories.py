"""The disk tier's directories that this process has open: each once, however many tiers use it.

LMDB and POSIX locks both belong to the process: closing a second opening of the same files would let go of the first
one's locks.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kvstore.tiers.disk.directory import DiskDirectory
from kvstore.tiers.disk.meta import Geometry

_opened: dict[tuple[int, int], DiskDirectory] = {}  # (device, inode)
_opened_lock = threading.Lock()  # opening and closing only; never held while bytes move


def acquire(
    path: Path,
    geometry: Geometry | None = None,
    num_slots: int = 0,
    *,
    direct: bool = True,
    read_only: bool = False,
    shared: bool = True,
) -> DiskDirectory:
    """The directory at `path`, opened now or shared with this process's other tiers. End with `release`.

    Raises ConfigError, LayoutMismatch, or TierUnavailable if other processes keep it from being used.
    """
    with _opened_lock:
        opened = _opened.get(_identity(path)) if path.exists() else None
        if opened is not None:
            opened.join(geometry, num_slots, read_only=read_only, shared=shared)
            return opened
        directory = DiskDirectory(path, geometry, num_slots, direct=direct, read_only=read_only, shared=shared)
        _opened[_identity(path)] = directory
        return directory


def release(directory: DiskDirectory) -> None:
    """Undo one `acquire`."""
    if directory.is_inherited:
        return  # a forked child: what it inherited is its parent's, and so are the locks it would wait for
    with _opened_lock:
        if directory.leave():
            for identity in [identity for identity, opened in _opened.items() if opened is directory]:
                del _opened[identity]


def _after_fork() -> None:
    # Not told by the process id: a child in a container of its own may have its parent's number.
    global _opened_lock
    _opened_lock = threading.Lock()  # another thread may have held it
    for directory in _opened.values():
        directory.is_inherited = True
    _opened.clear()


os.register_at_fork(after_in_child=_after_fork)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino

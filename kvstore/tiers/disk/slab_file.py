"""The file of equal slots in which the disk tier keeps pages.

Bytes go straight between a host slot and the disk (O_DIRECT): no page cache, no copy, a tenth of the CPU of storing
pages in a database. Where a filesystem refuses O_DIRECT, or a view is not aligned, the same calls go through the page
cache, which is told at once to forget what it saw, so that it does not eat the memory the host slab was given.

Any thread: positions are passed with every call. Which slot holds what is the index's business.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

import numpy as np

from kvstore.errors import ConfigError
from kvstore.layout import SLOT_ALIGNMENT
from kvstore.tiers.disk.private_files import open_private, reserve

_log = logging.getLogger(__name__)


class SlabFile:
    """`slot_bytes`-sized slots in one preallocated file."""

    def __init__(
        self,
        path: Path,
        slot_bytes: int,
        *,
        direct: bool = True,
        read_only: bool = False,
        judge_owner: bool = True,
    ) -> None:
        """Open the file, creating it empty if it may be written.

        Raises OSError, or ConfigError if it is not ours alone (private_files.py, as `judge_owner`).
        """
        self.path = path
        self.slot_bytes = slot_bytes
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self._fd = open_private(path, flags, judge_owner=judge_owner)
        self._direct_fd = self._open_direct(flags) if direct else None
        self._retired_fd: int | None = None

    @property
    def is_direct(self) -> bool:
        """True while O_DIRECT is in use."""
        return self._direct_fd is not None

    def num_slots(self) -> int:
        """Whole slots that the file has at this moment."""
        return os.fstat(self._fd).st_size // self.slot_bytes

    def reserve(self, num_slots: int) -> None:
        """Grow the file to `num_slots` slots with disk blocks behind them, so that no later write can run out of space.

        Never shrinks it. Where the filesystem cannot set blocks aside the file is sparse: a write that finds no room
        then refuses its page. Raises ConfigError naming `disk.capacity_bytes` if the filesystem has no room, or allows
        no file that large; the file is then as before.
        """
        status = os.fstat(self._fd)
        size = num_slots * self.slot_bytes
        if status.st_size >= size and status.st_blocks * 512 >= size:
            return
        filesystem = os.fstatvfs(self._fd)
        free = filesystem.f_bavail * filesystem.f_frsize + status.st_blocks * 512
        if size > free:
            raise self._no_room(size, free)
        try:
            if not reserve(self._fd, size):
                os.ftruncate(self._fd, max(size, status.st_size))
                _log.warning(
                    "disk tier: the filesystem of %s cannot set space aside: %s is a sparse file of %d bytes, and "
                    "pages that find no room later are not stored",
                    self.path.parent,
                    self.path.name,
                    size,
                )
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, status.st_size)
            if error.errno == errno.EFBIG:
                raise ConfigError(
                    f"disk.capacity_bytes is {size}, but a file of that size is not allowed in disk.path "
                    f"{self.path.parent} (by its filesystem, or by the limit of file sizes: ulimit -f); set it lower"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_room(size, free) from error
            raise

    def read(self, slot: int, view: memoryview, num_bytes: int) -> bool:
        """Fill the head of `view` with `num_bytes` of a slot; False if the file ends before. Raises OSError.

        `view` is a whole slot: a direct read fills it up to the next multiple of 4096.
        """
        offset = slot * self.slot_bytes
        if self._direct_fd is not None:
            try:
                return _read(self._direct_fd, view[: _whole_sectors(num_bytes)], offset) >= num_bytes
            except OSError as error:
                self._stay_direct_or_raise(error, view)
        done = _read(self._fd, view[:num_bytes], offset)
        os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        return done >= num_bytes

    def write(self, slot: int, view: memoryview, num_bytes: int) -> None:
        """Store the head of `view`, at least `num_bytes` of it, in a slot. Raises OSError."""
        offset = slot * self.slot_bytes
        if self._direct_fd is not None:
            try:
                return _write(self._direct_fd, view[: _whole_sectors(num_bytes)], offset)
            except OSError as error:
                self._stay_direct_or_raise(error, view)
        _write(self._fd, view[:num_bytes], offset)
        os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)  # starts writeback; drops what is clean

    def ping(self, *, writable: bool) -> None:
        """Raise OSError if the file cannot be read, or lies on a filesystem that has become read-only."""
        os.pread(self._fd, 1, 0)
        if writable and os.fstatvfs(self._fd).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        for fd in (self._fd, self._direct_fd, self._retired_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct_fd, self._retired_fd = -1, None, None

    def _open_direct(self, flags: int) -> int | None:
        try:
            return os.open(self.path, (flags & ~os.O_CREAT) | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            _log.info("disk tier: %s refuses O_DIRECT; pages go through the page cache", self.path)
            return None

    def _stay_direct_or_raise(self, error: OSError, view: memoryview) -> None:
        """EINVAL means that this view, or this device, does not suit O_DIRECT; anything else is a failure."""
        if error.errno != errno.EINVAL:
            raise error
        is_aligned = np.frombuffer(view, np.uint8).ctypes.data % SLOT_ALIGNMENT == 0
        if is_aligned and len(view) % SLOT_ALIGNMENT == 0 and self._direct_fd is not None:
            _log.warning("disk tier: %s refuses direct transfers of aligned slots; using the page cache", self.path)
            # The descriptor stays open: another thread may be inside a call on it.
            self._retired_fd, self._direct_fd = self._direct_fd, None

    def _no_room(self, size: int, free: int) -> ConfigError:
        return ConfigError(
            f"disk.capacity_bytes is {size}, but the filesystem of disk.path {self.path.parent} has only {free} bytes "
            f"for it: set it to at most {free // self.slot_bytes * self.slot_bytes}, or free some space"
        )


def _whole_sectors(num_bytes: int) -> int:
    return -(-num_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _read(fd: int, view: memoryview, offset: int) -> int:
    """Read until the view is full or the file ends; return the bytes read."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:] if done else view], offset + done)
        done += count
        if count == 0 or (done < len(view) and done % SLOT_ALIGNMENT):  # an odd end is the end of the file
            break
    return done


def _write(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.pwritev(fd, [view[done:] if done else view], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "write stored nothing")
        done += count

"""The locks of a disk tier's directory: advisory, on bytes of one file, and gone with their process.

    byte 0          shared by every process that has the directory open; exclusive while the first of them sets it up
    byte 1          held during a write transaction
    bytes 2 to 5    shared by readers: which snapshots of the index are being read (index_snapshots.py)
    byte 6          held by every process that stores: exclusively where `disk.shared` is false, shared otherwise
    byte 16 + id    held by writer `id` as long as it lives, so that slots a dead writer was filling can be taken back

Unlike process ids, locks are not fooled by a reused number or by containers that cannot see each other's processes, and
the kernel lets go only when the last write of a killed process has ended. Unlike LMDB's own mutex, they can be waited
for with a deadline: a process that is stopped in the middle of a transaction does not stop the others for ever. LMDB's
own locks are not used at all: they go by process id, and two containers whose process is number 1 would shut each other
out, or take each other's readers for their own.

The file holds the number of the newest snapshot, for readers, and which kernel runs the processes that use it: locks
and mapped memory reach no further, so a directory on a network is one machine's at a time.

POSIX locks belong to the process and vanish when it closes *any* descriptor of the file. So a process opens the file
once per directory (kvstore/tiers/disk/directory.py sees to it). Any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.tiers.disk.private_files import open_private

_USERS, _WRITE, _READERS, _OWNERS, _WRITERS = 0, 1, 2, 6, 16  # byte offsets of locks
POLL_S = 0.001  # fcntl has no wait with a deadline; a transaction takes about this long
OWNER_WAIT_S = 5.0  # a process that was killed keeps its locks until its memory is given back
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_NEWEST = struct.Struct("<Q")  # the content: the newest snapshot, then the kernel
_KERNEL_BYTES = 36
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, process


class DirectoryLock:
    """The lock file of one directory, as this process has it open."""

    def __init__(self, path: Path, *, read_only: bool = False, judge_owner: bool = True) -> None:
        """Open the file, creating it unless `read_only`. Raises OSError, or ConfigError if it is not ours alone."""
        self.path = path
        self.read_only = read_only
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self._fd = open_private(path, flags, judge_owner=judge_owner)
        self._threads = (
            threading.RLock()
        )  # POSIX locks do not tell threads apart. An RLock, since that knows whose it is

    def own(self, *, alone: bool) -> None:
        """Become one of those that store in the directory, or, `alone`, the only one.

        Raises ConfigError if another process is, or does not let others in.
        """
        deadline = time.monotonic() + OWNER_WAIT_S
        while not self._take(fcntl.LOCK_EX if alone else fcntl.LOCK_SH, _OWNERS):
            if time.monotonic() >= deadline:
                raise ConfigError(self._refusal(alone))
            time.sleep(POLL_S)

    def enter(self, deadline: float, *, may_set_up: bool = True) -> bool:
        """Become a user of the directory; True if this is the only process, which then holds it exclusively.

        With `may_set_up` False it is never exclusive. `deadline` is on time.monotonic. Raises TierUnavailable if
        another process is still setting up by then, ConfigError if processes of another machine use it.
        """
        while True:
            if may_set_up and self._take(fcntl.LOCK_EX, _USERS):
                self._write_content(_BOOT_ID_BYTES, _NEWEST.size)
                return True
            if self._take(fcntl.LOCK_SH, _USERS):
                self._check_kernel()
                return False
            if time.monotonic() >= deadline:
                raise TierUnavailable("disk tier: another process has been setting up the directory for too long")
            time.sleep(POLL_S)

    def refuse_older_users(self, alone: bool) -> None:
        """Raise ConfigError if processes of a build with LMDB's own locks may have the directory open.

        alone: `enter` said so. A reader that is not, and finds nobody, takes the files as they lie.
        """
        if not alone and not (self.read_only and self._holder(_USERS) is None):
            raise ConfigError(
                f"disk.path is {self.path.parent}: an older release of kvstore has set it up, and another process has "
                f"it open; stop every process that uses it, then start this release: the pages stay"
            )

    def share(self) -> None:
        """End being exclusive: let other processes in."""
        fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _USERS)

    @contextlib.contextmanager
    def writing(self, deadline: float) -> Iterator[None]:
        """Be the only writer of all processes and threads. Raises TierUnavailable if not so by `deadline`."""
        with self._turn(deadline - time.monotonic()) as is_ours:
            if not is_ours:
                raise TierUnavailable("disk tier: another thread has held the index's write lock for too long")
            with self._unlocking(_WRITE):
                while not self._take(fcntl.LOCK_EX, _WRITE):
                    if time.monotonic() >= deadline:
                        raise TierUnavailable("disk tier: another process has held the index's write lock for too long")
                    time.sleep(POLL_S)
                yield

    @contextlib.contextmanager
    def holding_writers_off(self) -> Iterator[bool]:
        """True while nobody may write, in any process; False, at once, if somebody is writing now."""
        with self._turn(0.0) as is_ours:
            if not is_ours:
                yield False
                return
            with self._unlocking(_WRITE):
                yield self._take(fcntl.LOCK_SH, _WRITE)

    def live(self, writer: int) -> None:
        """Mark writer `writer` as living in this process."""
        if not self._take(fcntl.LOCK_EX, _WRITERS + writer):
            raise TierUnavailable(f"disk tier: writer number {writer} is taken; the index gave it out twice")

    def is_alive(self, writer: int) -> bool:
        """True if another process lives as `writer`. Never ask about a writer of this process."""
        return self._holder(_WRITERS + writer) is not None

    # For readers of the index: see index_snapshots.py.

    def begin_reading(self, ring: int) -> None:
        """Tell writers that this process reads snapshots of number `ring`. Once per process: count threads yourself."""
        if not self._take(fcntl.LOCK_SH, _READERS + ring):
            raise TierUnavailable("disk tier: the lock of the index's readers is held by something else")

    def end_reading(self, ring: int) -> None:
        """Undo `begin_reading`."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _READERS + ring)

    def reader(self, ring: int) -> int | None:
        """The process id of another process that reads snapshots of number `ring`; 0 where it cannot be seen from here
        (another container), None if there is none.
        """
        return self._holder(_READERS + ring)

    def newest(self) -> int:
        """The newest snapshot that is whole, as its writer wrote it down; -1 if nothing is written."""
        raw = os.pread(self._fd, _NEWEST.size, 0)
        return int(_NEWEST.unpack(raw)[0]) if len(raw) == _NEWEST.size else -1

    def set_newest(self, snapshot: int) -> None:
        """Write down that a snapshot is whole. Where it cannot be written readers take their longer way."""
        self._write_content(_NEWEST.pack(snapshot), 0)

    def close(self) -> None:
        """Release everything. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # An exception from outside (Ctrl-C, a watchdog) may come between any two steps, so none relies on the one before:
    # what is let go is what may have been taken. Nobody else lets go of a lock for a process that lives on.

    @contextlib.contextmanager
    def _turn(self, timeout_s: float) -> Iterator[bool]:
        """This thread's turn; False if it has not come in time. A thread never asks for it twice."""
        try:
            yield self._threads.acquire(timeout=max(0.0, timeout_s))
        finally:
            try:
                self._threads.release()
            except RuntimeError:  # not ours
                pass
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._threads.release()
                raise

    @contextlib.contextmanager
    def _unlocking(self, byte: int) -> Iterator[None]:
        try:
            yield
        finally:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def _take(self, kind: int, byte: int) -> bool:
        try:
            fcntl.lockf(self._fd, kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the kernel likes
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise ConfigError(
                    f"disk.path is {self.path.parent}: its filesystem has no locks ({error}); use a local one"
                ) from error
            raise
        return True

    def _holder(self, byte: int) -> int | None:
        """The process id of another process that has the byte locked, None if none has. Changes nothing."""
        raw = fcntl.fcntl(self._fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        kind, _, _, _, pid = _FLOCK.unpack(raw)
        return None if kind == fcntl.F_UNLCK else max(0, pid)

    def _refusal(self, alone: bool) -> str:
        pid = self._holder(_OWNERS)
        who = f"process {pid}" if pid else "a process of another container" if pid == 0 else "another process"
        if alone:
            text = f"disk.shared is false, and {who} has disk.path {self.path.parent} open"
        else:
            text = f"disk.path is {self.path.parent}: {who} has it open with disk.shared = false"
        return f"{text}; stop it, or choose another disk.path, or set disk.shared = true for both"

    def _check_kernel(self) -> None:
        theirs = os.pread(self._fd, _KERNEL_BYTES, _NEWEST.size)
        # Without another user it is what an earlier boot left. What is no boot id at all is damage, and no reason.
        if theirs == _BOOT_ID_BYTES or theirs.count(b"-") != 4 or self._holder(_USERS) is None:
            return
        raise ConfigError(
            f"disk.path is {self.path.parent}: processes of another machine (or virtual machine) have it open; a "
            f"directory is shared by processes of one kernel: give each machine its own, and let them share a Redis"
        )

    def _write_content(self, data: bytes, offset: int) -> None:
        if not self.read_only:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, data, offset)


def _boot_id() -> bytes:
    try:
        return _BOOT_ID.read_bytes().strip()[:_KERNEL_BYTES]
    except OSError:  # then no machine is told from another
        return bytes(_KERNEL_BYTES)


_BOOT_ID_BYTES = _boot_id()

"""Opens the disk tier's files, and puts disk blocks behind them.

They hold what a model made of somebody's prompt, and what is read from them becomes somebody's answer. So a file that
is a link, that another user owns, or that everybody may read or change is refused and left as it is; what this module
makes can be read by its owner only.

Blocks are asked of the kernel itself. The C library's posix_fallocate writes a byte into every block where a filesystem
has no fallocate (ext3, NFS v3, some FUSE): 48 s for 2 GiB, while other processes wait at the lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.ownership import exposure, kind_of, owner_problem

FILE_MODE = 0o600  # what a model made of somebody's prompt is nobody else's to read
DIRECTORY_MODE = 0o700

# ENODEV: not on this kind of file. EPERM: a sandbox that knows only some calls.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)

_libc = ctypes.CDLL(None, use_errno=True)


def open_private(path: Path, flags: int, *, judge_owner: bool = True) -> int:
    """Open one of our files, made with FILE_MODE if O_CREAT is in `flags`; return its descriptor.

    judge_owner: False for looking only, by root, at what another user's process made.
    Raises ConfigError with what to run if it is not ours alone, OSError if it cannot be opened.
    """
    try:
        # A pipe in a file's place must not hang us; on a file O_NONBLOCK means nothing.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _refused(path, f"is {kind_of(os.lstat(path))}, and must be a file", f"mv {path} {path}.old") from None
        raise
    try:
        check_private(path, os.fstat(fd), judge_owner=judge_owner)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_private(path: Path, status: os.stat_result, *, judge_owner: bool = True) -> None:
    """Refuse a file that is not ours alone. Raises ConfigError with what to run."""
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, f"is {kind_of(status)}, and must be a file", f"mv {path} {path}.old")
    problem = owner_problem(status) if judge_owner else None
    if problem:
        raise _refused(path, problem, f"chown -R {os.geteuid()} {path.parent}")
    problem = exposure(status, 0o666)
    if problem and judge_owner:
        raise _refused(path, problem, f"chmod 600 {path}")
    if status.st_nlink > 1 and judge_owner:
        raise _refused(
            path, f"has {status.st_nlink} names; what is written to it would change the others", f"rm {path}"
        )


def check_directory(path: Path, *, may_be_link: bool, judge_owner: bool = True) -> None:
    """Refuse a directory in which others can put files in the place of ours.

    may_be_link: a link to it is followed if it is ours or root's.
    Raises ConfigError with what to run, OSError if it is not there.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        problem = owner_problem(status) if may_be_link else "is a link, and must be a directory"
        if problem:
            raise _refused(path, problem, f"rm {path}")
        status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(path, f"is {kind_of(status)}, and must be a directory", f"rm {path}")
    if not judge_owner:
        return
    problem = owner_problem(status)
    if problem:
        raise _refused(path, problem, f"chown -R {os.geteuid()} {path}, or set disk.path to a directory below it")
    problem = exposure(status, 0o222)
    if problem:
        raise _refused(path, problem, f"chmod go-w {path}, or set disk.path to a directory below it")


def reserve(fd: int, num_bytes: int) -> bool:
    """Put disk blocks behind the first `num_bytes` of a file, which grows to that; False where the filesystem cannot.

    What was written stays. Raises OSError, ENOSPC among others: some blocks may have come already.
    """
    while fallocate(fd, num_bytes) != 0:
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def fallocate(fd: int, num_bytes: int) -> int:
    """The system call, for all bytes from 0 on: 0, or -1 with the reason in ctypes.get_errno()."""
    return int(_libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)))


def _refused(path: Path, problem: str, cure: str) -> ConfigError:
    return ConfigError(f"disk.path: {path} {problem}; nothing was changed. Run: {cure}")

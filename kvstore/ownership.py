"""Whose a file is, and who else may read or change it: one rule for all files that are nobody else's business.

A file belongs to this process if its owner is the user it runs as, or root, who can do anything anyway. Bits for a
group count as nobody else's if the process is in that group: so Kubernetes hands out secrets (root, group of the pod,
0440) and volumes (root, group of the pod, 2775), and a user's own files are often his group's. Bits for everybody else
never do.

Used for tokens and keys (`secret_problem`) and for the disk tier's directory (kvstore/tiers/disk/private_files.py).
"""

from __future__ import annotations

import os
import pwd
import stat

from kvstore.errors import ConfigError

_READ, _WRITE = 0o444, 0o222


def owner_problem(status: os.stat_result) -> str | None:
    """Say that a file is another user's, as the end of a sentence that begins with the file; None if it is not."""
    if status.st_uid in (os.geteuid(), 0):
        return None
    return f"belongs to {user_name(status.st_uid)}, and this process runs as {user_name(os.geteuid())}"


def exposure(status: os.stat_result, bits: int, *, group_may: int = 0o777) -> str | None:
    """Say who else has one of the permissions `bits` (0o444 to read, 0o222 to write); None where nobody has.

    group_may: what a group of this process may have of them; another group may have nothing.
    """
    mode = stat.S_IMODE(status.st_mode)
    if mode & bits & 0o007:
        return f"can be {_done(mode & bits & 0o007)} by every user (mode {mode:04o})"
    is_ours = status.st_gid == os.getegid() or status.st_gid in os.getgroups()
    group = mode & bits & 0o070 & ~(group_may if is_ours else 0)
    if group:
        return f"can be {_done(group)} by group {status.st_gid} (mode {mode:04o})"
    return None


def check_secret(field: str, path: str | os.PathLike[str]) -> None:
    """Refuse a file with a token or a key that others can read or change, or that is no file.

    field: the setting that names it. Raises ConfigError with what to run. A link is followed: Kubernetes makes links.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field} is {os.fspath(path)}; it cannot be read: {_reason(error)}") from None
    check_secret_status(field, path, status)


def read_secret(field: str, path: str | os.PathLike[str]) -> bytes:
    """Return what a file with tokens or a key holds. Raises ConfigError as `check_secret` does."""
    try:
        # Judged by what is open, so that nobody puts another file in its place meanwhile; a pipe does not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            check_secret_status(field, path, os.fstat(fd))
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{field} is {os.fspath(path)}; it cannot be read: {_reason(error)}") from None


def check_secret_status(field: str, path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Refuse by what the system says of a file; see `check_secret`."""
    name = os.fspath(path)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{field} is {name}; it must be a file, and is {kind_of(status)}")
    problem = owner_problem(status)
    if problem:
        raise ConfigError(f"{field} is {name}; it {problem}; run: chown {os.geteuid()} {name}")
    problem = exposure(status, _READ | _WRITE, group_may=_READ)
    if problem:
        raise ConfigError(
            f"{field} is {name}; it {problem}; run: chmod 600 {name} (for a Kubernetes secret: defaultMode: 0400, "
            f"with an fsGroup)"
        )


def kind_of(status: os.stat_result) -> str:
    """The kind of a file, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a link",
        stat.S_IFSOCK: "a socket",
        stat.S_IFIFO: "a pipe",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


def user_name(uid: int) -> str:
    """A user as people know it; a container's user often has no name."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def _done(bits: int) -> str:
    can_read, can_write = bool(bits & _READ), bool(bits & _WRITE)
    return "read and changed" if can_read and can_write else "changed" if can_write else "read"


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)

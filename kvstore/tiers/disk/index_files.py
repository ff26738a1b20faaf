"""The files of a disk tier's index: judged before LMDB opens them by name, opened, set aside when they are damaged.

    <disk.path>/index/data.mdb   LMDB's file, with blocks set aside behind it
    <disk.path>/index.damaged/   the last index that could not be read, kept for a look

Called by DiskDirectory only, which knows who else has the directory open.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
from pathlib import Path

import lmdb

from kvstore.errors import CorruptPage
from kvstore.tiers.disk.private_files import (
    DIRECTORY_MODE,
    FILE_MODE,
    check_directory,
    check_private,
    open_private,
    reserve,
)

# The index is not what was written: begin anew. Other errors of LMDB are about this moment or this process.
DAMAGE = (
    CorruptPage,
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
)

_log = logging.getLogger(__name__)


def check_files(path: Path, *, judge_owner: bool) -> None:
    """Refuse a directory `path`, an index or its file that is not ours alone. The other files are judged when open.

    Raises ConfigError with what to run; OSError if there is no such directory.
    """
    index, data = path / "index", path / "index" / "data.mdb"
    check_directory(path, may_be_link=True, judge_owner=judge_owner)
    if os.path.lexists(index):
        check_directory(index, may_be_link=False, judge_owner=judge_owner)
    if os.path.lexists(data) and (data.is_symlink() or not data.is_dir()):  # a directory is damage, as other garbage
        check_private(data, os.lstat(data), judge_owner=judge_owner)


def open_environment(path: Path, map_bytes: int, *, read_only: bool) -> lmdb.Environment:
    """Open the index of the directory `path`, creating it if it may be written. Raises lmdb.Error or OSError."""
    if not read_only:
        (path / "index").mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    return lmdb.open(
        str(path / "index"),
        map_size=map_bytes,
        readonly=read_only,
        lock=False,  # we have our own, which containers can share: see index_snapshots.py
        mode=FILE_MODE,
        max_dbs=8,
        # A cache: after a crash of the machine (not of the process) the newest pages may be missing, and the walk
        # at the next opening finds an index that was half written.
        sync=False,
        metasync=False,
        lib_version=0,  # the format of LMDB 0.9, which every release of py-lmdb reads
    )


def reserve_blocks(path: Path, num_bytes: int) -> None:
    """Put disk blocks behind the index of the directory `path`, as far as the filesystem can.

    Raises OSError if it is full.
    """
    fd = open_private(path / "index" / "data.mdb", os.O_RDWR | os.O_CREAT)
    try:
        reserve(fd, num_bytes)
    finally:
        os.close(fd)


def set_aside(path: Path, reason: str) -> None:
    """Move the index of the directory `path`, which nobody has open, out of the way."""
    aside = path / "index.damaged"
    _log.error("disk tier: %s: the index is damaged (%s); it moves to %s", path, reason, aside.name)
    if aside.is_symlink() or aside.is_file():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    (path / "index").rename(aside)


def has_address_space(num_bytes: int) -> bool:
    """True if a map of that size could be made now. LMDB gives its old one up before it asks."""
    try:
        mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except (OSError, OverflowError):
        return False
    return True

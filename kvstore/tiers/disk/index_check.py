"""Walks a whole LMDB index and exits with 0 if it is sound. Run as a script, in a process of its own.

LMDB trusts its file: a damaged page can make it read or jump anywhere, which ends the process it runs in. So an index
that nobody has open is walked by a child first; if that dies, only the child is gone and the index is set aside. Beside
processes that use it the walk goes in steps, so that none of them waits, and leaves out what only writers need.

    python -I -S index_check.py <folder of the lmdb package> <index> <"beside others" or "alone">
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

PROBE_TIMEOUT_S = 120.0  # a walk takes about a second per million pages; a damaged tree may have a ring in it
_MAP_BYTES = 1 << 36  # address space only
_STEP = 1024  # records a transaction: about 5 ms


def index_is_sound(path: Path, *, alone: bool) -> bool:
    """Run the probe over the index at `path`; True also where no child can be started to find out.

    alone: nobody else has it open.
    """
    import lmdb

    if not sys.executable or not (path / "data.mdb").exists():
        return True
    package_folder = Path(lmdb.__file__).parent.parent
    command = [
        sys.executable,
        "-I",
        "-S",
        __file__,
        str(package_folder),
        str(path),
        "alone" if alone else "beside others",
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError:
        return True
    return done.returncode in (0, _CANNOT_TELL)


_CANNOT_TELL = 77


def _probe(package_folder: str, path: str, mode: str) -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, package_folder)
    try:
        import lmdb
    except ImportError:
        return _CANNOT_TELL
    env = lmdb.open(path, readonly=True, lock=False, max_dbs=16, map_size=_MAP_BYTES, lib_version=0, create=False)
    return _walk_alone(env) if mode == "alone" else _walk_beside_others(env, Path(path).parent / "lock")


def _walk_alone(env: Any) -> int:
    # A compacting copy reads every page that is in use, and the list of those that are not.
    with open(os.devnull, "wb") as nowhere:
        env.copyfd(nowhere.fileno(), compact=True)
    with env.begin() as txn:
        names = [bytes(name) for name, _ in txn.cursor()]
    for name in names:
        table = env.open_db(name, create=False)
        with env.begin() as txn:
            if sum(1 for _ in txn.cursor(table)) != txn.stat(table)["entries"]:
                return 1
    return 0


def _walk_beside_others(env: Any, lock_path: Path) -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from kvstore.errors import TierUnavailable
    from kvstore.tiers.disk.directory_lock import DirectoryLock
    from kvstore.tiers.disk.index_snapshots import IndexSnapshots

    try:
        snapshots = IndexSnapshots(env, DirectoryLock(lock_path, read_only=True, judge_owner=False))
        reading: Callable[[], AbstractContextManager[Any]] = snapshots.reading
    except OSError:  # nobody can be there
        reading = env.begin
    try:
        with reading() as txn:
            names = [bytes(name) for name, _ in txn.cursor()]
        for name in names:
            with reading():
                table = env.open_db(name, create=False)
            last: bytes | None = b""
            while last is not None:
                with reading() as txn:
                    cursor = txn.cursor(table)
                    more = cursor.set_range(last) if last else cursor.first()
                    keys = [bytes(key) for key, _ in itertools.islice(cursor, _STEP)] if more else []
                last = keys[-1] if len(keys) == _STEP else None
    except TierUnavailable:
        return _CANNOT_TELL
    return 0


if __name__ == "__main__":
    sys.exit(_probe(*sys.argv[1:]))

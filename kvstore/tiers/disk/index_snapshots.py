"""Read transactions on the disk tier's index, in any process that has the directory open.

A snapshot is the index as one write transaction left it; they are numbered. LMDB never writes over the newest snapshot
nor over the one before it, but it must not begin transaction n while the pages of n - 3 are still being read. It keeps
a table of readers for that, by process id; here it is opened without (see directory_lock.py), and readers hold a lock:

    reader   1. reads in the lock file which snapshot s is the newest one that is whole
             2. locks the byte of s (they are used in turn, 4 of them)
             3. begins; if LMDB gives it another snapshot than s, a writer was faster: it lets go and begins again
    writer   of n waits until the byte of n - 2 is free, makes its changes, commits, and writes n into the lock file

Why it is enough: a reader of s has its lock before it begins, and at that moment s is the newest. So the writer of
s + 2, who begins after s + 1 was committed, sees it. That is one transaction sooner than LMDB needs, on purpose: the
root of a snapshot, too, is not written over before that, so that a reader never finds one that is half written. A root
that is being written is not written down yet, so step 3 does not accept it.

If a writer dies between its commit and its note, step 3 never succeeds; so a reader that fails holds writers off (their
byte is free, or its owner is about to finish), and then whatever LMDB gives it is whole.

A process that is stopped while it reads stops writers, and only them, until their deadline; one that dies stops nobody:
its locks are gone. A map that fills because of old readers, as LMDB's own table has it, does not exist here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from lmdb import MapResizedError

from kvstore.errors import TierUnavailable
from kvstore.tiers.disk.directory_lock import POLL_S, DirectoryLock

RING = 4  # bytes in turn: the readers of the newest snapshots must be told apart, and 3 would do
READ_WAIT_S = 2.0  # for a writer that is stopped between its commit and its note
_SPIN_S = 20e-6  # such a writer is nearly always about to finish

Env = Any  # an lmdb.Environment
Txn = Any  # an lmdb.Transaction


class IndexSnapshots:
    """Which snapshots this process reads. Any thread; no transaction may be begun inside another."""

    def __init__(self, env: Env, lock: DirectoryLock) -> None:
        """Take an environment that is open without LMDB's own locks."""
        self._env = env
        self._lock = lock
        self._mutex = threading.RLock()  # of the next line; a reader may be collected while its thread holds it
        self._readers: list[set[_Reading]] = [set() for _ in range(RING)]  # POSIX locks do not count threads

    def reading(self) -> _Reading:
        """A read transaction, as a context. Raises TierUnavailable if a stopped writer keeps it from beginning."""
        return _Reading(self)

    def wait_for_readers(self, snapshot: int, deadline: float) -> None:
        """Return when nobody reads `snapshot` any more; writers only, who know that it is not the newest one.

        Raises TierUnavailable if somebody does so still at `deadline`.
        """
        ring = snapshot % RING
        while True:
            if not self._readers[ring]:
                pid = self._lock.reader(ring)
                if pid is None:
                    return
            else:
                pid = -1
            if time.monotonic() >= deadline:
                reader = {-1: "a thread of this process", 0: "a process of another container"}.get(
                    pid, f"process {pid}"
                )
                raise TierUnavailable(
                    f"disk tier: {reader} has been reading an old state of the index in {self._lock.path.parent} for "
                    f"too long; nothing can be stored until it ends or goes on"
                )
            time.sleep(POLL_S / 10)

    def note(self, snapshot: int) -> None:
        """Write down that transaction `snapshot` was committed, unless it had nothing to commit; writers only."""
        if self._env.info()["last_txnid"] == snapshot:
            self._lock.set_newest(snapshot)

    def begin(self, reader: _Reading) -> Txn:
        """Begin the transaction of `reader`; after an exception `end` it as well."""
        deadline = 0.0
        while True:
            if self._begin_newest(reader) or self._begin_without_writers(reader):
                return reader.txn
            if not deadline:
                deadline = time.monotonic() + READ_WAIT_S
            elif time.monotonic() >= deadline:
                raise TierUnavailable("disk tier: another process has held the index's write lock for too long")
            time.sleep(_SPIN_S)

    def end(self, reader: _Reading) -> None:
        """End whatever `begin` has begun. Idempotent: what was interrupted is done again."""
        try:
            if reader.txn is not None:
                reader.txn.abort()
                reader.txn = None
        finally:
            if reader.ring is not None:
                with self._mutex:
                    self._readers[reader.ring].discard(reader)
                    if not self._readers[reader.ring]:
                        self._lock.end_reading(reader.ring)
                reader.ring = None

    def _begin_newest(self, reader: _Reading) -> bool:
        newest = self._lock.newest()
        if newest < 0:
            return False
        self._enter(reader, newest % RING)
        # A root that is half written may seem to lie beyond the map; without writers the error would be a true one.
        with contextlib.suppress(MapResizedError):
            reader.txn = self._env.begin()
        if reader.txn is not None and reader.txn.id() == newest:
            return True
        self.end(reader)
        return False

    def _begin_without_writers(self, reader: _Reading) -> bool:
        with self._lock.holding_writers_off() as held:
            if not held:
                return False
            reader.txn = self._env.begin()
            snapshot = reader.txn.id()
            self._enter(reader, snapshot % RING)
            self._lock.set_newest(snapshot)
            return True

    def _enter(self, reader: _Reading, ring: int) -> None:
        with self._mutex:
            # In this order, so that an exception at any place leaves nothing that `end` does not find.
            reader.ring = ring
            self._readers[ring].add(reader)
            if len(self._readers[ring]) == 1:
                self._lock.begin_reading(ring)


class _Reading:
    """A context, by hand: this is done for each batch, and a generator takes longer than all the rest.

    An exception from outside (Ctrl-C, a watchdog) may come anywhere. So a reader itself says what it holds, from before
    it holds it, and what is not ended when it is collected is ended then.
    """

    txn: Txn | None = None
    ring: int | None = None

    def __init__(self, snapshots: IndexSnapshots) -> None:
        self._snapshots = snapshots

    def __enter__(self) -> Txn:
        try:
            return self._snapshots.begin(self)
        except BaseException:
            self._snapshots.end(self)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._snapshots.end(self)
        finally:
            if self.ring is not None:  # interrupted
                self._snapshots.end(self)

    def __del__(self) -> None:
        if self.txn is not None or self.ring is not None:
            self._snapshots.end(self)

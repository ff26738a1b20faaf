"""A disk tier's directory, as this process has it open: lock file, index and slab file.

    <disk.path>/lock           who may do what (directory_lock.py)
    <disk.path>/index/         LMDB: which page lies in which slot (index.py)
    <disk.path>/pages.slab     the pages (slab_file.py)
    <disk.path>/index.damaged/ the last index that could not be read, kept for a look

LMDB allows a directory once per process, so tiers over the same one share this object (open_directories.py). The first
process that opens a directory has it to itself while it checks the index, takes back what dead writers left and grows
the files; then others come in. An index that cannot be read is set aside and begun anew: it is a cache, and the pages
it named are misses.

Builds that leave LMDB's own locks on know nothing of our readers, nor we of theirs. So a directory that such a build
set up is taken over, with its pages, only while nobody else has it open, and from then on those builds refuse it.

After a fork the child may not use it (LMDB's rule): its calls raise TierUnavailable. Start children by spawn.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb

from kvstore.errors import (
    ConfigError,
    CorruptPage,
    LayoutMismatch,
    StoreForked,
    TierFull,
    TierRefused,
    TierUnavailable,
)
from kvstore.tiers.disk.directory_lock import DirectoryLock
from kvstore.tiers.disk.gate import Gate
from kvstore.tiers.disk.index import DiskIndex, is_read_only
from kvstore.tiers.disk.index_check import index_is_sound
from kvstore.tiers.disk.index_files import (
    DAMAGE,
    check_files,
    has_address_space,
    open_environment,
    reserve_blocks,
    set_aside,
)
from kvstore.tiers.disk.index_map import MAX_MAP_BYTES, IndexMapFull, map_bytes_of, reserved_bytes
from kvstore.tiers.disk.meta import LMDB_LOCKS_VERSION, Geometry
from kvstore.tiers.disk.slab_file import SlabFile

OPEN_TIMEOUT_S = 30.0  # for another process that is setting the directory up; it may be walking a large index
CLOSE_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class DiskDirectory:
    """Shared by all tiers of this process over one directory. Any thread."""

    def __init__(
        self,
        path: Path,
        geometry: Geometry | None,
        num_slots: int,
        *,
        direct: bool,
        read_only: bool,
        shared: bool = True,
    ) -> None:
        """Open or create; `geometry` None takes what is there. Use `open_directories.acquire` instead."""
        self.path = path
        self._shared = shared
        self.read_only = read_only
        self._judges_owner = not (read_only and os.geteuid() == 0)  # root may look at what is another user's
        self.lost_pages = 0
        self._asked = geometry
        self._asked_slots = num_slots
        self._direct = direct
        self.is_inherited = False  # True in a child that was forked while it was open
        self._users = 1
        self._gate = Gate()
        self._opening = threading.Lock()
        self._is_damaged = False
        self._is_broken = False
        self._lock: DirectoryLock | None = None
        self._index: DiskIndex | None = None
        self._slab: SlabFile | None = None
        self.geometry: Geometry
        self.num_slots: int
        with self._opening:
            self._open()

    @property
    def slab(self) -> SlabFile:
        """The pages; only inside `use`."""
        assert self._slab is not None
        return self._slab

    @contextlib.contextmanager
    def use(self) -> Iterator[DiskIndex]:
        """The index, for one call; it stays open until the call is over.

        Raises TierFull where the disk has no room left for the index, IndexMapFull where `enlarge_map` may help,
        TierRefused where it can only be read, TierUnavailable where it cannot be used. After damage the directory stays
        unavailable until `revive`.
        """
        self._check_process()
        call = object()
        try:
            self._gate.enter(call)
            assert self._index is not None
            yield self._index
        except (lmdb.MapFullError, lmdb.MapResizedError) as error:
            assert self._index is not None
            map_bytes = self._index.map_bytes
            raise IndexMapFull(
                f"disk tier: the index in {self.path} does not fit its map of {map_bytes} bytes: {error}", map_bytes
            ) from error
        except lmdb.DiskError as error:
            raise TierFull(f"disk tier: no room left for the index in {self.path}: {error}") from error
        except (lmdb.Error, CorruptPage, SystemError) as error:
            if isinstance(error, lmdb.Error) and is_read_only(error):
                # The filesystem takes no writes any more. The transaction has ended, and readers need none.
                raise TierRefused(f"disk tier: the index in {self.path} cannot be written: {error}", "EROFS") from error
            # SystemError: py-lmdb's Cursor.delete does not notice that the step to the next record has failed.
            self._is_broken = True
            self._is_damaged = self._is_damaged or isinstance(error, (*DAMAGE, SystemError))
            self._gate.shut(f"disk tier: the index in {self.path} failed: {error}")
            raise TierUnavailable(f"disk tier: the index in {self.path} failed: {error}") from error
        finally:
            try:
                self._gate.leave(call)
            finally:
                self._gate.leave(call)  # if that was interrupted

    def revive(self) -> None:
        """Open again what broke; nothing if nothing did. Raises TierUnavailable if it still cannot be used."""
        self._check_process()
        if not self._is_broken:
            return
        with self._opening:
            if not self._is_broken:
                return
            if not self._gate.drain(CLOSE_TIMEOUT_S):
                raise TierUnavailable(f"disk tier: calls into the broken index in {self.path} have not ended yet")
            self._shut()
            try:
                self._open()
            except (ConfigError, LayoutMismatch) as error:  # somebody changed the directory meanwhile
                raise TierUnavailable(str(error)) from error
            _log.warning("disk tier: %s is in use again", self.path)

    def enlarge_map(self, full: IndexMapFull) -> None:
        """Give the index more address space than it had when it was `full`. Calls of this process wait meanwhile.

        Raises `full` where it cannot have more.
        """
        with self._opening:
            if self._is_broken or self._index is None:
                raise full
            if self._index.map_bytes > full.map_bytes:  # another thread was faster
                return
            in_file = (self.path / "index" / "data.mdb").stat().st_size
            map_bytes = max(min(2 * full.map_bytes, MAX_MAP_BYTES), in_file)
            if map_bytes <= full.map_bytes or not has_address_space(map_bytes):
                _log.error("%s; it cannot have more", full)
                raise full
            self._gate.pause(CLOSE_TIMEOUT_S)
            try:
                if not self._gate.drain(CLOSE_TIMEOUT_S):
                    raise full
                self._index.grow_map(map_bytes)
            except lmdb.Error as error:  # without a map: nothing may touch it before it is opened anew
                self._is_broken = True
                self._gate.shut(f"disk tier: the index in {self.path} failed: {error}")
                raise full from error
            finally:
                if not self._is_broken:
                    self._gate.open()
            _log.warning("%s; it has %d bytes now", full, map_bytes)

    def join(self, geometry: Geometry | None, num_slots: int, *, read_only: bool, shared: bool = True) -> None:
        """Add one more tier of this process to its users. Raises what opening it would raise."""
        if not read_only and not (shared and self._shared):
            raise ConfigError(
                f"disk.shared is false, and another store of this process has disk.path {self.path} open; close that, "
                f"or choose another disk.path, or set disk.shared = true for both"
            )
        if self.read_only and not read_only:
            raise ConfigError(f"disk.path is {self.path}: this process has it open for reading only; close that first")
        if geometry is not None:
            self._check_geometry(geometry)
        if not read_only and num_slots != self.num_slots:
            self._refit(num_slots)
        self._users += 1

    def leave(self) -> bool:
        """End one tier's use; True if it was the last one and everything is closed."""
        self._users -= 1
        if self._users:
            return False
        with self._opening:
            self._gate.shut(f"disk tier: {self.path} is closed")
            if self._gate.drain(CLOSE_TIMEOUT_S):
                self._shut()
            else:
                _log.error("disk tier: calls into %s have not ended; its files stay open", self.path)
        return True

    def _check_process(self) -> None:
        if self.is_inherited:
            raise StoreForked(f"disk tier: {self.path} was opened before a fork; start children by spawn")

    def _refit(self, num_slots: int) -> None:
        """Change the number of slots while tiers of this process use the directory: they wait outside meanwhile."""
        with self._opening:
            if self._is_broken or self._index is None:
                raise TierUnavailable(f"disk tier: {self.path} is out of use in this process; it cannot be resized now")
            self._gate.shut(f"disk tier: {self.path} is being resized; ask again")
            try:
                if not self._gate.drain(CLOSE_TIMEOUT_S):
                    raise TierUnavailable(f"disk tier: calls into {self.path} have not ended; it cannot be resized now")
                self._fit(self._index, self.slab, self.geometry, num_slots)
            except (lmdb.Error, OSError) as error:
                raise self._not_opened(error) from error
            finally:
                if not self._is_broken:
                    self._gate.open()

    # Opening.

    def _open(self) -> None:
        self._enter_path()
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        try:
            check_files(self.path, judge_owner=self._judges_owner)
            self._lock = self._open_lock()
            if self._lock is not None and not self.read_only:
                self._lock.own(alone=not self._shared)
            alone = self._lock is not None and self._lock.enter(deadline, may_set_up=not self.read_only)
            self._check_index(alone)
            try:
                self._open_files(alone)
            except DAMAGE as error:
                if not alone:
                    raise TierUnavailable(
                        f"disk tier: the index in {self.path} cannot be read and other processes have it open: {error}"
                    ) from error
                self._set_aside(str(error))
                self._open_files(alone)
            if alone and self._lock is not None:
                self._lock.share()
        except BaseException as error:
            self._shut()
            if isinstance(error, (lmdb.Error, OSError)):
                raise self._not_opened(error) from error
            raise
        self._is_damaged = self._is_broken = False
        self._gate.open()

    def _enter_path(self) -> None:
        if self.read_only:
            if not (self.path / "index" / "data.mdb").exists():
                raise ConfigError(f"disk.path is {self.path}: there is no page directory to read")
            return
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_opened(error) from error

    def _open_lock(self) -> DirectoryLock | None:
        try:
            return DirectoryLock(self.path / "lock", read_only=self.read_only, judge_owner=self._judges_owner)
        except OSError:
            if self.read_only:  # a copy of a directory, or one on a medium that nobody can write
                return None
            raise

    def _check_index(self, alone: bool) -> None:
        if alone and self._is_damaged:
            self._set_aside("it failed while in use")
        elif (alone or self.read_only) and not index_is_sound(self.path / "index", alone=alone):
            if not alone:
                raise TierUnavailable(f"disk tier: the index in {self.path} is damaged")
            self._set_aside("a walk through it failed")

    def _set_aside(self, reason: str) -> None:
        self._close_files()
        set_aside(self.path, reason)

    def _open_files(self, alone: bool) -> None:
        try:
            index = self._index = self._open_index()
            stored = index.geometry()
            if stored is not None and stored.version == LMDB_LOCKS_VERSION:
                if self._lock is not None:
                    self._lock.refuse_older_users(alone)
                stored = Geometry(stored.layout, stored.slot_bytes)  # what `_fit` will make of it
            geometry = self._asked or stored
            if geometry is None:
                raise ConfigError(f"disk.path is {self.path}: the directory was never set up")
            if stored is not None:
                self.geometry = stored
                self._check_geometry(geometry)
            self.geometry = geometry
            self._slab = SlabFile(
                self.path / "pages.slab",
                geometry.slot_bytes,
                direct=self._direct,
                read_only=self.read_only,
                judge_owner=self._judges_owner,
            )
            slots_in_file = self._slab.num_slots()
            self.num_slots = index.num_slots()
            if not self.read_only:
                # Opened again after a failure: meanwhile another process may have made the directory larger.
                self._fit(index, self._slab, geometry, max(self._asked_slots, self.num_slots if self._is_broken else 0))
                self._note_lost(index.enter(slots_in_file))
        except BaseException:
            self._close_files()
            raise

    def _open_index(self) -> DiskIndex:
        map_bytes = map_bytes_of(self._asked_slots)
        if self.read_only and has_address_space(MAX_MAP_BYTES):
            map_bytes = MAX_MAP_BYTES
        env = open_environment(self.path, map_bytes, read_only=self.read_only)
        try:
            return DiskIndex(env, self._lock)
        except BaseException:
            env.close()
            raise

    def _check_geometry(self, geometry: Geometry) -> None:
        if geometry != self.geometry:
            raise LayoutMismatch(
                f"disk.path is {self.path}: its pages have layout {self.geometry.layout} and slots of "
                f"{self.geometry.slot_bytes} bytes, this store has layout {geometry.layout} and slots of "
                f"{geometry.slot_bytes} bytes; give each layout a directory of its own (nothing was changed)"
            )

    def _fit(self, index: DiskIndex, slab: SlabFile, geometry: Geometry, num_slots: int) -> None:
        """Give the directory `num_slots` slots. It grows; it does not shrink, since that would throw pages away."""
        stored = index.num_slots()
        if num_slots < stored:
            raise ConfigError(
                f"disk.capacity_bytes is {num_slots * geometry.slot_bytes}, but disk.path {self.path} already has "
                f"{stored * geometry.slot_bytes} bytes of slots and does not shrink: set it to at least that, or "
                f"remove the directory to start with a smaller one"
            )
        slab.reserve(num_slots)
        reserve_blocks(self.path, reserved_bytes(num_slots))
        index.grow_map(map_bytes_of(num_slots))
        if num_slots > stored or index.geometry() != geometry:
            index.set_up(geometry, num_slots)
        self.num_slots = num_slots

    def _note_lost(self, lost: int) -> None:
        self.lost_pages += lost
        if lost:
            _log.error("disk tier: %s was cut short; %d pages are lost", self.path / "pages.slab", lost)

    def _not_opened(self, error: lmdb.Error | OSError) -> ConfigError | TierUnavailable:
        if isinstance(error, lmdb.DiskError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return ConfigError(
                f"disk.path is {self.path}: the disk is full ({error}); free some space or set a smaller "
                f"disk.capacity_bytes"
            )
        if isinstance(error, OSError):
            what = "read" if self.read_only else "write"
            return ConfigError(
                f"disk.path is {self.path}: it must be a directory that this process may {what} ({error})"
            )
        return TierUnavailable(f"disk tier: the index in {self.path} cannot be opened: {error}")

    # Closing.

    def _close_files(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
        if self._slab is not None:
            self._slab.close()
            self._slab = None

    def _shut(self) -> None:
        self._close_files()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

"""The host slab: one piece of memory, cut into equal slots, that every byte of the store passes through.

Engines copy into and out of slots, the disk reads and writes them with O_DIRECT, Redis replies are received into them.
So the slab is made once, aligned, backed by huge pages and faulted in before the first request: a first touch in 4 KiB
steps costs more than the copy itself. `shared_name` puts it into a memfd whose descriptor another process can map. Its
size is sealed: a process that was given it cannot cut it short, which would end all that read behind the cut (SIGBUS).

The hard thing is asking for more memory than there is: Linux would grant it and kill somebody later, so the slab is
compared with what is available before anything is touched.

A forked child is left without it: the mapping reads as zeros there, and what is written to it stays in the child. So
views that were handed out before the fork neither crash it nor reach the parent's pages, and the parent keeps its huge
pages, which copy-on-write would take to pieces. (MADV_DONTFORK does the latter too, but leaves a hole: a child ends by
SIGSEGV where it touches an old view, and unmaps what has come into the hole when it lets the view go.)

Any thread: which slot belongs to whom is the planner's business.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.forks import forbid, harmless, in_child
from kvstore.layout import SLOT_ALIGNMENT
from kvstore.tiers.memory_limit import available_memory
from radix.untracked import untrack

HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module
_MADV_WIPEONFORK = 18  # Linux 4.14; not in the mmap module
_MADV_REMOVE = 9  # not in the mmap module before Python 3.13
_MAP_FIXED = 0x10  # not in the mmap module
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; not in the os module. Where vm.memfd_noexec is 2, no memfd is given without it
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in the fcntl module before Python 3.13
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_GUARDED = _SEALS | _F_SEAL_FUTURE_WRITE
_MAP_NORESERVE = 0x4000  # not in the mmap module before Python 3.13
_MAP_FAILED = ctypes.c_void_p(-1).value
_SPARE_BYTES = 64 << 20  # what a full slab leaves of the available memory for everybody else

_PRIVATE = "private:"  # and the process, and the object: no fork takes its parent's for its own

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SlabHandle(NamedTuple):
    """The handle of a slab: any process of the same user attaches to a shared one by it. Plain data: it travels.

    path: the descriptor of the process that made the slab, under /proc; it needs no name in /dev/shm, so nothing is
          left behind by a process that dies, and the small /dev/shm of a container does not matter. Of private memory
          it is a name that means something in the process that made it, and nowhere else.
    first_slot: number of its first slot, as the store counts them; not 0 where a store has had several slabs.
    """

    path: str
    num_slots: int
    slot_bytes: int
    first_slot: int = 0

    def holds(self, slot: int) -> bool:
        """Whether a slot, by its number in a lease, lies in this slab."""
        return 0 <= slot - self.first_slot < self.num_slots


# Private slabs that somebody asked the handle of, by its path.
_private: weakref.WeakValueDictionary[str, HostSlab] = weakref.WeakValueDictionary()
_private_lock = threading.Lock()


def _after_fork() -> None:
    global _private_lock
    _private_lock = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)


class HostSlab:
    """`num_slots` slots of `slot_bytes` each, end to end; slot 0 is aligned to 2 MiB."""

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        *,
        shared_name: str | None = None,
        huge_pages: bool = True,
        prefault: bool = True,
        is_guarded: bool = False,
    ) -> None:
        """Reserve and, with `prefault`, touch the memory.

        slot_bytes:  a multiple of 4096, so that every slot is fit for O_DIRECT.
        shared_name: None for private memory; else the name under which /proc shows the shared one.
        is_guarded:  other processes can only read the shared one, whatever they do with its descriptor. The kernel then
                     takes no memory of slots back either (`discard`).

        Raises ConfigError naming `host.capacity_bytes` if the slots cannot be had, or saying that the system has no
        shared memory that can be sealed.
        """
        _check_geometry(num_slots, slot_bytes)
        _check_fits(num_slots, slot_bytes)
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        size = num_slots * slot_bytes
        self._fd: int | None = None if shared_name is None else _memory(shared_name, size)
        try:
            self.buffer: npt.NDArray[np.uint8] = _map(size, self._fd)
            if self._fd is not None:
                _seal(self._fd, _GUARDED if is_guarded else _SEALS)  # a mapping that is there already can go on writing
        except ConfigError:
            self._close_fd()
            raise
        except OSError as error:
            self._close_fd()
            raise ConfigError(f"host.capacity_bytes is {size}: the system does not give that much: {error}") from error
        if huge_pages:
            _advise(self.buffer, mmap.MADV_HUGEPAGE)  # refused where the kernel has none; the slab works all the same
        if prefault and not _advise(self.buffer, _MADV_POPULATE_WRITE):
            self.buffer[::SLOT_ALIGNMENT] = 0
        self._cut()

    @classmethod
    def attach(cls, handle: SlabHandle, *, prefault: bool = True) -> HostSlab:
        """Map the shared slab of another process; it may end before this one does, the memory stays.

        A private slab of this process is attached to without mapping it again.

        Raises OSError if the slab is gone or another user's, ConfigError if its size is not what the handle says.
        """
        _check_geometry(handle.num_slots, handle.slot_bytes)
        if handle.path.startswith(_PRIVATE):
            return cls._attach_private(handle)
        return cls.attach_descriptor(os.open(handle.path, os.O_RDWR | os.O_CLOEXEC), handle, prefault=prefault)

    @classmethod
    def attach_descriptor(
        cls, fd: int, handle: SlabHandle, *, prefault: bool = True, is_read_only: bool = False
    ) -> HostSlab:
        """Map the shared slab of a descriptor that another process sent; the slab closes it, or this if it raises.

        handle: its size; the path is not opened. Raises OSError, or ConfigError if the size is another.
        """
        slab = cls.__new__(cls)
        slab.num_slots, slab.slot_bytes, slab._fd = handle.num_slots, handle.slot_bytes, fd
        try:
            _check_geometry(handle.num_slots, handle.slot_bytes)
            size, there = handle.num_slots * handle.slot_bytes, os.fstat(fd).st_size
            if there != size:
                raise ConfigError(f"host slab: {handle.path} has {there} bytes, the handle says {size}")
            slab.buffer = _map(size, fd, is_read_only=is_read_only)
            slab.buffer.flags.writeable = not is_read_only  # an exception where the kernel would end the process
        except BaseException:
            slab._close_fd()
            raise
        _advise(slab.buffer, mmap.MADV_HUGEPAGE)
        if prefault:
            _advise(
                slab.buffer, _MADV_POPULATE_READ if is_read_only else _MADV_POPULATE_WRITE
            )  # without it the pages are mapped one by one, as they are used
        slab._cut()
        return slab

    @classmethod
    def _attach_private(cls, handle: SlabHandle) -> HostSlab:
        with _private_lock:
            origin = _private.get(handle.path)
        if origin is None:  # another process' (its number is in the path), or closed
            raise FileNotFoundError(f"host slab: {handle.path} is private memory of another process, or closed")
        if (origin.num_slots, origin.slot_bytes) != (handle.num_slots, handle.slot_bytes):
            raise ConfigError(f"host slab: {handle.path} is not of the size that the handle says")
        slab = cls.__new__(cls)
        slab.num_slots, slab.slot_bytes, slab._fd = handle.num_slots, handle.slot_bytes, None
        slab.buffer = origin.buffer
        slab._cut()
        return slab

    @property
    def handle(self) -> SlabHandle:
        """How this slab is attached to: by other processes, too, unless it is private memory."""
        if self._fd is not None:
            return SlabHandle(f"/proc/{os.getpid()}/fd/{self._fd}", self.num_slots, self.slot_bytes)
        path = f"{_PRIVATE}{os.getpid()}:{id(self)}"
        with _private_lock:
            _private[path] = self
        return SlabHandle(path, self.num_slots, self.slot_bytes)

    @property
    def slabs(self) -> tuple[SlabHandle, ...]:
        """The slabs that a store's slots may lie in: this one, for ever."""
        return (self.handle,)

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot, writable: to be read into or received into; slice assignment would hold the GIL."""
        if not 0 <= slot < len(self._arrays):
            raise IndexError(f"slot {slot} is not in the slab; it has {len(self._arrays)}")
        start = slot * self.slot_bytes
        # Made when asked for: views that are kept are walked by every garbage collection, one for each slot.
        return self._whole[start : start + self.slot_bytes]

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same bytes as an array, for np.copyto, which releases the GIL."""
        return self._arrays[slot]

    def fileno(self) -> int:
        """The descriptor of shared memory, slot i at offset i * slot_bytes; ValueError for private memory."""
        if self._fd is None:
            raise ValueError("host slab: private memory has no file descriptor; make it with shared_name")
        return self._fd

    def discard(self, slots: Iterable[int]) -> None:
        """Give the memory of slots back to the system; they read as zeros when they are used again."""
        advice = _MADV_REMOVE if self._fd is not None else mmap.MADV_DONTNEED
        for slot in slots:
            _advise(self.array(slot), advice)

    @harmless
    def close(self) -> None:
        """Free the memory; it returns to the system with the last view that callers still hold. Idempotent."""
        with _private_lock:
            _private.pop(f"{_PRIVATE}{os.getpid()}:{id(self)}", None)
        self._whole = memoryview(b"")
        self._arrays: list[npt.NDArray[np.uint8]] = []
        self.buffer = np.empty(0, np.uint8)
        self._close_fd()

    def _cut(self) -> None:
        forbid(self, HostSlab._close_fd)  # the descriptor would keep the memory alive for as long as a child lives
        self._whole = self.buffer.data
        bounds = range(0, self.num_slots * self.slot_bytes, self.slot_bytes)
        self._arrays = [self.buffer[start : start + self.slot_bytes] for start in bounds]
        untrack([self._arrays])

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _check_geometry(num_slots: int, slot_bytes: int) -> None:
    if slot_bytes <= 0 or slot_bytes % SLOT_ALIGNMENT:
        raise ConfigError(f"host slab: slot_bytes is {slot_bytes}; it must be a positive multiple of {SLOT_ALIGNMENT}")
    if num_slots < 1:
        raise ConfigError(
            f"host.capacity_bytes holds {num_slots} slots of {slot_bytes} bytes; "
            f"it must be at least {slot_bytes} (better: a few hundred slots)"
        )


def _check_fits(num_slots: int, slot_bytes: int) -> None:
    size, available = num_slots * slot_bytes, available_memory()
    if size > available - _SPARE_BYTES:
        fitting = max(0, available - _SPARE_BYTES) // slot_bytes
        raise ConfigError(
            f"host.capacity_bytes is {size} ({num_slots} slots of {slot_bytes} bytes), but only {available} bytes of "
            f"memory are available: set it to at most {fitting * slot_bytes} ({fitting} slots)"
        )


def _memory(name: str, size: int) -> int:
    """A descriptor of shared memory. Raises ConfigError."""
    try:
        fd = _memfd(name)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise ConfigError(
            f"host slab: the system gives no shared memory of {size} bytes (memfd_create): {error.strerror}. "
            "A node daemon needs it; a store in its engine's own process does not"
        ) from error
    return fd


def _seal(fd: int, seals: int) -> None:
    """Nobody can change the size, nor the seals, any more. Raises ConfigError."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        need = "service.isolate needs Linux 5.1" if seals == _GUARDED else "it must be sealed"
        raise ConfigError(f"host slab: the system does not seal shared memory ({need}): {error.strerror}") from error


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def _map(size: int, fd: int | None, *, is_read_only: bool = False) -> npt.NDArray[np.uint8]:
    """Map `size` bytes at a 2 MiB boundary: private and anonymous, or the file from its start.

    A boundary can only be had by reserving more and using the middle. For a file the middle of the reserve is mapped
    over, so that offset 0 of the file lies on the boundary: the kernel uses huge pages only where both agree.
    """
    # np.frombuffer holds the reserve, slices hold its array: the memory lives as long as the last view of it.
    reserve = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(reserve, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    if fd is not None:
        protection = mmap.PROT_READ if is_read_only else mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(whole.ctypes.data + start, size, protection, flags, fd, 0) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    slab = whole[start : start + size]
    if fd is not None or not _advise(slab, _MADV_WIPEONFORK):  # which the kernel has for private memory only
        in_child(whole, lambda whole: _blank(whole.ctypes.data + start, size))
    return slab


def _blank(address: int, size: int) -> None:
    """Put memory of this process's own, which reads as zeros, where a mapping was inherited."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
    if _libc.mmap(address, size, protection, flags, -1, 0) == _MAP_FAILED:
        os._exit(70)  # a child that could write into its parent's pages must not go on; EX_SOFTWARE


def _advise(buffer: npt.NDArray[np.uint8], advice: int) -> bool:
    return bool(_libc.madvise(buffer.ctypes.data, buffer.nbytes, advice) == 0)

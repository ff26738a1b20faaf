"""A store's slab in the processes of its engine that only copy: the ranks of a tensor-parallel engine.

The scheduler's process has the store; it plans, and says in each step which slots to copy. A rank needs no store: it
maps the slab by a handle that travels with the step, and keeps the mapping until a step brings another handle.

    scheduler:   step.slab = store.slots.slabs[-1]              # a new one after the daemon was restarted
    rank:        if mapped is None or step.slab != mapped.handle:
                     ...wait for the copies under way, let `mapped` go: mapped.close()...
                     mapped = attach_slab(step.slab)
                 np.copyto(mapped.array(slot), ...)             # the lease's own slot numbers

A daemon's slab is asked of the daemon itself, over a connection that stays open: it is one more anchor of the
scheduler's session. So a scheduler that dies leaves its leases behind for as long as a rank is attached, and no slot a
rank copies to is given to anybody else meanwhile. The rank is told (`is_lost`); once its copies have ended it closes,
or dies, and with the last anchor the leases are released.

The hard thing: a slot number of one attachment must not reach memory of another. Those of attachment n begin at
n << 32, and `array` refuses every number that is not of the slab that is mapped. A step that has copies of leases from
before the daemon started again needs both slabs: `store.slots.slabs` names all that a lease can lie in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.base import Slab
from kvstore.errors import ConfigError
from kvstore.service.client.connection import DaemonConnection, dial_unix
from kvstore.service.client.split_slab import SplitSlab, map_slab
from kvstore.service.protocol import frames
from kvstore.service.protocol.frames import Kind, ProtocolError, ReplyStatus
from kvstore.service.protocol.messages import STAGING
from kvstore.tiers.host import HostSlab, SlabHandle


class SlabShare(NamedTuple):
    """The handle of the slab of a daemon's client. Plain data: it travels, within one user's processes.

    path:      of the daemon's socket.
    session:   of the client; whoever knows it may attach to it.
    first_slot: number of the slab's first slot in the client's leases.
    num_staging: slots of memory for saves, where the slab itself can only be read; 0 where saves go to the slab.
    """

    path: str
    session: str
    first_slot: int
    num_slots: int
    slot_bytes: int
    num_staging: int = 0

    def holds(self, slot: int) -> bool:
        """Whether a slot, by its number in a lease, lies in this slab, or in the staging that goes with it."""
        index = slot - self.first_slot
        return 0 <= index < self.num_slots or STAGING <= index < STAGING + self.num_staging


class AttachedSlab:
    """A slab that another process of this engine leases slots of. Made by `attach_slab`; any thread.

    handle: by which it was mapped. buffer: all of it, for a device to page-lock.
    """

    def __init__(
        self,
        handle: SlabHandle | SlabShare,
        slab: HostSlab | SplitSlab,
        slot_base: int,
        anchor: DaemonConnection | None,
    ) -> None:
        self.handle = handle
        self.buffer = slab.buffer
        self._slab = slab
        self._slot_base = slot_base
        self._anchor = anchor

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot, by its number in a lease. Raises IndexError if it is a slot of another slab."""
        return self._slab.array(self._index(slot))

    def view(self, slot: int) -> memoryview:
        """The same bytes, to be read into. Raises IndexError if it is a slot of another slab."""
        return self._slab.view(self._index(slot))

    @property
    def is_lost(self) -> bool:
        """True if the scheduler or the daemon is gone: end what is being copied, then close. Does not wait."""
        return self._anchor is not None and self._anchor.is_lost

    def close(self) -> None:
        """Say that no copy is under way here any more, and let the memory go. Idempotent."""
        if self._anchor is not None:
            self._anchor.close()
        self.buffer = np.empty(0, np.uint8)
        self._slab.close()

    def _index(self, slot: int) -> int:
        index = slot - self._slot_base
        if not self.handle.holds(slot):
            raise IndexError(
                f"slot {slot} is not in the slab that is mapped, [{self._slot_base}, "
                f"{self._slot_base + self._slab.num_slots}): it was leased under another daemon"
            )
        return index


def attach_slab(handle: Slab, *, timeout_s: float = 1.0) -> AttachedSlab:
    """Map the slab that `store.slots.slabs` names, of a store in process or of a daemon's client. Any process.

    Raises OSError if it is gone (the store is closed, its process or the daemon ended), ConfigError if it is not what
    the handle says.
    """
    if isinstance(handle, SlabHandle):
        return AttachedSlab(handle, HostSlab.attach(handle), 0, None)
    if not isinstance(handle, SlabShare):
        raise ConfigError(f"a {type(handle).__name__} names no slab")
    anchor = dial_unix(handle.path)(timeout_s)
    try:
        slab = _receive(anchor, handle, timeout_s)
    except ProtocolError as error:
        anchor.close()
        raise ConnectionError(f"the daemon at {handle.path} shares no slab: {error}") from None
    except BaseException:
        anchor.close()
        raise
    return AttachedSlab(handle, slab, handle.first_slot, anchor)


def _receive(anchor: DaemonConnection, handle: SlabShare, timeout_s: float) -> HostSlab | SplitSlab:
    message = frames.encode_json({"session": handle.session, "anchor": True, "slab": True})
    status, answer, fds = anchor.hello(message, timeout_s, kind=Kind.ATTACH)
    if not fds:
        if status is ReplyStatus.ERROR:
            raise ConnectionError(str(frames.decode_json(answer).get("message")))
        if status is ReplyStatus.GONE:
            raise ConnectionResetError("the scheduler's session is gone: it ended, or the daemon has started again")
        raise ConfigError(f"the daemon at {handle.path} sent no slab: it is of another release")
    return map_slab(fds, handle.num_slots, handle.slot_bytes, handle.num_staging)

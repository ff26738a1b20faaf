"""How long the daemon waits for the rest of a frame that has begun to come.

A client that stops in the middle of a frame, or sends a byte now and then, holds a connection and the memory of what
has come. Large frames have more time, since machines are busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.service.protocol.frames import Frame, Kind, ProtocolError, ReplyStatus

FRAME_TIMEOUT_S = 60.0  # a client waits for an answer for much less (a guess)
SLOWEST_BYTES_S = 100e3

_UNKNOWN = Frame(Kind.HELLO, ReplyStatus.OK, 0, 0)  # of which not even the header has come


class Patience:
    """A timer for one connection. The daemon's event loop only."""

    def __init__(self, refuse: Callable[[Frame, ProtocolError], None]) -> None:
        """refuse: called when the time is over."""
        self._refuse = refuse
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, frame: Frame | None) -> None:
        """Part of a frame has come, with its header unless that is None. Does nothing while time runs already."""
        if self._timer is None:
            frame = frame or _UNKNOWN
            seconds = FRAME_TIMEOUT_S + frame.num_bytes / SLOWEST_BYTES_S
            told = ProtocolError(f"the rest of a frame did not come within {seconds:.0f} s")
            self._timer = asyncio.get_running_loop().call_later(seconds, self._refuse, frame, told)

    def end(self) -> None:
        """A frame is whole, or no more is read for the moment. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

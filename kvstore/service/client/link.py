"""A client's tie to its daemon: attached, or not for the moment.

    DOWN ---- hello answered ----------------> ATTACHED
    ATTACHED - a call is not answered in time -> SILENT      the session stays
    ATTACHED - a lease may be an orphan -------> SILENT      (calls.py)
    SILENT --- an answer in time, no orphans --> ATTACHED
    ATTACHED, SILENT - the daemon hung up -----> DOWN        leases of that session are void

Calls are made by the caller's thread, and only while ATTACHED: the first that is not answered in time costs what it may
take, and from then on all fail at once. What leads back is the *seeker's*, a thread that lives only while not ATTACHED:
it says hello to a new daemon or asks the old one for an answer, and has it release the orphans before anybody goes on.

The hard thing: a session may only be given up by the client while it holds no lease, for the daemon hands the slots of
a lost session to others, and somebody here may be copying from one. So a call that times out costs its connection but
not the session. A daemon that is gone gives slots to nobody: the memory stays as it was for as long as it is mapped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from kvstore.errors import ConfigError, LayoutMismatch
from kvstore.forks import in_child
from kvstore.service.client.attachment import Attachment, DaemonDown, error_of, greet
from kvstore.service.client.connection import DaemonConnection, Dial
from kvstore.service.client.thread import Errand
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import Kind, ProtocolError, ReplyStatus

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05  # before the seeker's first try; doubled by each that fails, up to retry_max_s
HELLO_TIMEOUT_S = 30.0  # the daemon may have to read a directory of millions of pages
SEEK_TIMEOUT_S = 10.0  # a frozen daemon answers when it wakes: better to wait for that than to try again and again


class DaemonLink:
    """Calls to a daemon, with deadlines; finding it again. Any thread.

    dial:      makes a connection; raises OSError, or ConfigError.
    greeting:  the hello message; may be changed for the hellos that follow.
    on_change: told with a new attachment before it is used, and with None when one is lost. Under no lock; any thread.
    """

    def __init__(
        self,
        dial: Dial,
        greeting: bytes,
        *,
        call_timeout_s: float,
        retry_max_s: float,
        on_change: Callable[[Attachment | None], None] = lambda attachment: None,
    ) -> None:
        self.call_timeout_s = call_timeout_s
        self.attachment: Attachment | None = None
        self.num_attached = 0
        self._dial = dial
        self.greeting = greeting
        self._retry_max_s = retry_max_s
        self._on_change = on_change
        self._is_closed = False
        self._is_new = True  # nothing was tried yet in this process
        self._is_answered = threading.Event()  # ATTACHED
        self._pause_s = 0.0
        self._seeker: Errand | None = None
        self._lock = threading.Lock()  # of these and the attachment; never held while calling
        in_child(self, DaemonLink.forget)

    def attach(self, timeout_s: float = HELLO_TIMEOUT_S) -> Attachment:
        """Say hello for the first time. If that fails the daemon is sought from then on.

        Raises DaemonDown; ConfigError or LayoutMismatch if refused.
        """
        with self._lock:
            is_first, self._is_new = self._is_new, False
        if not is_first:
            raise DaemonDown("another thread attaches, or has")
        try:
            attachment = self._meet(self._dial, timeout_s)
        except DaemonDown as error:
            self._seek(str(error))
            raise
        self._is_answered.set()
        return attachment

    def attached(self) -> Attachment:
        """The attachment there is. Does not wait, but for the hello of a forked child. Raises DaemonDown."""
        attachment = self.attachment
        if attachment is not None and self._is_answered.is_set():
            return attachment
        if not self._is_new:
            raise DaemonDown("the daemon has not answered lately")
        try:
            return self.attach(self.call_timeout_s)
        except (ConfigError, LayoutMismatch) as error:  # loud at the start, quiet now: this may be an engine's step
            self._seek(str(error))
            raise DaemonDown(str(error)) from None

    def call(self, attachment: Attachment, call: messages.Call, wait_s: float = 0.0) -> tuple[ReplyStatus, bytes]:
        """One call within `wait_s` and the call timeout.

        Raises DaemonDown, or RequestError if the daemon says that the caller is wrong.
        """
        with self.borrow(attachment) as wire:
            status, answer = wire.call(Kind.CALL, messages.encode(call), wait_s + self.call_timeout_s)
        if status is ReplyStatus.ERROR:
            raise error_of(answer)
        return status, answer

    @contextlib.contextmanager
    def borrow(self, attachment: Attachment) -> Iterator[DaemonConnection]:
        """A connection for a while. After an error it is closed, and DaemonDown raised."""
        if attachment is not self.attachment or not self._is_answered.is_set():
            raise DaemonDown("the daemon has not answered lately")
        wire: DaemonConnection | None = None
        try:
            wire = attachment.take(self._dial, self.call_timeout_s)
            yield wire
        except (OSError, ProtocolError) as error:
            if wire is not None:
                wire.close()
            self._failed(attachment, str(error))
            raise DaemonDown(str(error)) from None
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        attachment.give(wire)
        self._pause_s = 0.0

    def orphan(self, attachment: Attachment, lease_id: int) -> None:
        """Release a lease that the daemon may hold for this client, before anything else is asked of it."""
        attachment.orphans.append(lease_id)
        if attachment is self.attachment:
            self._seek(f"lease {lease_id} may be open there")

    def close(self) -> None:
        """Hang up; the daemon releases what was leased. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._is_answered.clear()
            attachment, self.attachment = self.attachment, None
            seeker, self._seeker = self._seeker, None
        if attachment is not None:
            attachment.hang_up()
        if seeker is not None:
            seeker.end()

    def forget(self) -> None:
        """In a forked child: the session is the parent's, and so is the seeker. The next call says hello anew."""
        self._lock = threading.Lock()  # another thread may have held it
        self._is_answered = threading.Event()
        self._is_new = not self._is_closed
        self.attachment = self._seeker = None

    # ---- private ------------------------------------------------------------------------------------------------

    def _meet(self, dial: Dial, timeout_s: float) -> Attachment:
        """Say hello. The attachment is there then, but not used yet."""
        try:
            wire = dial(min(timeout_s, self.call_timeout_s))
        except OSError as error:
            raise DaemonDown(str(error)) from None
        attachment = greet(wire, self.greeting, self.num_attached, timeout_s)
        with self._lock:
            if not self._is_closed:
                self.num_attached += 1
                self.attachment = attachment
        if attachment is not self.attachment:
            attachment.hang_up()
            attachment.slab.close()
            raise DaemonDown("the link is closed")
        self._on_change(attachment)
        log.info("attached to the daemon, session %s...", attachment.session[:8])
        return attachment

    def _failed(self, attachment: Attachment, reason: str) -> None:
        if attachment.is_lost:
            self._lose(attachment)
        if self.attachment in (attachment, None):  # else another has come meanwhile, and answers
            self._seek(reason)

    def _lose(self, attachment: Attachment) -> None:
        with self._lock:
            is_current = attachment is self.attachment
            if is_current:
                self.attachment = None
        attachment.hang_up()
        if is_current:
            self._on_change(None)

    # ---- the seeker ---------------------------------------------------------------------------------------------

    def _seek(self, reason: str) -> None:
        """Make all calls fail until the daemon has answered the seeker."""
        with self._lock:
            self._is_answered.clear()
            if self._seeker is None and not self._is_closed:
                log.warning("the daemon is away, everything is a miss: %s", reason)
                # A daemon that answers the seeker and fails the next call is sought more and more slowly, too.
                self._pause_s = self._longer(self._pause_s)
                self._seeker = Errand("seeker", self._run)

    def _run(self, seeker: Errand) -> None:
        pause_s, told = self._pause_s, ""
        while not seeker.rest(pause_s):
            try:
                self._knock(seeker)
            except Exception as error:  # whatever it was, there is another try
                if not isinstance(error, (DaemonDown, OSError)) and str(error) != told:
                    told = str(error)
                    log.warning("the daemon cannot be used: %s", told)
                pause_s = self._longer(pause_s)
                continue
            with self._lock:
                if self.attachment is not None and not self.attachment.orphans:
                    # Whoever loses the attachment or finds an orphan from here on starts another seeker.
                    self._seeker = None
                    if not self._is_closed:
                        self._is_answered.set()
                    return

    def _knock(self, seeker: Errand) -> None:
        """One try. Raises if the daemon cannot be used yet."""

        def dial(timeout_s: float) -> DaemonConnection:
            return seeker.hold(self._dial(min(timeout_s, self.call_timeout_s)))

        attachment = self.attachment
        if attachment is not None and attachment.is_lost:
            self._lose(attachment)
            attachment = None
        if attachment is None:
            self._meet(dial, SEEK_TIMEOUT_S)
            return
        began = time.monotonic()
        wire = attachment.open(dial, SEEK_TIMEOUT_S)
        if time.monotonic() - began > self.call_timeout_s:  # it has just woken, or is too slow for any call: ask again
            wire.close()
            wire = attachment.open(dial, self.call_timeout_s)
        try:
            attachment.release_orphans(wire, self.call_timeout_s)
        except BaseException:
            wire.close()
            raise
        attachment.give(wire)

    def _longer(self, pause_s: float) -> float:
        return min(self._retry_max_s, max(FIRST_PAUSE_S, 2 * pause_s))

"""The daemon's answer to a hello, and to a further connection of a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.service.daemon.session import ClientSession


class Greeting:
    """The answer to a hello (JSON) or attach (nothing), and descriptors of memory, closed when they are sent."""

    __slots__ = ("answer", "fds", "session")

    def __init__(self, session: ClientSession, answer: dict[str, Any] | None, fds: Sequence[int] = ()) -> None:
        self.session = session
        self.answer = answer
        self.fds = fds

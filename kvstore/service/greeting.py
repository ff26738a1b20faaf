"""What a daemon answers to a hello, and to a further connection of a session."""

from __future__ import annotations

from typing import Any

from kvstore.service.session import Session


class Greeting:
    """The answer to a hello (JSON) or attach (nothing), and the slab's descriptor, which is closed when it is sent."""

    __slots__ = ("answer", "fd", "session")

    def __init__(self, session: Session, answer: dict[str, Any] | None, fd: int | None) -> None:
        self.session = session
        self.answer = answer
        self.fd = fd

"""What a client has of one daemon: orphans are released once each, whatever comes in between."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvstore.service.client.attachment import Attachment
from kvstore.service.client.connection import DaemonConnection
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import Kind, ReplyStatus

ANSWER = {"session": "s", "namespace": "n", "lookup_deadline_s": 0.1, "load_deadline_s": 1.0}


class Daemon:
    """The far end of a connection; while it answers the first call another thread finds one more orphan."""

    def __init__(self) -> None:
        self.released: list[messages.Call] = []
        self.attachment: Attachment | None = None
        self.is_silent = False

    def call(self, kind: Kind, body: bytes, timeout_s: float) -> tuple[ReplyStatus, bytes]:
        assert kind is Kind.CALL
        if self.is_silent:
            raise TimeoutError
        self.released.append(messages.read_call(body))
        if self.attachment is not None:
            self.attachment.orphans.append(3)
            self.attachment = None
        return ReplyStatus.OK, b""


def attached(daemon: Daemon) -> Attachment:
    return Attachment(0, cast("dict[str, Any]", ANSWER), cast(DaemonConnection, daemon), None)


def test_an_orphan_that_is_found_while_another_is_released_is_released_too() -> None:
    daemon = Daemon()
    attachment = daemon.attachment = attached(daemon)
    attachment.orphans += [1, 2]

    attachment.release_orphans(cast(DaemonConnection, daemon), 1.0)

    assert sorted(daemon.released, key=repr) == [messages.ReleaseCall(number) for number in (1, 2, 3)]
    assert attachment.orphans == []


def test_an_orphan_that_could_not_be_released_stays_one() -> None:
    daemon = Daemon()
    attachment = attached(daemon)
    attachment.orphans += [1, 2]
    daemon.is_silent = True

    with pytest.raises(TimeoutError):
        attachment.release_orphans(cast(DaemonConnection, daemon), 1.0)

    assert attachment.orphans == [1, 2]

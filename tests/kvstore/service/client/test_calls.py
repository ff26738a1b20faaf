"""What is kept of a call whose answer never came."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvstore.plan.records import Request, RequestOptions
from kvstore.service.client.attachment import Attachment, DaemonDown
from kvstore.service.client.calls import Calls
from kvstore.service.client.connection import DaemonConnection
from kvstore.service.client.link import DaemonLink
from kvstore.service.protocol import messages
from kvstore.tiers.host import HostSlab
from radix.hashing import BlockHash


class FrozenDaemon:
    """A link to a daemon that was attached to just now, and does not answer from then on."""

    call_timeout_s = 0.1
    attachment: Attachment | None = None

    def __init__(self) -> None:
        answer = {"session": "s", "namespace": "n", "lookup_deadline_s": 1.0, "load_deadline_s": 1.0}
        self.made = Attachment(2, answer, cast(DaemonConnection, None), cast(HostSlab, None))
        self.orphans: list[tuple[Attachment, int]] = []

    def attached(self) -> Attachment:
        self.attachment = self.made
        return self.made

    def call(self, attachment: Attachment, call: messages.Call, wait_s: float = 0.0) -> Any:
        raise DaemonDown("no answer in time")

    def orphan(self, attachment: Attachment, lease_id: int) -> None:
        self.orphans.append((attachment, lease_id))


def test_a_lease_that_a_new_daemon_may_have_granted_is_its_orphan() -> None:
    link = FrozenDaemon()
    calls = Calls(cast(DaemonLink, link))
    request = Request(1, [BlockHash(b"k" * 32)], 17, RequestOptions())

    with pytest.raises(DaemonDown):
        calls.prepare(messages.PrepareLoadCall, request, 7, 0, 1, "")

    assert link.orphans == [(link.made, 7)]

"""What is kept of a call whose answer never came."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvstore.plan.records import Request, RequestOptions
from kvstore.service.calls import Calls
from kvstore.service.link import Attachment, DaemonDown, Link
from kvstore.service.protocol import Op
from kvstore.service.wire import Wire
from radix.hashing import BlockHash


class FrozenDaemon:
    """A link to a daemon that was attached to just now, and does not answer from then on."""

    call_timeout_s = 0.1

    def __init__(self) -> None:
        answer = {"session": "s", "namespace": "n", "lookup_deadline_s": 1.0, "load_deadline_s": 1.0}
        self.before: Attachment | None = None
        self.made = Attachment(2, answer, cast(Wire, None), None)

    @property
    def attachment(self) -> Attachment | None:
        return self.before

    def attach(self, timeout_s: float) -> Attachment:
        self.before = self.made
        return self.made

    def call(self, attachment: Attachment, op: Op, body: bytes, wait_s: float = 0.0) -> Any:
        raise DaemonDown("no answer in time")


def test_a_lease_that_a_new_daemon_may_have_granted_is_its_orphan() -> None:
    link = FrozenDaemon()
    calls = Calls(cast(Link, link), lambda attachment: None)
    request = Request(1, [BlockHash(b"k" * 32)], 17, RequestOptions())

    with pytest.raises(DaemonDown):
        calls.prepare(Op.PREPARE_LOAD, request, 7, 0, 1, "")

    assert link.made.orphans == [7]

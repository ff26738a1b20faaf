"""A session in the daemon's loop: messages in, answers out, and an end that leaves nothing behind."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.config.sections import Config
from kvstore.errors import RequestError
from kvstore.hints.actions import HintKind
from kvstore.plan.records import SaveLease
from kvstore.plan.wishes import Wish
from kvstore.service.daemon.events import EventHub, Feed
from kvstore.service.daemon.session import ClientSession
from kvstore.service.daemon.stores import OpenStore, Stores
from kvstore.service.daemon.tenants import LOCAL
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import ProtocolError
from kvstore.service.protocol.replies import OutcomesReply
from radix.hashing import BlockHash
from tests.helpers.stores import BLOCK, LAYOUT, PAGE_BYTES, namespace


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[OpenStore]:
    config = Config(
        host={"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False}, service={"socket": tmp_path / "kv.sock"}
    )
    stores = Stores(config)
    opened = await stores.open(LOCAL, LAYOUT, namespace())
    yield opened
    opened.store.check()
    await stores.close(1.0)


@pytest.fixture
def session(opened: OpenStore) -> ClientSession:
    return ClientSession("secret", opened, "test", Feed(EventHub(lambda: [opened]), opened))


def request(
    number: int, num_blocks: int, *, options: messages.Options | None = None, num_tokens: int | None = None
) -> messages.RequestPart:
    keys = [BlockHash(struct.pack("<Q24x", number * 1000 + block)) for block in range(num_blocks)]
    tokens = num_blocks * BLOCK if num_tokens is None else num_tokens
    return messages.RequestPart(number, 0, keys, tokens, 0, options)


def save(session: ClientSession, number: int, num_blocks: int, options: messages.Options | None = None) -> None:
    """Open a save lease under that number."""
    part = request(number, num_blocks, options=options)
    session.handle(messages.encode(messages.PrepareSaveCall(part, number, 0, num_blocks, "")))


async def test_a_lease_that_cannot_be_released_keeps_no_other(
    session: ClientSession, opened: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2, 3):
        save(session, number, 4)
    release = opened.store.release
    bad = session.leases[2].lease

    def failing(lease: Any) -> None:
        if lease is bad:
            raise OverflowError("int too large to convert to float")
        release(lease)

    monkeypatch.setattr(opened.store, "release", failing)
    session.close()

    assert opened.store.stats()["leases"] == 1
    assert "lease 2 is not released" in caplog.text
    release(bad)


@pytest.mark.parametrize("number", [1e300 * 1e10, float("nan"), -1, float("-inf")])
async def test_a_promise_that_is_no_time_is_refused_before_anything_is_leased(
    session: ClientSession, opened: OpenStore, number: float
) -> None:
    with pytest.raises(RequestError, match=r"options\.retain_until"):
        save(session, 1, 4, messages.Options(retain_until=number))

    session.close()
    assert opened.store.stats()["slots"] == {"free": 64, "filling": 0, "resident": 0}


async def test_numbers_that_answers_cannot_carry_are_refused(session: ClientSession) -> None:
    with pytest.raises(RequestError, match="request has 4294967296 tokens; at most 4294967295"):
        session.handle(messages.encode(messages.LookupCall(request(1, 2, num_tokens=1 << 32), 0.0)))
    with pytest.raises(RequestError, match="first is 3"):
        session.handle(messages.encode(messages.ForgetCall(request(1, 2), 3)))
    for first in (-1, 1 << 40):
        with pytest.raises(ProtocolError):
            session.handle(messages.encode(messages.ForgetCall(request(1, 2), first)))


async def test_a_request_with_too_many_keys_is_refused(session: ClientSession) -> None:
    part = messages.RequestPart(1, messages.MAX_KEYS, [BlockHash(bytes(32))], 1 << 30, 0)

    with pytest.raises(RequestError, match="request has 1048577 blocks; a daemon takes at most 1048576"):
        session.handle(messages.encode(messages.KeysCall(part)))


async def test_every_verb_has_a_handler(session: ClientSession) -> None:
    assert set(session._handlers) == set(messages.Call.__subclasses__())


async def test_of_a_hint_a_client_has_no_more_done_at_once_than_its_limit(session: ClientSession) -> None:
    wishes = [messages.WishPart.of(Wish("a", HintKind.PIN, ttl_s=1.0))] * 20

    answer = session.handle(messages.encode(messages.HintCall(request(1, 4), wishes, [])))

    assert isinstance(answer, bytes)
    reasons = [outcome.reason for outcome in OutcomesReply.read(answer).outcomes]
    assert reasons == ["nothing of it is stored here"] * 16 + ["16 actions are done at once"] * 4


async def test_what_a_client_keeps_is_kept_on_its_word(session: ClientSession, opened: OpenStore) -> None:
    save(session, 1, 4, messages.Options(pin=True))
    lease = session.leases[1].lease
    assert isinstance(lease, SaveLease)
    session.handle(messages.encode(messages.CompleteCall(1, None)))

    session.close()

    (kept,) = opened.store.admin.kept()
    assert (kept.holder, kept.num_pages) == ("test (client 0)", 4)

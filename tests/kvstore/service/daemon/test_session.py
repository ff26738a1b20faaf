"""A session in the daemon's loop: messages in, answers out, and an end that leaves nothing behind."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.config.sections import Config
from kvstore.errors import RequestError
from kvstore.plan.records import SaveLease
from kvstore.service.daemon.events import EventHub, Feed
from kvstore.service.daemon.session import ClientSession
from kvstore.service.daemon.stores import OpenStore, Stores
from kvstore.service.daemon.tenants import LOCAL
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import ProtocolError, Verb
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


def request(number: int, num_blocks: int, *, options: bytes = b"", num_tokens: int | None = None) -> bytes:
    keys = b"".join(struct.pack("<Q24x", number * 1000 + block) for block in range(num_blocks))
    tokens = num_blocks * BLOCK if num_tokens is None else num_tokens
    return struct.pack("<QIIQII", number, 0, num_blocks, tokens, 0, len(options)) + options + keys


def save(session: ClientSession, number: int, num_blocks: int, options: bytes = b"") -> None:
    """Open a save lease under that number."""
    message = messages.encode_prepare(request(number, num_blocks, options=options), number, 0, num_blocks, "")
    session.handle(Verb.PREPARE_SAVE, message)


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


@pytest.mark.parametrize("number", ["9" * 400, "1e400", "NaN", "-1", "Infinity", "true"])
async def test_a_promise_that_is_no_time_is_refused_before_anything_is_leased(
    session: ClientSession, opened: OpenStore, number: str
) -> None:
    with pytest.raises(RequestError, match=r"options\.retain_until"):
        save(session, 1, 4, b'{"retain_until": ' + number.encode() + b"}")

    session.close()
    assert opened.store.stats()["slots"] == {"free": 64, "filling": 0, "resident": 0}


async def test_numbers_that_answers_cannot_carry_are_refused(session: ClientSession) -> None:
    with pytest.raises(RequestError, match="request has 4294967296 tokens; at most 4294967295"):
        session.handle(Verb.LOOKUP, messages.encode_lookup(request(1, 2, num_tokens=1 << 32), 0.0))
    with pytest.raises(ProtocolError):
        session.handle(Verb.RELEASE_OWNER, messages.encode_number(-3) + b"abc")
    for first in (-1, 3, 1 << 40):
        with pytest.raises(RequestError, match="first is"):
            session.handle(Verb.FORGET, messages.encode_number(first) + request(1, 2))


async def test_what_a_client_keeps_is_kept_on_its_word(session: ClientSession, opened: OpenStore) -> None:
    save(session, 1, 4, b'{"pin": true}')
    lease = session.leases[1].lease
    assert isinstance(lease, SaveLease)
    session.handle(Verb.COMPLETE, messages.encode_complete(1, None))

    session.close()

    (kept,) = opened.store.admin.kept()
    assert (kept.holder, kept.num_pages) == ("test (client 0)", 4)

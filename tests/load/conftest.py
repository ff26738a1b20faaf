from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest

from kvstore.load.arrivals import Arrivals, Closed
from kvstore.load.client import Client
from kvstore.load.player import Asking, PlayedWorkload, play
from kvstore.load.record import OK, Record
from kvstore.load.requests import Workload
from tests.helpers.openai_server import FakeServer, fake_server

Play = Callable[..., Awaitable[PlayedWorkload]]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def played(server: FakeServer) -> Play:
    """Plays a workload against the fake server."""

    async def run(
        workload: Workload,
        arrivals: Arrivals | None = None,
        *,
        asking: Asking | None = None,
        stop: asyncio.Event | None = None,
        answers: Mapping[int, str] | None = None,
        **client: Any,
    ) -> PlayedWorkload:
        async with Client(server.url, model="fake", now=time.perf_counter, draw=lambda: 0.0, **client) as asker:
            return await play(
                "run",
                workload,
                asker,
                arrivals or Closed(2),
                asking or Asking(workload.api),
                now=time.perf_counter,
                stop=stop or asyncio.Event(),
                answers=answers,
            )

    return run


@pytest.fixture
def record() -> Callable[..., Record]:
    """An answered request of four tokens; fields can be set."""

    def make(number: int = 0, *, ttft_s: float = 1.0, **values: Any) -> Record:
        first = values.get("planned_s", 0.0) + ttft_s
        made = Record(number, number)
        made.status, made.sent_s, made.text = OK, values.get("planned_s", 0.0), "a b c d"
        made.piece_s = [first, first + 0.1, first + 0.2, first + 0.3]
        made.end_s = first + 0.3
        made.prompt_tokens, made.completion_tokens = 100, 4
        for name, value in values.items():
            setattr(made, name, value)
        return made

    return make

"""Plays a workload: who is asked when, in what order, and what is kept of it.

A request that continues a conversation is sent when what it continues is answered, at the earliest. In an open loop it
was due before that perhaps, and its wait counts: a user of a slow server is kept waiting, not excused (the error known
as coordinated omission).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.load.arrivals import Arrivals, Closed, Open
from kvstore.load.client import Client
from kvstore.load.record import SKIPPED, Record
from kvstore.load.requests import COMPLETIONS, Blocks, PlannedRequest, Workload


@dataclass(frozen=True, slots=True)
class Asking:
    """How requests are put, the same for all of a run.

    api:     CHAT or COMPLETIONS, for prompts of messages.
    plain:   only what OpenAI's API has: no session, no `cache`, no `ignore_eos`.
    cache:   False asks a replica of ours to neither look up nor save.
    """

    api: str
    plain: bool = False
    cache: bool = True
    tenant: str = ""
    ignore_eos: bool = True

    def body(self, workload: Workload, request: PlannedRequest, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """The whole body but the model's name."""
        body = {
            **prompt,
            "max_tokens": request.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.plain:
            return body
        if self.ignore_eos:
            body["ignore_eos"] = True
        ours: dict[str, Any] = {} if self.cache else {"cache": False}
        if self.tenant:
            ours["tenant"] = self.tenant
        if self.cache and workload.is_conversation(request):
            ours["session"] = f"{workload.name}-{workload.seed}-{request.conversation}"
            ours["last_turn"] = request.last
        if ours:
            body["kvstore"] = ours
        return body


@dataclass(slots=True)
class PlayedWorkload:
    """The records of a run: one for each request that came to an end, in the order of the workload."""

    name: str
    records: list[Record] = field(default_factory=list)
    wall_s: float = 0.0
    interrupted: bool = False

    @property
    def answers(self) -> dict[int, str]:
        """The texts that conversations go on from."""
        return {record.number: record.text for record in self.records if record.ok}


async def play(
    name: str,
    workload: Workload,
    client: Client,
    arrivals: Arrivals,
    asking: Asking,
    *,
    now: Callable[[], float],
    stop: asyncio.Event,
    answers: Mapping[int, str] | None = None,
    on_record: Callable[[Record], None] = lambda _: None,
) -> PlayedWorkload:
    """Play all requests, or until `stop` is set: what is under way then is dropped, what is done is returned.

    answers: texts that conversations go on from, in place of this run's own: the very prompts of another run.
    """
    player = _Player(workload, client, arrivals, asking, now, answers, on_record)
    playing = asyncio.ensure_future(player.play())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((playing, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        interrupted = not playing.done()
        for task in (playing, stopping):
            task.cancel()
        results = await asyncio.gather(playing, stopping, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    records = sorted(player.records, key=lambda record: record.number)
    return PlayedWorkload(name, records, now() - player.began_s, interrupted)


class _Player:
    """One run under way."""

    def __init__(
        self,
        workload: Workload,
        client: Client,
        arrivals: Arrivals,
        asking: Asking,
        now: Callable[[], float],
        answers: Mapping[int, str] | None,
        on_record: Callable[[Record], None],
    ) -> None:
        self.records: list[Record] = []
        self.began_s = now()
        self._workload = workload
        self._client = client
        self._arrivals = arrivals
        self._asking = asking
        self._now = now
        self._given = answers
        self._answers: dict[int, str] = {}
        self._ended = [asyncio.Event() for _ in workload.requests]
        self._on_record = on_record

    async def play(self) -> None:
        """Until every request has ended."""
        if isinstance(self._arrivals, Closed):
            rest = iter(self._workload.requests)
            works = [self._work_off(rest) for _ in range(self._arrivals.concurrency)]
        else:
            works = [self._send_when_due(request, self._arrivals) for request in self._workload.requests]
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work_off(self, rest: Any) -> None:
        # Workers share the iterator. What a request waits for was taken before it, so somebody is at it already.
        for request in rest:
            await self._ask(request, None)

    async def _send_when_due(self, request: PlannedRequest, arrivals: Open) -> None:
        due_s = arrivals.times_s[request.number]
        await asyncio.sleep(max(0.0, self.began_s + due_s - self._now()))
        await self._ask(request, due_s)

    async def _ask(self, request: PlannedRequest, due_s: float | None) -> None:
        ready_s = self._now() - self.began_s
        if request.after is not None:
            await self._ended[request.after].wait()
        record = Record(request.number, request.conversation, request.part)
        record.planned_s = self._now() - self.began_s if due_s is None else due_s
        if due_s is not None and request.after is not None:
            record.held_s = self._now() - self.began_s - ready_s
        prompt = self._workload.body(request, self._answers if self._given is None else self._given, self._asking.api)
        if prompt is None:
            record.status = SKIPPED
        else:
            api = COMPLETIONS if isinstance(request.prompt, Blocks) else self._asking.api
            body = self._asking.body(self._workload, request, prompt)
            await self._client.ask(record, api, body, self.began_s)
        if record.ok:
            self._answers[request.number] = record.text
        self.records.append(record)
        self._ended[request.number].set()
        self._on_record(record)

"""The operations of the HTTP API, over the daemon's stores.

Handlers get checked bodies (see routes) and raise `Problem`, or an error of ours that becomes one. Those on tiers are
in tiers_api.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

from aiohttp import web

from kvstore.codecs.loss import Loss, marked
from kvstore.metrics import CONTENT_TYPE
from kvstore.plan.records import Match, Request, RequestOptions
from kvstore.service.daemon import shares
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.http import metrics, pages, scope
from kvstore.service.http.answers import (
    BlocksAnswer,
    ClearAnswer,
    DeleteAnswer,
    ExplainAnswer,
    FlushAnswer,
    HealthAnswer,
    MatchAnswer,
    NamespaceAnswer,
    NamespacesAnswer,
    PinAnswer,
    StatsAnswer,
    StatusAnswer,
    TicketAnswer,
)
from kvstore.service.http.clients_api import ClientsApi
from kvstore.service.http.explain import MAX_ELSEWHERE, explain
from kvstore.service.http.hints_api import HintsApi
from kvstore.service.http.models import (
    Cancel,
    Delete,
    Explain,
    Flush,
    InNamespace,
    Lookup,
    NewNamespace,
    Prompt,
    Read,
    TtlBody,
)
from kvstore.service.http.parsing import Parser
from kvstore.service.http.policies_api import PoliciesApi
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall, Route
from kvstore.service.http.tiers_api import TiersApi
from kvstore.service.protocol.namespaces import layout_from_json, namespace_from_json
from radix.hashing import BlockHash, hash_blocks

EVENT_KEEPALIVE_S = 5.0  # also the longest time until a listener that left is noticed
MAX_EVENT_STREAMS = 64
LARGE_PROMPT = 16_384  # tokens, or hashes; a longer one is hashed beside the event loop
CLEAR_TIMEOUT_S = 65.0  # a walk over about a hundred million keys, and something before it
DELETE_TIMEOUT_S = 5.0


class Api:
    """All operations. The daemon's event loop only."""

    def __init__(self, state: DaemonState, parser: Parser) -> None:
        self._state = state
        self._parser = parser
        self._tiers = TiersApi(state)
        self._clients = ClientsApi(state)
        self._policies = PoliciesApi(state)
        self._hints = HintsApi(state)
        self._listening: Counter[str] = Counter()  # event streams by tenant

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("GET", "/healthz", self.health, "Is the process alive?", answer=HealthAnswer, is_open=True),
            Route("GET", "/readyz", self.ready, "Does it serve?", answer=StatusAnswer, is_open=True, errors=(503,)),
            Route("GET", "/metrics", self.metrics, "Prometheus metrics.", produces="text/plain"),
            Route("GET", "/v1/stats", self.stats, "Counters and gauges.", query=InNamespace, answer=StatsAnswer,
                  errors=(404,)),
            *self._clients.routes(),
            Route("GET", "/v1/namespaces", self.namespaces, "The open namespaces.", answer=NamespacesAnswer),
            Route("POST", "/v1/namespaces", self.open_namespace, "Open a namespace.", body=NewNamespace,
                  answer=NamespaceAnswer, errors=(409, 503)),
            Route("POST", "/v1/namespaces/{namespace}/clear", self.clear, "Delete all of a namespace.",
                  answer=ClearAnswer, errors=(404, 503)),
            Route("POST", "/v1/lookup", self.lookup, "What is stored of a prompt?", body=Lookup, answer=MatchAnswer,
                  errors=(404, 409)),
            Route("POST", "/v1/explain", self.explain, "Why did this prompt miss?", body=Explain, answer=ExplainAnswer,
                  errors=(404, 409)),
            Route("POST", "/v1/prefetch", self.prefetch, "Bring a prefix into host memory.", body=Prompt,
                  answer=TicketAnswer, errors=(404, 409)),
            Route("POST", "/v1/prefetch/cancel", self.cancel, "Stop a prefetch.", body=Cancel, answer=BlocksAnswer,
                  errors=(404, 409)),
            Route("POST", "/v1/pin", self.pin, "Keep a prefix in host memory.", body=Prompt, answer=PinAnswer,
                  errors=(404, 409)),
            Route("POST", "/v1/unpin", self.unpin, "Undo pin.", body=Prompt, answer=BlocksAnswer, errors=(404, 409)),
            Route("POST", "/v1/ttl", self.ttl, "Give a prefix a time to live.", body=TtlBody, answer=BlocksAnswer,
                  errors=(404, 409)),
            Route("POST", "/v1/delete", self.delete, "Delete a prefix and all that continues it.", body=Delete,
                  answer=DeleteAnswer, errors=(404, 409)),
            Route("POST", "/v1/flush", self.flush, "Is all that was saved and deleted on its tiers?", body=Flush,
                  answer=FlushAnswer, errors=(404, 409)),
            *self._hints.routes(),
            *self._tiers.routes(),
            *self._policies.routes(),
            Route("POST", "/v1/pages/read", self.read_pages, "The pages of a stored prefix, as a framed stream.",
                  body=Read, produces=pages.CONTENT_TYPE, errors=(404, 409)),
            Route("PUT", "/v1/pages", self.write_pages, "Store pages, given as a framed stream.", body=Prompt,
                  consumes=pages.CONTENT_TYPE, answer=BlocksAnswer, errors=(404, 409)),
            Route("GET", "/v1/events", self.events, "What comes and goes, as server-sent events.", query=InNamespace,
                  produces="text/event-stream", errors=(404, 429)),
        ]  # fmt: skip

    # ---- the daemon ---------------------------------------------------------------------------------------------

    async def health(self, call: ApiCall) -> HealthAnswer:
        return HealthAnswer()

    async def ready(self, call: ApiCall) -> StatusAnswer:
        if not self._state.progress.is_ready:
            raise Problem(503, "draining" if self._state.progress.is_draining else "starting", Retry_After="1")
        unable, without = self._state.reasons()
        if unable:
            problem = Problem(503, "not ready", unable[0], Retry_After="1")
            problem.reasons = [*unable, *without]
            raise problem
        return StatusAnswer(status="ready", reasons=without)

    async def metrics(self, call: ApiCall) -> web.Response:
        if call.tenant.is_operator:
            body = metrics.render(self._state.stores.all(), self._state.own_metrics())
        else:
            body = metrics.render(self._state.stores.of(call.tenant), {})
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def stats(self, call: ApiCall) -> StatsAnswer:
        own = self._state.own_metrics() if call.tenant.is_operator else {}
        return StatsAnswer(
            namespaces={opened.id: opened.store.stats() for opened in scope.some(self._state.stores, call)},
            service=own,
        )

    # ---- namespaces -----------------------------------------------------------------------------------------------

    async def namespaces(self, call: ApiCall) -> NamespacesAnswer:
        return NamespacesAnswer(namespaces=[_namespace(opened) for opened in self._state.stores.of(call.tenant)])

    async def open_namespace(self, call: ApiCall) -> NamespaceAnswer:
        body: NewNamespace = call.body
        if not self._state.progress.is_ready:
            raise Problem(503, "draining", Retry_After="1")
        layout = layout_from_json(body.layout.model_dump())
        namespace = namespace_from_json(body.namespace.model_dump())
        return _namespace(await self._state.stores.open(call.tenant, layout, namespace))

    async def clear(self, call: ApiCall) -> ClearAnswer:
        opened = scope.one(self._state.stores, call, call.request.match_info["namespace"])
        admin = opened.store.admin
        before = admin.cleared_keys()
        blocks = admin.clear()
        owed = await _deleted(opened, CLEAR_TIMEOUT_S)
        if owed:
            tiers = ", ".join(f"{name}: {num}" for name, num in owed.items())
            detail = (
                f"{blocks} blocks that were known here are deleted; the rest is owed ({tiers}), and done when it can be"
            )
            raise Problem(503, "a shared tier is not cleared", detail, Retry_After="5")
        return ClearAnswer(
            blocks=blocks, keys={name: num - before.get(name, 0) for name, num in admin.cleared_keys().items()}
        )

    # ---- prefixes -------------------------------------------------------------------------------------------------

    async def lookup(self, call: ApiCall) -> MatchAnswer:
        body: Lookup = call.body
        async with self._asked(call) as (opened, request):
            return _match(await opened.wait_lookup(request, body.timeout_s))

    async def explain(self, call: ApiCall) -> ExplainAnswer:
        async with self._asked(call) as (opened, request):
            return await self._explain(call, opened, request)

    async def _explain(self, call: ApiCall, opened: OpenStore, request: Request) -> ExplainAnswer:
        others: list[tuple[OpenStore, Request]] = []
        body: Explain = call.body
        if body.tokens is not None:  # hashes of one namespace say nothing in another
            alike = [
                other
                for other in self._state.stores.of(call.tenant)
                if other is not opened and other.layout.block_size == opened.layout.block_size
            ]
            others = [(other, await _hashed(other, body)) for other in alike[:MAX_ELSEWHERE]]
        try:
            if body.timeout_s:
                await asyncio.gather(*(one.ask(same, body.timeout_s) for one, same in [(opened, request), *others]))
            return explain(opened, request, others)
        finally:
            for other, same in others:
                other.store.abandon(same)

    async def prefetch(self, call: ApiCall) -> TicketAnswer:
        async with self._asked(call) as (opened, request):
            return TicketAnswer(ticket=opened.store.prefetch(request))

    async def cancel(self, call: ApiCall) -> BlocksAnswer:
        body: Cancel = call.body
        scope.one(self._state.stores, call, body.namespace).store.cancel(body.ticket)
        return BlocksAnswer(blocks=0)

    async def pin(self, call: ApiCall) -> PinAnswer:
        async with self._asked(call) as (opened, request):
            blocks = opened.store.keep.pin(request)
        until = time.time() + self._state.config.store.pin_max_s
        return PinAnswer(blocks=blocks, until=until if blocks else None)

    async def unpin(self, call: ApiCall) -> BlocksAnswer:
        async with self._asked(call) as (opened, request):
            return BlocksAnswer(blocks=opened.store.keep.unpin(request))

    async def ttl(self, call: ApiCall) -> BlocksAnswer:
        async with self._asked(call) as (opened, request):
            return BlocksAnswer(blocks=opened.store.keep.set_ttl(request, call.body.ttl_s))

    async def flush(self, call: ApiCall) -> FlushAnswer:
        body: Flush = call.body
        opened = scope.one(self._state.stores, call, body.namespace)
        store, flushing = opened.store, opened.store.start_flush()
        result = await opened.wait_for(lambda: store.flush_result(flushing, opened.told), body.timeout_s)
        if result is None:
            result = store.flush_result(flushing, opened.told, at_once=True)
        assert result is not None
        return FlushAnswer(ok=result.ok, written=result.written, missing=result.missing, undeleted=result.undeleted)

    async def delete(self, call: ApiCall) -> DeleteAnswer:
        body: Delete = call.body
        async with self._asked(call) as (opened, request):
            if body.first > len(request.keys):
                raise Problem(409, "there is no such block", f"the prompt has {len(request.keys)} full blocks", "first")
            blocks = opened.store.keep.forget(request, body.first)
            if body.tokens is not None and opened.store.loss and not body.exact:  # whatever its pages may have lost
                exact = await _hashed(opened, body.model_copy(update={"exact": True}))
                blocks += opened.store.keep.forget(exact, body.first)
                opened.store.abandon(exact)
            return DeleteAnswer(blocks=blocks, owed=await _deleted(opened, DELETE_TIMEOUT_S))

    # ---- bytes and events -------------------------------------------------------------------------------------------

    async def read_pages(self, call: ApiCall) -> web.StreamResponse:
        async with self._asked(call) as (opened, request):
            with self._state.transfers.begin(call.request, opened, "read by") as transfer:
                return await pages.send(call.request, transfer, request, call.body)

    async def write_pages(self, call: ApiCall) -> BlocksAnswer:
        async def opened_for(body: Prompt) -> tuple[OpenStore, Request]:
            return await self._request(ApiCall(call.request, call.tenant, body))

        return BlocksAnswer(blocks=await pages.receive(call.request, opened_for, self._state.transfers, self._parser))

    async def events(self, call: ApiCall) -> web.StreamResponse:
        hub, name = self._state.events, call.tenant.name
        if not shares.has_room(name, self._listening, MAX_EVENT_STREAMS, len(self._state.tenants)):
            told = f"this tenant has {self._listening[name]}, and {sum(self._listening.values())} are open"
            raise Problem(429, "too many event streams", told, Retry_After="5")
        scope.some(self._state.stores, call)
        wanted = call.body.namespace
        self._listening[name] += 1
        stream = hub.listen(lambda opened: opened.tenant.name == call.tenant.name and wanted in (None, opened.id))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            await response.prepare(call.request)
            while not self._state.progress.is_draining and call.request.transport is not None:
                await response.write(await stream.take(EVENT_KEEPALIVE_S))
        except ConnectionError:
            pass
        finally:
            hub.leave(stream)
            self._listening[name] -= 1
        return response

    # ---- private ----------------------------------------------------------------------------------------------------

    async def _request(self, call: ApiCall) -> tuple[OpenStore, Request]:
        opened = scope.one(self._state.stores, call, call.body.namespace)
        return opened, await _hashed(opened, call.body)

    @contextlib.asynccontextmanager
    async def _asked(self, call: ApiCall) -> AsyncIterator[tuple[OpenStore, Request]]:
        """The request that a call is about. It is over when it is answered: the store keeps no note of the prompt."""
        opened, request = await self._request(call)
        try:
            yield opened, request
        finally:
            opened.store.abandon(request)


async def _deleted(opened: OpenStore, timeout_s: float) -> dict[str, int]:
    """Wait for tiers to delete what they are owed; what they still are, by tier."""
    admin = opened.store.admin
    owed = await opened.wait_for(admin.undeleted, timeout_s)
    return admin.undeleted(at_once=True) or {} if owed is None else owed


async def _hashed(opened: OpenStore, body: Prompt) -> Request:
    size = len(body.keys or ()) if body.tokens is None else len(body.tokens)
    if size < LARGE_PROMPT:
        keys, num_tokens = _keys(opened, body)
    else:
        keys, num_tokens = await asyncio.to_thread(_keys, opened, body)
    return opened.new_request(keys, num_tokens, RequestOptions())


def _keys(opened: OpenStore, body: Prompt) -> tuple[list[BlockHash], int]:
    block_size = opened.layout.block_size
    if body.tokens is not None:
        loss = Loss.EXACT if body.exact else opened.store.loss
        keys = marked(hash_blocks(body.tokens, block_size, root=opened.root), loss)
        num_tokens = len(body.tokens)
    else:
        assert body.keys is not None
        keys = [BlockHash(bytes.fromhex(key)) for key in body.keys]
        num_tokens = len(keys) * block_size + 1  # whoever sends hashes wants all of them
    return opened.bind(keys), num_tokens


def _namespace(opened: OpenStore) -> NamespaceAnswer:
    namespace = opened.namespace
    return NamespaceAnswer(
        id=opened.id,
        model=namespace.model,
        revision=namespace.revision,
        dtype=namespace.dtype,
        adapter=namespace.adapter,
        block_size=namespace.block_size,
        slot_bytes=opened.handle.slot_bytes,
        num_slots=opened.handle.num_slots,
    )


def _match(match: Match) -> MatchAnswer:
    return MatchAnswer(
        num_blocks=match.num_blocks,
        num_tokens=match.num_tokens,
        pending=match.pending,
        by_tier=match.by_tier,
        known=match.known,
        cut=match.cut.value,
    )

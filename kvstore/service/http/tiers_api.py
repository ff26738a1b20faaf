"""The HTTP API's operations on tiers, while requests run: what there is, attach, detach, resize."""

from __future__ import annotations

import asyncio
import contextlib

from kvstore.build import attach_tier
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, RequestError
from kvstore.plan.records import HOST
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.http import scope
from kvstore.service.http.answers import TierAnswer, TiersAnswer
from kvstore.service.http.models import Attach, InNamespace, Resize
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall, Route
from kvstore.tiers import registry

DETACH_TIMEOUT_S = 5.0


class TiersApi:
    """Operations on tiers. The daemon's event loop only."""

    def __init__(self, state: DaemonState) -> None:
        self._state = state
        self._changing: set[tuple[str, str, str]] = set()  # (tenant, namespace, tier) being attached or detached

    def routes(self) -> list[Route]:
        """Their part of the table."""
        return [
            Route("GET", "/v1/tiers", self.tiers, "The tiers.", query=InNamespace, answer=TiersAnswer, errors=(404,)),
            Route("POST", "/v1/tiers/{tier}/attach", self.attach, "Attach a tier.", body=Attach, answer=TiersAnswer,
                  needs_operator=True, errors=(403, 404, 409)),
            Route("POST", "/v1/tiers/{tier}/detach", self.detach, "Detach a tier.", body=InNamespace,
                  answer=TiersAnswer, needs_operator=True, errors=(403, 404, 409)),
            Route("POST", "/v1/tiers/{tier}/resize", self.resize, "Give a tier another capacity.", body=Resize,
                  answer=TiersAnswer, needs_operator=True, errors=(403, 404, 409)),
        ]  # fmt: skip

    async def tiers(self, call: ApiCall) -> TiersAnswer:
        return _tiers(scope.some(self._state.stores, call))

    async def attach(self, call: ApiCall) -> TiersAnswer:
        body: Attach = call.body
        opened, tier = self._tier(call)
        if (body.path or body.url) and self._state.tokens is None:
            # Whoever reaches loopback would make the daemon write where it may, or connect to where it can.
            raise Problem(403, "only the configured tier", "another path or url needs service.tokens_file", "path")
        config = self._attach_config(opened, tier, body)
        with self._change(opened, tier):
            await asyncio.to_thread(attach_tier, opened.store, config, tier)
        return _tiers([opened])

    async def detach(self, call: ApiCall) -> TiersAnswer:
        opened, tier = self._tier(call)
        with self._change(opened, tier):
            if not await asyncio.to_thread(opened.store.admin.detach_tier, tier, DETACH_TIMEOUT_S):
                raise Problem(409, "a transfer hangs in the tier", "it is out of use, but not closed; call again")
        return _tiers([opened])

    async def resize(self, call: ApiCall) -> TiersAnswer:
        body: Resize = call.body
        opened, tier = self._tier(call, may_be_host=True)
        if tier == HOST:
            opened.store.admin.resize_host(body.capacity_bytes // opened.layout.slot_bytes)
            return _tiers([opened])
        kind = registry.kind_of(tier)
        if kind.capacity is None or not kind.traits(self._state.config.tier(tier)).has_capacity:
            raise Problem(409, "this tier has no capacity", kind.refuses_resize, "tier")
        config = self._attach_config(opened, tier, Attach(capacity_bytes=body.capacity_bytes))
        with self._change(opened, tier):
            if not await asyncio.to_thread(opened.store.admin.detach_tier, tier, DETACH_TIMEOUT_S):
                raise Problem(409, "a transfer hangs in the tier", "it is out of use, but not closed; call again")
            await asyncio.to_thread(attach_tier, opened.store, config, tier)
        return _tiers([opened])

    # ---- private ----------------------------------------------------------------------------------------------------

    def _tier(self, call: ApiCall, *, may_be_host: bool = False) -> tuple[OpenStore, str]:
        tier = call.request.match_info["tier"]
        if tier not in registry.names() and not (may_be_host and tier == HOST):
            raise Problem(404, "there is no such tier", registry.unknown(tier), field="tier")
        return scope.one(self._state.stores, call, call.body.namespace), tier

    def _attach_config(self, opened: OpenStore, tier: str, body: Attach) -> Config:
        """Return the store's own configuration, with what was sent for this tier; checked like any other."""
        kind = registry.kind_of(tier)
        config = self._state.stores.share(opened.tenant, opened.id, tier)
        sent = {"path": (kind.directory, body.path), "url": (kind.address, body.url),
                "capacity_bytes": (kind.capacity, body.capacity_bytes)}  # fmt: skip
        update = {}
        for name, (field, value) in sent.items():
            if value and field is None:
                raise Problem(400, "the request is not valid", f"tier {tier} takes none", name)
            if value and field is not None:
                update[field] = value
        section = config.tier(tier)
        values = {name: getattr(section, name) for name in type(section).model_fields}
        return config.model_copy(update={tier: Config(**{tier: values | update}).tier(tier)})

    @contextlib.contextmanager
    def _change(self, opened: OpenStore, tier: str):  # type: ignore[no-untyped-def]
        """One change of a tier at a time; what is wrong with it becomes a 409."""
        place = (opened.tenant.name, opened.id, tier)
        if place in self._changing:
            raise Problem(409, "the tier is being changed", "ask again when that is over", "tier")
        self._changing.add(place)
        try:
            yield
        except (ConfigError, RequestError) as error:
            raise Problem(409, "the tier is not changed", str(error)) from None
        finally:
            self._changing.discard(place)


def _tiers(stores: list[OpenStore]) -> TiersAnswer:
    rows = []
    for opened in stores:
        stats = opened.store.stats()
        capacity = stats["capacity_pages"]
        for name in [HOST, *stats["breaker_open"]]:
            pages_fit = capacity.get(name)
            rows.append(
                TierAnswer(
                    namespace=opened.id,
                    tier=name,
                    is_up=name == HOST or not stats["breaker_open"][name],
                    pages=stats["pages"].get(name, 0),
                    capacity_bytes=None if pages_fit is None else pages_fit * stats["slot_bytes"],
                )
            )
    return TiersAnswer(tiers=rows)

"""The content of the page at `/` and of `kvstore top`: this moment, the past day, and the stored prefixes.

A sample of every store is taken each second, whether anybody watches or not, so that a page opened now shows what was.
All that is told of this moment is made from the last sample: who watches costs the stores nothing, but for the look at
their prefixes, which is bounded (see dashboard_prefixes).

A tenant sees its own namespaces, as in /v1/stats; an operator sees those of all tenants, as in /metrics.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.plan.records import HOST
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.daemon.usage import unix_of
from kvstore.service.dashboard.beliefs import Beliefs
from kvstore.service.dashboard.history import COARSE_S, FINE_ROWS, FINE_S, LOWER, TIERS, Columns, History, row_of
from kvstore.service.dashboard.incidents import Incidents, left_out
from kvstore.service.dashboard.misses import misses_of
from kvstore.service.dashboard.models import (
    Branches,
    BudgetBrief,
    ClientBrief,
    Flow,
    NamespaceBrief,
    NowAnswer,
    PrefixesAnswer,
    SeriesAnswer,
    Shown,
    TenantBrief,
    TierBrief,
    TimeSpan,
    Use,
)
from kvstore.service.dashboard.prefixes import Looks, merged
from kvstore.service.dashboard.renderings import renderings_of
from kvstore.service.http.clients_api import kept_in
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall, Route

if TYPE_CHECKING:
    from kvstore.service.daemon.session import ClientSession

log = logging.getLogger(__name__)

RECENT_S = 60.0
FLOW_S = 5.0  # long enough that a batch of pages is a stream, not a spike
MAX_CLIENTS = 50
MAX_HOLDERS = 50

Place = tuple[str, str]  # tenant, namespace


class Dashboard:
    """Takes the samples and answers the page."""

    def __init__(self, state: DaemonState) -> None:
        self._state = state
        self._began = time.monotonic()
        self._history = History()
        self._stats: dict[Place, dict[str, Any]] = {}
        self._incidents = Incidents()
        self._looks = Looks()
        self._beliefs = Beliefs(self._visible)
        self._task: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        """The operations behind the page."""
        return [
            Route("GET", "/v1/dashboard/now", self.now, "What the dashboard shows of this moment.", query=Shown,
                  answer=NowAnswer, errors=(404,)),
            Route("GET", "/v1/dashboard/series", self.series, "Rates over time.", query=TimeSpan, answer=SeriesAnswer,
                  errors=(404,)),
            Route("GET", "/v1/dashboard/prefixes", self.prefixes, "The stored prefixes, hottest first.",
                  query=Branches, answer=PrefixesAnswer, errors=(404,)),
            *self._beliefs.routes(),
        ]  # fmt: skip

    def start(self) -> None:
        """Take a sample now and every second from now on."""
        self.sample()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._looks.close()

    def sample(self) -> None:
        """Read the counters of every store, and let go what nobody watches any more."""
        self._looks.forget_old()
        at = time.time()
        opened = {_place(one): one for one in self._state.stores.all()}
        self._stats = {place: one.store.stats() for place, one in opened.items()}
        self._history.add(
            at, {place: row_of(stats, opened[place].layout.block_groups) for place, stats in self._stats.items()}
        )
        for place, stats in self._stats.items():
            self._incidents.note(place, stats, at)

    @property
    def tiers_down(self) -> list[str]:
        """Tiers that are out of use in some store, as of the last sample."""
        return sorted(
            {tier for stats in self._stats.values() for tier, is_open in stats["breaker_open"].items() if is_open}
        )

    @property
    def directions_down(self) -> dict[str, list[str]]:
        """The directions in which tiers that are in use fail in some store, as of the last sample."""
        every = list(self._stats.values())
        tiers = sorted({tier for stats in every for tier in stats["direction_open"]} - set(self.tiers_down))
        return {tier: ways for tier in tiers if (ways := sorted(left_out(every, tier)))}

    # ---- operations -----------------------------------------------------------------------------------------------

    async def now(self, call: ApiCall) -> NowAnswer:
        stores = self._visible(call, call.body)
        places = [_place(one) for one in stores]
        sessions = [s for s in self._state.sessions.values() if _place(s.opened) in set(places)]
        misses, reasons = misses_of(stores)
        return NowAnswer(
            at=time.time(),
            started_at=unix_of(self._began),
            version=self._state.version,
            node=platform.node(),
            tenant=call.tenant.name,
            is_operator=call.tenant.is_operator,
            engines_url=f"unix://{self._state.progress.socket}" if call.tenant.is_operator else "",
            status=self._state.progress.word,
            namespaces=[self._namespace(one) for one in self._visible(call, Shown())],
            total=self._total(places),
            recent=_use(self._history.span(places, RECENT_S)),
            flows=_flows(self._history.span(places, FLOW_S)),
            tiers=[tier for name in TIERS if (tier := self._tier(name, places)) is not None],
            tenants=self._tenants(stores),
            clients=[_client(s) for s in sorted(sessions, key=lambda s: -s.usage.prompt_tokens)[:MAX_CLIENTS]],
            num_clients=len(sessions),
            renderings=renderings_of(sessions),
            kept=sorted(kept_in(stores), key=lambda one: -one.num_bytes)[:MAX_HOLDERS],
            misses=misses,
            reasons=reasons,
            incidents=self._incidents.of(set(places)),
        )

    async def series(self, call: ApiCall) -> SeriesAnswer:
        body: TimeSpan = call.body
        stores = self._visible(call, body)
        columns = self._history.span([_place(one) for one in stores], body.span_s, body.since)

        def rate(name: str) -> list[float]:
            return [round(float(value), 3) for value in columns.rate(name)]

        return SeriesAnswer(
            step_s=FINE_S if body.span_s <= FINE_S * FINE_ROWS else COARSE_S,
            at=[round(float(at), 3) for at in columns.at[1:]],
            prompt_tokens=rate("prompt_tokens"),
            hit_tokens={tier: rate(f"hit_tokens.{tier}") for tier in TIERS},
            ttft_saved_s=rate("ttft_saved_s"),
            saved_bytes=rate("saved_bytes"),
            loaded_bytes=rate("loaded_bytes"),
            fetched_bytes={tier: rate(f"fetched_bytes.{tier}") for tier in LOWER},
            spilled_bytes={tier: rate(f"spilled_bytes.{tier}") for tier in LOWER},
        )

    async def prefixes(self, call: ApiCall) -> PrefixesAnswer:
        body: Branches = call.body
        looks = [await self._looks.at(one) for one in self._visible(call, body)]
        levels = {}
        for under in ["", *filter(None, body.open.split(","))]:
            found = [level for look, _ in looks if (level := look.level(under)) is not None]
            if found or not under:
                levels[under] = merged(found)
        return PrefixesAnswer(
            levels=levels,
            num_blocks=sum(look.num_blocks for look, _ in looks),
            age_s=max((age for _, age in looks), default=0.0),
            is_cut=any(look.is_cut for look, _ in looks),
        )

    # ---- private --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + FINE_S, loop.time())
            await asyncio.sleep(due - loop.time())
            try:
                self.sample()
            except Exception:
                log.exception("dashboard: no sample this second")

    def _visible(self, call: ApiCall, shown: Shown) -> list[OpenStore]:
        """The stores that the tenant may see, of those that are asked for."""
        stores = self._state.stores
        seen = [
            one
            for one in (stores.all() if call.tenant.is_operator else stores.of(call.tenant))
            if _place(one) in self._stats  # one that was opened since the last sample is not there yet
            and shown.namespace in (None, one.id)
            and shown.tenant in (None, one.tenant.name)
        ]
        if not seen and (shown.namespace is not None or shown.tenant is not None):
            raise Problem(404, "there is no such namespace", field="namespace")
        return seen

    def _namespace(self, one: OpenStore) -> NamespaceBrief:
        return NamespaceBrief(
            id=one.id,
            tenant=one.tenant.name,
            model=one.namespace.model,
            dtype=one.namespace.dtype,
            adapter=one.namespace.adapter,
            block_size=one.layout.block_size,
            block_bytes=one.layout.block_bytes,
            prefill_tokens_per_s=self._stats[_place(one)]["prefill_rate"] or None,
        )

    def _total(self, places: Sequence[Place]) -> Use:
        hits = dict.fromkeys(TIERS, 0)
        lookups = prompt_tokens = 0
        saved_s = 0.0
        for stats in (self._stats[place] for place in places):
            lookups += stats["lookups"]
            prompt_tokens += stats["matched_tokens"] + stats["miss_tokens"]
            saved_s += stats["ttft_saved_seconds"]
            for tier in TIERS:
                hits[tier] += stats["hit_tokens"].get(tier, 0)
        return Use(
            span_s=time.monotonic() - self._began,
            lookups=lookups,
            prompt_tokens=prompt_tokens,
            hit_tokens=hits,
            ttft_saved_s=saved_s,
        )

    def _tier(self, name: str, places: Sequence[Place]) -> TierBrief | None:
        """A tier summed over stores; None if none of them has it."""
        every = [(place, self._stats[place]) for place in places]
        found = [(place, stats) for place, stats in every if name == HOST or name in stats["breaker_open"]]
        if not found:
            return None
        breakers = [state for place, _ in found if (state := self._incidents.reads(place, name)) is not None]
        is_up = all(up for up, _ in breakers)
        bounded = all(name in stats["capacity_pages"] for _, stats in found)

        def total(*keys: str) -> int:
            return sum(_number(stats, keys) * stats["slot_bytes"] for _, stats in found)

        waiting = total("owed_pages", name)
        if name == HOST:
            # What is owed may have left host memory since.
            owed = [min(max(s["owed_pages"].values(), default=0), s["pages"][HOST]) * s["slot_bytes"] for _, s in found]
            waiting = sum(owed)
        speeds = [stats["tier_bandwidth"][name] for _, stats in found if name in stats["tier_bandwidth"]]
        latencies = [stats["tier_latency"][name] for _, stats in found if name in stats["tier_latency"]]
        return TierBrief(
            tier=name,
            used_bytes=total("pages", name),
            capacity_bytes=total("capacity_pages", name) if bounded else None,
            waiting_bytes=waiting,
            free_bytes=total("slots", "free") if name == HOST else None,
            filling_bytes=total("slots", "filling") if name == HOST else 0,
            pinned_bytes=total("pinned_pages") if name == HOST else 0,
            is_up=is_up,
            since=max((since for up, since in breakers if up == is_up), default=unix_of(self._began)),
            left_out=left_out([stats for _, stats in found], name),
            num_opened=sum(_number(stats, ("breaker_opens", name)) for _, stats in found),
            queued=sum(_number(stats, ("lane_queue", name)) for _, stats in found),
            lost_pages=sum(_number(stats, ("spill_lost", name)) for _, stats in found),
            budget=_budget(name, [stats for _, stats in found]),
            bytes_per_s=max(speeds, default=None),
            latency_s=min(latencies, default=None),
        )

    def _tenants(self, stores: Sequence[OpenStore]) -> list[TenantBrief]:
        by_tenant: dict[str, list[Place]] = {}
        for one in stores:
            by_tenant.setdefault(one.tenant.name, []).append(_place(one))
        rows = []
        for tenant, places in by_tenant.items():
            used = {
                tier: sum(
                    _number(self._stats[place], ("pages", tier)) * self._stats[place]["slot_bytes"] for place in places
                )
                for tier in TIERS
            }
            rows.append(
                TenantBrief(
                    tenant=tenant,
                    num_namespaces=len(places),
                    total=self._total(places),
                    recent=_use(self._history.span(places, RECENT_S)),
                    used_bytes=used,
                )
            )
        return sorted(rows, key=lambda row: -row.total.prompt_tokens)


def _place(one: OpenStore) -> Place:
    return one.tenant.name, one.id


def _number(stats: dict[str, Any], keys: Sequence[str]) -> int:
    value: Any = stats
    for key in keys:
        value = value.get(key, 0)
    return int(value)


def _budget(name: str, every: Sequence[dict[str, Any]]) -> BudgetBrief | None:
    """The write budgets of a tier, summed; None where there is none."""
    found = [stats for stats in every if name in stats["write_budget"]]
    if not found:
        return None
    return BudgetBrief(
        bytes_per_day=sum(_number(stats, ("write_budget_day", name)) for stats in found),
        left_bytes=sum(_number(stats, ("write_budget", name)) for stats in found),
        num_spent=sum(_number(stats, ("write_budget_spent", name)) for stats in found),
        is_spent=any(_number(stats, ("write_budget", name)) <= 0 for stats in found),
    )


def _use(columns: Columns) -> Use:
    return Use(
        span_s=float(columns.at[-1] - columns.at[0]) if len(columns.at) else 0.0,
        lookups=int(columns.growth("lookups")),
        prompt_tokens=int(columns.growth("prompt_tokens")),
        hit_tokens={tier: int(columns.growth(f"hit_tokens.{tier}")) for tier in TIERS},
        ttft_saved_s=columns.growth("ttft_saved_s"),
    )


def _flows(columns: Columns) -> list[Flow]:
    span_s = float(columns.at[-1] - columns.at[0]) if len(columns.at) > 1 else 1.0
    ways = [("engines", HOST, "saved_bytes"), (HOST, "engines", "loaded_bytes")]
    for tier in LOWER:
        ways += [(tier, HOST, f"fetched_bytes.{tier}"), (HOST, tier, f"spilled_bytes.{tier}")]
    return [
        Flow(source=source, target=target, bytes_per_s=columns.growth(column) / span_s)
        for source, target, column in ways
    ]


def _client(session: ClientSession) -> ClientBrief:
    usage = session.usage
    return ClientBrief(
        client=session.client,
        tenant=session.opened.tenant.name,
        namespace=session.opened.id,
        attached_at=usage.attached_at,
        seen_at=usage.seen_at,
        lookups=usage.lookups,
        prompt_tokens=usage.prompt_tokens,
        hit_tokens=usage.hit_tokens,
        saved_bytes=usage.saved_bytes,
        leases=len(session.leases),
    )

"""The answers of the dashboard's operations. Sizes are bytes, times Unix seconds, spans seconds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvstore.service.http.answers import Answer, KeptAnswer
from kvstore.service.http.models import InNamespace

MAX_OPEN = 64  # prefixes whose branches are asked for at once
PREFIX_ID_DIGITS = 16  # of the hash of its first block: enough to tell apart what lies in one daemon


class Shown(InNamespace):
    """The scope of an answer: all that may be seen, or one tenant's, or one namespace."""

    tenant: Annotated[str, Field(max_length=64)] | None = None


class TimeSpan(Shown):
    """How far back. Query values are text, so numbers are read from it."""

    span_s: Annotated[float, Field(strict=False, ge=1, le=86_400, allow_inf_nan=False)] = 900.0
    since: Annotated[float, Field(strict=False, ge=0, lt=1e11, allow_inf_nan=False)] = 0.0


class Branches(Shown):
    """Which prefixes are open."""

    open: str = Field(
        default="",
        pattern=rf"^([0-9a-f]{{{PREFIX_ID_DIGITS}}}(,[0-9a-f]{{{PREFIX_ID_DIGITS}}}){{0,{MAX_OPEN - 1}}})?$",
        description="Ids of prefixes, separated by commas; the branches of each are told.",
    )


class Use(Answer):
    """The tokens asked for and reused in a span. hit_tokens: by the tier they were loaded from."""

    span_s: float
    lookups: int
    prompt_tokens: int
    hit_tokens: dict[str, int]
    ttft_saved_s: float


class NamespaceBrief(Answer):
    """One namespace. prefill_tokens_per_s: none while no engine has told how fast it computes."""

    id: str
    tenant: str
    model: str
    dtype: str
    adapter: str
    block_size: int
    block_bytes: int
    prefill_tokens_per_s: float | None


class Flow(Answer):
    """Bytes per second from one place to another, over the last seconds. "engines" are the clients' own memories."""

    source: str
    target: str
    bytes_per_s: float


class BudgetBrief(Answer):
    """The bytes that may be written to a tier (`max_writes_per_day`), summed over namespaces.

    left_bytes: that may be written now; negative while a batch that was sent is being earned.
    num_spent:  times nothing was left. is_spent: nothing is left now in some namespace.
    """

    bytes_per_day: int
    left_bytes: int
    num_spent: int
    is_spent: bool


class TierBrief(Answer):
    """One tier, summed over namespaces.

    capacity_bytes: none where the medium evicts by itself; then used_bytes are those known to be there.
    waiting_bytes:  on its way there or owed to it; for host: not yet written to some tier below.
    free_bytes, filling_bytes, pinned_bytes: of host memory.
    is_up, since:   whether it is read in every namespace, and since when, as far as was seen.
    lost_pages:     that left host memory before they were written there, since the start.
    left_out:       directions in which it is not used (read, write, touch, delete, claim), and its own words for why.
    """

    tier: str
    used_bytes: int
    capacity_bytes: int | None
    waiting_bytes: int
    free_bytes: int | None
    filling_bytes: int
    pinned_bytes: int
    is_up: bool
    since: float
    left_out: dict[str, str]
    num_opened: int
    queued: int
    lost_pages: int
    budget: BudgetBrief | None
    bytes_per_s: float | None
    latency_s: float | None


class TenantBrief(Answer):
    """One tenant: since the daemon started, and of late."""

    tenant: str
    num_namespaces: int
    total: Use
    recent: Use
    used_bytes: dict[str, int]


class ClientBrief(Answer):
    """One attached client, since it attached."""

    client: str
    tenant: str
    namespace: str
    attached_at: float
    seen_at: float
    lookups: int
    prompt_tokens: int
    hit_tokens: int
    saved_bytes: int
    leases: int


class RenderingGroup(Answer):
    """Clients of one namespace that make the same prompts of chats. clients: names of the first few of them."""

    tenant: str
    namespace: str
    rendering: str
    clients: list[str]
    num_clients: int


class Miss(Answer):
    """A lookup that fell short, with its reason then (those of /v1/explain)."""

    at: float
    tenant: str
    namespace: str
    session: str
    prompt_tokens: int
    hit_tokens: int
    block: int | None
    hash: str
    reason: str
    text: str


class Incident(Answer):
    """A tier, or a direction of it, went down or came back.

    direction: read stands for the tier itself: without it no page is had of it.
    reason:    why it went down, in the medium's words, as far as was seen.
    """

    at: float
    tenant: str
    namespace: str
    tier: str
    direction: str
    is_up: bool
    reason: str


class NowAnswer(Answer):
    """All that the dashboard shows of this moment.

    engines_url: what engines on this machine set service.url to; only operators are told.
    kept:    what pins and promises keep in host memory, by holder, most first.
    misses:  the newest of those remembered, first those that are no mere beginnings (never_stored).
    reasons: the lookups among those remembered that fell short, by reason.
    renderings: of namespaces whose clients render chats in different ways, so that they share none: all of the ways.
    """

    at: float
    started_at: float
    version: str
    node: str
    tenant: str
    is_operator: bool
    engines_url: str
    status: Literal["starting", "ready", "draining"]
    namespaces: list[NamespaceBrief]
    total: Use
    recent: Use
    flows: list[Flow]
    tiers: list[TierBrief]
    tenants: list[TenantBrief]
    clients: list[ClientBrief]
    num_clients: int
    renderings: list[RenderingGroup]
    kept: list[KeptAnswer]
    misses: list[Miss]
    reasons: dict[str, int]
    incidents: list[Incident]


class SeriesAnswer(Answer):
    """Rates per second up to each of the times `at`; parallel lists. step_s: time between two samples."""

    step_s: float
    at: list[float]
    prompt_tokens: list[float]
    hit_tokens: dict[str, list[float]]
    ttft_saved_s: list[float]
    saved_bytes: list[float]
    loaded_bytes: list[float]
    fetched_bytes: dict[str, list[float]]
    spilled_bytes: dict[str, list[float]]


class PrefixNode(Answer):
    """A stretch of blocks without a branch, and what continues it.

    tokens, bytes:     its own; bytes by tier. deep_tokens: with all that continues it.
    hits:              loads that used it, also those that went on into what continues it.
    branches:          stretches that continue it.
    used_s:            seconds since its last use; none if it was never used since it was stored.
    session:           the only session that used it; "" if it had none or several did.
    """

    id: str
    tenant: str
    namespace: str
    depth_tokens: int
    tokens: int
    bytes: dict[str, int]
    deep_tokens: int
    hits: int
    branches: int
    used_s: float | None
    session: str
    is_shared: bool


class Level(Answer):
    """The hottest branches of a prefix. more: those not told."""

    nodes: list[PrefixNode]
    more: int


class PrefixesAnswer(Answer):
    """Branches by the id of what they continue; "" for the roots. A prefix that is gone has no entry.

    age_s:  since the stores were looked through.
    is_cut: there is more than was looked at.
    """

    levels: dict[str, Level]
    num_blocks: int
    age_s: float
    is_cut: bool

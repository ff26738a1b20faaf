"""The answers of the HTTP API; the OpenAPI document is made from these very models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """The base of all answers."""

    model_config = ConfigDict(frozen=True)


class MatchAnswer(Answer):
    """Blocks [0, num_blocks) can be loaded."""

    num_blocks: int
    num_tokens: int
    pending: bool
    by_tier: dict[str, int]
    known: int
    cut: str


class BlocksAnswer(Answer):
    """How many blocks it concerned."""

    blocks: int


class PinAnswer(Answer):
    """How many blocks are kept, and the Unix time at which that ends; none where nothing is.

    Fewer than were given where they are not in host memory, or the budget ends (store.max_pinned_fraction).
    """

    blocks: int
    until: float | None


class DeleteAnswer(Answer):
    """How many blocks were deleted. owed: pages that tiers are still to delete, and will as soon as they can."""

    blocks: int
    owed: dict[str, int]


class ClearAnswer(Answer):
    """The blocks deleted everywhere. blocks: that were known here. keys: further ones, by tier without an index."""

    blocks: int
    keys: dict[str, int]


class FlushAnswer(Answer):
    """Whether everything that was saved and deleted so far is so on its tiers, and what is missing.

    written:   pages written to each tier since the last call.
    missing:   pages by tier, and by why they are not there: waiting (the time ran out), out (the tier is), refused,
               lost (for good; told once).
    undeleted: deletes by tier, and by why they are not done: waiting, out, dropped (for good; told once).
    """

    ok: bool
    written: dict[str, int]
    missing: dict[str, dict[str, int]]
    undeleted: dict[str, dict[str, int]]


class TicketAnswer(Answer):
    """Names a prefetch."""

    ticket: int


class OutcomeAnswer(Answer):
    """What became of an action of a hint.

    tokens: granted so far. until: Unix time at which that ends; none where nothing does.
    """

    action_id: str
    action: str
    status: Literal["accepted", "clipped", "deferred", "rejected", "ignored"]
    tokens: int
    until: float | None
    reason: str


class HintsAnswer(Answer):
    """What became of the actions of a message, in their order."""

    message_id: str
    outcomes: list[OutcomeAnswer]


class ClientAnswer(Answer):
    """A client that is attached.

    id:       names it here. pid: its process, on this machine.
    ranks:    further processes of its engine that have the slab mapped.
    slots:    that its leases hold; overdue ones are out of use until it ends (see docs/service.md).
    is_alone: the client is gone, and only ranks of its engine still hold its leases.
    kept_slots, kept_until: what its pins and promises keep, and the Unix time at which the last of them ends.
    staging_slots, staging_free: memory of its own for saves (service.isolate), and what of it no lease has.
    """

    id: int
    client: str
    tenant: str
    namespace: str
    is_remote: bool
    pid: int | None
    connections: int
    ranks: int
    attached_s: float
    idle_s: float
    leases: int
    slots: int
    oldest_lease_s: float | None
    overdue_leases: int
    is_alone: bool
    kept_slots: int
    kept_until: float | None
    staging_slots: int = 0
    staging_free: int = 0


class KeptAnswer(Answer):
    """The pages that pins and `retain_until` keep in host memory on one holder's word, be it attached or not.

    holder: a client and its id, or "http"; of a hint, with its session. until: Unix time at which the last of it ends.
    salt:   the tenant of the requests within the namespace, by a digest; "" where they have none.
    """

    holder: str
    tenant: str
    namespace: str
    salt: str
    slots: int
    num_bytes: int
    until: float


class ClientsAnswer(Answer):
    """All clients of the tenant; of all tenants for an operator.

    kept: what is kept in host memory, by holder, also on the word of clients that are gone.
    """

    clients: list[ClientAnswer]
    kept: list[KeptAnswer]


class NamespaceAnswer(Answer):
    """A namespace that is open."""

    id: str
    model: str
    revision: str
    dtype: str
    adapter: str
    block_size: int
    slot_bytes: int
    num_slots: int


class NamespacesAnswer(Answer):
    """All namespaces of the tenant."""

    namespaces: list[NamespaceAnswer]


class TierAnswer(Answer):
    """One tier of one namespace. capacity_bytes: none where the medium evicts by itself."""

    namespace: str
    tier: str
    is_up: bool
    pages: int
    capacity_bytes: int | None


class TiersAnswer(Answer):
    """All tiers of the tenant's namespaces."""

    tiers: list[TierAnswer]


class BeliefAnswer(Answer):
    """What a policy has learned of one class of blocks.

    words:  what makes the class, widest first; none for all blocks. It is a part of the class without its last word.
    seen:   observations that it rests on.
    within: probability of a next use within each of the answer's spans_s.
    mean_s: mean time until the next use, of those that come within the longest span.
    """

    words: list[str]
    seen: float
    within: list[float]
    mean_s: float | None


class PolicyAnswer(Answer):
    """The policy of one tier of one namespace.

    learns:  whether it is one that learns. num_classes: that it has seen.
    classes: those seen most, each after the one that it is a part of.
    """

    tenant: str
    namespace: str
    tier: str
    policy: str
    learns: bool
    num_classes: int
    classes: list[BeliefAnswer]


class PoliciesAnswer(Answer):
    """The policies of the tenant's namespaces. spans_s: the times, in seconds, that the classes' `within` are about."""

    spans_s: list[float]
    policies: list[PolicyAnswer]


class ExplainAnswer(Answer):
    """Why a prompt matches what it matches.

    reason: hit, too_short, never_stored, evicted, expired, deleted, lost, detached, tier_down, no_state, not_worth,
            below_minimum or other_namespace.
    text:   the same as a sentence.
    asked:  what each shared tier answered about the block; none where it did not, or was not asked.
    elsewhere: namespaces that have more of the prompt, and the fields in which they differ.
    loss:   the most that these pages may have lost where they were stored: exact, near, compact or small.
    """

    reason: str
    text: str
    num_blocks: int
    num_tokens: int
    known: int
    by_tier: dict[str, int]
    block: int | None
    tiers: dict[str, bool]
    asked: dict[str, bool | None]
    left_at: float | None
    left_tier: str | None
    elsewhere: list[dict[str, Any]]
    loss: str


class StatsAnswer(Answer):
    """Counters and gauges by namespace, as kvstore/metrics.py documents them.

    service: the daemon's own, by the names of its metrics; for operators only.
    """

    namespaces: dict[str, dict[str, Any]]
    service: dict[str, float]


class HealthAnswer(Answer):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class StatusAnswer(Answer):
    """Whether the daemon serves. reasons: what it serves without, such as a tier that is down."""

    status: Literal["ready", "starting", "draining"]
    reasons: list[str] = []


class ProblemAnswer(Answer):
    """RFC 9457, with the field that is wrong. reasons: of a daemon that is not ready, one by one."""

    type: str
    title: str
    status: int
    detail: str = ""
    field: str = ""
    reasons: list[str] = []

"""Why did this prompt miss? The planner's answer in words, and a look into the tenant's other namespaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any

from kvstore.codecs.loss import loss_of
from kvstore.plan.records import CutReason, Explanation, Request
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.http.answers import ExplainAnswer
from radix.namespace import Namespace

MAX_ELSEWHERE = 64  # namespaces that are looked into

_TEXT = {
    "hit": "all of the prompt that can be loaded is stored",
    "too_short": "the prompt has no full block before its last token, which is always computed",
    "never_stored": "block {block} was never stored here, or so long ago that its end is not remembered",
    "tier_down": "block {block} lies only on a tier that is down: {tiers}",
    "no_state": "from block {block} on, pages are stored, but no state of the model at a usable length",
    "not_worth": "from block {block} on, loading would be slower than computing",
    "below_minimum": "what is stored is shorter than store.min_hit_blocks",
    "other_namespace": "it is stored in another namespace, which differs in {differs}",
}
_LEFT = {
    "evicted": "block {block} was evicted from {tier} at {at}, to make room for others",
    "expired": "block {block} outlived its time to live in {tier} at {at}",
    "deleted": "block {block} was deleted from {tier} at {at}",
    "lost": "block {block} was lost by {tier} at {at}: gone from the medium, corrupt, or not readable",
    "detached": "block {block} was in {tier}, which was detached at {at}",
}


def explain(opened: OpenStore, request: Request, others: Sequence[tuple[OpenStore, Request]]) -> ExplainAnswer:
    """Put an explanation into words.

    others: the tenant's other namespaces, each with the same prompt under its own hashes; MAX_ELSEWHERE at most.
    """
    told = opened.store.admin.explain(request)
    elsewhere: list[dict[str, Any]] = [
        {"namespace": other.id, "known": known, "differs": differing(opened.namespace, other.namespace)}
        for other, same in others
        if (known := other.store.admin.explain(same).match.known) > told.match.known
    ]
    reason, text = in_words(told, elsewhere)
    left, match = told.left, told.match
    return ExplainAnswer(
        reason=reason,
        text=text + _shared(told),
        num_blocks=match.num_blocks,
        num_tokens=match.num_tokens,
        known=match.known,
        by_tier=match.by_tier,
        block=told.block,
        tiers=told.tiers,
        asked=told.asked,
        left_at=None if left is None else left[0],
        left_tier=None if left is None else left[1],
        elsewhere=elsewhere,
        loss=(loss_of(request.keys[0]) if request.keys else opened.store.loss).word,
    )


def in_words(told: Explanation, elsewhere: Sequence[dict[str, Any]] = ()) -> tuple[str, str]:
    """The reason as one word, and as a sentence."""
    reason = _reason(told, elsewhere)
    left = told.left
    text = {**_TEXT, **_LEFT}[reason].format(
        block=told.block,
        tiers=", ".join(name for name, is_up in told.tiers.items() if not is_up),
        tier="" if left is None else left[1],
        at="" if left is None else datetime.fromtimestamp(left[0], timezone.utc).isoformat(timespec="seconds"),
        differs=", ".join(elsewhere[0]["differs"]) if elsewhere else "",
    )
    return reason, text


def differing(ours: Namespace, theirs: Namespace) -> list[str]:
    """The fields in which two namespaces differ. Names only: a salt is a secret."""
    names = [
        f.name for f in fields(Namespace) if f.name != "extra" and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    one, two = dict(ours.extra), dict(theirs.extra)
    return names + sorted(f"extra.{name}" for name in {*one, *two} if one.get(name) != two.get(name))


def _shared(told: Explanation) -> str:
    """The answers of shared tiers about the block that is missing."""
    if told.match.cut is not CutReason.NEVER_STORED:
        return ""
    said = {True: "has it", False: "does not have it", None: "has not answered"}
    return "".join(f"; {tier} {said[answer]}" for tier, answer in told.asked.items())


def _reason(told: Explanation, elsewhere: Sequence[dict[str, Any]]) -> str:
    cut: CutReason = told.match.cut
    if cut is CutReason.NONE:
        return "hit"
    if cut is CutReason.NEVER_STORED and told.left is not None:
        return told.left[2]
    if cut is CutReason.NEVER_STORED and elsewhere:
        return "other_namespace"
    return str(cut.value)

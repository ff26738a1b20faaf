"""The hints of vLLM's requests: the two ways in which they come.

    request.kv_hints                            AsyncLLM.generate(..., kv_hints=KvHintsEnvelope(...))
    kv_transfer_params: {"kv_hint": {...}}      over HTTP, the same message as JSON

Both seats of ours read them here: vLLM's request has these fields as well as the context of its offloading. What a
message says is the store's to find out (kvstore.hints); nothing here raises, whatever was sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvstore.base import HintOutcome

CARRIER = "kv_hint"  # in kv_transfer_params, of a request and of its answer


def messages(asked: Any) -> list[object]:
    """Return the messages that came with a request, or with its context; mostly none."""
    params = getattr(asked, "kv_transfer_params", None)
    found = (getattr(asked, "kv_hints", None), params.get(CARRIER) if isinstance(params, Mapping) else None)
    return [message for message in found if message is not None]


def answer(outcomes: Iterable[HintOutcome]) -> dict[str, Any] | None:
    """Return the `kv_transfer_params` of an answer: what became of the hints; None where there were none."""
    told = [outcome.as_json() for outcome in outcomes]
    return {CARRIER: {"outcomes": told}} if told else None

"""Requests and answers of llama-server, as far as a front has to understand them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvstore.cluster.openai import ApiError, KVOptions


def parse_body(raw: bytes) -> dict[str, Any]:
    """The object of a request for one answer. Raises ApiError 400."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if body.get("n", 1) not in (1, None) or body.get("n_cmpl", 1) not in (1, None):
        raise ApiError(400, "n is more than 1; send a request for each answer", param="n", code="unsupported_parameter")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and any(isinstance(one, list) for one in prompt):
        raise ApiError(400, f"prompt holds {len(prompt)} prompts; send one per request", param="prompt")
    return body


def take_extension(body: dict[str, Any]) -> KVOptions:
    """Take what is for the store out of a request. Raises ApiError 400."""
    try:
        return KVOptions.model_validate(body.pop("kvstore", None) or {})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, ("kvstore", *first["loc"])))
        raise ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value") from None


def is_plain(body: Mapping[str, Any]) -> bool:
    """Whether the state that a request leaves depends on the tokens of its text alone."""
    if body.get("lora") or body.get("cache_prompt") is False:
        return False
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            return False
    return True


class Counts(NamedTuple):
    """Tokens of an answer, as llama-server counts them. prefill_s: for those of the prompt that it computed."""

    cached: int
    computed: int
    generated: int
    prefill_s: float = 0.0


def as_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def counts_of(answer: Mapping[str, Any]) -> Counts | None:
    """The counts in an answer; None if it has none."""
    timings = answer.get("timings")
    if not isinstance(timings, dict):
        return None
    values = [timings.get(name) for name in ("cache_n", "prompt_n", "predicted_n")]
    known = [value for value in values if type(value) is int and value >= 0]
    prompt_ms = timings.get("prompt_ms")
    prefill_s = prompt_ms / 1000 if isinstance(prompt_ms, (int, float)) and prompt_ms > 0 else 0.0
    if len(known) < len(values):
        return None
    cached, computed, generated = known
    return Counts(cached, computed, generated, prefill_s)

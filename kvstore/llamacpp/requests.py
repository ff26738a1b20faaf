"""Requests and answers of llama-server, as far as a front has to understand them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvstore.cluster.bodies import parse_object
from kvstore.cluster.openai import ApiError


def parse_body(raw: bytes) -> dict[str, Any]:
    """The object of a request for one answer. Raises ApiError 400."""
    body = parse_object(raw)
    if body.get("n", 1) not in (1, None) or body.get("n_cmpl", 1) not in (1, None):
        raise ApiError(400, "n is more than 1; send a request for each answer", param="n", code="unsupported_parameter")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and any(isinstance(one, list) for one in prompt):
        raise ApiError(400, f"prompt holds {len(prompt)} prompts; send one per request", param="prompt")
    return body


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
    """Tokens of an answer, as llama-server counts them. prefill_s: for those of the prompt that it computed;
    decode_s: for those of the answer."""

    cached: int
    computed: int
    generated: int
    prefill_s: float = 0.0
    decode_s: float = 0.0


def counts_of(answer: Mapping[str, Any]) -> Counts | None:
    """The counts in an answer; None if it has none."""
    timings = answer.get("timings")
    if not isinstance(timings, dict):
        return None
    values = [timings.get(name) for name in ("cache_n", "prompt_n", "predicted_n")]
    known = [value for value in values if type(value) is int and value >= 0]
    prefill_s, decode_s = (_seconds(timings.get(name)) for name in ("prompt_ms", "predicted_ms"))
    if len(known) < len(values):
        return None
    cached, computed, generated = known
    return Counts(cached, computed, generated, prefill_s, decode_s)


def _seconds(milliseconds: object) -> float:
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) and milliseconds > 0 else 0.0

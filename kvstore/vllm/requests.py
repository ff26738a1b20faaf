"""Requests and answers of vLLM, as far as a front has to understand them. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.cluster.openai import ApiError, KVOptions

ANSWER_TOKENS = {"/v1/completions": 16, "/v1/chat/completions": 512}  # held for a request that names no limit


@dataclass(slots=True)
class AnswerUsage:
    """Tokens of an answer, as vLLM counts them; None for what it has not told."""

    prompt: int | None = None
    cached: int | None = None
    new: int | None = None

    def take(self, answer: Mapping[str, Any]) -> bool:
        """Note the usage in an answer or event; whether there was one."""
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return False
        self.prompt, self.new = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        self.cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
        return True


def held_answer_tokens(path: str, body: Mapping[str, Any], room: int) -> int:
    """The answer tokens that a request may ask for, of all its answers: what it holds of the budget.

    room: what is left of the whole budget beside its prompts; one that names no limit holds no more.
    """
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    limit = next((one for one in limits if type(one) is int and one > 0), None)
    answers = body.get("n")
    count = len(texts_or_ids(body)) * (answers if type(answers) is int and answers > 0 else 1)
    return max(1, min(ANSWER_TOKENS[path] * count, room)) if limit is None else limit * count


def texts_or_ids(body: Mapping[str, Any]) -> list[Any]:
    """The prompts of a request: each a text, ids, or something that vLLM will refuse; one for a conversation."""
    prompt = body.get("prompt")
    is_several = isinstance(prompt, list) and bool(prompt) and all(isinstance(one, (str, list)) for one in prompt)
    return prompt if is_several and isinstance(prompt, list) else [prompt]


def salt_of(body: Mapping[str, Any], extension: KVOptions) -> str:
    """vLLM's salt of a request that uses the cache, "" for none: only requests with the same one share KV.

    It is made of the tenant and the request's own salt, each in a place of its own, so that no choice of one is another
    tenant's. Raises ApiError 400.
    """
    own = body.get("cache_salt") or ""
    if not isinstance(own, str):
        raise ApiError(400, "cache_salt must be a string", param="cache_salt", code="invalid_value")
    tenant = extension.tenant
    return f"tenant:{len(tenant)}:{tenant}:{own}" if tenant or own else ""


def apply_extension(body: dict[str, Any], extension: KVOptions) -> None:
    """Say in vLLM's words what a request says about the cache.

    A tenant, or no cache at all, is a salt of vLLM's: of its own cache and of the store, for block hashes are vLLM's.
    """
    salt = salt_of(body, extension) if extension.cache else f"none:{secrets.token_hex(16)}"
    if salt:
        body["cache_salt"] = salt
    ours = extension.model_dump(exclude_defaults=True, exclude={"tenant", "hints"})
    added = {**({"kvstore": ours} if ours else {}), **({"kv_hint": extension.hints} if extension.hints else {})}
    if added:
        params = body.get("kv_transfer_params")
        body["kv_transfer_params"] = {**(params if isinstance(params, dict) else {}), **added}


def ask_for_usage(body: dict[str, Any]) -> bool:
    """Have a stream end with its usage; whether the client asked for that itself."""
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    wanted = bool(options.get("include_usage"))
    body["stream_options"] = {**options, "include_usage": True}
    return wanted


def event_of(data: bytes) -> dict[str, Any]:
    """The object of an event; {} for what is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None

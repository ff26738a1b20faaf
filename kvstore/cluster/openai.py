"""OpenAI's API as the replica speaks it: requests that are checked, answers, chunks and errors in its forms.

What a request asks for is either done or refused: a field that would change the answer and is not supported here gets a
400 that names it, and so does a field nobody knows. A field that is null counts as left out.

One extension in requests and answers, "kvstore": see `KVOptions` and docs/replica.md.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from kvstore.cluster.messages import ChatMessage, Strict
from kvstore.requests import MAX_REASON_BYTES, MAX_TTL_S

MAX_STOP_STRINGS = 16
MAX_NAME = 256  # characters of a tenant, a session
MAX_BREAKPOINTS = 4  # of cache_control in one request, as Anthropic has it: each costs tokenizing the prompt once more
DONE = b"data: [DONE]\n\n"

# Fields that would change the answer, with the values that do not. null is always one of them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
}
SEVERAL = "send a request for each answer (they share their prompt), or use vLLM: kvstore cluster up --engine vllm"
INSTEAD = {"n": SEVERAL, "best_of": SEVERAL}
# Fields that say something about the request and nothing about the answer.
NOTES = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)


class ApiError(Exception):
    """An error in OpenAI's form. param: the field that is wrong, e.g. "messages[0].role"."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer; also that of an error inside a stream."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, where there is one."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class KVOptions(Strict):
    """The extension: what a request says about the cache.

    cache:     False neither looks the prompt up nor saves it.
    tenant:    tenants never see each other's pages.
    session:   the conversation.
    last_turn: no prompt will continue this one.
    finish_reason: why the reply will have ended, of whoever knows it better than the replica; counts where the reply
               ends by itself.
    priority:  pages of a higher one stay longer.
    ttl_s:     how long the pages that it saves live unused.
    retain_until: Unix time until which its pages stay in host memory, within the store's budget.
    hints:     a message of KV hints (docs/hints.md); whatever it is, its outcomes are in the answer.
    """

    cache: bool = True
    tenant: str = Field(default="", max_length=MAX_NAME)
    session: str = Field(default="", max_length=MAX_NAME)
    last_turn: bool = False
    finish_reason: str = Field(default="", max_length=MAX_REASON_BYTES)
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    ttl_s: float | None = Field(default=None, gt=0, le=MAX_TTL_S)
    retain_until: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    hints: Any = None


class TransferParams(Strict):
    """vLLM's field for hints, so that a gateway has one way for all its servers. kv_hint: as `KVOptions.hints`."""

    kv_hint: Any = None


class StreamOptions(Strict):
    """include_usage: a last chunk with `usage` and `kvstore`, and no choices."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Ask(Strict):
    """The fields that both kinds of requests have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_as_list),
        Field(max_length=MAX_STOP_STRINGS),
    ] = Field(default_factory=list)
    ignore_eos: bool = False
    kvstore: KVOptions = KVOptions()
    kv_transfer_params: TransferParams = TransferParams()

    @property
    def hints(self) -> list[Any]:
        """The messages of KV hints that came with it; mostly none."""
        return [message for message in (self.kvstore.hints, self.kv_transfer_params.kv_hint) if message is not None]

    @property
    def new_tokens(self) -> int | None:
        """The most tokens to generate; None leaves it to the server."""
        return self.max_tokens


class CompletionAsk(Ask):
    """`POST /v1/completions`. prompt: a text or token ids; a list of one of them is taken as well."""

    prompt: Any

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> str | list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
            if not prompt:
                raise ValueError("it is empty; give at least one token")
            return prompt
        if isinstance(prompt, list) and all(isinstance(one, (str, list)) for one in prompt):
            raise ValueError(f"it holds {len(prompt)} prompts; send one per request")
        raise ValueError("it must be text or a list of token ids")


class ChatAsk(Ask):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @field_validator("messages")
    @classmethod
    def _few_breakpoints(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        count = sum(1 for message in messages for _ in message.breakpoints)
        if count > MAX_BREAKPOINTS:
            raise ValueError(f"{count} parts have cache_control; up to {MAX_BREAKPOINTS} may")
        return messages

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


A = TypeVar("A", bound=Ask)


def parse(raw: bytes, kind: type[A]) -> A:
    """Check a body. Raises ApiError 400 that names the field; the value is not repeated, it may be a prompt."""
    try:
        body = _without_nulls(json.loads(raw))
    except (ValueError, RecursionError) as error:  # nested too deep for either
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name in [name for name in body if name in NEUTRAL and name not in kind.model_fields]:
        if body.pop(name) not in NEUTRAL[name]:
            instead = INSTEAD.get(name, "leave it out")
            raise ApiError(400, f"{name} is not supported here; {instead}", param=name, code="unsupported_parameter")
    for name in NOTES:
        body.pop(name, None)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _of_validation(error) from None


def check_model(asked: str | None, served: str) -> None:
    """Raise ApiError 404 if the request is for another model. One that names none is for whatever is served."""
    if asked is not None and asked != served:
        raise ApiError(
            404,
            f"the model {asked[:200]!r} is not served here; this is {served!r}",
            param="model",
            code="model_not_found",
        )


class Reply:
    """Builds the JSON of one answer: whole, or chunk by chunk.

    cached and extension are known when the answer is complete: `finish` takes them.
    """

    def __init__(self, ask: Ask, model: str, prompt_tokens: int) -> None:
        self._is_chat = isinstance(ask, ChatAsk)
        self._streams = ask.stream
        self._has_usage = ask.stream_options.include_usage
        self._prompt_tokens = prompt_tokens
        self._begun = False
        prefix, kind = ("chatcmpl", "chat.completion") if self._is_chat else ("cmpl", "text_completion")
        if self._is_chat and ask.stream:
            kind += ".chunk"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, text: str, finish_reason: str | None = None) -> bytes:
        """One event of a stream: the text that became certain with one token."""
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["delta"] = {"content": text} if self._begun else {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        self._begun = True
        body = {**self._head, "choices": [{**choice, "logprobs": None, "finish_reason": finish_reason}]}
        if self._has_usage:
            body["usage"] = None
        return event(body)

    def end(self, new_tokens: int, cached: int, extension: Mapping[str, Any]) -> bytes:
        """The events behind the last chunk: usage where it was asked for, then the end of the stream."""
        if not self._has_usage:
            return DONE
        return event({**self._head, "choices": [], **self._account(new_tokens, cached, extension)}) + DONE

    def whole(
        self, text: str, finish_reason: str | None, new_tokens: int, cached: int, extension: Mapping[str, Any]
    ) -> dict[str, Any]:
        """An answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], **self._account(new_tokens, cached, extension)}

    def _account(self, new_tokens: int, cached: int, extension: Mapping[str, Any]) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": self._prompt_tokens + new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"usage": usage, "kvstore": dict(extension)}


def models(served: str, created: int) -> dict[str, Any]:
    """`GET /v1/models`."""
    return {
        "object": "list",
        "data": [{"id": served, "object": "model", "created": created, "owned_by": "kvstore"}],
    }


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _without_nulls(value: Any) -> Any:
    """null means left out, in the request itself, in messages and in options."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [_without_nulls(one) for one in value]
    return value


def _of_validation(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is unknown here; leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return ApiError(400, f"{param}: {message[:400]}", param=param, code="invalid_value")


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200]

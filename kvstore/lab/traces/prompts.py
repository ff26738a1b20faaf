"""A log of one's own prompts as a trace: JSON lines with a time and a prompt, as text or as token ids.

    {"timestamp": 1764500000.25, "prompt": "...", "session": "ada", "output_tokens": 120}
    {"timestamp": "2026-11-30T06:15:00Z", "messages": [{"role": "user", "content": "..."}]}
    {"timestamp": 1764500001250, "token_ids": [1, 2, 3], "tenant": "acme", "finish_reason": "stop"}

Blocks are those that a store would have: full blocks of `--block-size` tokens, hashed as the store hashes them, each
tenant apart. The hashes are numbered at once, so nothing of a prompt is left in the trace; one line is in memory at a
time. A number as a time is in seconds, or in ms, us or ns where it would be after the year 5000 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install
from kvstore.lab.traces.source import Format, Source, why
from kvstore.load.kvt import MAX_PROMPT_TOKENS, KvtRequest
from radix.hashing import BlockHash, hash_blocks
from radix.namespace import Namespace

PROMPTS = ("prompt", "messages", "token_ids")
BLOCK_TOKENS = 64  # the store's own default
FAR_FUTURE = 1e11  # seconds: the year 5138; in ms it is 1973
MAX_TEXT = 256  # characters of a name

Encode = Callable[[Any, bool], Sequence[int]]


def _read(source: Source) -> Iterator[KvtRequest]:
    blocks: dict[bytes, int] = {}
    sessions: dict[str, int] = {}
    roots: dict[str, BlockHash] = {}
    encode: Encode | None = None
    for line, fields in source.objects():
        try:
            kinds = [name for name in PROMPTS if name in fields]
            if len(kinds) != 1:
                raise ValueError(f"one of {', '.join(PROMPTS)}")
            kind = kinds[0]
            if kind != "token_ids" and encode is None:
                encode = _tokenizer(source)
            request, tokens = _request(fields, kind, encode, sessions)
            if request.tenant not in roots:
                roots[request.tenant] = _root(source.block_tokens, request.tenant)
            hashes = hash_blocks(tokens, source.block_tokens, root=roots[request.tenant])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            source.bad(f"a request ({why(error)})", line)
            continue
        request = KvtRequest(
            request.at_s,
            request.session,
            -1,
            len(tokens),
            request.num_answer_tokens,
            tuple(blocks.setdefault(name, len(blocks)) for name in hashes),
            finish_reason=request.finish_reason,
            tenant=request.tenant,
        )
        yield request


def _request(
    fields: Mapping[str, Any], kind: str, encode: Encode | None, sessions: dict[str, int]
) -> tuple[KvtRequest, Sequence[int]]:
    at_s = _seconds(fields["timestamp"])
    names = {name: fields.get(name, "") for name in ("session", "user", "tenant", "finish_reason")}
    for name, value in names.items():
        if not isinstance(value, (str, int)) or len(str(value)) > MAX_TEXT:
            raise ValueError(f"{name} must be a name of at most {MAX_TEXT} characters")
    num_answer = fields.get("output_tokens", 0)
    if type(num_answer) is not int or not 0 <= num_answer <= MAX_PROMPT_TOKENS:
        raise ValueError(f"output_tokens is {num_answer!r:.40}; it must be a number of tokens")
    tokens = _tokens(fields[kind], kind, encode)
    session = str(names["session"]) or str(names["user"])
    number = sessions.setdefault(session, len(sessions)) if session else -1
    reason, tenant = str(names["finish_reason"]), str(names["tenant"])
    return KvtRequest(at_s, number, -1, len(tokens), num_answer, (), finish_reason=reason, tenant=tenant), tokens


def _tokens(value: Any, kind: str, encode: Encode | None) -> Sequence[int]:
    if kind == "token_ids":
        if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
            raise ValueError("token_ids must be a list of numbers")
        tokens: Sequence[int] = value
    else:
        assert encode is not None
        if kind == "prompt" and not isinstance(value, str):
            raise ValueError("prompt must be text")
        if kind == "messages" and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise ValueError("messages must be a list of objects")
        try:
            tokens = encode(value, kind == "messages")
        except Exception as error:  # a chat template is a program, and may raise anything of its own
            raise ValueError(f"{kind} cannot be tokenized: {type(error).__name__}: {error}"[:200]) from None
    if len(tokens) > MAX_PROMPT_TOKENS:
        raise ValueError(f"{len(tokens)} tokens; a prompt has at most {MAX_PROMPT_TOKENS}")
    return tokens


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        at = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        return (at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"timestamp is {value!r:.40}; it must be seconds, milliseconds or ISO 8601")
    seconds = float(value)
    while seconds >= FAR_FUTURE:
        seconds /= 1000
    return seconds


def _root(block_size: int, tenant: str) -> BlockHash:
    return Namespace("prompts", "", "", "", block_size, salt=tenant).root()


def _tokenizer(source: Source) -> Encode:
    if source.tokenizer is None:
        raise ConfigError(f"{source.path} has prompts as text: give --tokenizer DIR_OR_ID, the model's own")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"{source.path} has prompts as text; {how_to_install('transformers')}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    except Exception as error:  # whatever is wrong with a folder, or a hub that is not reached
        raise ConfigError(f"--tokenizer {source.tokenizer} cannot be loaded: {error}"[:300]) from error

    def encode(value: Any, is_chat: bool) -> Sequence[int]:
        if not is_chat:
            return list(tokenizer(value)["input_ids"])
        text = tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has them

    return encode


PROMPT_LOG = Format(
    "prompts",
    "a request with timestamp and prompt, messages or token_ids",
    lambda fields: "format" not in fields and "timestamp" in fields and any(name in fields for name in PROMPTS),
    _read,
    BLOCK_TOKENS,
    window_s=3600.0,  # a server may log a request when it is over
    may_be_cut=True,
)

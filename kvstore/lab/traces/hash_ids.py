"""Mooncake and Qwen-Bailian: published traces whose requests name their blocks by `hash_ids`.

    mooncake  timestamp (ms), input_length, output_length, hash_ids; 512 tokens a block
    bailian   timestamp (s), chat_id, parent_chat_id, turn, type, input_length, output_length, hash_ids; 16 tokens

An id names the content of a block, and mostly of all before it; here it counts together with those. That of a last
block which is filled in part names that part: a prompt that grows has another id there, so what an id says is right as
it stands. Its tokens are counted as many as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kvstore.lab.traces.source import Format, Source, why
from kvstore.load.kvt import MAX_PROMPT_TOKENS, MAX_TIME_S, KvtRequest


def _read(source: Source, request: Callable[[dict[str, Any]], KvtRequest]) -> Iterator[KvtRequest]:
    numbers: dict[tuple[int, int], int] = {}  # of a block, by the number of the one before it and its own id
    for line, fields in source.objects():
        try:
            _check(fields, source.block_tokens)
            found = request(fields)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            source.bad(f"a request ({why(error)})", line)
            continue
        yield replace(found, blocks=_chained(fields["hash_ids"], numbers))


def _chained(ids: list[int], numbers: dict[tuple[int, int], int]) -> tuple[int, ...]:
    """The numbers of a path's blocks: an id counts together with all before it, whether it names them itself or not."""
    above, path = -1, []
    for id_ in ids:
        above = numbers.setdefault((above, id_), len(numbers))
        path.append(above)
    return tuple(path)


def _check(fields: dict[str, Any], block_tokens: int) -> None:
    for name in ("input_length", "output_length"):
        if type(fields[name]) is not int or not 0 <= fields[name] <= MAX_PROMPT_TOKENS:
            raise ValueError(f"{name} is {fields[name]!r:.40}; it must be a number of tokens")
    ids = fields["hash_ids"]
    if not isinstance(ids, list) or not all(type(id_) is int and 0 <= id_ < 1 << 255 for id_ in ids):
        raise ValueError("hash_ids must be a list of numbers")
    if len(ids) != -(-fields["input_length"] // block_tokens):
        raise ValueError(
            f"{len(ids)} hash_ids for input_length {fields['input_length']}; blocks of {block_tokens} tokens are "
            f"{-(-fields['input_length'] // block_tokens)}: is the block size another one?"
        )
    at = fields["timestamp"]
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at) or abs(at) > MAX_TIME_S:
        raise TypeError(f"timestamp is {fields['timestamp']!r:.40}; it must be a number")


def _read_mooncake(source: Source) -> Iterator[KvtRequest]:
    def request(fields: dict[str, Any]) -> KvtRequest:
        return _request(fields, fields["timestamp"] / 1000, -1)

    return _read(source, request)


def _read_bailian(source: Source) -> Iterator[KvtRequest]:
    sessions: dict[int, int] = {}  # of a chat: the first chat of its conversation

    def request(fields: dict[str, Any]) -> KvtRequest:
        chat, parent, turn = fields["chat_id"], fields.get("parent_chat_id", -1), fields.get("turn", 0)
        for name, value in (("chat_id", chat), ("parent_chat_id", parent), ("turn", turn)):
            if type(value) is not int or not -1 <= value < 1 << 63:
                raise ValueError(f"{name} is {value!r:.40}; it must be a number")
        # A parent that came before the trace began stands for the conversation itself.
        session = sessions.setdefault(chat, sessions.get(parent, parent) if parent >= 0 else chat)
        kind = fields.get("type", "")
        return _request(
            fields, float(fields["timestamp"]), session, kind if isinstance(kind, str) else "", max(0, turn)
        )

    return _read(source, request)


def _request(fields: dict[str, Any], at_s: float, session: int, kind: str = "", turn: int = 0) -> KvtRequest:
    return KvtRequest(at_s, session, -1, fields["input_length"], fields["output_length"], (), kind=kind, turn=turn)


def _has_ids(fields: Mapping[str, Any]) -> bool:
    return "hash_ids" in fields and "format" not in fields


MOONCAKE = Format(
    "mooncake",
    "a request with hash_ids, timestamps in ms",
    lambda fields: _has_ids(fields) and "chat_id" not in fields,
    _read_mooncake,
    512,
)
BAILIAN = Format(
    "bailian",
    "a request with hash_ids and chat_id, timestamps in s",
    lambda fields: _has_ids(fields) and "chat_id" in fields,
    _read_bailian,
    16,
)

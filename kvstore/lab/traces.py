"""Traces as the laboratory replays them: who asked when, and of which blocks a prompt is made.

    kvt1      JSON lines with a header (kvstore/load/kvt.py); a request names the earlier one that it continues
    mooncake  JSON lines: timestamp (ms), input_length, output_length, hash_ids; 512 tokens a block
    bailian   JSON lines: timestamp (s), chat_id, parent_chat_id, turn, type, input_length, output_length, hash_ids;
              16 tokens a block

Any may be compressed with gzip or zstd; the first line says which of them it is. In the two without a header an id
names the content of a block, and mostly of all before it; here it counts together with those. That of a last block
which is filled in part names that part: a prompt that grows has another id there, so what an id says is right as it
stands. Its tokens are counted as many as they are.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.load.kvt import KvtRequest, broken_line, next_line, open_lines, read_header, read_kvt

BLOCK_TOKENS = {"kvt1": 0, "mooncake": 512, "bailian": 16}  # by format; 0: its header says so


@dataclass(frozen=True, slots=True)
class ReplayTrace:
    """A trace in memory. num_skipped: broken lines that were left out."""

    name: str
    block_tokens: int
    requests: tuple[KvtRequest, ...]
    num_skipped: int = 0

    @property
    def num_distinct(self) -> int:
        """How many different blocks there are: a store of so many never evicts."""
        return len({block for request in self.requests for block in request.blocks})

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_prompt_tokens for request in self.requests)

    def blocks_of(self, share: float) -> int:
        """Return how many blocks a store of this share of all different ones has, at least one."""
        if not 0 < share < math.inf:
            raise ConfigError(f"capacity is {share}; it must be a share above 0 of the trace's different blocks")
        return max(1, int(self.num_distinct * share))


def read_trace(
    path: Path, *, block_tokens: int | None = None, max_requests: int | None = None, skip_bad: bool = False
) -> ReplayTrace:
    """Read a trace, or its first requests.

    block_tokens: of a block, where the format has no header that says so; None for the format's own.
    skip_bad:     leave broken lines out, and count them; not of kvt1, whose lines go by the ones before.

    Raises ConfigError for a file that is no trace, or a line that is broken; OSError for no file.
    """
    with closing(open_lines(path)) as lines:
        first = next_line(path, lines)
        kind = _kind(path, first)
        skipped = [0]
        if kind == "kvt1":
            header = read_header(path, first)
            name, size = str(header.get("name", path.name)), int(header["block_tokens"])
            found = read_kvt(path, lines)
        else:
            name, size = path.name.split(".")[0], block_tokens or BLOCK_TOKENS[kind]
            found = _read_lines(path, first, lines, _READERS[kind], size, skipped if skip_bad else None)
        requests: list[KvtRequest] = []
        for request in found:
            if len(requests) == max_requests:
                break
            if requests and request.at_s < requests[-1].at_s:
                raise ConfigError(
                    f"{path}: request {len(requests) + 1} came at {request.at_s:g} s, before the one above it at "
                    f"{requests[-1].at_s:g} s; sort the trace by time"
                )
            requests.append(request)
    if not requests:
        raise ConfigError(f"{path} has no request in it")
    return ReplayTrace(name, size, tuple(requests), skipped[0])


def _kind(path: Path, line: str) -> str:
    try:
        fields = json.loads(line)
        if "format" in fields:
            return "kvt1"
        if "hash_ids" in fields:
            return "bailian" if "chat_id" in fields else "mooncake"
    except (ValueError, TypeError, RecursionError):
        pass
    raise broken_line(
        path, 1, f"the first line of a trace ({', '.join(BLOCK_TOKENS)}): a header, or a request with hash_ids", line
    )


def _read_lines(
    path: Path,
    line: str,
    lines: io.TextIOBase,
    read: Callable[[dict[str, Any], tuple[int, ...]], KvtRequest],
    block_tokens: int,
    skipped: list[int] | None,
) -> Iterator[KvtRequest]:
    number = 1
    numbers: dict[tuple[int, int], int] = {}  # of a block, by the number of the one before it and its own id
    while line:
        if line.strip():
            try:
                fields = _checked(json.loads(line), block_tokens)
                yield read(fields, _chained(fields["hash_ids"], numbers))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                if skipped is None:
                    raise broken_line(path, number, f"a request ({_why(error)})", line) from None
                skipped[0] += 1
        line, number = next_line(path, lines), number + 1


def _chained(ids: list[int], numbers: dict[tuple[int, int], int]) -> tuple[int, ...]:
    """The numbers of a path's blocks: an id counts together with all before it, whether it names them itself or not."""
    above, path = -1, []
    for id_ in ids:
        above = numbers.setdefault((above, id_), len(numbers))
        path.append(above)
    return tuple(path)


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "one JSON object a line"
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _checked(fields: Any, block_tokens: int) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise TypeError("one JSON object a line")
    for name in ("input_length", "output_length"):
        if type(fields[name]) is not int or fields[name] < 0:
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
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        raise TypeError(f"timestamp is {fields['timestamp']!r:.40}; it must be a number")
    return dict(fields)


def _mooncake(fields: dict[str, Any], blocks: tuple[int, ...]) -> KvtRequest:
    return _request(fields, blocks, fields["timestamp"] / 1000, -1)


def _bailian(fields: dict[str, Any], blocks: tuple[int, ...]) -> KvtRequest:
    chat = fields["chat_id"]
    return _request(fields, blocks, float(fields["timestamp"]), chat if type(chat) is int else -1)


def _request(fields: dict[str, Any], blocks: tuple[int, ...], at_s: float, session: int) -> KvtRequest:
    return KvtRequest(at_s, session, -1, fields["input_length"], fields["output_length"], blocks)


_READERS = {"mooncake": _mooncake, "bailian": _bailian}

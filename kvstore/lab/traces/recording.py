"""The store's own recording (kvstore/recording.py) as a trace, with the older parts that lie beside it.

A request stands at the time at which it was looked up, and has the hits that the store gave it then. An abandoned one
counts too: it was asked. Ids are those of the recording; sessions and tenants are numbered as they come.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.lab.traces.source import Format, Source, why
from kvstore.load.kvt import MAX_PROMPT_TOKENS, MAX_TIME_S, KvtRequest
from kvstore.load.lines import next_line, open_lines
from kvstore.recording import FORMAT, ID_BYTES

MAX_PARTS = 1000


def _read(source: Source) -> Iterator[KvtRequest]:
    blocks: dict[bytes, int] = {}
    sessions: dict[str, int] = {}
    for part in _parts(source.path):
        with closing(open_lines(part)) as stream:
            older = replace(source, path=part, stream=stream, first=next_line(part, stream), number=0, num_skipped=0)
            yield from _Part(older, blocks, sessions).requests()
            source.num_skipped += older.num_skipped
            if not source.block_tokens:
                source.block_tokens = older.block_tokens
    part_of = _Part(source, blocks, sessions)
    yield from part_of.requests()


def _parts(path: Path) -> list[Path]:
    """The older parts of a recording, oldest first: FILE.2, FILE.1."""
    found: list[Path] = []
    while len(found) < MAX_PARTS and (part := path.with_name(f"{path.name}.{len(found) + 1}")).exists():
        found.append(part)
    return found[::-1]


class _Part:
    """One file of a recording.

    blocks, sessions: numbers by the names in the file; the same for all parts.
    """

    def __init__(self, source: Source, blocks: dict[bytes, int], sessions: dict[str, int]) -> None:
        self._source = source
        self._blocks = blocks
        self._sessions = sessions
        self._sizes: dict[str, int] = {}  # block size by writer
        self._above: dict[bytes, bytes] = {}  # what each block continues
        self._num_others = 0

    def requests(self) -> Iterator[KvtRequest]:
        source = self._source
        for line, fields in source.objects():
            try:
                if "format" in fields:
                    self._begin(fields)
                    continue
                request = self._request(fields)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                source.bad(f"a request ({why(error)})", line)
                continue
            if request is not None:
                yield request
        if self._num_others:
            source.notes.append(f"{self._num_others} requests of stores with other block sizes are left out")

    def _begin(self, fields: dict[str, Any]) -> None:
        size, writer = fields["block_tokens"], fields["w"]
        if fields["format"] != FORMAT or type(size) is not int or size < 1 or not isinstance(writer, str):
            raise ValueError(f"a {FORMAT} header has a writer w and block_tokens")
        self._sizes[writer] = size
        self._source.block_tokens = self._source.block_tokens or size

    def _request(self, fields: dict[str, Any]) -> KvtRequest | None:
        writer = fields["w"]
        if not isinstance(writer, str) or writer not in self._sizes:
            raise ValueError(f"writer {writer!r:.20} has no header")
        size = self._sizes[writer]
        at, session = fields["t"], fields.get("s")
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at) or abs(at) > MAX_TIME_S:
            raise ValueError(f"t is {at!r:.40}; it must be seconds")
        for name in ("in", "out", "k"):
            if type(fields.get(name, 0)) is not int or not 0 <= fields.get(name, 0) <= MAX_PROMPT_TOKENS:
                raise ValueError(f"{name} is {fields[name]!r:.40}; it must be a number of tokens or blocks")
        for name in ("s", "u", "x", "e"):
            if not isinstance(fields.get(name, ""), str):
                raise ValueError(f"{name} must be text")
        path = self._path(fields)
        if len(path) * size > fields["in"]:
            raise ValueError(f"{len(path)} blocks of {size} tokens are more than its {fields['in']} tokens")
        hits = fields.get("hit", {})
        if not isinstance(hits, dict) or not all(type(n) is int and 0 <= n <= fields["in"] for n in hits.values()):
            raise ValueError("hit must be tokens by tier")
        if size != self._source.block_tokens:
            self._num_others += 1
            return None
        number = -1 if session is None else self._sessions.setdefault(session, len(self._sessions))
        return KvtRequest(
            at,
            number,
            -1,
            fields["in"],
            fields["out"],
            tuple(self._blocks.setdefault(name, len(self._blocks)) for name in path),
            kind=fields.get("e", ""),
            finish_reason=fields.get("x", ""),
            tenant=fields.get("u", ""),
            hit_tokens=sum(hits.values()),
        )

    def _path(self, fields: dict[str, Any]) -> list[bytes]:
        head: list[bytes] = []
        if num_known := fields.get("k", 0):
            name: bytes | None = b64decode(fields["l"], validate=True)
            while name and len(head) < num_known:
                if name not in self._above:
                    raise ValueError("it continues a block that no line before it has")
                head.append(name)
                name = self._above[name]
            if len(head) != num_known or name:
                raise ValueError(f"k is {num_known}; it is not the depth of block l")
            head.reverse()
        packed = b64decode(fields["h"], validate=True)
        if len(packed) % ID_BYTES:
            raise ValueError(f"h is not made of names of {ID_BYTES} bytes")
        new = [packed[at : at + ID_BYTES] for at in range(0, len(packed), ID_BYTES)]
        above = head[-1] if head else b""
        for name in new:
            if self._above.setdefault(name, above) != above:
                raise ValueError("a block has two places")
            above = name
        return head + new


RECORDING = Format(
    "recording",
    "what kvstore serve --record writes",
    lambda fields: fields.get("format") == FORMAT,
    _read,
    0,
    window_s=86400.0,  # a line is written when its request is over, and says when it came
    may_be_cut=True,
)

"""The store's own recording: what was asked, when, and how it ended, as JSON lines without any text (docs/formats.md).

A block is named by 8 bytes: its hash, hashed again with a key that lies beside the recording and not in it. So somebody
who has the recording alone can neither read a prompt from it nor find out whether one of his own is there; sessions and
tenants are named in the same way. Blocks that the same writer has named before in the same file are not named again: a
request tells the last one of them, which stands for all that come before it.

The writer is one of kvstore/move/recorder.py, the reader kvstore/lab/traces/recording.py.
"""

from __future__ import annotations

import json
import re
import secrets
from base64 import b64encode
from bisect import bisect_left
from hashlib import blake2b
from typing import Any

from kvstore.plan.ended import ABANDONED, EndedRequest

FORMAT = "kvr1"
ID_BYTES = 8
KEY_BYTES = 32
MAX_KNOWN = 1 << 18  # blocks whose names a writer remembers: some 30 MB
REASON = re.compile(r"[A-Za-z0-9_.-]{1,32}")  # anything else might be text of a user


class RecordWriter:
    """Makes the lines of one writer. Not thread-safe.

    key: KEY_BYTES, the same for all that write to a file, so that their names agree.
    """

    def __init__(self, key: bytes, block_tokens: int) -> None:
        self._key = key
        self._block_tokens = block_tokens
        self._writer = secrets.token_hex(4)
        self._known: set[bytes] = set()

    def header(self) -> bytes:
        """The line that begins what this writer writes to a file; what was named in another one is named again."""
        self._known.clear()
        return _line({"format": FORMAT, "w": self._writer, "block_tokens": self._block_tokens})

    def line(self, ended_at: float, ended: EndedRequest) -> bytes:
        """The line of one request that was over at that Unix time. O(blocks that are new, times the hash of each)."""
        keys, options = ended.request.keys, ended.request.options
        num_blocks = min(len(keys), ended.num_tokens // self._block_tokens)
        if len(self._known) + num_blocks > MAX_KNOWN:
            self._known.clear()
        # Of a path the known blocks are its head: nothing is named before what it continues.
        known = bisect_left(range(num_blocks), True, key=lambda at: keys[at] not in self._known)
        self._known.update(keys[known:num_blocks])
        record: dict[str, Any] = {
            "w": self._writer,
            "t": round(ended_at - ended.took_s, 6),
            "d": round(ended.took_s, 6),
            "in": ended.num_tokens,
            "out": max(0, ended.request.num_tokens - ended.num_tokens),
            "h": b64encode(b"".join(self._name(key) for key in keys[known:num_blocks])).decode(),
        }
        if known:
            record |= {"k": known, "l": b64encode(self._name(keys[known - 1])).decode()}
        if hits := {tier: tokens for tier, tokens in ended.hit_tokens.items() if tokens}:
            record["hit"] = hits
        if options.session:
            record["s"] = self._name(b"session " + options.session.encode("utf-8", "surrogatepass")).hex()
        if options.tenant:
            record["u"] = self._name(b"tenant " + options.tenant.encode("utf-8", "surrogatepass")).hex()
        if ended.reason == ABANDONED:
            record["e"] = ABANDONED
        elif ended.reason:
            record["x"] = ended.reason if REASON.fullmatch(ended.reason) else "other"
        return _line(record)

    def _name(self, what: bytes) -> bytes:
        return blake2b(what, digest_size=ID_BYTES, key=self._key).digest()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"

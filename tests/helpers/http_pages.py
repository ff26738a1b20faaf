"""Prompts that come and go by plain HTTP, as a client in another language has them, and a tenant always."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from kvstore.layout import Layout
from kvstore.service.http import pages
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from radix.namespace import Namespace
from tests.helpers.daemons import Http
from tests.helpers.stores import LAYOUT, namespace, page_of


def framed(tokens: Sequence[int], wanted: dict[int, bytes], checksum: int | None = None, **fields: Any) -> bytes:
    """The body of a PUT: pages by block, of a layout of one group. checksum: in place of the right one."""
    head = json.dumps({"tokens": list(tokens), **fields}).encode()
    body = struct.pack("<I", len(head)) + head
    for block, data in wanted.items():
        digest = xxhash.xxh3_64_intdigest(data) if checksum is None else checksum
        body += pages.FRAME.pack(block, 0, 0, len(data), 0, digest) + data
    return body


def unframed(raw: bytes) -> dict[int, bytes]:
    """The pages of an answer, by block; their checksums are right."""
    read = {}
    while raw:
        block, _, _, size, _, checksum = pages.FRAME.unpack_from(raw)
        read[block], raw = raw[pages.FRAME.size : pages.FRAME.size + size], raw[pages.FRAME.size + size :]
        assert xxhash.xxh3_64_intdigest(read[block]) == checksum
    return read


class HttpPages:
    """One namespace of a tenant, opened, filled and read over HTTP. Bytes tell whose page of which prompt they are."""

    def __init__(
        self, port: int, token: str | None = None, layout: Layout = LAYOUT, names: Namespace | None = None
    ) -> None:
        self.http = Http(port, token)
        self._layout = layout
        self._token = token
        names = namespace(layout) if names is None else names
        opened = self.http.post("/v1/namespaces", layout=layout_to_json(layout), namespace=namespace_to_json(names))
        self.namespace: str = opened["id"]

    def save(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> int:
        """Put every block; returns those that were not there."""
        tokens = np.asarray(tokens).tolist()
        wanted = {block: self._page(tokens, block) for block in range(len(tokens) // self._layout.block_size)}
        body = framed(tokens, wanted, namespace=self.namespace)
        status, answer = self.http.call("PUT", "/v1/pages", body, headers={"Content-Type": pages.CONTENT_TYPE})
        assert status == 200, answer
        return int(answer["blocks"])

    def load(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> int:
        """Read what there is and compare every byte; returns the blocks that came."""
        tokens = np.asarray(tokens).tolist()
        fields = {"tokens": tokens, "namespace": self.namespace, "timeout_s": 10.0}
        status, raw = self.http.call("POST", "/v1/pages/read", fields)
        assert status == 200, raw
        read = unframed(raw)
        assert read == {block: self._page(tokens, block) for block in range(len(read))}
        return len(read)

    def lookup(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> dict[str, Any]:
        """What is stored of a prompt."""
        told: dict[str, Any] = self.http.post(
            "/v1/lookup", tokens=np.asarray(tokens).tolist(), namespace=self.namespace, timeout_s=10.0
        )
        return told

    def flush(self) -> bool:
        """Whether everything is on its tiers."""
        told: bool = self.http.post("/v1/flush", namespace=self.namespace, timeout_s=30.0)["ok"]
        return told

    def stats(self) -> dict[str, Any]:
        """The counters of the namespace."""
        told: dict[str, Any] = self.http.get(f"/v1/stats?namespace={self.namespace}")["namespaces"][self.namespace]
        return told

    def _page(self, tokens: list[int], block: int) -> bytes:
        end = (block + 1) * self._layout.block_size
        key = hashlib.sha256(f"{self._token} {self.namespace} {tokens[:end]}".encode()).digest()
        return page_of(key, 0, self._layout.stored_bytes(0)).tobytes()

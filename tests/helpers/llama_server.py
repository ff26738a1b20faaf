"""A llama-server that computes nothing: it tokenizes letters, keeps slots, and writes and reads their files.

A slot's rows are made of its tokens by hashing, so that a state of other tokens is seen: `wrong_rows` counts them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

LAYERS, ROW = 3, 16


def rows_of(tokens: list[int], layer: int, what: str, rope: str = "") -> bytes:
    """ROW bytes for each token, which depend on all tokens up to it."""
    out, digest = [], hashlib.sha256(f"{rope}{layer}{what}".encode())
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
        out.append(digest.digest()[:ROW])
    return b"".join(out)


def slot_file(
    tokens: list[int], *, streams: int = 2, version: int = 4, cells: list[int] | None = None, rope: str = ""
) -> bytes:
    """A file as llama-server writes it. cells: positions in the order of the cells; all, in order, if None."""
    order = list(range(len(tokens))) if cells is None else cells
    ints = [-1, 1, len(tokens), *tokens, 0] if version == 4 else tokens
    out = [struct.pack("<III", 0x67677371, version, len(ints)), struct.pack(f"<{len(ints)}i", *ints)]
    out.append(struct.pack("<II", streams, len(order)))
    out += [struct.pack("<III", position, 1, 0) for position in order]
    out.append(struct.pack("<II", 0, LAYERS) + (bytes(8) if version == 4 else b""))
    for what in "kv":
        for layer in range(LAYERS):
            rows = rows_of(tokens, layer, what, rope)
            out.append(struct.pack("<iQ", 1, ROW))
            out += [rows[ROW * position : ROW * (position + 1)] for position in order]
    out.append(bytes(4 * (streams - 1)))
    return b"".join(out)


def read_tokens(data: bytes) -> list[int]:
    """The tokens of such a file."""
    (count,) = struct.unpack_from("<I", data, 8)
    return list(struct.unpack_from(f"<{count}i", data, 12))[3:-1]


class FakeLlama:
    """The server. Its attributes may be changed at any time.

    forgets:      a restore is answered with success, and has no effect.
    rope:         a setting that it tells nobody, and that its rows depend on.
    ends:         a stream ends before its last event, as if that were all.
    cannot_erase: it answers that it has failed to empty a slot.
    """

    def __init__(self, folder: Path, num_slots: int = 2) -> None:
        self.folder = folder
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.props: dict[str, Any] = {
            "total_slots": num_slots,
            "build_info": "b1-fake",
            "model_path": str(folder / "model.gguf"),
            "default_generation_settings": {"n_ctx": 4096},
        }
        self.forgets = self.ends = False
        self.rope = ""
        self.cannot_erase = False
        self.has_slots = True
        self.has_timings = True
        self.cut_bytes = 0
        self.wrong_rows = 0
        self.restored: list[int] = []
        self.saves = 0
        self.bodies: list[dict[str, Any]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.url = ""
        (folder / "model.gguf").write_bytes(b"GGUF" + bytes(1000))
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/props", self._props)
        app.router.add_get("/health", self._props)
        app.router.add_get("/lora-adapters", self._adapters)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/apply-template", self._render)
        app.router.add_post("/slots/{slot}", self._slot)
        for path in ("/completion", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._complete)
        self._runner = web.AppRunner(app)

    async def start(self, port: int = 0) -> FakeLlama:
        """Listen."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        return self

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _props(self, request: web.Request) -> web.Response:
        return web.json_response(self.props)

    async def _adapters(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [ord(letter) for letter in (await request.json())["content"]]})

    async def _render(self, request: web.Request) -> web.Response:
        messages = (await request.json())["messages"]
        return web.json_response({"prompt": "".join(f"<{one['role']}>{one['content']}" for one in messages)})

    async def _slot(self, request: web.Request) -> web.Response:
        if not self.has_slots:
            error = {
                "error": {"message": "This server does not support slots action. Start it with `--slot-save-path`"}
            }
            return web.json_response(error, status=501)
        number, action = int(request.match_info["slot"]), request.query["action"]
        if action == "erase":
            if self.cannot_erase:
                return web.json_response({"error": {"message": "failed"}}, status=500)
            self.slots[number] = []
            return web.json_response({})
        path = self.folder / (await request.json())["filename"]
        if action == "save":
            self.saves += 1
            data = slot_file(self.slots[number], streams=len(self.slots), rope=self.rope)
            path.write_bytes(data[: len(data) - self.cut_bytes])
        else:
            data = path.read_bytes()
            tokens = read_tokens(data)
            self.wrong_rows += data != slot_file(tokens, streams=len(self.slots), rope=self.rope)
            self.restored.append(len(tokens))
            self.slots[number] = [] if self.forgets else tokens
        return web.json_response({"n_restored": len(read_tokens(data)) if action == "restore" else 0})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        text = body.get("prompt")
        if text is None:
            text = "".join(f"<{one['role']}>{one['content']}" for one in body["messages"])
        tokens = [ord(letter) for letter in text] if isinstance(text, str) else text
        if len(tokens) > 4000:
            return web.json_response({"error": {"message": "too long", "code": 400}}, status=400)
        slot = body.get("id_slot", 0)
        before = self.slots[slot] if body.get("cache_prompt", True) else []
        differ = np.flatnonzero(np.array(before[: len(tokens)]) != np.array(tokens[: len(before)]))
        cached = min(int(differ[0]) if len(differ) else min(len(before), len(tokens)), len(tokens) - 1)
        answer = [ord("a") + sum(tokens) % 26] * 4
        self.slots[slot] = tokens + answer[:-1]
        await self.hold.wait()
        found: dict[str, Any] = {
            "choices": [{"text": "".join(map(chr, answer)), "index": 0, "finish_reason": "length"}],
            "usage": {"prompt_tokens": len(tokens), "completion_tokens": 4},
        }
        if self.has_timings:
            found["timings"] = {"cache_n": cached, "prompt_n": len(tokens) - cached, "predicted_n": 4}
        if not body.get("stream"):
            return web.json_response(found)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        first = {"choices": [{"text": "", "index": 0, "finish_reason": None}]}
        for one in (json.dumps(first), json.dumps(found), "[DONE]")[: 1 if self.ends else 3]:
            await response.write(f"data: {one}\n\n".encode())
        return response

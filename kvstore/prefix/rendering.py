"""The process that renders templates, as its parent sees it: a text, or why there is none, always in time.

A template is a program that somebody else wrote. It runs in a child (child.py) that is ended when a rendering takes
longer than it may; the next one gets a new child. Where some in a row take too long, none is tried for a while, so that
a diagnosis or a log ends in time. One thread at a time.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import KVStoreError

COMMAND = (sys.executable, "-m", "kvstore.prefix.child")
START_S = 60.0  # a guess for a busy machine: an interpreter and Jinja
MAX_SLOW = 3  # renderings in a row that take too long: then none is tried for REST_S
REST_S = 60.0  # a guess: long enough that a log of thousands comes to its end, and a server that was busy goes on
NOON = 1_767_268_800.0  # 1 January 2026, 12:00 UTC: the clock of renderings that name none
TOO_SLOW, BROKEN = "too_slow", "broken"


class TemplateRefused(KVStoreError):
    """A template gives no text for this conversation. kind: raised, too_long, too_much_memory, too_slow or broken."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one rendering.

    seconds:   by the clock; the prompts of real templates take milliseconds.
    max_chars: of its text.
    """

    seconds: float = 10.0
    max_chars: int = 4_000_000


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template. special: variables that the tokenizer gives it, such as bos_token."""

    text: str
    special: Mapping[str, str] = field(default_factory=dict)


class RenderProcess:
    """Renders any number of templates, one after another. A context manager; `close` ends the child."""

    def __init__(
        self,
        limits: Limits = Limits(),
        *,
        command: Sequence[str] = COMMAND,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._command = command
        self._now = now
        self._child: subprocess.Popen[bytes] | None = None
        self._num_slow = 0  # in a row
        self._rests_until = 0.0

    def render(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        generation_prompt: bool = True,
        clock: float = NOON,
        engine: str = "transformers",
    ) -> str:
        """Return the prompt. Raises TemplateRefused.

        kwargs: `chat_template_kwargs`, such as {"enable_thinking": False}. clock: the time it is, seconds since 1970.
        """
        job = {
            "template": template.text,
            "special": dict(template.special),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "kwargs": dict(kwargs or {}),
            "add_generation_prompt": generation_prompt,
            "clock": clock,
            "engine": engine,
            "max_chars": self._limits.max_chars,
        }
        return str(self._ask(job)["text"])

    def names(self, template: Template) -> list[str]:
        """Return the variables that a template reads. Raises TemplateRefused if it is no template."""
        return list(self._ask({"wants": "names", "template": template.text})["names"])

    def close(self) -> None:
        """End the child. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def __enter__(self) -> RenderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        seconds = self._limits.seconds
        if self._num_slow >= MAX_SLOW and self._now() < self._rests_until:
            raise TemplateRefused(TOO_SLOW, f"not tried: {MAX_SLOW} renderings in a row took longer than {seconds:g} s")
        if self._child is None:
            self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            seconds += START_S
        answer = self._exchange(self._child, json.dumps(job).encode() + b"\n", seconds)
        if "error" in answer:
            raise TemplateRefused(str(answer["kind"]), str(answer["error"]))
        return answer

    def _exchange(self, child: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any]:
        assert child.stdin is not None
        try:
            child.stdin.write(line)  # it waits for a line, so it takes it
            child.stdin.flush()
            answer = self._read(child, self._now() + seconds)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self.close()
            self._num_slow += 1
            self._rests_until = self._now() + REST_S
            raise TemplateRefused(TOO_SLOW, f"no text after {self._limits.seconds:g} s")
        if not answer.endswith(b"\n"):
            self.close()
            raise TemplateRefused(BROKEN, "the process that renders has ended")
        self._num_slow = 0
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def _read(self, child: subprocess.Popen[bytes], until: float) -> bytes | None:
        """Return a line; what there is of it where the child ended; None if time is up."""
        assert child.stdout is not None
        pieces = []
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                left = until - self._now()
                if left <= 0 or not selector.select(left):
                    return None
                piece = os.read(child.stdout.fileno(), 1 << 16)
                pieces.append(piece)
                if not piece or piece.endswith(b"\n"):
                    return b"".join(pieces)

"""Renders chat templates by the rules that transformers has for them; the process behind `rendering.RenderProcess`.

A line of JSON comes in with a template and a conversation, a line goes out with the text or why there is none. The
sandbox is Jinja's own; the process has a limit on its memory, an output has one on its length, and time is for the
parent to watch, which ends this process.

Two engines. TRANSFORMERS: blocks are trimmed, `tojson` escapes nothing and keeps the order of keys, reasoning is known
under three names, as `apply_chat_template` of transformers 5.23 does it. BARE: the same template in Jinja as it comes,
as front ends do that bring no filters of their own: its `tojson` sorts keys and escapes what HTML would read.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TRANSFORMERS, BARE = "transformers", "bare"
MEMORY_BYTES = 1 << 30
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
RAISED, TOO_LONG, TOO_MUCH = "raised", "too_long", "too_much_memory"


class TooLong(Exception):
    """A template writes more than is allowed."""


class GenerationBlock(Extension):
    """`{% generation %}`, with which templates mark an answer for training: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def make_environment(engine: str, now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """Return a sandbox with the names that chat templates use."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    if engine == TRANSFORMERS:
        made.filters["tojson"] = to_json
    return made


class Renders:
    """The templates of this process, compiled once."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._compile = lru_cache(maxsize=8)(self._compile_now)

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return {"text": ...}, {"names": ...} for a job that asks for those, or {"kind": ..., "error": ...}."""
        try:
            if job.get("wants") == "names":
                tree = make_environment(TRANSFORMERS, self._now).parse(job["template"])
                return {"names": sorted(meta.find_undeclared_variables(tree))}
            return {"text": self._render(job)}
        except TooLong:
            return {"kind": TOO_LONG, "error": f"more than {job['max_chars']} characters"}
        except MemoryError:
            return {"kind": TOO_MUCH, "error": f"more than {MEMORY_BYTES >> 20} MiB of memory"}
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            return {"kind": RAISED, "error": f"{type(error).__name__}: {error}"[:500]}

    def _render(self, job: dict[str, Any]) -> str:
        self._clock = job["clock"]
        template = self._compile(job["template"], job["engine"])
        messages = job["messages"]
        if job["engine"] == TRANSFORMERS:
            messages = [with_reasoning_names(message) for message in messages]
        pieces = template.generate(
            **{**job["special"], **job["kwargs"]},
            messages=messages,
            tools=job["tools"],
            documents=None,
            add_generation_prompt=job["add_generation_prompt"],
        )
        return "".join(bounded(pieces, job["max_chars"]))

    def _compile_now(self, template: str, engine: str) -> Any:
        return make_environment(engine, self._now).from_string(template)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock, timezone.utc)


def with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has the names that templates read it by."""
    reasoning = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def bounded(pieces: Iterator[str], max_chars: int) -> Iterator[str]:
    """Pass pieces on. Raises TooLong where they are more than `max_chars` together."""
    left = max_chars
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise TooLong
        yield piece


def main() -> None:
    """Answer line by line until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    renders = Renders()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(renders.answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

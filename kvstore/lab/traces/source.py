"""The source of a trace while a format reads it: its lines, what the caller wants, and what is noted on the way."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.load.kvt import KvtRequest
from kvstore.load.lines import broken_line, next_line

Reader = Callable[["Source"], Iterator[KvtRequest]]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of traces.

    claims:   whether a file is in it, by the object in its first line.
    read:     yields the requests; it may set the source's name and block_tokens before the first one.
    block_tokens: of a block, where the format has a usual one.
    window_s: requests that are out of order by no more than this are sorted: what several writers wrote at once.
    may_be_cut: it is written while traffic goes on, so its last line may be cut off.
    """

    name: str
    about: str
    claims: Callable[[Mapping[str, Any]], bool]
    read: Reader
    block_tokens: int
    window_s: float = 0.0
    may_be_cut: bool = False


@dataclass(slots=True)
class Source:
    """Under one reader.

    first:      the first line, which `objects` and `lines` give again.
    skip_bad:   leave broken lines out, and count them.
    tokenizer:  a directory or a name, for formats with text.
    number:     of the line that was read last.
    """

    path: Path
    stream: io.TextIOBase
    first: str
    block_tokens: int
    skip_bad: bool = False
    may_be_cut: bool = False
    tokenizer: str | None = None
    on_progress: Callable[[str], None] | None = None
    name: str = ""
    number: int = 0
    num_skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield each line that is not empty, the first one too."""
        line = self.first
        while line:
            self.number += 1
            if line.strip():
                yield line
            line = self._next()

    def counted(self) -> Iterator[str]:
        """Yield each line below the first one, the empty ones too."""
        self.number = 1
        while line := self._next():
            self.number += 1
            yield line

    def objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each line with the JSON object in it. A line that has none is a bad one.

        Where the format may be cut off, so may be the last line, and the last before a header: there was a crash.
        """
        broken: tuple[int, str] | None = None
        for line in self.lines():
            found = _object(line)
            if broken is not None:
                self._cut_or_bad(*broken, is_cut=found is not None and "format" in found)
                broken = None
            if found is None:
                broken = self.number, line
            else:
                yield line, found
        if broken is not None:
            self._cut_or_bad(*broken, is_cut=not broken[1].endswith("\n"))

    def _cut_or_bad(self, number: int, line: str, *, is_cut: bool) -> None:
        if self.may_be_cut and is_cut:
            self.notes.append(f"line {number} is cut off in the middle, as by a crash, and left out")
        else:
            self.left_out(broken_line(self.path, number, "one JSON object a line", line))

    def bad(self, expected: str, line: str) -> None:
        """Raise ConfigError for the line that was read last, or count it."""
        self.left_out(broken_line(self.path, self.number, expected, line))

    def left_out(self, error: ConfigError) -> None:
        """Raise a broken line's error, or count it."""
        if not self.skip_bad:
            raise error
        self.num_skipped += 1

    def _next(self) -> str:
        try:
            return next_line(self.path, self.stream)
        except ConfigError as error:
            if not (self.skip_bad or self.may_be_cut) or self.number < 1:
                raise
            self.notes.append(f"the file ends after line {self.number}: {error}")
            return ""


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def why(error: Exception) -> str:
    """Return in words what is wrong with the fields of a line."""
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)

"""Reading kvt1 traces: who asked when, and which blocks their prompts share. No text is in them.

kvt1 (JSON lines, mostly .kvt.zst): a header, then one request a line: `t` seconds, `s` session (-1 unknown), `in` and
`out` tokens, `p` the earlier request it shares its longest prefix with (-1 none), `k` how many leading blocks of it,
`h` its further blocks as [first id, count] runs.

Workloads play them at a server (trace.py), the laboratory through a planner (kvstore/lab/replay.py). A broken line is
told with file, line and what was expected.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install

HEADER = 'a kvt1 header ({"format": "kvt1", "block_tokens": ...})'


@dataclass(frozen=True, slots=True)
class KvtRequest:
    """One request of a trace.

    at_s:    when it came, in seconds since the trace began.
    session: -1 if unknown.
    parent:  the earlier request that has its longest prefix, -1 if none.
    blocks:  ids of the prompt's blocks; the last one may be filled in part only.
    """

    at_s: float
    session: int
    parent: int
    num_prompt_tokens: int
    num_answer_tokens: int
    blocks: tuple[int, ...]


def read_kvt(path: Path, lines: io.TextIOBase) -> Iterator[KvtRequest]:
    """Yield the requests below the header. Raises ConfigError for a broken line."""
    prompts: list[tuple[int, ...]] = []
    number = 0
    while (line := next_line(path, lines)).strip():
        fields = _fields(path, line, number)
        shared = prompts[fields["p"]][: fields["k"]] if fields["p"] >= 0 else ()
        fresh = tuple(i for first, count in fields["h"] for i in range(first, first + count))
        prompts.append(shared + fresh)
        yield KvtRequest(fields["t"], fields["s"], fields["p"], fields["in"], fields["out"], prompts[-1])
        number += 1


def open_lines(path: Path) -> io.TextIOWrapper:
    """Open a trace, compressed or not. Raises ConfigError if zstandard is missing."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(cast(IO[bytes], gzip.open(path)), encoding="utf-8", errors="replace", newline="")
    if path.suffix != ".zst":
        return path.open(encoding="utf-8", errors="replace", newline="")
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{path} is compressed with zstd; {how_to_install('codecs')}") from error
    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")


def next_line(path: Path, lines: io.TextIOBase) -> str:
    """Return the next line, "" at the end. Raises ConfigError where the file does not decompress."""
    try:
        return lines.readline()
    except Exception as error:  # zstandard's error is its own class, and the module may not be there
        if not isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)) and type(error).__name__ != "ZstdError":
            raise
        raise ConfigError(f"{path} does not decompress: {error}; is it whole?") from error


def read_header(path: Path, line: str, *, expected: str = HEADER) -> dict[str, Any]:
    """Return the header in a trace's first line. Raises ConfigError, with what was expected, if it is none."""
    try:
        header = json.loads(line)
        if header["format"] == "kvt1" and int(header["block_tokens"]) > 0:
            return dict(header)
    except (ValueError, KeyError, TypeError):
        pass
    raise broken_line(path, 1, expected, line)


def broken_line(path: Path, line: int, expected: str, found: str) -> ConfigError:
    """Return the error for a line that is not what it should be."""
    found = found.strip()
    return ConfigError(
        f"{path}:{line}: expected {expected}, found {found[:80] + '...' if len(found) > 80 else found!r}"
    )


def _fields(path: Path, line: str, number: int) -> dict[str, Any]:
    problem: str | None = "a JSON object"
    try:
        fields = json.loads(line)
        problem = _problem(fields, number)
    except ValueError:
        pass
    if problem is not None:
        raise broken_line(path, number + 2, problem, line)
    return dict(fields)


def _problem(fields: Any, number: int) -> str | None:
    """The fields that a request's line lacks, or None."""
    if not isinstance(fields, dict):
        return "a JSON object"
    for name in ("t", "s", "in", "out", "p", "k"):
        kinds = (int, float) if name == "t" else (int,)
        if not isinstance(fields.get(name), kinds) or isinstance(fields[name], bool):
            return f'a number "{name}"'
    runs = fields.get("h")
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == 2 and all(type(n) is int and n >= 0 for n in run) for run in runs
    ):
        return '"h" as a list of [first id, count]'
    if not -1 <= fields["p"] < number:
        return f'"p" as an earlier request, -1 to {number - 1}'
    if fields["k"] < 0 or fields["in"] < 0 or fields["out"] < 0:
        return 'no negative "k", "in" or "out"'
    return None

"""Traces as workloads: kvt1 files say what prompts share, Azure's CSV files say only when and how long.

kvt1 (JSON lines, mostly .kvt.zst): a header, then one request a line: `t` seconds, `s` session (-1 unknown), `in` and
`out` tokens, `p` the earlier request it shares its longest prefix with (-1 none), `k` how many leading blocks of it,
`h` its further blocks as [first id, count] runs. No text is in it: equal block ids become equal tokens.

Azure (TIMESTAMP,ContextTokens,GeneratedTokens): arrivals and lengths of real traffic; its prompts share nothing here.

Reading stops after the requests that are wanted; a broken line is told with file, line and what was expected.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install
from kvstore.load.requests import COMPLETIONS, VOCAB_SIZE, Blocks, PlannedRequest, Workload

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FORMATS = f'a kvt1 header ({{"format": "kvt1", "block_tokens": ...}}) or the columns {",".join(AZURE_COLUMNS)}'


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace file, cut to what a small machine can play.

    requests:           the first so many.
    max_prompt_tokens:  longer prompts lose their end; what they share with others is at the beginning.
    max_answer_tokens:  longer answers are cut too.
    block_tokens:       tokens played for each block of the trace; 0: as many as the trace says. Fewer shrink every
                        prompt and answer alike, and leave the share of tokens that can hit as it is.
    vocab_size:         token ids stay below it.
    """

    path: Path
    requests: int = 100
    max_prompt_tokens: int = 4096
    max_answer_tokens: int = 64
    block_tokens: int = 0
    vocab_size: int = VOCAB_SIZE

    def make(self, seed: int) -> Workload:
        """The first requests of the trace. Raises ConfigError for a file that is none, with its line."""
        for name, least in (("requests", 1), ("max_prompt_tokens", 1), ("max_answer_tokens", 1), ("vocab_size", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} is too small; it must be at least {least}")
        if self.block_tokens < 0:
            raise ConfigError(f"block_tokens = {self.block_tokens} is negative; 0 takes the trace's own")
        with closing(_open(self.path)) as lines:
            first = _next_line(self.path, lines)
            if first.startswith(",".join(AZURE_COLUMNS)):
                return self._from_azure(lines, seed)
            return self._from_kvt(_read_header(self.path, first), lines, seed)

    def _from_kvt(self, header: dict[str, Any], lines: io.TextIOBase, seed: int) -> Workload:
        own = header["block_tokens"]
        size = self.block_tokens or own
        sessions: list[int] = []
        paths: list[tuple[int, ...]] = []
        requests: list[PlannedRequest] = []
        for number, fields in enumerate(_read_requests(self.path, lines, self.requests)):
            parent = fields["p"]
            shared = paths[parent][: fields["k"]] if parent >= 0 else ()
            fresh = tuple(i for first, count in fields["h"] for i in range(first, first + count))
            paths.append(shared + fresh)
            sessions.append(fields["s"])
            num_tokens = min(max(1, round(fields["in"] * size / own)), self.max_prompt_tokens)
            # Whoever continues a session's request has read its answer; what merely shares a prefix has not.
            continues = parent >= 0 and fields["s"] >= 0 and sessions[parent] == fields["s"]
            requests.append(
                PlannedRequest(
                    number,
                    fields["s"] if fields["s"] >= 0 else -1 - number,
                    Blocks(paths[-1][: -(-num_tokens // size)], num_tokens, number),
                    min(max(1, round(fields["out"] * size / own)), self.max_answer_tokens),
                    after=parent if continues else None,
                    at_s=fields["t"],
                )
            )
        return self._workload(
            requests, seed, size, {"trace": header.get("name", self.path.name), "trace_block_tokens": own}
        )

    def _from_azure(self, lines: io.TextIOBase, seed: int) -> Workload:
        requests: list[PlannedRequest] = []
        began: datetime | None = None
        for number, row in enumerate(csv.reader(lines)):
            if number == self.requests:
                break
            try:
                # Seven digits of a second; Python's own parser took six before 3.11.
                at = datetime.fromisoformat(row[0][:26])
                num_tokens, num_answer = int(row[1]), int(row[2])
            except (IndexError, ValueError) as error:
                raise _broken(self.path, number + 2, f"a row of {','.join(AZURE_COLUMNS)}", ",".join(row)) from error
            began = began or at
            prompt = Blocks((), min(max(1, num_tokens), self.max_prompt_tokens), number)
            answer = min(max(1, num_answer), self.max_answer_tokens)
            requests.append(PlannedRequest(number, number, prompt, answer, at_s=(at - began).total_seconds()))
        return self._workload(requests, seed, 0, {"trace": self.path.name})

    def _workload(self, requests: list[PlannedRequest], seed: int, size: int, source: dict[str, Any]) -> Workload:
        if not requests:
            raise ConfigError(f"{self.path} holds no request after its header")
        parameters = {**source, **asdict(self), "path": str(self.path), "block_tokens": size, "requests": len(requests)}
        return Workload("trace", tuple(requests), COMPLETIONS, seed, parameters, size, self.vocab_size)


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix != ".zst":
        return path.open(encoding="utf-8", errors="replace", newline="")
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{path} is compressed with zstd; {how_to_install('codecs')}") from error
    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")


def _next_line(path: Path, lines: io.TextIOBase) -> str:
    """The next line, "" at the end. Raises ConfigError where the file does not decompress."""
    try:
        return lines.readline()
    except Exception as error:  # zstandard's error is its own class, and the module may not be there
        if type(error).__name__ != "ZstdError":
            raise
        raise ConfigError(f"{path} does not decompress: {error}; is it whole?") from error


def _read_header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if header["format"] == "kvt1" and int(header["block_tokens"]) > 0:
            return dict(header)
    except (ValueError, KeyError, TypeError):
        pass
    raise _broken(path, 1, FORMATS, line)


def _read_requests(path: Path, lines: io.TextIOBase, num_requests: int) -> Iterator[dict[str, Any]]:
    for number in range(num_requests):
        line = _next_line(path, lines)
        if not line.strip():
            return
        problem = None
        try:
            fields = json.loads(line)
            problem = _problem(fields, number)
        except ValueError:
            problem = "a JSON object"
        if problem is not None:
            raise _broken(path, number + 2, problem, line)
        yield fields


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


def _broken(path: Path, line: int, expected: str, found: str) -> ConfigError:
    found = found.strip()
    return ConfigError(
        f"{path}:{line}: expected {expected}, found {found[:80] + '...' if len(found) > 80 else found!r}"
    )

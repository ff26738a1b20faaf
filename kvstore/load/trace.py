"""Traces as workloads: kvt1 files say what prompts share, Azure's CSV files say only when and how long.

kvt1 (kvt.py has the format): equal block ids become equal tokens.

Azure (TIMESTAMP,ContextTokens,GeneratedTokens): arrivals and lengths of real traffic; its prompts share nothing here.

Reading stops after the requests that are wanted; a broken line is told with file, line and what was expected.
"""

from __future__ import annotations

import csv
import io
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.load.kvt import HEADER, read_header, read_kvt
from kvstore.load.lines import broken_line, next_line, open_lines, rest_of
from kvstore.load.requests import COMPLETIONS, VOCAB_SIZE, Blocks, PlannedRequest, Workload

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FORMATS = f"{HEADER} or the columns {','.join(AZURE_COLUMNS)}"


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
        with closing(open_lines(self.path)) as lines:
            first = next_line(self.path, lines)
            if first.startswith(",".join(AZURE_COLUMNS)):
                return self._from_azure(lines, seed)
            return self._from_kvt(read_header(self.path, first, expected=FORMATS), lines, seed)

    def _from_kvt(self, header: dict[str, Any], lines: io.TextIOBase, seed: int) -> Workload:
        own = header["block_tokens"]
        size = self.block_tokens or own
        sessions: list[int] = []
        requests: list[PlannedRequest] = []
        for number, read in enumerate(islice(read_kvt(self.path, rest_of(self.path, lines)), self.requests)):
            sessions.append(read.session)
            num_tokens = min(max(1, round(read.num_prompt_tokens * size / own)), self.max_prompt_tokens)
            # Whoever continues a session's request has read its answer; what merely shares a prefix has not.
            continues = read.parent >= 0 and read.session >= 0 and sessions[read.parent] == read.session
            requests.append(
                PlannedRequest(
                    number,
                    read.session if read.session >= 0 else -1 - number,
                    Blocks(read.blocks[: -(-num_tokens // size)], num_tokens, number),
                    min(max(1, round(read.num_answer_tokens * size / own)), self.max_answer_tokens),
                    after=read.parent if continues else None,
                    at_s=read.at_s,
                )
            )
        continued = {request.after for request in requests}
        requests = [replace(request, last=request.number not in continued) for request in requests]
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
                expected = f"a row of {','.join(AZURE_COLUMNS)}"
                raise broken_line(self.path, number + 2, expected, ",".join(row)) from error
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

"""kvt1 traces: who asked when, and which blocks their prompts share. No text is in them.

kvt1 (JSON lines, mostly .kvt.zst): a header, then one request a line: `t` seconds, `s` session (-1 unknown), `in` and
`out` tokens, `p` the earlier request it shares its longest prefix with (-1 none), `k` how many leading blocks of it,
`h` its further blocks as [first id, count] runs. Where it is known: `y` type of the request, `x` finish reason of the
reply, `n` turn, `u` tenant.

Workloads play them at a server (trace.py), the laboratory through a planner (kvstore/lab/replay.py). A broken line is
told with file, line and what was expected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.load.lines import broken_line

HEADER = 'a kvt1 header ({"format": "kvt1", "block_tokens": ...})'
MAX_PROMPT_TOKENS = 1 << 24  # 16 times the longest context there is; a run of more blocks is a mistake
MAX_ID = 1 << 63
MAX_TIME_S = 1e12  # 30,000 years


@dataclass(frozen=True, slots=True)
class KvtRequest:
    """One request of a trace.

    at_s:    when it came, in seconds since the trace began.
    session: -1 if unknown.
    parent:  the earlier request that has its longest prefix, -1 if none.
    blocks:  ids of the prompt's blocks; the last one may be filled in part only.
    kind:    type of the request; "" if unknown.
    finish_reason: of the reply, which is known only after it; "" if unknown.
    turn:    of the session, from 1; 0 if unknown.
    tenant:  "" if unknown.
    hit_tokens: what the recorded store served; -1 if the trace does not say.
    """

    at_s: float
    session: int
    parent: int
    num_prompt_tokens: int
    num_answer_tokens: int
    blocks: tuple[int, ...]
    kind: str = ""
    finish_reason: str = ""
    turn: int = 0
    tenant: str = ""
    hit_tokens: int = -1


def read_kvt(
    path: Path, lines: Iterable[str], on_bad: Callable[[ConfigError], None] | None = None
) -> Iterator[KvtRequest]:
    """Yield the requests below the header.

    on_bad: called with a broken line's error, which is left out then, together with those that continue it.

    Raises ConfigError for a broken line.
    """
    prompts: list[tuple[int, ...] | None] = []  # None: of a line that was left out
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            request = _request(path, line, number, prompts)
        except ConfigError as error:
            if on_bad is None:
                raise
            on_bad(error)
            prompts.append(None)
            continue
        prompts.append(request.blocks)
        yield request


def read_header(path: Path, line: str, *, expected: str = HEADER) -> dict[str, Any]:
    """Return the header in a trace's first line. Raises ConfigError, with what was expected, if it is none."""
    try:
        header = json.loads(line)
        if header["format"] == "kvt1" and int(header["block_tokens"]) > 0:
            return dict(header, block_tokens=int(header["block_tokens"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    raise broken_line(path, 1, expected, line)


def _request(path: Path, line: str, number: int, prompts: list[tuple[int, ...] | None]) -> KvtRequest:
    problem: str | None = "a JSON object"
    try:
        fields = json.loads(line)
        problem = _problem(fields, prompts)
    except (ValueError, RecursionError):
        pass
    if problem is not None:
        raise broken_line(path, number, problem, line)
    head = prompts[fields["p"]] if fields["p"] >= 0 else ()
    assert head is not None
    blocks = head[: fields["k"]] + tuple(i for first, count in fields["h"] for i in range(first, first + count))
    return KvtRequest(
        fields["t"],
        fields["s"],
        fields["p"],
        fields["in"],
        fields["out"],
        blocks,
        kind=fields.get("y", ""),
        finish_reason=fields.get("x", ""),
        turn=fields.get("n", 0),
        tenant=fields.get("u", ""),
    )


def _problem(fields: Any, prompts: list[tuple[int, ...] | None]) -> str | None:
    """The fields that a request's line lacks, or None."""
    if not isinstance(fields, dict):
        return "a JSON object"
    for name in ("t", "s", "in", "out", "p", "k"):
        kinds = (int, float) if name == "t" else (int,)
        if not isinstance(fields.get(name), kinds) or isinstance(fields[name], bool):
            return f'a number "{name}"'
    if not (math.isfinite(fields["t"]) and abs(fields["t"]) < MAX_TIME_S):
        return 'seconds as "t"'
    for name in ("y", "x", "u"):
        if not isinstance(fields.get(name, ""), str):
            return f'text as "{name}"'
    if type(fields.get("n", 0)) is not int or fields.get("n", 0) < 0:
        return 'a number of the turn as "n"'
    if not -1 <= fields["p"] < len(prompts):
        return f'"p" as an earlier request, -1 to {len(prompts) - 1}'
    if fields["k"] < 0 or not 0 <= fields["in"] <= MAX_PROMPT_TOKENS or fields["out"] < 0:
        return f'no negative "k", "in" or "out", and at most {MAX_PROMPT_TOKENS} tokens'
    head = prompts[fields["p"]] if fields["p"] >= 0 else ()
    if head is None:
        return f'"p" as a request that was read; {fields["p"]} is broken'
    return _problem_of_runs(fields.get("h"), fields["in"])


def _problem_of_runs(runs: Any, num_tokens: int) -> str | None:
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == 2 and all(type(n) is int and 0 <= n < MAX_ID for n in run) for run in runs
    ):
        return '"h" as a list of [first id, count]'
    if sum(count for _, count in runs) > num_tokens:
        return f'no more blocks in "h" than the {num_tokens} tokens of the prompt'
    return None

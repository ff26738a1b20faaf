"""Reading a trace of any format into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.lab.traces.registry import detect, find_format
from kvstore.lab.traces.source import Source
from kvstore.lab.traces.trace import ReplayTrace
from kvstore.load.kvt import KvtRequest
from kvstore.load.lines import next_line, open_lines

TOLD_EVERY = 1000  # requests


def read_trace(
    path: Path,
    *,
    format_name: str | None = None,
    block_tokens: int | None = None,
    max_requests: int | None = None,
    skip_bad: bool = False,
    tokenizer: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> ReplayTrace:
    """Read a trace, or its first requests.

    format_name:  one of the registry's; None finds out from the first line.
    block_tokens: of a block, where the format has no header that says so; None for the format's own.
    skip_bad:     leave broken lines out, and count them; of kvt1 also those that continue them.
    tokenizer:    a directory or a name, for formats that have text.
    on_progress:  told now and then how many requests were read.

    Raises ConfigError for a file that is no trace, or a line that is broken; OSError for no file.
    """
    chosen = None if format_name is None else find_format(format_name)
    with closing(open_lines(path)) as stream:
        first = next_line(path, stream)
        if not first.strip() and not next_line(path, stream):
            raise ConfigError(f"{path} is empty: it has no request in it")
        chosen = chosen or detect(path, first)
        source = Source(
            path,
            stream,
            first,
            block_tokens or chosen.block_tokens,
            skip_bad=skip_bad,
            may_be_cut=chosen.may_be_cut,
            tokenizer=tokenizer,
            name=path.name.split(".")[0],
        )
        requests = list(_in_order(source, chosen.read(source), chosen.window_s, max_requests, on_progress))
    if not requests:
        raise ConfigError(f"{path} has no request in it")
    requests.sort(key=lambda request: request.at_s)
    return ReplayTrace(source.name, source.block_tokens, tuple(requests), source.num_skipped, tuple(source.notes))


def _in_order(
    source: Source,
    found: Iterator[KvtRequest],
    window_s: float,
    max_requests: int | None,
    on_progress: Callable[[str], None] | None,
) -> Iterator[KvtRequest]:
    """The requests, each checked to come no more than the window before the latest one."""
    latest = -float("inf")
    for number, request in enumerate(found, 1):
        if max_requests is not None and number > max_requests:
            return
        if request.at_s < latest - window_s:
            source.left_out(
                ConfigError(
                    f"{source.path}:{source.number}: request {number} came at {request.at_s:g} s, before the one above "
                    f"it at {latest:g} s; sort the trace by time"
                )
            )
            continue
        latest = max(latest, request.at_s)
        if on_progress is not None and number % TOLD_EVERY == 0:
            on_progress(f"reading {source.path}: {number} requests")
        yield request

"""kvt1 as a trace of the laboratory, and as what any trace can be written to (kvstore/load/kvt.py has the format).

A trace that is written so is small and has neither text nor hashes in it: only which blocks prompts share, as numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install
from kvstore.lab.traces.source import Format, Source
from kvstore.lab.traces.trace import ReplayTrace
from kvstore.load.kvt import KvtRequest, read_header, read_kvt


def write_kvt(trace: ReplayTrace, path: Path) -> None:
    """Write a trace as kvt1, compressed if the name ends in .gz or .zst."""
    header = {"format": "kvt1", "name": trace.name, "block_tokens": trace.block_tokens, "requests": len(trace.requests)}
    with _writing(path) as out:
        for line in (header, *_records(trace)):
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


def _records(trace: ReplayTrace) -> Iterator[dict[str, Any]]:
    used: dict[int, int] = {}  # the request that had a block last
    for number, request in enumerate(trace.requests):
        parent, shared = _shared(trace.requests, request.blocks, used)
        for block in request.blocks:
            used[block] = number
        record: dict[str, Any] = {
            "t": round(request.at_s, 6),
            "s": request.session,
            "in": request.num_prompt_tokens,
            "out": request.num_answer_tokens,
            "p": parent,
            "k": shared,
            "h": _runs(request.blocks[shared:]),
        }
        known = {"y": request.kind, "x": request.finish_reason, "n": request.turn, "u": request.tenant}
        yield record | {name: value for name, value in known.items() if value}


def _shared(requests: tuple[KvtRequest, ...], blocks: tuple[int, ...], used: dict[int, int]) -> tuple[int, int]:
    shared = 0
    while shared < len(blocks) and blocks[shared] in used:
        shared += 1
    parent = used[blocks[shared - 1]] if shared else -1
    # An id names all before it, so this holds; a trace made by hand may have it otherwise.
    if shared and requests[parent].blocks[:shared] != blocks[:shared]:
        return -1, 0
    return parent, shared


def _runs(blocks: tuple[int, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs


def _writing(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        import gzip

        return io.TextIOWrapper(cast(IO[bytes], gzip.open(path, "wb")), encoding="utf-8")
    if path.suffix != ".zst":
        return path.open("w", encoding="utf-8")
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{path} is to be compressed with zstd; {how_to_install('codecs')}") from error
    stream = zstandard.ZstdCompressor(level=10).stream_writer(path.open("wb"), closefd=True)
    return io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8")


def _read(source: Source) -> Iterator[KvtRequest]:
    header = read_header(source.path, source.first)
    source.name = str(header.get("name") or source.name)
    source.block_tokens = header["block_tokens"]
    on_bad = source.left_out if source.skip_bad else None
    yield from read_kvt(source.path, source.counted(), on_bad)


KVT1 = Format("kvt1", "a kvt1 header", lambda fields: fields.get("format") == "kvt1", _read, 0)

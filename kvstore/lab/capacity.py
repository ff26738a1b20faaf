"""Capacities as people write them, turned into blocks of a trace.

5%        of the trace's different blocks          64GiB     of memory, by the bytes of a model's token
20000     blocks                                   3Mtokens  also K and G

A,B,C     a list                                   A..B      doubling from A, up to B
A..B+S    from A by steps of S, up to B
"""

from __future__ import annotations

import re

from kvstore.errors import ConfigError
from kvstore.lab.traces import ReplayTrace
from kvstore.units import parse_bytes

MOST = 1000  # sizes in a range; a sweep of more is a mistake


def parse_capacities(
    text: str, trace: ReplayTrace, bytes_per_token: float | None, *, may_be_none: bool = False
) -> list[int]:
    """Read a list of capacities and ranges; return their blocks in rising order, each once.

    may_be_none: "0" stands for no such tier.

    Raises ConfigError, with what would be right.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"capacity {text!r} names nothing; write a list such as 1%,5% or a range such as 1%..25%")
    found: set[int] = set()
    for word in words:
        if may_be_none and word == "0":
            found.add(0)
        elif ".." in word:
            found.update(_range(word, trace, bytes_per_token))
        else:
            found.add(parse_capacity(word, trace, bytes_per_token))
    return sorted(found)


def parse_capacity(text: str, trace: ReplayTrace, bytes_per_token: float | None) -> int:
    """Read one capacity as blocks of a trace. Raises ConfigError, with what would be right."""
    written = text.strip()
    if tokens := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?) ?tokens", written, re.ASCII):
        num_tokens = float(tokens[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[tokens[2]]
        if num_tokens >= trace.block_tokens:
            return int(num_tokens / trace.block_tokens)
        raise ConfigError(f"capacity {text!r} is less than one block of {trace.block_tokens} tokens")
    try:
        share = float(written[:-1]) / 100 if written.endswith("%") else None
        num_bytes = 0 if share is not None or written.isdecimal() else parse_bytes(written)
    except ValueError:
        raise ConfigError(
            f"capacity is {text!r}; write a share of the trace's blocks (5%), blocks (20000), tokens (3Mtokens) or a "
            "size (64GiB)"
        ) from None
    if share is not None:
        return trace.blocks_of(share)
    if num_bytes and bytes_per_token is None:
        raise ConfigError(f"capacity {text!r} is a size; say with --bytes-per-token how large a token's KV is")
    num_blocks = int(num_bytes / ((bytes_per_token or 1) * trace.block_tokens)) if num_bytes else int(written or 0)
    if num_blocks < 1:
        raise ConfigError(f"capacity {text!r} is less than one block of {trace.block_tokens} tokens")
    return num_blocks


def _range(word: str, trace: ReplayTrace, bytes_per_token: float | None) -> list[int]:
    low, _, rest = word.partition("..")
    high, plus, step = rest.partition("+")
    parts = [part.strip() for part in (low, high, *([step] if plus else []))]
    sizes = [parse_capacity(part, trace, bytes_per_token) for part in parts]
    if sizes[0] > sizes[1]:
        raise ConfigError(f"capacity {word!r} goes down; write the smaller end first")
    # Shares go by their own numbers, not by the blocks that they were rounded to: 10%..30%+10% has 20% in it.
    are_shares = all(part.endswith("%") for part in parts)
    ends: list[float] = [float(part[:-1]) for part in parts] if are_shares else list(sizes)
    found, size = [ends[0]], ends[0]
    while (size := size + ends[2] if plus else 2 * size) < ends[1] * (1 - 1e-9):
        found.append(size)
        if len(found) > MOST:
            raise ConfigError(f"capacity {word!r} has more than {MOST} sizes; write a longer step, or double (A..B)")
    return [*(trace.blocks_of(size / 100) if are_shares else int(size) for size in found), sizes[1]]

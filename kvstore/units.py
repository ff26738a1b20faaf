"""Sizes and times as people write them, turned into bytes and seconds and back.

Inside the code a size is an int of bytes and a time is a float of seconds; this file is where "1GiB" and "24h" become
that (configuration, command line) and where numbers become readable again (printing).
"""

from __future__ import annotations

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_BYTES = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(value: object) -> int:
    """Read a size: an int of bytes, or a string such as "512MiB", "1.5 GiB" or "4GB".

    Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal ones (KB, MB, GB, TB) powers of 1000; case is ignored.
    Raises ValueError that says what would be right.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        if re.fullmatch(r"\s*-?[0-9]+\s*", value):
            return int(value)
        number, factor = _split(value, _BYTES)
        if factor is not None and (number * factor).is_integer():
            return int(number * factor)
    raise ValueError('a size is a whole number of bytes or a string such as "512MiB", "1GiB" or "4GB"')


def parse_seconds(value: object) -> float:
    """Read a time: a number of seconds, or a string such as "250ms", "30s", "5min", "24h" or "7d".

    Raises ValueError that says what would be right.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            number, factor = _split(value, _SECONDS)
            if factor is not None:
                return number * factor
    raise ValueError('a time is a number of seconds or a string such as "250ms", "30s", "5min", "24h" or "7d"')


def format_bytes(num_bytes: float) -> str:
    """Write a size with the largest binary unit that keeps it at or above 1: "1 GiB", "1.5 MiB", "512 B"."""
    for name, factor in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(num_bytes) >= factor:
            return f"{_short(num_bytes / factor)} {name}"
    return f"{_short(num_bytes)} B"


def format_seconds(seconds: float) -> str:
    """Write a time with the unit a reader would choose: "50 ms", "2 s", "1.5 min", "24 h", "7 d"."""
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 0.001:
        return f"{_short(seconds * 1e6, 3)} µs"
    if abs(seconds) < 1:
        return f"{_short(seconds * 1e3, 3)} ms"
    for name, factor, least in (("d", 86400.0, 2.0), ("h", 3600.0, 1.0), ("min", 60.0, 1.0)):
        if abs(seconds) >= factor * least:
            return f"{_short(seconds / factor, 3)} {name}"
    return f"{_short(seconds, 3)} s"


def _split(text: str, units: dict[str, int] | dict[str, float]) -> tuple[float, float | None]:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        return 0.0, None
    return float(match[1]), units.get(match[2].lower())


def _short(number: float, digits: int = 4) -> str:
    # A whole number keeps all of its digits.
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.{digits}g}"

"""The lines of a trace file, compressed or not, and the error that names one.

The first bytes or the name say whether a file is gzip or zstd. A file that ends in the middle of its compressed data
is told: zstandard's own reader takes it for the end.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
READ_BYTES = 1 << 17
MAX_LINE = 1 << 28  # characters; a prompt of a million tokens has some 5 million


def open_lines(path: Path) -> io.TextIOWrapper:
    """Open a trace, compressed or not. Raises ConfigError if zstandard is missing."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head.startswith(GZIP) or path.suffix == ".gz":
        stream = cast(IO[bytes], gzip.open(path))  # noqa: SIM115 the caller closes it
    elif head == ZSTD or path.suffix == ".zst":
        stream = cast(IO[bytes], io.BufferedReader(_Zstd(path), READ_BYTES))
    else:
        stream = path.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n")


def next_line(path: Path, lines: io.TextIOBase) -> str:
    """Return the next line, "" at the end. Raises ConfigError where the file does not decompress."""
    try:
        line = lines.readline(MAX_LINE)
    except Exception as error:  # zstandard's error is its own class, and the module may not be there
        if not isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)) and type(error).__name__ != "ZstdError":
            raise
        raise ConfigError(f"{path} does not decompress: {error}; is it whole?") from error
    if len(line) == MAX_LINE:
        raise ConfigError(f"{path} has a line of {MAX_LINE} characters and more; is it a trace?")
    return line


def rest_of(path: Path, lines: io.TextIOBase) -> Iterator[str]:
    """Yield the lines that are left, as `next_line` does."""
    while line := next_line(path, lines):
        yield line


def broken_line(path: Path, line: int, expected: str, found: str) -> ConfigError:
    """Return the error for a line that is not what it should be."""
    found = found.strip()
    return ConfigError(
        f"{path}:{line}: expected {expected}, found {found[:80] + '...' if len(found) > 80 else found!r}"
    )


class _Zstd(io.RawIOBase):
    """The bytes of a file of zstd frames. Raises EOFError where the last frame is cut off."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f"{path} is compressed with zstd; {how_to_install('codecs')}") from error
        self._file = path.open("rb")
        self._zstd = zstandard.ZstdDecompressor()
        self._frame = self._zstd.decompressobj()
        self._is_within = False
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._packed:
                self._packed = self._file.read(READ_BYTES)
            if not self._packed:
                if self._is_within:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame.eof:
                self._frame = self._zstd.decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            self._is_within = not self._frame.eof
        view = memoryview(buffer)
        count = min(len(view), len(self._plain))
        view[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

"""Other ways to keep pages, to be measured beside ours (`kvstore bench --peer`). They check nothing and index nothing.

    PlainFiles   a file for each page, written under another name and renamed; through the page cache
    RedisPy      GET and SET of redis-py as it comes, with the parser it finds (hiredis where that is installed)

Each takes pages by number, in the order of `views`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class PlainFiles:
    """Pages in files. Any thread, for different pages."""

    def __init__(self, folder: Path, views: Sequence[memoryview]) -> None:
        """folder: is there, and empty."""
        self._folder, self._views = folder, views

    def write(self, pages: Sequence[int]) -> None:
        """Write each page to a file of its own; not synced."""
        for page in pages:
            path = self._path(page)
            with open(f"{path}.new", "wb", buffering=0) as file:
                file.write(self._views[page])
            os.replace(f"{path}.new", path)

    def read(self, pages: Sequence[int]) -> None:
        """Read each file into its page's view."""
        for page in pages:
            with open(self._path(page), "rb", buffering=0) as file:
                if file.readinto(self._views[page]) != len(self._views[page]):
                    raise RuntimeError(f"peer: the file of page {page} is short")

    def cool(self, pages: Sequence[int]) -> None:
        """Write what the page cache holds of the files to the disk, and have it forgotten."""
        for page in pages:
            with open(self._path(page), "rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _path(self, page: int) -> Path:
        return self._folder / f"{page:08}"


class RedisPy:
    """Pages in a server, by the plain client. Any thread."""

    def __init__(self, url: str, keys: Sequence[bytes], views: Sequence[memoryview]) -> None:
        """keys: of the pages."""
        import redis

        self._client: Any = redis.Redis.from_url(url)
        self._keys, self._views = keys, views

    def write(self, pages: Sequence[int]) -> None:
        """SET each page."""
        for page in pages:
            self._client.set(self._keys[page], self._views[page])

    def read(self, pages: Sequence[int]) -> None:
        """GET each page, and copy it to where it belongs."""
        for page in pages:
            value = self._client.get(self._keys[page])
            if value is None or len(value) != len(self._views[page]):
                raise RuntimeError(f"peer: the server lost page {page}")
            np.copyto(np.frombuffer(self._views[page], np.uint8), np.frombuffer(value, np.uint8))

    def close(self) -> None:
        """Delete the pages and close the connections."""
        self._client.delete(*self._keys)
        self._client.close()

"""The interface of codecs: a page's raw bytes become stored bytes, and pages again.

Slow media use them. The page header names the codec by id, so a page of any codec can be read whatever is configured.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes8 = npt.NDArray[np.uint8]


class Codec(Protocol):
    """A reversible encoding of pages."""

    name: str
    id: int

    def max_bytes(self, raw_bytes: int) -> int:
        """The most bytes `encode` can make of a page of `raw_bytes`."""

    def encode(self, page: memoryview, out: memoryview) -> int:
        """Write the encoding of `page` to the head of `out` (at least `max_bytes` long); return its length."""

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Fill all of `out` with the page that `blob` encodes. Raises CorruptPage if it is not one of that length."""


def array_of(view: memoryview) -> Bytes8:
    """The bytes of a view as an array, uncopied."""
    return np.frombuffer(view, np.uint8)

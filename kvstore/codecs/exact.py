"""The codec `exact`, id 0: the bytes as they are. Any thread."""

from __future__ import annotations

import numpy as np

from kvstore.codecs.base import array_of
from kvstore.errors import CorruptPage


class ExactCodec:
    """Stores the bytes as they are."""

    name = "exact"
    id = 0

    def max_bytes(self, raw_bytes: int) -> int:
        """As many as the page has."""
        return raw_bytes

    def encode(self, page: memoryview, out: memoryview) -> int:
        """Copy."""
        np.copyto(array_of(out)[: page.nbytes], array_of(page))
        return page.nbytes

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Copy back."""
        if blob.nbytes != out.nbytes:
            raise CorruptPage(f"exact page has {blob.nbytes} bytes, not {out.nbytes}")
        np.copyto(array_of(out), array_of(blob))

"""Codes of keys and values, compiled where the extension is there, in Python (twin.py) where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvstore.codecs import twin
from kvstore.errors import CorruptPage
from kvstore.layout import TensorAxes

if TYPE_CHECKING:
    import numpy.typing as npt

try:
    from kvstore.codecs import _quant
except ImportError:  # installed without a compiler
    _quant = None  # type: ignore[assignment]

FORMAT = 1  # of the encoding, in its digest


class Quantizer:
    """The encoding of one kind of page at a number of bits. Any thread.

    axes:  where the tensors of a page lie; they cover it.
    bits:  8 (a largest magnitude a group), 6 or 4 (a least and a largest value).
    key_group, value_group: tokens of a channel, and channels of a token, that share a scale.

    Raises ValueError for axes that do not tell every byte of a page once.
    """

    def __init__(
        self,
        axes: Sequence[TensorAxes],
        page_bytes: int,
        bits: int,
        key_group: int,
        value_group: int,
        *,
        compiled: bool = True,
    ) -> None:
        table = tensor_table(axes)
        text = repr((FORMAT, table.tolist(), page_bytes, bits, key_group, value_group))
        self.page_bytes = page_bytes
        self._code: Any = _quant if compiled and _quant is not None else twin
        self._plan = self._code.make_plan(
            table, page_bytes, bits, key_group, value_group, xxhash.xxh32_intdigest(text.encode())
        )

    def coded_bytes(self, skip: int) -> int:
        """Bytes of a page's encoding, with that many leading tokens (0 or 1) left as they are."""
        num_bytes: int = self._code.coded_bytes(self._plan, skip)
        return num_bytes

    def encode(self, page: memoryview, out: memoryview, skip: int) -> float:
        """Encode a page; return the largest relative error (L2) of a tensor, infinite for what has no numbers."""
        squared: float = self._code.encode(self._plan, page, out, skip, 0)
        return math.sqrt(squared)

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Fill a page. Raises CorruptPage for an encoding that is none of this kind of page."""
        try:
            self._code.decode(self._plan, blob, out, 0)
        except ValueError as error:
            raise CorruptPage(f"coded page: {error}") from error


def is_compiled() -> bool:
    """True if the extension is there."""
    return _quant is not None


def tensor_table(axes: Sequence[TensorAxes]) -> npt.NDArray[np.int64]:
    """The axes as the extension takes them, shape (n, 7)."""
    return np.array(
        [(a.is_key, a.offset, a.heads, a.head_stride, a.tokens, a.token_stride, a.dims) for a in axes], np.int64
    ).reshape(-1, 7)

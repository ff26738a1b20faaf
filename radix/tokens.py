"""Whatever a caller has as tokens, as one flat uint32 array.

Arrays and buffers are taken as they are, without a step per token in Python (often without a copy); only lists and
other sequences of ints are walked, in C. Anything that is not a flat row of ids in [0, 2**32) is refused with the
place and the value.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint32]

_LIMIT = 1 << 32  # ids are hashed as uint32
_RIGHT = "tokens must be a flat array, buffer or list of ints in [0, 2**32)"


def as_tokens(tokens: Any) -> TokenArray:
    """Return `tokens` as a contiguous uint32 array, shape (T,).

    Takes any 1-D integer numpy array, a CPU tensor (anything with `__array__`), array.array, a memoryview or other
    typed buffer, and lists, tuples or other sequences of ints. The answer may share memory with an array or buffer:
    copy it before changing either. Bytes are refused, because the width of a token in them is not known: cast a
    memoryview first.

    Raises TypeError for the wrong kind (floats, bools, text, bytes, objects) and ValueError for the wrong shape or
    range.
    """
    if isinstance(tokens, np.ndarray):
        return _from_array(tokens)
    if isinstance(tokens, (bytes, bytearray)) or (isinstance(tokens, (array, memoryview)) and tokens.itemsize == 1):
        raise TypeError(
            f"tokens is {_kind(tokens)} of single bytes, which may be halves of ids; for raw uint32 ids pass "
            "memoryview(tokens).cast('B').cast('I')"
        )
    if tokens is None or isinstance(tokens, (str, Mapping, Number, np.generic)):
        raise TypeError(f"tokens is {_kind(tokens)}; {_RIGHT}")
    if isinstance(tokens, Sequence) and not isinstance(tokens, (array, memoryview)):
        return _from_sequence(tokens)
    try:
        values = np.asarray(tokens)
    except Exception as error:  # whatever its __array__ raises: a CUDA tensor, a dtype numpy has no name for
        raise TypeError(f"tokens is {_kind(tokens)} and cannot be read as an array ({error}); {_RIGHT}") from error
    return _from_array(values)


def _from_array(values: npt.NDArray[Any]) -> TokenArray:
    if values.dtype.kind not in "iu":
        what = {"b": "bools", "f": "floats", "O": "Python objects"}.get(values.dtype.kind, f"{values.dtype} values")
        raise TypeError(f"tokens holds {what} (dtype {values.dtype}); {_RIGHT}")
    if values.ndim != 1:
        hint = "; pass one row" if values.ndim == 2 else ""
        raise ValueError(f"tokens has shape {values.shape}; {_RIGHT}{hint}")
    if values.dtype.kind == "i" or values.dtype.itemsize > 4:
        _check_range(values)
    if values.dtype == np.int32 and values.dtype.isnative:
        values = values.view(np.uint32)  # same bytes once the range is known: no copy
    return np.ascontiguousarray(values, dtype=np.uint32)


def _check_range(values: npt.NDArray[Any]) -> None:
    # Two passes without a temporary; only a failure pays for masks.
    if values.size and (values.min() < 0 or values.max() >= _LIMIT):
        at = int(np.argmax((values < 0) | (values >= _LIMIT)))
        raise ValueError(f"tokens[{at}] is {values[at]}; {_RIGHT}")


def _from_sequence(tokens: Sequence[Any]) -> TokenArray:
    try:
        # array() checks range and type while it converts: 128K ids in 0.8 ms, where np.array takes 2.8 and checks
        # neither.
        values = np.asarray(array("I", tokens), dtype=np.uint32)
    except (TypeError, OverflowError):
        raise _first_wrong(tokens) from None
    # Only bools slip through, as 0 and 1; looking at every type would cost three times the conversion.
    for at in np.flatnonzero(values <= 1).tolist():
        if isinstance(tokens[at], (bool, np.bool_)):
            raise _first_wrong(tokens)
    return values


def _first_wrong(tokens: Sequence[Any]) -> TypeError | ValueError:
    for at, token in enumerate(tokens):
        if isinstance(token, (list, tuple, np.ndarray)):
            return ValueError(f"tokens[{at}] is {_kind(token)}; {_RIGHT}; pass one row")
        if isinstance(token, (bool, np.bool_)) or not hasattr(token, "__index__"):
            return TypeError(f"tokens[{at}] is {token!r:.40} ({_kind(token)}); {_RIGHT}")
        if not 0 <= int(token) < _LIMIT:
            return ValueError(f"tokens[{at}] is {token}; {_RIGHT}")
    return TypeError(f"tokens is {_kind(tokens)} that cannot be read as ids; {_RIGHT}")


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"

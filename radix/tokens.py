"""Whatever a caller has as tokens, as one flat uint32 array.

Arrays and buffers are taken as they are, without a step per token in Python (often without a copy); only lists and other
sequences of ints are walked, in C. Anything that is not a flat row of ids in [0, 2**32) is refused with the place and the value.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint32]

_LIMIT = 1 << 32  # ids are hashed as uint32
_RIGHT = "tokens must be a flat array, buffer or list of ints in [0, 2**32)"


def as_tokens(tokens: Any) -> TokenArray:
    """Return `tokens` as a contiguous uint32 array, shape (T,).

    Takes any 1-D integer numpy array, a CPU tensor (anything with `__array__`), array.array, a memoryview or other typed buffer,
    and lists, tuples or other sequences of ints. The answer may share memory with an array or buffer: copy it before changing
    either. Bytes are refused, because the width of a token in them is not known: cast a memoryview first.

    Raises TypeError for the wrong kind (floats, bools, text, bytes, objects) and ValueError for the wrong shape or range.
    """
    if isinstance(tokens, np.ndarray):
        return _from_array(tokens)
    if isinstance(tokens, (str, bytes, bytearray)):
        raise TypeError(f"tokens is {_kind(tokens)}; {_RIGHT}; for raw ids use memoryview(tokens).cast('I')")
    if isinstance(tokens, (array, memoryview)):
        if tokens.itemsize == 1:
            raise TypeError(
                f"tokens is {_kind(tokens)} of single bytes; a token needs a wider type; for raw ids use "
                "memoryview(tokens).cast('B').cast('I')"
            )
        return _from_array(np.asarray(tokens))
    if isinstance(tokens, Sequence) and not hasattr(tokens, "__array__"):
        return _from_sequence(tokens)
    if isinstance(tokens, Mapping) or np.isscalar(tokens) or tokens is None:
        raise TypeError(f"tokens is {_kind(tokens)}; {_RIGHT}")
    try:
        return _from_array(np.asarray(tokens))
    except (RuntimeError, BufferError, TypeError) as error:  # a CUDA tensor, a dtype numpy has no name for, ...
        if str(error).startswith("tokens "):
            raise
        raise TypeError(f"tokens is {_kind(tokens)} and cannot be read as an array ({error}); {_RIGHT}") from error


def _from_array(values: npt.NDArray[Any]) -> TokenArray:
    if values.dtype.kind not in "iu":
        what = {"b": "bools", "f": "floats", "O": "Python objects"}.get(values.dtype.kind, f"{values.dtype} values")
        raise TypeError(f"tokens holds {what} (dtype {values.dtype}); {_RIGHT}")
    if values.ndim != 1:
        hint = "; pass one row" if values.ndim == 2 else ""
        raise ValueError(f"tokens has shape {values.shape}; {_RIGHT}{hint}")
    _check_range(values)
    if values.dtype == np.int32 and values.dtype.isnative:
        values = values.view(np.uint32)  # same bytes once the range is known: no copy
    return np.ascontiguousarray(values, dtype=np.uint32)


def _check_range(values: npt.NDArray[Any]) -> None:
    if not values.size:
        return
    if values.dtype.kind == "i" and values.min() < 0:
        at = int(np.argmax(values < 0))
    elif values.dtype.itemsize > 4 and values.max() >= _LIMIT:
        at = int(np.argmax(values >= _LIMIT))
    else:
        return
    raise ValueError(f"tokens[{at}] is {values[at]}; {_RIGHT}")


def _from_sequence(tokens: Sequence[Any]) -> TokenArray:
    # bool is an int to array(), and a list of lists fails there without saying where: look at the types first.
    for kind in set(map(type, tokens)):
        if issubclass(kind, (bool, np.bool_)) or not issubclass(kind, (int, np.integer)):
            at = next(i for i, token in enumerate(tokens) if type(token) is kind)
            raise TypeError(f"tokens[{at}] is {tokens[at]!r:.40}, {_kind(tokens[at])}; {_RIGHT}")
    try:
        # array() checks the range while it converts: 128K ids in about 2 ms where np.array takes 5.
        return np.frombuffer(array("I", tokens), dtype=np.uint32)
    except OverflowError:
        at = next(i for i, token in enumerate(tokens) if not 0 <= token < _LIMIT)
        raise ValueError(f"tokens[{at}] is {tokens[at]}; {_RIGHT}") from None


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}" if value is not None else "None"

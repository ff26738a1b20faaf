from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from radix.tokens import as_tokens

ids = st.integers(0, 2**32 - 1)


class ArrayLike:
    """What a CPU tensor is to us: something with `__array__`."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if isinstance(self.values, Exception):
            raise self.values
        return np.asarray(self.values, dtype=dtype)


@given(st.lists(ids))
def test_every_container_of_the_same_ids_gives_the_same_array(tokens: list[int]) -> None:
    expected = np.array(tokens, dtype=np.uint32)

    for container in (
        tokens,
        tuple(tokens),
        array("I", tokens),
        array("q", tokens),
        memoryview(array("I", tokens)),
        np.array(tokens, dtype=np.int64),
        np.array(tokens, dtype=np.uint64),
        np.array(tokens, dtype=">u4"),
        ArrayLike(np.array(tokens, dtype=np.int64)),
    ):
        got = as_tokens(container)

        assert got.dtype == np.uint32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, expected)


@given(npst.arrays(st.one_of(npst.integer_dtypes(), npst.unsigned_integer_dtypes()), st.integers(0, 20)))
def test_an_integer_array_is_taken_whole_or_refused_by_its_first_wrong_value(values: Any) -> None:
    tokens = values.tolist()
    wrong = [at for at, token in enumerate(tokens) if not 0 <= token < 2**32]

    if wrong:
        with pytest.raises(ValueError, match=rf"tokens\[{wrong[0]}\] is {tokens[wrong[0]]}; ") as caught:
            as_tokens(values)
        assert "[0, 2**32)" in str(caught.value)
    else:
        assert as_tokens(values).tolist() == tokens


@given(st.lists(st.one_of(ids, st.integers(), st.booleans(), st.floats(), st.none(), st.text(max_size=2)), min_size=1))
def test_a_list_is_taken_whole_or_refused_by_its_first_wrong_item(tokens: list[Any]) -> None:
    wrong = [at for at, t in enumerate(tokens) if type(t) is not int or not 0 <= t < 2**32]

    if wrong:
        error = ValueError if type(tokens[wrong[0]]) is int else TypeError
        with pytest.raises(error, match=rf"^tokens\[{wrong[0]}\] is "):
            as_tokens(tokens)
    else:
        assert as_tokens(tokens).tolist() == tokens


def test_strided_view_is_made_contiguous() -> None:
    assert as_tokens(np.arange(10)[::-3]).tolist() == [9, 6, 3, 0]


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_32_bit_array_is_not_copied(dtype: Any) -> None:
    values = np.arange(100, dtype=dtype)

    assert np.shares_memory(as_tokens(values), values)


def test_list_of_numpy_integers_is_taken() -> None:
    assert as_tokens([np.int64(7), np.uint8(1), 0]).tolist() == [7, 1, 0]


def test_range_is_taken() -> None:
    assert as_tokens(range(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("empty", [[], (), array("i"), np.empty(0, dtype=np.int64)])
def test_no_tokens_are_no_tokens(empty: Any) -> None:
    assert as_tokens(empty).shape == (0,)


def test_cpu_tensor_is_taken() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    assert as_tokens(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert as_tokens(torch.arange(5, dtype=torch.int32)[1:]).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"shape \(1, 5\).*pass one row"):
        as_tokens(torch.arange(5)[None])
    with pytest.raises(TypeError, match="floats"):
        as_tokens(torch.zeros(3))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (None, TypeError, "tokens is None;"),
        (5, TypeError, "tokens is an int;"),
        (1.5, TypeError, "tokens is a float;"),
        ("abc", TypeError, "tokens is a str;"),
        ({"input_ids": [1]}, TypeError, "tokens is a dict;"),
        (object(), TypeError, r"tokens holds Python objects"),
        (iter([1, 2]), TypeError, "tokens holds Python objects"),
        (b"abcd", TypeError, r"tokens is a bytes of single bytes.*cast\('I'\)"),
        (memoryview(b"abcd"), TypeError, "tokens is a memoryview of single bytes"),
        (array("b", [1]), TypeError, "tokens is an array of single bytes"),
        (array("d", [1.0]), TypeError, r"tokens holds floats \(dtype float64\)"),
        (np.array([1.0]), TypeError, "tokens holds floats"),
        (np.array([True]), TypeError, "tokens holds bools"),
        (np.array([1], dtype=object), TypeError, "tokens holds Python objects"),
        (np.array(["a"]), TypeError, "tokens holds <U1 values"),
        (np.array(5), ValueError, r"tokens has shape \(\)"),
        (np.zeros((2, 3), dtype=int), ValueError, r"tokens has shape \(2, 3\).*pass one row"),
        (np.zeros((2, 3), dtype=np.int32).data, ValueError, r"tokens has shape \(2, 3\)"),
        ([[1, 2], [3, 4]], ValueError, r"tokens\[0\] is a list;.*pass one row"),
        ([1, True], TypeError, r"tokens\[1\] is True \(a bool\)"),
        ([3, np.bool_(False)], TypeError, r"tokens\[1\] is .*False.* \(a bool"),
        ([1, 2.0], TypeError, r"tokens\[1\] is 2.0 \(a float\)"),
        ([1, -1], ValueError, r"tokens\[1\] is -1;"),
        ([2**32], ValueError, r"tokens\[0\] is 4294967296;"),
        (np.array([1, -1]), ValueError, r"tokens\[1\] is -1;"),
        (np.array([2**32]), ValueError, r"tokens\[0\] is 4294967296;"),
        (ArrayLike(np.array([0.5])), TypeError, "tokens holds floats"),
        (ArrayLike(TypeError("it lives on cuda:0")), TypeError, "tokens is an ArrayLike and cannot be .*cuda:0"),
        (ArrayLike(RuntimeError("needs detach")), TypeError, "tokens is an ArrayLike and cannot be .*needs detach"),
    ],
)
def test_wrong_tokens_are_named_with_what_would_be_right(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_tokens(tokens)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix.namespace import Namespace

BASE = Namespace("example/model", "0123abcd", "bfloat16", "layout-1", 16)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
namespaces = st.builds(
    Namespace,
    model=text,
    revision=text,
    dtype=text,
    layout=text,
    block_size=st.integers(1, 300),
    adapter=text,
    salt=text,
    hash=st.sampled_from(["sha256", "xxh3_128"]),
    extra=st.dictionaries(text, text, max_size=3).map(lambda pairs: tuple(pairs.items())),
)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "example/other"},
        {"revision": "0123abce"},
        {"dtype": "float16"},
        {"layout": "layout-2"},
        {"block_size": 32},
        {"adapter": "lora"},
        {"salt": "tenant"},
        {"hash": "xxh3_128"},
        {"extra": (("engine_hash", "v1"),)},
    ],
)
def test_every_field_changes_the_root(change: dict[str, Any]) -> None:
    assert replace(BASE, **change).root() != BASE.root()


def test_text_moved_from_one_field_to_the_next_changes_the_root() -> None:
    assert replace(BASE, model="ab", revision="c").root() != replace(BASE, model="a", revision="bc").root()
    assert replace(BASE, adapter="x", salt="").root() != replace(BASE, adapter="", salt="x").root()


def test_order_of_extra_pairs_does_not_matter() -> None:
    assert replace(BASE, extra=(("a", "1"), ("b", "2"))).root() == replace(BASE, extra=(("b", "2"), ("a", "1"))).root()


def test_with_salt_changes_nothing_but_the_salt() -> None:
    salted = BASE.with_salt("tenant")

    assert salted == replace(BASE, salt="tenant")
    assert salted.with_salt("") == BASE


def test_root_is_32_bytes_for_every_hash() -> None:
    assert len(BASE.root()) == len(replace(BASE, hash="xxh3_128").root()) == 32


@given(namespaces, namespaces)
def test_two_namespaces_have_one_encoding_only_if_they_are_equal(one: Namespace, other: Namespace) -> None:
    same = replace(one, extra=()) == replace(other, extra=()) and sorted(one.extra) == sorted(other.extra)

    assert (one.encode() == other.encode()) == same
    assert (one.root() == other.root()) == same


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, "model is None; it must be a str"),
        ({"salt": b"tenant"}, TypeError, "salt is b'tenant'; it must be a str"),
        ({"block_size": 0}, ValueError, "block_size is 0; it must be at least 1"),
        ({"block_size": "16"}, TypeError, "block_size is '16'; it must be an int"),
        ({"block_size": True}, TypeError, "block_size is True; it must be an int"),
        ({"hash": "md5"}, ValueError, "hash is 'md5'; it must be one of sha256, xxh3_128"),
        ({"extra": (("a", "1"), ("a", "2"))}, ValueError, "not unique"),
        ({"extra": (("a", 1),)}, TypeError, "extra"),
        ({"extra": ("ab",)}, TypeError, "extra"),
    ],
)
def test_wrong_field_is_named_with_its_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(BASE, **change)

"""Sampling follows its settings; text streams hold back exactly what is not certain."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.transformers.text import Sampler, Sampling, TextStream
from kvstore.errors import RequestError


class ByteTokenizer:
    """One token per UTF-8 byte; 0 is a special token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in ids if token).decode("utf-8", errors="replace")


def stream_all(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(ByteTokenizer(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=60))
def test_pieces_join_to_the_text(text: str) -> None:
    clean = text.replace("\0", "")

    pieces, stream = stream_all(clean)

    assert "".join(pieces) == stream.text == clean


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    pieces, _ = stream_all("a€b")

    assert pieces == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_become_a_character_come_out_in_the_end() -> None:
    stream = TextStream(ByteTokenizer())

    assert [stream.push(0xE2), stream.push(0x82), stream.finish()] == ["", "", "\ufffd"]


@given(st.text(alphabet="abX", max_size=30), st.lists(st.text(alphabet="abX", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_the_text_and_never_leak(text: str, stops: list[str]) -> None:
    # What a reader of the whole text would do: it ends where the first token completes a stop string.
    ends = [text[: end + 1] for end in range(len(text)) if any(stop in text[: end + 1] for stop in stops)]
    expected = text
    if ends:
        expected = text[: min(ends[0].find(stop) for stop in stops if stop in ends[0])]

    pieces, stream = stream_all(text, tuple(stops))

    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(ends)


def test_what_may_become_a_stop_string_is_held_back_and_then_given_out() -> None:
    stream = TextStream(ByteTokenizer(), ("END",))

    assert [stream.push(byte) for byte in b"xENxEN"] == ["x", "", "", "ENx", "", ""]
    assert stream.finish() == "EN"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty string"):
        TextStream(ByteTokenizer(), ("",))


def logits(*values: float) -> object:
    import torch

    return torch.tensor([[list(values)]])


def test_greedy_takes_the_largest() -> None:
    assert Sampler(Sampling()).pick(logits(0.0, 3.0, 2.0)) == 1  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(logits(*[0.0] * 50)) for _ in range(8)]  # type: ignore[arg-type]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=1.0, top_k=2, seed=0), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.5, seed=0), {0}),  # 0.64 of the mass: enough by itself
        (Sampling(temperature=1.0, top_p=0.65, seed=0), {0, 1}),
        (Sampling(temperature=1e-3, seed=0), {0}),
        (Sampling(temperature=5.0, seed=0), {0, 1, 2, 3}),
    ],
)
def test_only_tokens_that_the_settings_allow_are_drawn(sampling: Sampling, possible: set[int]) -> None:
    sampler = Sampler(sampling)

    drawn = Counter(sampler.pick(logits(3.0, 2.0, 1.0, 0.0)) for _ in range(200))  # type: ignore[arg-type]

    assert set(drawn) == possible


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_wrong_settings_are_refused_with_field_and_value(wrong: dict[str, float]) -> None:
    ((field, value),) = wrong.items()

    with pytest.raises(RequestError, match=f"{field} is {value}"):
        Sampling(**wrong)  # type: ignore[arg-type]

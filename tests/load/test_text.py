from __future__ import annotations

from kvstore.load.text import WORDS, make_text


def test_words_are_all_different_and_plain() -> None:
    assert len(WORDS) == len(set(WORDS)) > 200
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


def test_a_name_and_a_seed_always_give_the_same_text() -> None:
    assert make_text(7, "system", 200) == make_text(7, "system", 200)


def test_other_names_and_seeds_differ_from_the_first_words_on() -> None:
    heads = {tuple(make_text(seed, f"user {n}", 50).split()[:4]) for seed in range(5) for n in range(5)}

    assert len(heads) == 25


def test_words_and_full_stops_are_as_many_as_asked_for() -> None:
    text = make_text(0, "a", 100)

    assert len(text.replace(".", " .").split()) == 100
    assert make_text(0, "a", 0) == ""


def test_longer_text_of_a_name_begins_with_the_shorter() -> None:
    assert make_text(0, "a", 300).startswith(make_text(0, "a", 100))

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.units import GiB, KiB, MiB, format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("512MiB", 512 * MiB),
        ("512 mib", 512 * MiB),
        ("1.5GiB", 3 * GiB // 2),
        (".5KiB", 512),
        ("4GB", 4 * 10**9),
        (" 2 KB ", 2000),
        ("1TiB", 1024 * GiB),
        ("-1", -1),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1 GigB", "1e9", "1.5B", "one", "1GiB 2MiB", "-1GiB", 1.5, True, None, [1]]
)
def test_what_is_no_size_is_refused_with_examples(text: object) -> None:
    with pytest.raises(ValueError, match=r'"512MiB", "1GiB" or "4GB"'):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0.0),
        (2, 2.0),
        ("0.05", 0.05),
        ("250ms", 0.25),
        ("30 s", 30.0),
        ("5min", 300.0),
        ("24H", 86400.0),
        ("7d", 604800.0),
    ],
)
def test_times_are_read_in_the_units_people_use(text: object, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 m", "1h30", "soon", "-5min", True, None])
def test_what_is_no_time_is_refused_with_examples(text: object) -> None:
    with pytest.raises(ValueError, match=r'"250ms", "30s", "5min", "24h" or "7d"'):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 * GiB // 2, "1.5 GiB"),
        (4096 * KiB, "4 MiB"),
        (1234567, "1.177 MiB"),
    ],
)
def test_sizes_are_written_with_the_largest_fitting_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.00025, "250 µs"), (0.05, "50 ms"), (2.0, "2 s"), (90, "1.5 min"), (86400, "24 h"), (604800, "7 d")],
)
def test_times_are_written_with_the_unit_a_reader_would_choose(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(0, 1 << 45))
def test_a_written_size_reads_back_to_four_digits(num_bytes: int) -> None:
    number, unit = format_bytes(num_bytes).split()
    factor = parse_bytes(f"1{unit}")

    assert float(number) * factor == pytest.approx(num_bytes, rel=1e-3)

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.redis.parts import (
    KEY_BYTES_ON_SERVER,
    PART_BYTES,
    SLACK_BYTES,
    WASTE_SHARE,
    WHOLE_BYTES,
    KiB,
    MiB,
    max_parts,
    part_sizes,
    size_class,
)

STRING_BYTES = 12  # what a Redis string carries beside its text


@pytest.mark.parametrize(
    ("num_bytes", "block"),
    [
        (1, 16),
        (16, 16),
        (17, 32),
        (128, 128),
        (129, 160),
        (256, 256),
        (257, 320),
        (2 * MiB, 2 * MiB),
        (2 * MiB + 1, 2560 * KiB),
        (1310720, 1310720),
        (1310721, 1536 * KiB),
    ],
)
def test_size_classes_step_by_a_quarter_of_a_power_of_two(num_bytes: int, block: int) -> None:
    assert size_class(num_bytes) == block


def test_pages_are_cut_as_the_published_format_says() -> None:
    text = (Path(__file__).parents[4] / "docs" / "formats.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+(?:, \d+)+) \| [\d.]+ \|$", text, re.MULTILINE)

    assert len(rows) == 5
    for total, sizes in rows:
        assert part_sizes(int(total)) == [int(size) for size in sizes.split(", ")]


@pytest.mark.parametrize(("total", "sizes"), [(96_000, [96_000]), (6 * MiB + 128, [2 * MiB - 64, 4 * MiB - 64, 256])])
def test_a_page_that_fits_a_class_is_whole_and_a_large_one_is_cut_in_pieces(total: int, sizes: list[int]) -> None:
    assert part_sizes(total) == sizes


@given(st.integers(129, 40 * MiB))
def test_parts_cover_the_page_and_waste_little(total: int) -> None:
    sizes = part_sizes(total)

    assert sum(sizes) == total
    assert min(sizes) > 0
    assert len(sizes) <= max_parts(total)
    on_server = sum(size_class(size + STRING_BYTES) for size in sizes)
    assert on_server - total <= total / WASTE_SHARE + KEY_BYTES_ON_SERVER + SLACK_BYTES * len(sizes)


@given(st.integers(1, WHOLE_BYTES), st.integers(1, 40 * MiB))
def test_no_value_is_larger_than_a_whole_page_and_the_bound_on_parts_grows_with_the_page(a: int, b: int) -> None:
    assert max(part_sizes(b)) <= WHOLE_BYTES
    assert max_parts(a) == 2
    assert max_parts(max(a, b)) >= len(part_sizes(min(a, b)))


def test_a_page_far_above_4_mib_is_cut_into_parts_of_2_mib() -> None:
    sizes = part_sizes(32 * MiB)

    assert set(sizes[:-2]) == {PART_BYTES}

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from kvstore.demo.plot import draw_bars
from tests.helpers.demo import report


def png_size(path: Path) -> tuple[int, int]:
    """Width and height out of the header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_the_figure_is_a_png_with_a_row_per_stage(tmp_path: Path) -> None:
    whole = report()
    without_redis = replace(whole, stages=tuple(stage for stage in whole.stages if stage.name != "redis"))

    draw_bars(whole, tmp_path / "new" / "all.png")
    draw_bars(without_redis, tmp_path / "fewer.png")

    width, height = png_size(tmp_path / "new" / "all.png")
    assert width > 1200
    assert png_size(tmp_path / "fewer.png")[1] < height


def test_a_cold_stage_alone_can_be_drawn(tmp_path: Path) -> None:
    draw_bars(replace(report(), stages=report().stages[:1]), tmp_path / "cold.png")

    assert png_size(tmp_path / "cold.png")[0] > 1200

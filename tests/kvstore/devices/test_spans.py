"""Layers of a page are cut into spans that are whole layers."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.devices import spans
from kvstore.devices.base import PageTable
from kvstore.devices.spans import cut_layers
from kvstore.devices.tables import paged_table


def table(*sizes: int) -> PageTable:
    return paged_table([np.zeros((3, size), np.uint8) for size in sizes])


def test_small_layers_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN_BYTES", 30)

    cut = cut_layers(table(10, 10, 10, 10, 10, 10, 10, 10), 2)

    assert [(span.last, span.start, span.stop) for span in cut] == [(1, 0, 40), (3, 40, 80)]
    assert [span.table.page_bytes for span in cut] == [40, 40]


def test_the_last_layers_are_a_span_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN_BYTES", 15)

    assert [span.last for span in cut_layers(table(10, 10, 10))] == [1, 2]


def test_pieces_that_are_no_whole_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="a table of 3 pieces has no whole layers of 2"):
        cut_layers(table(10, 10, 10), 2)

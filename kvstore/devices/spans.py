"""Layers of a page that are copied together, so that each layer of a forward waits for its own bytes only."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.devices.base import PageTable

SPAN_BYTES = 64 << 10  # of one page: layers are copied together up to here, as each call costs 20 us


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Layers that are copied in one call, the number of the last one, and where they lie in a page."""

    table: PageTable
    last: int
    start: int
    stop: int


def cut_layers(table: PageTable, pieces_per_layer: int = 1) -> list[LayerSpan]:
    """Cut a table whose pieces lie layer after layer into spans of whole layers, the first layer first.

    Raises ValueError if its pieces are no whole number of layers.
    """
    num_layers, rest = divmod(len(table.base), pieces_per_layer)
    if rest:
        raise ValueError(f"a table of {len(table.base)} pieces has no whole layers of {pieces_per_layer}")
    spans: list[LayerSpan] = []
    sizes = (table.num_runs * table.run_bytes).reshape(num_layers, pieces_per_layer).sum(axis=1).tolist()
    first = start = stop = 0
    for layer, size in enumerate(sizes):
        stop += size
        if stop - start >= SPAN_BYTES or layer == num_layers - 1:
            cut = slice(first * pieces_per_layer, (layer + 1) * pieces_per_layer)
            part = PageTable(
                base=table.base[cut],
                page_stride=table.page_stride[cut],
                num_runs=table.num_runs[cut],
                run_stride=table.run_stride[cut],
                run_bytes=table.run_bytes[cut],
                num_pages=table.num_pages,
                keep_alive=table.keep_alive[cut],
                first_page=table.first_page,
            )
            spans.append(LayerSpan(part, layer, start, stop))
            first, start = layer + 1, stop
    return spans

"""A process that renders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.prefix.rendering import RenderProcess


@pytest.fixture
def process() -> Iterator[RenderProcess]:
    with RenderProcess() as process:
        yield process

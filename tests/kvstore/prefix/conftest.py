"""A process that renders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.prefix.rendering import RenderProcess, Template


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    """One for all tests of a file: an interpreter and Jinja take longer to start than a template to render."""
    with RenderProcess() as process:
        process.names(Template(""))  # it starts now: a test that starts it would seem to leave it behind
        yield process

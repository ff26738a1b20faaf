from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.helpers.llama_server import FakeLlama


@pytest.fixture
async def llama(tmp_path: Path) -> AsyncIterator[FakeLlama]:
    folder = tmp_path / "slots"
    folder.mkdir()
    server = await FakeLlama(folder).start()
    yield server
    await server.stop()

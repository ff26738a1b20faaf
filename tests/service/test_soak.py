"""The soak, shortened: a few rounds of load and faults leave nothing behind."""

from pathlib import Path

import pytest

from kvstore.ports import free_port
from tests.helpers.redis_server import NEEDS_REDIS
from tests.service.soak import Soak

pytestmark = NEEDS_REDIS


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_load_and_faults_leaves_nothing_behind(tmp_path: Path) -> None:
    soak = Soak(tmp_path, free_port())
    try:
        result = soak.run(60.0, print)
    finally:
        soak.close()

    assert result["requests"] > 100
    assert result["loaded_blocks"] > 100
    assert len(result["faults"]) > 5

"""What cannot work is said when the engine starts, not later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.tiers.redis_local import free_port
from tests.engines.vllm.conftest import MiB
from tests.engines.vllm.engine import Engine, make_prompt

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("extra", "transfer", "message"),
    [
        ({"dick": {}}, {}, "unknown key 'dick'; did you mean 'disk'"),
        ({"redis": {"url": f"redis://127.0.0.1:{free_port()}"}}, {}, "the server does not answer"),
        ({}, {"kv_role": "kv_consumer"}, "make no sense"),
        ({"host": {"capacity_bytes": "8KiB"}}, {}, "host.capacity_bytes"),
    ],
)
def test_a_wrong_configuration_ends_the_start(
    open_engine: Callable[..., Engine], extra: dict[str, Any], transfer: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        open_engine(extra, transfer=transfer)


def test_a_directory_of_another_layout_is_refused_and_kept(open_engine: Callable[..., Engine], tmp_path: Path) -> None:
    disk = {"disk": {"path": str(tmp_path), "capacity_bytes": 16 * MiB}}
    prompt = make_prompt(300, 1)
    engine = open_engine(disk)
    engine.ask(prompt)

    with pytest.raises(Exception, match="layout"):
        open_engine(disk, block_size=64)

    assert open_engine(disk).ask(prompt)["cached"] > 0

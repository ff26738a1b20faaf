"""What cannot work is said when the engine starts, not later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.ports import free_port
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


def test_loads_that_vllm_could_not_recover_from_are_refused(open_engine: Callable[..., Engine]) -> None:
    with pytest.raises(Exception, match='load is "sync", which needs a model of one layer group on CPU'):
        open_engine({"load": "sync"}, kind="sliding")


def test_a_version_that_is_not_supported_ends_the_start(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.1")

    with pytest.raises(Exception, match=r"vLLM 0\.31\.1 is not supported.*0\.32\.x.*Install vllm==0\.3"):
        open_engine({})


class Warnings(logging.Handler):
    """What our part of vLLM's log says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logging.getLogger("vllm.kvstore").addHandler(handler)  # vLLM's loggers do not hand on to the root, nor to caplog
    yield handler
    logging.getLogger("vllm.kvstore").removeHandler(handler)


def test_vllms_own_policy_for_failed_loads_is_warned_of_since_it_ends_requests(
    open_engine: Callable[..., Engine], warnings: Warnings
) -> None:
    engine = open_engine({}, transfer={"kv_load_failure_policy": "fail"})
    assert [text for text in warnings.texts if "kv_load_failure_policy is 'fail'; set it to 'recompute'" in text]
    prompt = make_prompt(300, 1)
    computed = engine.ask(prompt)
    engine.forget_own_cache()

    def fail(*_: object) -> None:
        raise RuntimeError("no copy today")

    engine.worker._device.copy_in = fail
    failed = engine.ask(prompt)
    del engine.worker._device.copy_in

    assert (failed["finish"], failed["tokens"]) == ("error", [])
    assert engine.ask(prompt)["tokens"] == computed["tokens"]  # the engine lives on


def test_a_directory_of_another_layout_is_refused_and_kept(
    open_engine: Callable[..., Engine], tmp_path: Path, warnings: Warnings
) -> None:
    disk = {"disk": {"path": str(tmp_path), "capacity_bytes": 16 * MiB}}
    prompt = make_prompt(300, 1)
    engine = open_engine(disk)
    engine.ask(prompt)

    with pytest.raises(Exception, match="layout"):
        open_engine(disk, block_size=64)

    assert open_engine(disk).ask(prompt)["cached"] > 0
    assert warnings.texts == []  # nothing to say of a configuration that is right

"""KV events as a router gets them, over vLLM's own ZeroMQ publisher: what it believes is what is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.conftest import MiB
from tests.engines.vllm.engine import Engine, make_prompt
from tests.helpers.daemons import DaemonProcess
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(600)


class Router:
    """Believes what it is told: which block is where."""

    def __init__(self, folder: Path) -> None:
        import zmq

        self.endpoint = f"ipc://{folder}/events"
        self.beliefs: set[tuple[Any, str, int | None]] = set()
        self.removed: set[str] = set()
        self.cleared = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.connect(self.endpoint)

    @property
    def config(self) -> dict[str, Any]:
        return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": self.endpoint}

    def hear(self, quiet_s: float = 0.5) -> None:
        """Take in events until there is none for a while."""
        from msgspec.msgpack import Decoder
        from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVEventBatch

        decoder = Decoder(type=KVEventBatch)
        while self._socket.poll(quiet_s * 1000):
            for event in decoder.decode(self._socket.recv_multipart()[-1]).events:
                if isinstance(event, AllBlocksCleared):
                    self.beliefs.clear()
                    self.cleared += 1
                    continue
                told = {(name, str(event.medium), event.group_idx) for name in event.block_hashes}
                if isinstance(event, BlockStored):
                    self.beliefs |= told
                else:
                    self.removed.add(str(event.medium))
                    assert told <= self.beliefs or event.medium == "GPU"  # nothing is taken back that was not told
                    self.beliefs -= told

    def names(self, medium: str) -> set[Any]:
        return {name for name, where, _ in self.beliefs if where == medium}

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    router = Router(tmp_path)
    yield router
    router.close()


@pytest.mark.parametrize("kind", ["gqa", "sliding"])
def test_a_router_believes_what_is_stored(
    open_engine: Callable[..., Engine], router: Router, tmp_path: Path, kind: str
) -> None:
    extra = {
        "host": {"capacity_bytes": 3 * MiB, "huge_pages": False},  # far less than the prompts need
        "disk": {"path": str(tmp_path / "disk"), "capacity_bytes": 4 * MiB},
    }
    engine = open_engine(extra, kind=kind, kv_events_config=router.config)
    time.sleep(0.5)  # a subscriber needs a moment before the first event
    for seed in range(5):
        engine.ask(make_prompt(700, seed))
        engine.settle()
    engine.ask(make_prompt(20, 99))  # a step, in which the last of it is told
    router.hear()

    pages = engine.half.store.stats()["pages"]
    told = {medium: sum(where == medium for _, where, _ in router.beliefs) for medium in ("CPU", "STORAGE")}
    assert told == {"CPU": pages["host"], "STORAGE": pages["disk"]}
    assert {"CPU", "STORAGE"} <= router.removed
    assert router.names("CPU") <= router.names("GPU")  # by the names that vLLM itself uses; its own cache is larger


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    disk = (f"disk.path={tmp_path / 'disk'}", f"disk.capacity_bytes={4 * MiB}")
    daemon = DaemonProcess(tmp_path / "kv.sock", None, f"host.capacity_bytes={3 * MiB}", *disk)
    yield daemon
    daemon.kill()


def test_through_a_daemon_a_router_believes_what_is_stored_there_and_nothing_once_it_is_dead(
    open_engine: Callable[..., Engine], router: Router, daemon: DaemonProcess
) -> None:
    service = {"url": f"unix://{daemon.socket}", "retry_max_s": 0.2}
    engine = open_engine({"service": service}, kv_events_config=router.config)
    time.sleep(0.5)

    def told() -> dict[str, int]:
        engine.ask(make_prompt(20, 99))  # events go out with steps
        router.hear(0.2)
        return {medium: sum(where == medium for _, where, _ in router.beliefs) for medium in ("CPU", "STORAGE")}

    def stored() -> dict[str, int]:
        pages = engine.half.store.stats()["pages"]
        return {"CPU": pages["host"], "STORAGE": pages["disk"]}

    for seed in range(5):  # far more than the daemon has room for
        engine.ask(make_prompt(700, seed))
        engine.settle()
    wait_until(lambda: told() == stored())
    assert min(stored().values()) > 0
    assert {"CPU", "STORAGE"} <= router.removed
    assert router.names("CPU") <= router.names("GPU")

    daemon.kill()
    wait_until(lambda: told() == {"CPU": 0, "STORAGE": 0})
    assert router.names("GPU")

    daemon.start()
    wait_until(lambda: engine.half.store.num_attached == 2)
    engine.ask(make_prompt(300, 50))
    engine.settle()
    wait_until(lambda: told()["CPU"] == stored()["CPU"] > 0 and told()["STORAGE"] > 0)
    assert told()["STORAGE"] < stored()["STORAGE"]  # what lay there before the daemon started is not told


def test_after_a_reset_a_router_believes_nothing(open_engine: Callable[..., Engine], router: Router) -> None:
    engine = open_engine({}, kv_events_config=router.config)
    time.sleep(0.5)
    engine.ask(make_prompt(300, 1))
    engine.settle()
    engine.ask(make_prompt(20, 2))
    router.hear()
    assert router.names("CPU")

    engine.llm.reset_prefix_cache(reset_connector=True)
    engine.ask(make_prompt(20, 3))
    router.hear()

    assert router.cleared
    assert not router.names("CPU")

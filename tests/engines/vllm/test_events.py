"""KV events as a router gets them, over vLLM's own ZeroMQ publisher: what it believes is what is stored."""

from __future__ import annotations

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

    def meet(self, engine: Engine) -> None:
        """Wait until the engine's publisher knows of this subscriber: what it tells before is lost."""

        def is_met() -> bool:
            engine.llm.reset_prefix_cache()  # which is told with the next step
            self.told(engine)
            return self.cleared > 0

        wait_until(is_met, "no event comes")
        self.cleared = 0

    def told(self, engine: Engine) -> dict[str, int]:
        """How many blocks it believes to be where, after one more step: events go out with steps."""
        engine.ask(make_prompt(20, 99))
        self.hear(0.2)
        return {medium: sum(where == medium for _, where, _ in self.beliefs) for medium in ("CPU", "STORAGE")}

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


def stored(engine: Engine) -> dict[str, int]:
    pages = engine.half.store.stats()["pages"]
    return {"CPU": pages["host"], "STORAGE": pages["disk"]}


@pytest.mark.parametrize("kind", ["gqa", "sliding"])
def test_a_router_believes_what_is_stored(
    open_engine: Callable[..., Engine], router: Router, tmp_path: Path, kind: str
) -> None:
    extra = {
        "host": {"capacity_bytes": 6 * MiB, "huge_pages": False},  # far less than the prompts need
        "disk": {"path": str(tmp_path / "disk"), "capacity_bytes": 8 * MiB},
    }
    engine = open_engine(extra, kind=kind, kv_events_config=router.config)
    router.meet(engine)
    for seed in range(5):
        engine.ask(make_prompt(700, seed))
        engine.settle()

    wait_until(lambda: router.told(engine) == stored(engine))
    assert {"CPU", "STORAGE"} <= router.removed
    assert router.names("CPU") <= router.names("GPU")  # by the names that vLLM itself uses; its own cache is larger


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    disk = (f"disk.path={tmp_path / 'disk'}", f"disk.capacity_bytes={8 * MiB}")
    daemon = DaemonProcess(tmp_path / "kv.sock", None, f"host.capacity_bytes={6 * MiB}", *disk)
    yield daemon
    daemon.kill()


def test_through_a_daemon_a_router_believes_what_is_stored_there_and_nothing_once_it_is_dead(
    open_engine: Callable[..., Engine], router: Router, daemon: DaemonProcess
) -> None:
    service = {"url": f"unix://{daemon.socket}", "retry_max_s": 0.2}
    engine = open_engine({"service": service}, kv_events_config=router.config)
    router.meet(engine)

    for seed in range(5):  # far more than the daemon has room for
        engine.ask(make_prompt(700, seed))
        engine.settle()
    wait_until(lambda: router.told(engine) == stored(engine))
    assert min(stored(engine).values()) > 0
    assert {"CPU", "STORAGE"} <= router.removed
    assert router.names("CPU") <= router.names("GPU")

    daemon.kill()
    wait_until(lambda: router.told(engine) == {"CPU": 0, "STORAGE": 0})
    assert router.names("GPU")

    daemon.start()
    wait_until(lambda: engine.half.store.num_attached == 2)
    engine.ask(make_prompt(300, 50))
    engine.settle()
    wait_until(lambda: router.told(engine)["CPU"] == stored(engine)["CPU"] > 0)
    wait_until(lambda: router.told(engine)["STORAGE"] > 0)
    assert (
        router.told(engine)["STORAGE"] < stored(engine)["STORAGE"]
    )  # what lay there before the daemon started is not told


def test_after_a_reset_a_router_believes_nothing(open_engine: Callable[..., Engine], router: Router) -> None:
    engine = open_engine({}, kv_events_config=router.config)
    router.meet(engine)
    engine.ask(make_prompt(300, 1))
    engine.settle()
    wait_until(lambda: router.told(engine)["CPU"] > 0)

    engine.llm.reset_prefix_cache(reset_connector=True)

    wait_until(lambda: router.told(engine) == {"CPU": 0, "STORAGE": 0})
    assert router.cleared

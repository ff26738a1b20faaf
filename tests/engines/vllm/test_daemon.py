"""Engines through a node daemon, by configuration alone: one host copy for all, and no answer that depends on it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.ports import free_port
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, Engine, EngineProcess, make_prompt
from tests.helpers.daemons import SEEKER, DaemonProcess, Http, counted_calls
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.timeout(600)
LENGTH = 700
HIT = (LENGTH - 1) // BLOCK * BLOCK
CALL_TIMEOUT_S = 3.0  # one test waits for it


class Served(DaemonProcess):
    """A daemon, how engines are told of it, and what its operator sees."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.http = Http(free_port())
        super().__init__(
            folder / "kv.sock",
            None,
            f"host.capacity_bytes={64 * MiB}",
            f"service.http_port={self.http.port}",
            "store.lookup_deadline_s=5",
            "store.load_deadline_s=10",
            "store.load_or_recompute=false",
            *settings,
        )
        service = {"url": f"unix://{self.socket}", "call_timeout_s": CALL_TIMEOUT_S, "retry_max_s": 0.2}
        self.extra: dict[str, Any] = {"service": service}

    def stats(self) -> dict[str, Any]:
        """Of the one namespace that there is."""
        stats: list[dict[str, Any]] = list(self.http.get("/v1/stats")["namespaces"].values())
        assert len(stats) == 1
        return stats[0]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    daemon = Served(tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.kill()


def test_a_second_engine_takes_a_prefix_from_the_first_ones_host_copy(
    daemon: Served, model_of: Callable[[str], str], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 1)
    fork = [*prompt[:400], *make_prompt(50, 2)]
    with (
        EngineProcess(model_of("gqa"), daemon.extra) as first,
        EngineProcess(model_of("gqa"), daemon.extra, processes=True) as second,
    ):
        a = first.ask(prompt)
        wait_until(lambda: daemon.stats()["saved_pages"] == LENGTH // BLOCK, "the first engine's pages did not come")
        b = second.ask(prompt)
        c = second.ask(fork)
        metrics = second.metrics()

    reference.check([a, b, c], [prompt, prompt, fork])
    assert (a["cached"], b["cached"]) == (0, HIT)
    assert metrics["vllm:kvstore_hit_tokens.host"] == HIT
    assert metrics.get("vllm:kvstore_hook_errors", 0) == 0
    assert daemon.stats()["pages"]["host"] == LENGTH // BLOCK + 2  # one copy, and what the fork added


def test_engines_that_can_only_read_the_slab_go_on_in_a_new_process(
    tmp_path: Path, model_of: Callable[[str], str], reference: Reference
) -> None:
    daemon = Served(tmp_path, "service.isolate=true", f"service.isolate_bytes={8 * MiB}")
    prompt = make_prompt(LENGTH, 5)
    longer = [*prompt, *make_prompt(300, 6)]
    try:
        with EngineProcess(model_of("gqa"), daemon.extra) as first:
            a = first.ask(prompt)
            wait_until(
                lambda: daemon.stats()["saved_pages"] == LENGTH // BLOCK, "the first engine's pages did not come"
            )
            maps = kinds_of_maps(first.pid)
            (client,) = daemon.http.get("/v1/clients")["clients"]
        with EngineProcess(model_of("gqa"), daemon.extra) as second:
            b = second.ask(prompt)
            c = second.ask(longer)
            metrics = second.metrics()
        wait_until(lambda: daemon.stats()["leases"] == 0, "leases of engines that have ended are kept")
    finally:
        daemon.kill()

    assert maps == {"slab": {"r--s"}, "staging": {"rw-s"}}
    assert client["staging_slots"] > LENGTH // BLOCK
    reference.check([a, b, c], [prompt, prompt, longer])
    assert (a["cached"], b["cached"]) == (0, HIT)
    assert c["cached"] >= HIT  # vLLM's own cache has more of it by now
    assert metrics["vllm:kvstore_hit_tokens.host"] == HIT
    assert metrics.get("vllm:kvstore_hook_errors", 0) == 0


def kinds_of_maps(pid: int) -> dict[str, set[str]]:
    """How a process has mapped what the daemon gave it: permissions, as /proc says them."""
    found: dict[str, set[str]] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/memfd:kvstore-" in line:
            name = "staging" if "/memfd:kvstore-staging" in line else "slab"
            found.setdefault(name, set()).add(line.split()[1])
    return found


class TestFaults:
    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], daemon: Served) -> Engine:
        return open_engine(daemon.extra)

    def ask(self, engine: Engine, reference: Reference, prompt: list[int]) -> int:
        """Ask without vLLM's own cache; the tokens that came from the store, whatever happens."""
        until = time.monotonic() + WAIT_S
        while not engine.llm.reset_prefix_cache():  # blocks are held until saves are reported
            assert time.monotonic() < until
            engine.ask(make_prompt(40, 99))
        started = time.monotonic()
        answer = engine.ask(prompt)
        assert time.monotonic() - started < WAIT_S  # no wait without a bound
        reference.check([answer], [prompt])
        assert engine.scheduler.connector._hook_errors == 0
        return int(answer["cached"])

    def stored(self, engine: Engine, reference: Reference, daemon: Served, seed: int) -> list[int]:
        """A prompt that is in the daemon; it may have to be found again first."""
        prompt = make_prompt(LENGTH, seed)
        self.ask(engine, reference, prompt)
        wait_until(lambda: self.ask(engine, reference, prompt) == HIT, "the daemon does not have the prompt")
        return prompt

    def test_a_daemon_that_is_killed_is_a_miss_and_one_that_is_back_is_used_again(
        self, engine: Engine, daemon: Served, reference: Reference
    ) -> None:
        prompt = self.stored(engine, reference, daemon, 11)
        daemon.kill()
        try:
            assert [self.ask(engine, reference, prompt) for _ in range(2)] == [0, 0]
            assert engine.worker._slabs == {}  # memory of a daemon that died is not kept
        finally:
            daemon.start()

        assert self.stored(engine, reference, daemon, 11) == prompt
        (handle,) = engine.worker._slabs
        assert handle.first_slot > 0

    # What is leased and ready lies in memory that outlives the daemon; before that there is nothing to load.
    @pytest.mark.parametrize(("moment", "expected"), [("prepare_load", 0), ("poll", HIT), ("copy_in", HIT)])
    def test_a_daemon_that_dies_in_the_middle_of_a_load_changes_no_answer(
        self, engine: Engine, daemon: Served, reference: Reference, moment: str, expected: int
    ) -> None:
        prompt = self.stored(engine, reference, daemon, 12)
        owner = engine.worker._device if moment == "copy_in" else engine.half.store
        original = getattr(owner, moment)

        def kill_first(*arguments: Any, **keywords: Any) -> Any:
            daemon.kill()
            return original(*arguments, **keywords)

        setattr(owner, moment, kill_first)
        try:
            assert self.ask(engine, reference, prompt) == expected
        finally:
            delattr(owner, moment)
            daemon.start()

    def test_a_daemon_that_freezes_costs_each_thread_one_call(
        self, engine: Engine, daemon: Served, reference: Reference
    ) -> None:
        prompt = self.stored(engine, reference, daemon, 13)
        others = [make_prompt(300, 130 + seed) for seed in range(4)]
        daemon.signal(signal.SIGSTOP)
        try:
            with counted_calls() as calls:
                assert [self.ask(engine, reference, one) for one in (prompt, *others)] == [0] * 5
            assert {num for name, num in calls.items() if name != SEEKER} == {1}
        finally:
            daemon.signal(signal.SIGCONT)

        assert self.stored(engine, reference, daemon, 13) == prompt

    def test_many_requests_while_the_daemon_comes_and_goes(
        self, engine: Engine, daemon: Served, reference: Reference
    ) -> None:
        prompts = [make_prompt(300, 100 + seed) for seed in range(12)]
        for _ in range(3):
            daemon.kill()
            reference.check(engine.generate(prompts), prompts)
            daemon.start()
            reference.check(engine.generate(prompts), prompts)

        assert self.stored(engine, reference, daemon, 14)
        assert daemon.stats()["leases"] == 0
        assert engine.scheduler.connector._hook_errors == 0


def test_an_engine_that_is_killed_leaves_no_lease(
    daemon: Served, model_of: Callable[[str], str], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 21)
    with EngineProcess(model_of("gqa"), daemon.extra) as survivor:
        doomed = EngineProcess(model_of("gqa"), daemon.extra)
        doomed.ask(prompt)
        doomed.kill()
        doomed.close_pipes()
        wait_until(lambda: daemon.stats()["leases"] == 0, "leases of a dead engine are kept")

        answer = survivor.ask(prompt)

    reference.check([answer], [prompt])
    assert answer["cached"] == HIT


def test_a_daemon_that_is_not_there_ends_the_start(open_engine: Callable[..., Engine], tmp_path: Path) -> None:
    nowhere = {"service": {"url": f"unix://{tmp_path}/none.sock"}}
    with pytest.raises(Exception, match="no daemon answers there"):
        open_engine(nowhere)

    engine = open_engine({**nowhere, "require_daemon": False})
    assert engine.ask(make_prompt(100, 1))["cached"] == 0
    assert engine.scheduler.connector._hook_errors == 0

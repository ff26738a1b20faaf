from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connectors.llamacpp.states import SlotStates
from kvstore.llamacpp.server import ServerGone
from kvstore.tiers.memory import MemoryTier
from tests.helpers.daemons import LocalDaemon, daemon_config
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.llama_front import BLOCK, HEAD, forget_slots, fronted, until
from tests.helpers.llama_server import FakeLlama
from tests.helpers.stores import redis_like, store_over


async def test_a_slot_of_another_tenant_that_cannot_be_emptied_is_not_reused(llama: FakeLlama) -> None:
    async with fronted(llama) as client:
        await client.ask(HEAD + "one", kvstore={"tenant": "a"})
        await client.ask(HEAD + "two", kvstore={"tenant": "a"})
        llama.slots = [[ord(letter) for letter in HEAD] for _ in llama.slots]
        llama.cannot_erase = True

        theirs = await client.ask(HEAD + "one", kvstore={"tenant": "b"})
        past = await client.ask(HEAD + "one", kvstore={"tenant": "b", "cache": False})

        await client.ask("x" * BLOCK, kvstore={"tenant": "b"})  # each in the slot that was unused longest
        own = await client.ask("x" * BLOCK, kvstore={"tenant": "b"})

    assert own["usage"]["prompt_tokens_details"]["cached_tokens"] == BLOCK - 1
    assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert past["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("action", ["restore", "erase", "adapters"])
async def test_a_server_that_is_too_busy_for_its_slots_answers_the_request_all_the_same(
    llama: FakeLlama, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    async with fronted(llama) as client:
        await client.ask(HEAD + "one")
        await forget_slots(llama, client)

        async def too_late(*args: object) -> None:
            raise ServerGone("llama-server does not answer within 60 s")

        monkeypatch.setattr(client.front.seat.server, action, too_late)
        answer = await client.ask(HEAD + "two")
        stats = await client.get("/v1/stats")

    assert (answer["kvstore"]["restored_tokens"] > 0) == (action == "erase")
    assert stats["slots_free"] == 2


class TestStoreAway:
    @pytest.mark.parametrize("calls", [("contains",), ("read_into",)])
    async def test_a_tier_that_hangs_costs_its_deadline_once_and_no_answer(
        self, llama: FakeLlama, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...]
    ) -> None:
        async with fronted(llama) as client:
            served = client.front.seat.served
            assert served.states is not None
            layout = served.states.store.layout
            _, plan = redis_like()
            faulty = FaultyTier(MemoryTier(128, layout.slot_bytes, name=plan.name))
            store = store_over([(faulty, plan)], layout=layout, timeout_s=0.2, num_slots=11, load_deadline_s=0.2)
            served.states.store.close()
            served.states = SlotStates(store, served.states.shape, client.front.seat.counters)
            await client.ask(HEAD + "one")
            await client.ask("x" * len(HEAD))  # takes the host's slots
            await forget_slots(llama, client)
            waits: list[str] = []
            for name in ("wait_lookup", "wait"):
                monkeypatch.setattr(store, name, _noting(waits, name, getattr(store, name)))
            faulty.hang(only=calls)

            answer = await client.ask(HEAD + "two")
            faulty.recover()

        assert answer["kvstore"]["restored_tokens"] <= BLOCK  # what the host had kept
        assert waits.count("wait_lookup") == 1
        assert waits.count("wait") <= 1
        assert llama.wrong_rows == 0

    async def test_a_daemon_that_is_gone_is_waited_for_by_no_request(self, llama: FakeLlama, tmp_path: Path) -> None:
        socket = tmp_path / "kvd.sock"
        config = daemon_config(socket)
        daemon = LocalDaemon(config)
        async with fronted(llama, service={"url": f"unix://{socket}", "retry_max_s": 0.1}) as client:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            warm = await client.ask(HEAD + "two")
            await asyncio.to_thread(daemon.stop)
            await forget_slots(llama, client)
            without = [await client.ask(HEAD + number) for number in "345"]
            daemon = LocalDaemon(config)
            await until(lambda: client.front.seat.served.states.store.num_attached == 2)  # type: ignore[union-attr]
            again = await client.ask("y" + HEAD)
            await forget_slots(llama, client)
            back = await client.ask("y" + HEAD + "z")
        daemon.stop()

        assert warm["kvstore"]["restored_tokens"] == len(HEAD)
        assert [answer["kvstore"]["restored_tokens"] for answer in (*without, again, back)] == [0, 0, 0, 0, len(HEAD)]

    async def test_a_store_that_raises_is_a_store_that_has_nothing(
        self, llama: FakeLlama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            states = client.front.seat.served.states
            assert states is not None
            for name in ("request", "lookup", "prepare_load", "prepare_save", "observe_prefill"):
                with monkeypatch.context() as patched:
                    patched.setattr(states.store, name, _raising)
                    await client.ask(HEAD + name * BLOCK)
                    await forget_slots(llama, client)
            stats = await client.get("/v1/stats")

        assert stats["load_failures"] == 3
        assert stats["save_failures"] > 0
        assert stats["slots_free"] == 2


def _raising(*_: object, **__: object) -> None:
    raise RuntimeError("a fault of the store's")


def _noting(into: list[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*arguments: Any, **named: Any) -> Any:
        into.append(name)
        return call(*arguments, **named)

    return noting

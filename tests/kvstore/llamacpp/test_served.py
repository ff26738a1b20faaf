from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.llamacpp.server import LlamaServer
from tests.helpers.llama_front import HEAD, Client, forget_slots, fronted, started_anew
from tests.helpers.llama_server import FakeLlama


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"path": tmp_path / "disk", "capacity_bytes": 1 << 20}


def meanwhile(client: Client, llama: FakeLlama, action: str, **changes: Any) -> list[FakeLlama]:
    """Start the server anew, once, just before it is asked to save or restore a slot; it comes into the list."""
    others: list[FakeLlama] = []
    server = client.front.seat.server
    ask = getattr(server, action)

    async def asked(slot: int, path: Path) -> None:
        if not others:
            others.append(await started_anew(llama, **changes))
            others[0].slots = [list(tokens) for tokens in llama.slots]
        await ask(slot, path)

    setattr(server, action, asked)
    return others


async def test_a_witness_of_too_few_tokens_identifies_nothing(
    llama: FakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LlamaServer.save

    async def short(self: LlamaServer, slot: int, path: Path) -> None:
        llama.slots[slot] = llama.slots[slot][:3]
        await save(self, slot, path)

    monkeypatch.setattr(LlamaServer, "save", short)
    async with fronted(llama) as client:
        await client.ask(HEAD)
        stats = await client.get("/v1/stats")

    assert "has saved 3 tokens" in stats["off"]


class TestStartedAnew:
    async def test_with_a_setting_that_it_does_not_tell_it_shares_no_page(
        self, llama: FakeLlama, disk: dict[str, Any]
    ) -> None:
        async with fronted(llama, disk=disk) as client:
            await client.ask(HEAD + "one")
            other = await started_anew(llama, rope="yarn")

            theirs = [await client.ask(HEAD + tail) for tail in ("two", "three")]
            await forget_slots(other, client)
            ours = await client.ask(HEAD + "four")
            await other.stop()

        assert [answer["kvstore"]["restored_tokens"] for answer in theirs] == [0, 0]
        assert ours["kvstore"]["restored_tokens"] == len(HEAD)
        assert other.wrong_rows == 0

    async def test_with_other_weights_in_the_same_file_it_shares_no_page(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            (llama.folder / "model.gguf").write_bytes(b"GGUF" + bytes(1001))

            await client.ask(HEAD + "two")  # is found out while it is on its way
            await forget_slots(llama, client)
            again = await client.ask(HEAD + "three")

        assert llama.restored == []
        assert again["kvstore"]["restored_tokens"] == 0

    async def test_between_the_question_and_the_restore_its_slot_is_emptied(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            others = meanwhile(client, llama, "restore", rope="yarn")

            answer = await client.ask(HEAD + "two")
            await others[0].stop()

        assert others[0].restored == [len(HEAD)]
        assert answer["kvstore"]["restored_tokens"] == 0
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_between_the_answer_and_the_save_nothing_is_stored(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            others = meanwhile(client, llama, "save", rope="yarn")

            await client.ask(HEAD + "one")
            stats = await client.get("/v1/stats")
            await others[0].stop()

        assert others[0].saves == 1
        assert stats["saved_pages"] == 0

    @pytest.mark.parametrize(
        ("changes", "why"), [({"has_slots": False}, "--slot-save-path"), ({"cut_bytes": 3}, "cut")]
    )
    async def test_as_one_whose_states_cannot_be_stored_it_answers_all_the_same(
        self, llama: FakeLlama, changes: dict[str, Any], why: str
    ) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            other = await started_anew(llama, **changes)

            await client.ask(HEAD + "two")  # is found out while it is on its way
            answer = await client.ask(HEAD + "three")
            stats = await client.get("/v1/stats")
            await other.stop()

        assert answer["kvstore"]["restored_tokens"] == 0
        assert why in stats["off"]

    async def test_it_is_trusted_again(self, llama: FakeLlama) -> None:
        llama.forgets = True
        async with fronted(llama) as client:
            for number in range(4):
                await client.ask(HEAD + f"{number}")
                await forget_slots(llama, client)
            distrusted = await client.get("/v1/stats")
            client.front.seat.is_lost()
            other = await started_anew(llama)

            await client.ask(HEAD + "two")
            stats = await client.get("/v1/stats")
            await other.stop()

        assert distrusted["off"]
        assert stats["off"] == ""
        assert stats["restores"]["full"] == 1

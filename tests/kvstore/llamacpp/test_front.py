from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.llamacpp.front import FrontSettings, LlamaFront
from kvstore.llamacpp.seat import LlamaSeat
from kvstore.llamacpp.server import LlamaServer
from tests.helpers.llama_front import BLOCK, HEAD, forget_slots, fronted, until
from tests.helpers.llama_server import FakeLlama


class TestRestoring:
    async def test_a_stored_prefix_is_restored_and_not_computed_again(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            cold = await client.ask(HEAD + "one")
            await forget_slots(llama, client)

            warm = await client.ask(HEAD + "two")

        assert cold["kvstore"]["restored_tokens"] == 0
        assert warm["kvstore"]["restored_tokens"] == len(HEAD)
        assert warm["kvstore"]["restore"] == "full"
        assert warm["kvstore"]["hit_tokens"]["host"] == len(HEAD)
        assert warm["usage"]["prompt_tokens_details"] == {"cached_tokens": len(HEAD)}
        assert llama.wrong_rows == 0

    async def test_the_text_of_a_completion_is_cut_into_tokens_once(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")

        assert llama.bodies[-1]["prompt"] == [ord(letter) for letter in HEAD + "one"]

    async def test_a_router_is_told_the_name_and_what_would_have_to_be_computed(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            before = len(llama.bodies)

            in_a_slot = await client.post("/v1/lookup", prompt=HEAD + "one, and more")
            await forget_slots(llama, client)
            stored = await client.post("/v1/lookup", prompt=HEAD + "two")
            other_tenant = await client.post("/v1/lookup", prompt=HEAD + "two", kvstore={"tenant": "b"})
            ready = await client.get("/readyz")

        length = len(HEAD) + 3
        nothing = {"shared_tokens": 0, "queued_tokens": 0}
        assert in_a_slot == (200, {"prompt_tokens": length + 10, "hit_tokens": length, **nothing})
        assert stored == (200, {"prompt_tokens": length, "hit_tokens": len(HEAD), **nothing})
        assert other_tenant[1]["hit_tokens"] == 0
        assert ready == {"status": "ok", "name": "llamacpp"}
        assert len(llama.bodies) == before

    async def test_metrics_have_the_names_of_every_replica(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await client.ask(HEAD + "one more")
            await forget_slots(llama, client)
            await client.ask(HEAD + "two")
            text = await client.text("/metrics")

        assert 'kvstore_replica_requests_total{status="200"} 3.0' in text
        assert f'kvstore_replica_hit_tokens_total{{tier="host"}} {len(HEAD):.1f}' in text
        assert f'kvstore_replica_hit_tokens_total{{tier="engine"}} {len(HEAD) + 3:.1f}' in text

    async def test_what_is_in_the_slots_is_told_to_nobody(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "a secret")

            told = await client.get("/slots")

        assert told["error"]["message"] == "not found"

    async def test_pages_survive_the_front_on_disk(self, llama: FakeLlama, tmp_path: Path) -> None:
        disk = {"path": tmp_path / "disk", "capacity_bytes": 1 << 20}
        async with fronted(llama, disk=disk) as client:
            await client.ask(HEAD + "one")
        llama.slots = [[], []]

        async with fronted(llama, disk=disk) as client:
            warm = await client.ask(HEAD + "two")

        assert warm["kvstore"]["hit_tokens"]["disk"] == len(HEAD)
        assert llama.wrong_rows == 0

    async def test_prompts_with_a_common_head_share_its_pages(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            for number in range(10):
                await client.ask(HEAD + f"{number}" * BLOCK)
            stats = await client.get("/v1/stats")

        assert stats["saved_pages"] == len(HEAD) // BLOCK + 10

    async def test_a_slot_that_has_more_than_is_stored_is_used_as_it_is(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await client.ask("something else")

            again = await client.ask(HEAD + "one more")

        assert again["kvstore"]["restored_tokens"] == 0
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > len(HEAD)

    async def test_chats_and_answers_are_stored_too(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            first = {"role": "user", "content": HEAD}
            _, answer = await client.post("/v1/chat/completions", messages=[first])
            await forget_slots(llama, client)
            more = [first, {"role": "assistant", "content": "b"}]
            _, warm = await client.post("/v1/chat/completions", messages=more)

        assert answer["kvstore"]["restored_tokens"] == 0
        assert warm["kvstore"]["restored_tokens"] == (len("<user>") + len(HEAD)) // BLOCK * BLOCK

    async def test_nothing_new_is_not_saved_again(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            saves = llama.saves
            await client.ask(HEAD + "two")

        assert llama.saves == saves

    async def test_files_of_slots_are_removed(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD)
            await forget_slots(llama, client)
            await client.ask(HEAD + "two")

        assert list(llama.folder.glob("kvstore-*")) == []

    async def test_a_page_that_is_damaged_on_disk_is_computed(self, llama: FakeLlama, tmp_path: Path) -> None:
        disk = {"path": tmp_path / "disk", "capacity_bytes": 1 << 20}
        async with fronted(llama, disk=disk) as client:
            await client.ask(HEAD + "one")
        llama.slots = [[], []]
        for file in (tmp_path / "disk").rglob("*.slab"):
            data = bytearray(file.read_bytes())
            data[::64] = bytes(byte ^ 1 for byte in data[::64])
            file.write_bytes(data)

        async with fronted(llama, disk=disk) as client:
            again = await client.ask(HEAD + "two")

        assert again["kvstore"]["restored_tokens"] == 0
        assert llama.wrong_rows == 0


class TestTrust:
    async def test_a_restore_without_effect_is_told_and_soon_not_tried_again(self, llama: FakeLlama) -> None:
        llama.forgets = True
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            answers = []
            for number in range(4):
                await forget_slots(llama, client)
                answers.append(await client.ask(HEAD + f"{number}"))
            stats = await client.get("/v1/stats")

        assert [answer["kvstore"]["restore"] for answer in answers] == ["none", "none", "", ""]
        assert answers[0]["usage"]["restored_tokens"] == len(HEAD)
        assert answers[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert len(llama.restored) == 2
        assert "--swa-full" in stats["off"]

    async def test_what_another_client_left_in_a_slot_is_not_stored(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask("short")
            await client.ask("small")
            llama.slots = [[ord(letter) for letter in HEAD], [ord(letter) for letter in HEAD]]  # how, nobody knows

            await client.ask(HEAD + "one")
            stats = await client.get("/v1/stats")

        assert stats["foreign_answers"] == 1
        assert stats["saved_pages"] == 0

    async def test_a_file_cut_short_is_not_stored(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            llama.cut_bytes = 7
            await client.ask(HEAD + "one")
            stats = await client.get("/v1/stats")

        assert stats["saved_pages"] == 0
        assert stats["unsaved"] == {"UnsliceableState": 1}

    async def test_what_another_client_added_before_the_save_is_not_stored(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            save = client.front.seat.server.save

            async def late(slot: int, path: Path) -> None:
                llama.slots[slot] += [ord(letter) for letter in HEAD]
                await save(slot, path)

            client.front.seat.server.save = late  # type: ignore[method-assign]
            await client.ask(HEAD)
            stats = await client.get("/v1/stats")

        assert stats["saved_pages"] == 0
        assert stats["unsaved"] == {"UnsliceableState": 1}

    async def test_another_server_at_the_same_address_shares_no_page(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            llama.props = {**llama.props, "build_info": "b2-fake"}
            await client.ask(HEAD + "two")  # is found out while it is on its way
            await forget_slots(llama, client)
            again = await client.ask(HEAD + "three")

        assert llama.restored == []
        assert again["kvstore"]["restored_tokens"] == 0

    async def test_tenants_see_neither_pages_nor_slots_of_each_other(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one", kvstore={"tenant": "a"})
            await client.ask("other", kvstore={"tenant": "a"})

            theirs = await client.ask(HEAD + "one", kvstore={"tenant": "b"})

        assert theirs["kvstore"]["restored_tokens"] == 0
        assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


class TestForwarding:
    async def test_a_stream_is_passed_on_and_told_of_at_its_end(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client, aiohttp.ClientSession() as session:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            body = {"prompt": HEAD + "two", "stream": True}
            async with session.post(client.front.site.url + "/v1/completions", json=body) as answer:
                lines = [line for line in (await answer.text()).split("\n\n") if line]
            await client.settle()

        assert len(lines) == 3
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[1].removeprefix("data: "))["kvstore"]["restored_tokens"] == len(HEAD)

    async def test_a_stream_that_ends_early_is_not_taken_for_a_whole_answer(self, llama: FakeLlama) -> None:
        llama.ends = True
        async with fronted(llama) as client, aiohttp.ClientSession() as session:
            body = {"prompt": HEAD, "stream": True}
            async with session.post(client.front.site.url + "/v1/completions", json=body) as answer:
                *_, last = [line for line in (await answer.text()).split("\n\n") if line]
            await client.settle()

        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_lost"

    async def test_a_client_that_leaves_gives_its_slot_back(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            llama.hold.clear()
            gone = asyncio.ensure_future(client.post(prompt=HEAD))
            await until(lambda: len(llama.bodies) == 2)  # the first one is the witness
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            await client.settle()
            llama.hold.set()

            assert (await client.ask("another"))["usage"]["prompt_tokens"] == 7

    async def test_requests_beyond_the_slots_wait_and_are_answered(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            answers = await asyncio.gather(*(client.ask(HEAD[number:] + "x" * number) for number in range(8)))

        assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(HEAD)] * 8
        assert {body["id_slot"] for body in llama.bodies} == {0, 1}

    async def test_what_the_store_cannot_do_for_is_forwarded_all_the_same(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            for body in ({"lora": [{"id": 0, "scale": 1}]}, {"cache_prompt": False}, {"kvstore": {"cache": False}}):
                await client.ask(HEAD, **body)
            stats = await client.get("/v1/stats")

        assert llama.bodies[-2]["cache_prompt"] is False
        assert (stats["requests"], stats["saved_pages"]) == (0, 0)

    async def test_errors_of_the_server_are_its_own_words(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client:
            status, found = await client.post(prompt="x" * 4001)

        assert (status, found["error"]["message"]) == (400, "too long")

    @pytest.mark.parametrize(
        ("body", "names"),
        [({"prompt": "x", "n": 2}, "n"), ({"prompt": [[1], [2]]}, "prompt"), ({"kvstore": {"tenent": 1}}, "tenent")],
    )
    async def test_a_request_that_cannot_be_served_is_told_which_field(
        self, llama: FakeLlama, body: dict[str, Any], names: str
    ) -> None:
        async with fronted(llama) as client:
            status, found = await client.post(**body)

        assert status == 400
        assert names in found["error"]["message"]

    async def test_a_server_that_is_gone_is_told_and_found_again(self, llama: FakeLlama, tmp_path: Path) -> None:
        async with fronted(llama) as client:
            await client.ask(HEAD + "one")
            port = int(llama.url.rpartition(":")[2])
            await llama.stop()
            status, found = await client.post(prompt=HEAD)
            other = await FakeLlama(llama.folder).start(port)

            warm = await client.ask(HEAD + "two")
            await other.stop()

        assert (status, found["error"]["code"]) == (503, "server_gone")
        assert warm["kvstore"]["restored_tokens"] == len(HEAD)

    async def test_metrics_tell_where_tokens_came_from(self, llama: FakeLlama) -> None:
        async with fronted(llama) as client, aiohttp.ClientSession() as session:
            await client.ask(HEAD + "one")
            await forget_slots(llama, client)
            await client.ask(HEAD + "two")
            async with session.get(client.front.site.url + "/metrics") as answer:
                text = await answer.text()

        assert f'kvstore_llamacpp_prompt_tokens_total{{source="host"}} {float(len(HEAD))}' in text
        assert 'kvstore_llamacpp_restores_total{effect="full"} 1.0' in text
        assert "kvstore_lookups_total" in text


class TestBadServers:
    async def test_one_that_saves_no_slots_is_told_what_to_do(self, llama: FakeLlama) -> None:
        llama.has_slots = False
        with pytest.raises(ConfigError, match="--slot-save-path DIR"):
            async with fronted(llama):
                pass

    async def test_one_that_saves_elsewhere_is_told_what_to_do(self, llama: FakeLlama, tmp_path: Path) -> None:
        served = llama.folder
        llama.folder = tmp_path / "elsewhere"
        llama.folder.mkdir()
        front = LlamaFront(
            FrontSettings(port=0), LlamaSeat(LlamaServer(llama.url, served), Config(), weights="sampled")
        )
        with pytest.raises(ConfigError, match="--slots DIR"):
            await front.open()
        await front.close()

    async def test_one_that_counts_nothing_is_refused(self, llama: FakeLlama) -> None:
        llama.has_timings = False
        with pytest.raises(ConfigError, match="cache_n"):
            async with fronted(llama):
                pass

    async def test_one_that_is_no_llama_server_is_refused(self, llama: FakeLlama) -> None:
        llama.props = {"hello": "world"}
        with pytest.raises(ConfigError, match="no llama-server"):
            async with fronted(llama):
                pass

    async def test_one_that_is_not_there_is_told(self, llama: FakeLlama) -> None:
        await llama.stop()
        with pytest.raises(Exception, match="cannot be reached"):
            async with fronted(llama):
                pass

    async def test_a_model_file_that_is_gone_is_told_what_to_do(self, llama: FakeLlama) -> None:
        (llama.folder / "model.gguf").unlink()
        with pytest.raises(ConfigError, match="--model FILE"):
            async with fronted(llama):
                pass

    async def test_a_state_that_cannot_be_cut_is_told_and_served_without_the_store(self, llama: FakeLlama) -> None:
        llama.cut_bytes = 3
        async with fronted(llama) as client:
            answer = await client.ask(HEAD)
            stats = await client.get("/v1/stats")

        assert answer["kvstore"]["restored_tokens"] == 0
        assert "cannot be cut" in stats["off"]

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from kvstore.errors import ConfigError
from kvstore.vllm import engine, front
from kvstore.vllm.engine import VllmEngine
from kvstore.vllm.front import VllmFront, VllmFrontSettings
from tests.helpers.llama_front import until
from tests.helpers.vllm_server import FakeVllm


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    server = await FakeVllm().start()
    yield server
    await server.stop()


class Client:
    """Asks a front."""

    def __init__(self, front: VllmFront, session: aiohttp.ClientSession) -> None:
        self.front = front
        self._session = session

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, str], bytes]:
        async with self._session.post(self.front.site.url + path, json=body) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    async def ask(self, prompt: Any, **body: Any) -> dict[str, Any]:
        status, _, raw = await self.post(prompt=prompt, **body)
        assert status == 200, raw
        found: dict[str, Any] = json.loads(raw)
        return found

    async def get(self, path: str) -> tuple[int, str]:
        async with self._session.get(self.front.site.url + path) as answer:
            return answer.status, await answer.text()


@pytest.fixture
async def make(vllm: FakeVllm) -> AsyncIterator[Any]:
    fronts: list[VllmFront] = []
    async with aiohttp.ClientSession() as session:

        async def make_one(**settings: Any) -> Client:
            front = VllmFront(VllmFrontSettings(port=0, **{"drain_s": 0.0, **settings}), VllmEngine(vllm.url))
            fronts.append(front)
            await front.open()
            return Client(front, session)

        yield make_one
        vllm.hold.set()
        for front in fronts:
            await front.close()


def events(raw: bytes) -> list[dict[str, Any]]:
    lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


class TestAnswers:
    async def test_an_answer_says_who_gave_it_and_what_was_cached(self, vllm: FakeVllm, make: Any) -> None:
        vllm.cached = 64
        client = await make(name="replica-7")

        status, headers, raw = await client.post(prompt="x" * 100, max_tokens=4)
        answer = json.loads(raw)

        assert (status, headers["X-KVStore-Replica"]) == (200, "replica-7")
        assert answer["kvstore"] == {"replica": "replica-7", "cached_tokens": 64, "ttft_s": 0.0}
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}

    async def test_a_stream_has_the_usage_only_if_the_client_asked_for_it(self, make: Any) -> None:
        client = await make()

        _, _, plain = await client.post(prompt="hello", max_tokens=3, stream=True)
        _, _, with_usage = await client.post(
            prompt="hello", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )

        assert len(events(plain)) == 3
        assert next(event for event in events(with_usage) if "usage" in event)["kvstore"]["replica"] == "vllm"
        assert plain.endswith(b"data: [DONE]\n\n")

    async def test_what_vllm_refuses_is_passed_on_as_it_said_it(self, make: Any) -> None:
        client = await make()

        status, _, raw = await client.post(prompt="hello", max_tokens=13)

        assert (status, json.loads(raw)["error"]["message"]) == (400, "unlucky")
        assert client.front.books.num_inside == 0

    async def test_a_stream_that_breaks_ends_with_an_error_event(self, vllm: FakeVllm, make: Any) -> None:
        vllm.breaks = True
        client = await make()

        _, _, raw = await client.post(prompt="hello", max_tokens=3, stream=True)

        assert events(raw)[-1]["error"]["code"] == "engine_lost"
        assert b"[DONE]" not in raw

    async def test_a_stream_that_ends_early_is_not_taken_for_a_whole_answer(self, vllm: FakeVllm, make: Any) -> None:
        vllm.ends = True
        client = await make()

        _, _, raw = await client.post(prompt="hello", max_tokens=3, stream=True)

        assert events(raw)[-1]["error"]["code"] == "engine_lost"

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_engine_that_hangs_is_given_up_with_what_it_has(
        self, vllm: FakeVllm, make: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
    ) -> None:
        monkeypatch.setattr(engine, "LOOK_TIMEOUT_S", 0.2)
        monkeypatch.setattr(front, "LOOK_S", 0.01)
        vllm.hold.clear()
        client = await make()
        asked = asyncio.ensure_future(client.post(prompt="hello", max_tokens=3, stream=stream))
        await until(lambda: len(vllm.bodies) == 1)
        vllm.hangs = True

        await until(lambda: client.front.books.num_inside == 0)
        status, _, raw = await asked

        assert (status, json.loads(raw)["error"]["code"] if status == 503 else events(raw)[-1]["error"]["code"]) == (
            (200, "engine_lost") if stream else (503, "engine_gone")
        )
        assert (await client.get("/readyz"))[0] == 503
        vllm.hangs = False
        vllm.hold.set()
        await client.front.look()
        assert (await client.get("/readyz"))[0] == 200
        await client.ask("hello")

    async def test_a_client_that_leaves_gives_its_tokens_back(self, vllm: FakeVllm, make: Any) -> None:
        vllm.hold.clear()
        client = await make()
        asked = asyncio.ensure_future(client.post(prompt="hello", max_tokens=3))
        await until(lambda: client.front.books.num_inside == 1)

        asked.cancel()

        await until(lambda: client.front.books.num_inside == 0)
        assert client.front.books.admission.tokens == 0
        assert "kvstore_replica_cancelled_total 1.0" in (await client.get("/metrics"))[1]

    async def test_an_engine_that_is_gone_is_a_503_and_not_ready(self, vllm: FakeVllm, make: Any) -> None:
        client = await make()
        ready = await client.get("/readyz")
        await vllm.stop()

        status, headers, raw = await client.post(prompt="hello")

        assert ready[0] == 200
        assert (status, json.loads(raw)["error"]["code"], headers["Retry-After"]) == (503, "engine_gone", "1")
        assert (await client.get("/readyz"))[0] == 503

    async def test_a_server_that_is_no_vllm_is_told(self, vllm: FakeVllm) -> None:
        nowhere = VllmEngine(f"{vllm.url}/nowhere")
        try:
            with pytest.raises(ConfigError, match="it is no vLLM server; give the address of one: --url"):
                await nowhere.identify()
        finally:
            await nowhere.close()


class TestTheCache:
    async def test_tenants_and_no_cache_are_salts_of_vllms(self, vllm: FakeVllm, make: Any) -> None:
        client = await make()

        await client.ask("hello", kvstore={"tenant": "acme", "session": "s", "ttl_s": 60})
        await client.ask("hello", kvstore={"cache": False})
        await client.ask("hello", kvstore={"cache": False})
        await client.ask("hello")

        first, second, third, plain = vllm.bodies
        assert first["cache_salt"] == "tenant:4:acme:"
        assert first["kv_transfer_params"] == {"kvstore": {"session": "s", "ttl_s": 60.0}}
        assert second["kv_transfer_params"] == {"kvstore": {"cache": False}}
        assert second["cache_salt"] != third["cache_salt"]
        assert not {"kvstore", "cache_salt", "kv_transfer_params"} & plain.keys()

    async def test_no_choice_of_salt_and_tenant_is_another_tenants(self, vllm: FakeVllm, make: Any) -> None:
        client = await make()
        same = [("a", "b:c"), ("a:b", "c"), ("", "a:b:c"), ("", "tenant:a:b:c"), ("", "tenant:1:a:b:c"), ("a", "")]

        for tenant, own in (*same, ("a", "b:c")):
            await client.ask("hello", kvstore={"tenant": tenant}, **({"cache_salt": own} if own else {}))

        salts = [body["cache_salt"] for body in vllm.bodies]
        assert len(set(salts)) == len(same)
        assert salts[0] == salts[-1]

    async def test_a_salt_that_is_none_is_told(self, make: Any) -> None:
        client = await make()

        status, _, raw = await client.post(prompt="hello", cache_salt=["a"], kvstore={"tenant": "a"})

        assert (status, json.loads(raw)["error"]["param"]) == (400, "cache_salt")

    async def test_a_wrong_extension_is_told_by_its_field(self, make: Any) -> None:
        client = await make()

        status, _, raw = await client.post(prompt="hello", kvstore={"cash": True})

        assert (status, json.loads(raw)["error"]["param"]) == (400, "kvstore.cash")

    async def test_a_router_is_told_what_was_sent_here_lately(self, make: Any) -> None:
        client = await make()
        await client.ask("x" * 200)

        async def hits(**body: Any) -> int:
            _, _, raw = await client.post("/v1/lookup", **body)
            found = json.loads(raw)
            assert found["queued_tokens"] == 0
            return int(found["hit_tokens"])

        assert await hits(prompt="x" * 150) == 128
        assert await hits(prompt="y" * 150) == 0
        assert await hits(prompt="x" * 150, kvstore={"tenant": "other"}) == 0
        assert await hits(prompt="x" * 150, cache_salt="other") == 0


class TestAdmission:
    async def test_more_than_may_wait_get_a_429_with_its_reason_before_vllm_is_asked(
        self, vllm: FakeVllm, make: Any
    ) -> None:
        vllm.hold.clear()
        client = await make(max_running=1, max_queue=1)
        inside = [asyncio.ensure_future(client.post(prompt="hello", max_tokens=4)) for _ in range(2)]
        await until(lambda: client.front.books.num_inside == 2)

        status, headers, raw = await client.post(prompt="hello", max_tokens=4)
        vllm.hold.set()
        answered = [(await one)[0] for one in inside]

        assert (status, json.loads(raw)["error"]["code"]) == (429, "queue_full")
        assert int(headers["Retry-After"]) >= 1
        assert answered == [200, 200]
        assert len(vllm.bodies) == 2
        assert 'kvstore_replica_refusals_total{reason="queue_full"} 1.0' in (await client.get("/metrics"))[1]

    async def test_tokens_beyond_the_budget_get_a_429_that_says_when_by_the_measured_rates(
        self, vllm: FakeVllm, make: Any
    ) -> None:
        vllm.hold.clear()
        client = await make(max_tokens=300)
        admission = client.front.books.admission
        admission.prefill.observe(1000, 10.0)
        admission.decode.observe(100, 10.0)
        inside = asyncio.ensure_future(client.post(prompt="x" * 200, max_tokens=50))
        await until(lambda: client.front.books.num_inside == 1)

        status, headers, raw = await client.post(prompt="x" * 100, max_tokens=10)
        vllm.hold.set()
        await inside

        # 250 tokens are held; 60 of them have to go, and all of them take 200/100 + 50/10 s.
        assert (status, json.loads(raw)["error"]["code"]) == (429, "token_budget")
        assert headers["Retry-After"] == "2"
        assert admission.tokens == 0

    async def test_what_can_never_fit_is_a_400(self, make: Any) -> None:
        client = await make(max_tokens=100)

        status, _, raw = await client.post(prompt="x" * 99, max_tokens=2)

        assert status == 400
        assert json.loads(raw)["error"]["code"] == "context_length_exceeded"

    @pytest.mark.parametrize(
        ("body", "tokens"),
        [
            ({"prompt": "x" * 10, "max_tokens": 5, "n": 3}, 10 + 3 * 5),
            ({"prompt": ["x" * 10, "y" * 10], "max_tokens": 5, "n": 3}, 10 + 1 + 10 + 2 * 3 * 5),
            ({"prompt": [[1] * 10, [2] * 20], "max_tokens": 5}, 30 + 2 * 5),
            ({"prompt": "x" * 10, "messages": [], "max_tokens": 5}, 10 + 5),
        ],
    )
    async def test_a_request_holds_all_its_prompts_and_all_their_answers(
        self, vllm: FakeVllm, make: Any, body: dict[str, Any], tokens: int
    ) -> None:
        vllm.hold.clear()
        client = await make()
        asked = asyncio.ensure_future(client.post(**body))
        await until(lambda: client.front.books.num_inside == 1)

        assert client.front.books.admission.tokens == tokens

        vllm.hold.set()
        await asked

    async def test_a_request_that_names_no_limit_holds_no_more_than_there_is(self, make: Any) -> None:
        client = await make(max_tokens=100)

        status, _, _ = await client.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 90}])

        assert status == 200

    async def test_after_the_end_was_asked_for_nothing_is_let_in(self, vllm: FakeVllm, make: Any) -> None:
        vllm.hold.clear()
        client = await make(drain_s=20.0)
        inside = asyncio.ensure_future(client.post(prompt="hello", max_tokens=2))
        await until(lambda: client.front.books.num_inside == 1)
        closing = asyncio.ensure_future(client.front.close())
        await until(lambda: client.front.is_draining)

        status, _, _ = await client.post(prompt="hello")
        vllm.hold.set()
        answered = (await inside)[0]
        await closing

        assert (status, answered) == (503, 200)


async def test_metrics_are_those_of_a_replica_from_vllms_counters_and_vllms_own_beside_them(
    vllm: FakeVllm, make: Any
) -> None:
    client = await make()
    vllm.counters |= {
        "vllm:prompt_tokens_total": 500,
        "vllm:generation_tokens_total": 20,
        'vllm:prompt_tokens_by_source_total{source="local_cache_hit"}': 100,
        'vllm:kvstore_hit_tokens_total{tier="redis"}': 64,
    }
    await client.front.look()

    _, text = await client.get("/metrics")

    for line in (
        "kvstore_replica_prompt_tokens_total 500.0",
        "kvstore_replica_new_tokens_total 20.0",
        'kvstore_replica_hit_tokens_total{tier="redis"} 64.0',
        'kvstore_replica_hit_tokens_total{tier="engine"} 100.0',
        "vllm:prompt_tokens_total 500",
    ):
        assert f"\n{line}\n" in f"\n{text}\n"


async def test_metrics_that_are_not_told_for_once_are_not_counted_twice(vllm: FakeVllm, make: Any) -> None:
    client = await make()
    vllm.counters["vllm:prompt_tokens_total"] = 500
    await client.front.look()
    vllm.tells = 500
    await client.front.look()
    vllm.tells = 200

    await client.front.look()

    assert "kvstore_replica_prompt_tokens_total 500.0" in (await client.get("/metrics"))[1]


async def test_what_a_lost_engine_counted_is_not_told_as_if_it_were_there(vllm: FakeVllm, make: Any) -> None:
    client = await make()
    before = (await client.get("/metrics"))[1]
    await vllm.stop()
    await client.front.look()

    assert "vllm:prompt_tokens_total" in before
    assert "vllm:prompt_tokens_total" not in (await client.get("/metrics"))[1]

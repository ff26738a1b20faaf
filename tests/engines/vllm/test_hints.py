"""KV hints in real engines, in both seats: what is pinned or retained survives pressure; no hint changes an answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, DTYPE, PAGE_BYTES, STORE, Engine, make_prompt, transfer_config
from tests.engines.vllm.tier_engine import TierEngine
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
NUM_SLOTS = 64
LONG = 16 * BLOCK + 5
NUM_ENVELOPES = {"connector": 700, "tier": 300}


def message(kind: str, **payload: Any) -> dict[str, Any]:
    action = {"action_id": "a", "action_type": kind, "action_version": "1.0", "payload": payload}
    return {"protocol_version": "1.0", "message_id": "m", "actions": [action]}


def ask(engine: Engine, prompt: list[int], kind: str = "", max_tokens: int = 8, **payload: Any) -> dict[str, Any]:
    """Ask with a hint, if `kind` names one."""
    params = {"kv_hint": message(kind, **payload)} if kind else None
    return engine.generate([prompt], max_tokens, transfer=[params])[0]


def status(answer: dict[str, Any]) -> str:
    """What became of the only action."""
    ((outcome,),) = [answer["told"]["kv_hint"]["outcomes"]]
    return str(outcome["status"])


class TestConnector:
    @pytest.fixture(scope="class")
    def engine(self, model_of: Callable[[str], str]) -> Iterator[Engine]:
        host = {"capacity_bytes": NUM_SLOTS * PAGE_BYTES, "huge_pages": False}
        engine = Engine(model_of("gqa"), {"host": host, "hints": {"max_tenant_fraction": 0.5}, "store": STORE})
        yield engine
        engine.close()  # one engine lives at a time in a process

    def press(self, engine: Engine, seed: int) -> None:
        """Fill host memory twice over with other prompts, and empty vLLM's own cache."""
        for number in range(8):
            engine.ask(make_prompt(LONG, 1000 * seed + number), 1)
            engine.settle()
        engine.forget_own_cache()

    def kept(self, engine: Engine) -> int:
        return int(engine.half.store.stats()["kept_pages"])

    def test_of_two_sessions_under_pressure_the_pinned_one_survives(self, engine: Engine, reference: Reference) -> None:
        pinned, plain = make_prompt(LONG, 1), make_prompt(LONG, 2)
        told = ask(engine, pinned, "pin", ttl_s=300, session="agent")
        ask(engine, plain)
        engine.settle()
        assert self.kept(engine) == LONG // BLOCK

        self.press(engine, 1)
        answers = [ask(engine, pinned), ask(engine, plain)]

        reference.check(answers, [pinned, plain])
        assert [answer["cached"] for answer in answers] == [LONG // BLOCK * BLOCK, 0]
        assert status(told) == "deferred"
        assert status(ask(engine, pinned, "release")) == "accepted"
        assert self.kept(engine) == 0

    def test_a_pin_ends_by_itself_and_gives_its_memory_back(self, engine: Engine, reference: Reference) -> None:
        pinned = make_prompt(LONG, 3)
        ask(engine, pinned, "pin", ttl_s=1)
        engine.settle()
        wait_until(lambda: not self.kept(engine), "the pin does not end")

        self.press(engine, 2)
        answer = ask(engine, pinned)

        reference.check([answer], [pinned])
        assert answer["cached"] == 0
        stats = engine.half.store.stats()
        assert stats["pinned_pages"] == stats["leases"] == 0

    def test_a_budget_that_is_full_gives_a_part(self, engine: Engine) -> None:
        long = make_prompt(40 * BLOCK + 5, 4)
        ask(engine, long)
        engine.settle()

        told = ask(engine, long, "pin", ttl_s=300)

        (outcome,) = told["told"]["kv_hint"]["outcomes"]
        assert outcome["tokens"] == NUM_SLOTS // 2 * BLOCK
        assert self.kept(engine) == NUM_SLOTS // 2
        ask(engine, long, "release")

    def test_random_envelopes_change_no_answer_and_raise_nothing(self, engine: Engine) -> None:
        check_random_envelopes(engine, NUM_ENVELOPES["connector"])

        assert engine.scheduler.connector._hook_errors == 0
        engine.half.store.check()
        assert engine.half.counters["hints.accepted"] > 0

    def test_vllms_own_struct_is_read(self, engine: Engine) -> None:
        from vllm import SamplingParams
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        llm = engine.llm.llm_engine
        sent = KvHintsEnvelope("1.0", "m", [KvHintAction("a", "retain", "1.0", {"ttl_s": 60})])
        llm.add_request("s", {"prompt_token_ids": make_prompt(LONG, 5)}, SamplingParams(max_tokens=1), kv_hints=sent)
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()

        assert outputs[-1].kv_transfer_params["kv_hint"]["outcomes"][0]["action"] == "retain"


class TestTierSeat:
    @pytest.fixture(scope="class")
    def engine(self, model_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierEngine]:
        # A disk of 64 chunks: four prompts.
        disk = {"path": str(tmp_path_factory.mktemp("disk") / "pages"), "capacity_bytes": NUM_SLOTS * PAGE_BYTES}
        engine = TierEngine(model_of("gqa"), {"disk": disk, "store": {**STORE, "touch_interval_s": 0.01}})
        yield engine
        engine.close()

    def test_a_retained_prompt_is_on_disk_after_others_were_evicted(
        self, engine: TierEngine, reference: Reference
    ) -> None:
        retained, plain = make_prompt(LONG, 21), make_prompt(LONG, 22)
        ask(engine, retained, "retain", ttl_s=300)
        ask(engine, plain)
        engine.settle()
        for number in range(6):
            engine.ask(make_prompt(LONG, 2000 + number), 1)
            engine.settle()
        engine.forget()

        answers = [ask(engine, retained), ask(engine, plain)]

        reference.check(answers, [retained, plain])
        assert [answer["cached"] for answer in answers] == [LONG // BLOCK * BLOCK, 0]

    def test_a_forgotten_prompt_is_gone(self, engine: TierEngine, reference: Reference) -> None:
        prompt = make_prompt(LONG, 23)
        engine.ask(prompt)
        engine.forget()
        ask(engine, prompt, "forget")
        engine.forget()

        answer = engine.ask(prompt)

        reference.check([answer], [prompt])
        assert answer["cached"] == 0

    def test_random_envelopes_change_no_answer_and_raise_nothing(self, engine: TierEngine) -> None:
        check_random_envelopes(engine, NUM_ENVELOPES["tier"])

        assert engine.tier._num_errors == 0
        assert sum(engine.tier.core.hints.counts.values()) >= NUM_ENVELOPES["tier"]


def test_hints_reach_an_engine_in_another_process(model_of: Callable[[str], str]) -> None:
    """As a server written in Python has it: AsyncLLM, whose engine core is a process of its own."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

    extra = {"host": {"capacity_bytes": 16 * MiB, "huge_pages": False}, "store": STORE}
    arguments = AsyncEngineArgs(
        model=model_of("gqa"),
        dtype=DTYPE,
        max_model_len=4096,
        enforce_eager=True,
        block_size=BLOCK,
        kv_transfer_config=transfer_config(extra),
    )
    sent = KvHintsEnvelope("1.0", "m", [KvHintAction("a", "pin", "1.0", {"ttl_s": 60, "session": "s"})])

    async def run() -> Any:
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            prompt = {"prompt_token_ids": make_prompt(LONG, 31)}
            answers = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=2), "r", kv_hints=sent)
            return [answer async for answer in answers][-1].kv_transfer_params
        finally:
            engine.shutdown()

    told = asyncio.run(run())

    assert [one["action_id"] for one in told["kv_hint"]["outcomes"]] == ["a"]


# ---- random envelopes -----------------------------------------------------------------------------------------------

KINDS = (
    "pin",
    "retain",
    "prefetch",
    "demote",
    "release",
    "forget",
    "share",
    "kv.pin",
    "RETAIN",
    "evaporate",
    "",
    "a" * 500,
)
VERSIONS = ("1.0", "1", "v1.7", "2.0", "", "x", None, 7)
ODD = (
    None,
    True,
    -1,
    0,
    1 << 62,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    b"\xff",
    [],
    {},
    [[[]]],
    {"a": {"b": {}}},
)


def envelope(numbers: random.Random, hashes: list[str]) -> Any:
    """Any message: right, clipped, malformed, of another version, or none at all."""

    def odd_or(*right: Any) -> Any:
        """Mostly the first, sometimes another one, and sometimes anything."""
        kind = numbers.random()
        return right[0] if kind < 0.8 else numbers.choice(right if kind < 0.94 else ODD)

    def payload() -> Any:
        found: dict[str, Any] = {}
        for name, right in (
            ("ttl_s", (60, 0.05, 1e8, -60)),
            ("duration_s", (30,)),
            ("priority", (0, 50, 100)),
            ("session", ("s", "agent")),
            ("start", (0, 10, 1 << 20)),
            ("end", (32, 64, 1 << 31)),
            ("tokens", ([1, 2, 3] * 40, [-1], ["a"], [[1]])),
            ("block_hashes", (hashes, ["00" * 32], ["zz"], hashes * 1000)),
            ("ttl", (60,)),
        ):
            if numbers.random() < (0.03 if name == "ttl" else 0.2):
                found[name] = odd_or(*right)
        return odd_or(found)

    def action() -> Any:
        return odd_or(
            {
                "action_id": odd_or("a", "b", "i" * 1000),
                "action_type": odd_or(numbers.choice(KINDS), *KINDS),
                "action_version": odd_or(*VERSIONS),
                "payload": payload(),
            }
        )

    whole = {
        "protocol_version": odd_or(*VERSIONS),
        "message_id": odd_or("m", "m" * 1000),
        "actions": odd_or([action() for _ in range(numbers.choice((0, 1, 1, 2, 3, 40)))]),
    }
    if numbers.random() < 0.1:
        del whole[numbers.choice(list(whole))]
    if numbers.random() < 0.1:
        return numbers.choice((json.dumps(whole, default=str), "[" * 10_000, b"{" * 10, 7, [whole], deep(100)))
    return odd_or(whole)


def deep(depth: int) -> Any:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"actions": nested}
    return nested


def check_random_envelopes(engine: Engine, count: int) -> None:
    """Ask short prompts with random envelopes; their answers are those that they have without."""
    from vllm import SamplingParams

    numbers = random.Random(f"envelopes {count}")
    prompts = [make_prompt(2 * BLOCK + 8, 500 + number) for number in range(4)]
    expected = [engine.ask(prompt, 2)["tokens"] for prompt in prompts]
    hashes = [numbers.randbytes(32).hex() for _ in range(2)]
    asked = [numbers.randrange(4) for _ in range(count)]
    plain = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}
    sampling = [
        SamplingParams(**plain, extra_args={"kv_transfer_params": {"kv_hint": envelope(numbers, hashes)}})
        for _ in asked
    ]

    outputs = engine.llm.generate([{"prompt_token_ids": prompts[one]} for one in asked], sampling, use_tqdm=False)

    assert [list(output.outputs[0].token_ids) for output in outputs] == [expected[one] for one in asked]


def test_the_random_envelopes_hold_every_kind_of_outcome() -> None:
    """Else the tests above would say little."""
    from kvstore.hints.envelope import parse
    from kvstore.hints.limits import HintLimits
    from kvstore.hints.outcome import HintOutcome

    numbers = random.Random("kinds")
    items = [item for _ in range(1000) for item in parse(envelope(numbers, ["00" * 32]), HintLimits()).items]

    done = [item for item in items if not isinstance(item, HintOutcome)]
    refused = {(item.action, item.status.value) for item in items if isinstance(item, HintOutcome)}
    assert {item.kind.value for item in done} == {"pin", "retain", "prefetch", "demote", "release", "forget", "share"}
    assert any(item.is_clipped for item in done)
    assert {("envelope", "rejected"), ("unknown", "ignored"), ("pin", "ignored"), ("pin", "rejected")} <= refused

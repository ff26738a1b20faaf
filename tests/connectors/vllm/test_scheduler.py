"""The scheduler's half over a real store in memory, with stand-ins for vLLM's requests, blocks and pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.answers import SavedAnswers
from connectors.vllm.config import parse_extra_config
from connectors.vllm.layout import EngineLayout
from connectors.vllm.messages import IDLE_WAIT_S, StepPlan, StepReport
from connectors.vllm.scheduler import SchedulerHalf
from kvstore.build import open_store
from kvstore.config.sections import Config
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import LeaseState, LeaseStatus, LoadLease, Match, SlotPages
from kvstore.prefix.answers import AnswerForm, AnswerRules, TurnRule
from kvstore.store import LocalStore
from tests.helpers.hints import envelope
from tests.helpers.kv_pages import layout_with, plain_axes
from tests.helpers.stores import BLOCK, LAYOUT, PAGE_BYTES, namespace

ENGINE = EngineLayout(LAYOUT, (0,), (("a", "b"),), ((4096, 4096),))


class Pool:
    """vLLM's block pool as far as we use it: references per block."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=n, is_null=n == 0, references=0) for n in range(200)]

    def touch(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            block.references += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.references -= 1
            assert block.references >= 0

    @property
    def num_held(self) -> int:
        return sum(block.references for block in self.blocks)


def request(name: str, num_tokens: int, seed: int = 0) -> Any:
    """One of vLLM's, as far as we use it."""
    hashes = [bytes([seed, n]) * 16 for n in range(num_tokens // BLOCK)]
    return SimpleNamespace(
        request_id=name,
        num_tokens=num_tokens,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        block_hashes=hashes,
        kv_transfer_params=None,
        status=SimpleNamespace(name="FINISHED_STOPPED"),
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


class World:
    """A half with its surroundings."""

    def __init__(
        self,
        store: Any,
        engine: EngineLayout = ENGINE,
        world: int = 1,
        extra: dict[str, Any] | None = None,
        is_beside: bool = False,
        is_whole: bool = False,
        answers: SavedAnswers | None = None,
    ) -> None:
        self.clock = Clock()
        self.pool = Pool()
        self.store = store
        config = parse_extra_config(extra or {}, "kv_both")
        self.half = SchedulerHalf(
            store,
            engine,
            config,
            world=world,
            is_beside=is_beside,
            is_whole=is_whole,
            answers=answers,
            now=self.clock,
        )
        self.half.bind_pool(self.pool)

    def save(self, asked: Any, first_block: int = 1) -> StepPlan:
        """One step that computes all of `asked` in blocks from `first_block` on."""
        self.half.new_request(asked)
        ids = list(range(first_block, first_block + len(asked.block_hashes)))
        return self.half.plan_step({asked.request_id: asked.num_tokens}, lambda name: (ids,))

    def stored(self, asked: Any) -> None:
        """Save all of `asked`, copied well."""
        for job in self.save(asked).saves:
            self.half.reported(StepReport(done={job.lease: 1}))
        self.half.request_finished(asked)

    def loaded(self, name: str, asked: Any, *, ok: bool = True) -> bool:
        """Load a prompt of the tokens of `asked`, alone; True if that was aside. The request stays."""
        again = request(name, asked.num_tokens, asked.block_hashes[0][0])
        self.half.new_request(again)
        num_tokens, is_aside = self.half.matched(again, 0)
        assert num_tokens
        self.half.allocated(again, self.blocks(num_tokens // BLOCK), num_tokens)
        (job,) = self.half.plan_step({} if is_aside else {name: 1}, lambda name: None).loads
        assert job.is_async is is_aside
        self.half.reported(StepReport(done={job.lease: 1}, failed=set() if ok else {job.lease}))
        return is_aside

    def blocks(self, count: int, first: int = 50) -> list[list[Any]]:
        return [[SimpleNamespace(block_id=first + n, is_null=False) for n in range(count)]]


@pytest.fixture
def store() -> Iterator[LocalStore]:
    config = Config(host={"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False})
    with open_store(config, LAYOUT, namespace(), shared_name="kvstore-test") as store:
        yield store


@pytest.fixture
def world(store: LocalStore) -> World:
    return World(store)


def test_a_step_that_fills_blocks_saves_them(world: World) -> None:
    plan = world.save(request("a", 4 * BLOCK + 3))

    assert [len(part.slots) for part in plan.saves[0].copies] == [4]
    assert plan.saves[0].copies[0].blocks == (1, 2, 3, 4)
    assert plan.layout == LAYOUT.fingerprint


def test_blocks_are_held_until_the_copy_is_reported(world: World) -> None:
    plan = world.save(request("a", 4 * BLOCK))
    assert world.pool.num_held == 4
    assert world.half.is_saving

    world.half.reported(StepReport(done={plan.saves[0].lease: 1}))

    assert world.pool.num_held == 0
    assert not world.half.is_saving
    assert world.store.stats()["saved_pages"] == 4


def test_a_block_counts_only_when_every_rank_has_copied_it(store: LocalStore) -> None:
    world = World(store, world=2)
    plan = world.save(request("a", 2 * BLOCK))
    lease = plan.saves[0].lease

    world.half.reported(StepReport(done={lease: 1}))
    assert store.stats()["saved_pages"] == 0
    world.half.reported(StepReport(done={lease: 1}))

    assert store.stats()["saved_pages"] == 2


def test_one_rank_that_fails_spoils_the_save(store: LocalStore) -> None:
    world = World(store, world=2)
    lease = world.save(request("a", 2 * BLOCK)).saves[0].lease

    world.half.reported(StepReport(done={lease: 1}, failed={lease}))
    world.half.reported(StepReport(done={lease: 1}))

    assert store.stats()["saved_pages"] == 0
    assert world.pool.num_held == 0
    assert store.stats()["slots"]["free"] == 64


def test_a_prompt_that_is_stored_is_promised_without_its_last_token(world: World) -> None:
    world.stored(request("a", 4 * BLOCK))
    again = request("b", 4 * BLOCK)
    world.half.new_request(again)

    assert world.half.matched(again, 0) == (3 * BLOCK, True)


def test_what_the_engine_has_is_not_promised_again(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)

    assert world.half.matched(again, 3 * BLOCK) == (BLOCK, True)
    assert world.half._requests._tracked["b"].store.held == 3  # not weighed again by load_or_recompute
    world.half.allocated(again, world.blocks(5), BLOCK)
    plan = world.half.plan_step({}, lambda name: None)

    assert plan.loads[0].copies[0].blocks == (53,)


def test_a_load_that_failed_is_not_promised_again(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)
    world.half.allocated(again, world.blocks(5), 4 * BLOCK)
    lease = world.half.plan_step({}, lambda name: None).loads[0].lease

    world.half.reported(StepReport(done={lease: 1}, failed={lease}))

    assert world.half.matched(again, 0) == (0, False)
    assert world.store.stats()["leases"] == 0


def test_a_page_vllm_reads_and_the_lease_lacks_makes_the_load_bad(store: LocalStore) -> None:
    layout = Layout(
        BLOCK,
        (LayerGroup(GroupKind.FULL, (0,), 8192), LayerGroup(GroupKind.SLIDING, (1,), 8192, BLOCK + 1)),
        "test:bytes",
        "uint8",
    )
    lease = LoadLease(7, 2, 2 * BLOCK, SlotPages([0, 1, 1], [0, 0, 1], [0, 1, 2]))
    half = World(store, EngineLayout(layout, (0, 1), (("a",), ("b",)), ((8192,), (8192,)))).half
    null, real = SimpleNamespace(block_id=0, is_null=True), SimpleNamespace(block_id=9, is_null=False)

    _, inside = half._loads._copies(lease, [[real, real], [null, real]], 0, 2)
    _, outside = half._loads._copies(lease, [[real, real], [real, real]], 0, 2)

    assert (inside, outside) == (True, False)


class Pending:
    """A store whose answers take as long as the test says."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.is_asked = True
        self.is_fetching = True

    def lookup(self, asked: Any) -> Match:
        match = self._store.lookup(asked)
        return Match(0, 0, pending=True) if self.is_asked else match

    def poll(self, lease: Any) -> LeaseStatus:
        return LeaseStatus(LeaseState.WAITING, 1, BLOCK) if self.is_fetching else self._store.poll(lease)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class TestPatience:
    @pytest.fixture
    def slow(self, store: LocalStore) -> World:
        World(store).stored(request("a", 4 * BLOCK + 1))
        return World(Pending(store), extra={"store": {"lookup_deadline_s": 0.5, "load_deadline_s": 2.0}})

    def test_vllm_asks_again_until_the_pages_are_there(self, slow: World) -> None:
        asked = request("b", 4 * BLOCK + 1)
        slow.half.new_request(asked)

        assert slow.half.matched(asked, 0) == (None, False)
        slow.store.is_asked = False
        assert slow.half.matched(asked, 0) == (None, False)
        slow.store.is_fetching = False
        assert slow.half.matched(asked, 0) == (4 * BLOCK, True)

    def test_a_lookup_without_an_answer_is_given_up(self, slow: World) -> None:
        asked = request("b", 4 * BLOCK + 1)
        slow.half.new_request(asked)
        slow.half.matched(asked, 0)
        slow.clock.now += 0.6

        assert slow.half.matched(asked, 0) == (0, False)

    def test_what_came_before_the_patience_ended_is_used(self, slow: World) -> None:
        asked = request("b", 4 * BLOCK + 1)
        slow.half.new_request(asked)
        slow.store.is_asked = False
        slow.half.matched(asked, 0)
        slow.clock.now += 3.0

        assert slow.half.matched(asked, 0) == (BLOCK, True)
        assert slow.half.counters["short_loads"] == 1

    def test_a_request_that_ends_while_it_waits_leaves_no_lease(self, slow: World, store: LocalStore) -> None:
        asked = request("b", 4 * BLOCK + 1)
        slow.half.new_request(asked)
        slow.store.is_asked = False
        slow.half.matched(asked, 0)
        assert store.stats()["leases"] == 1

        slow.half.request_finished(asked)

        assert store.stats()["leases"] == 0


def test_if_vllm_does_not_load_the_lease_is_let_go(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)

    world.half.allocated(again, world.blocks(5), 0)

    assert world.store.stats()["leases"] == 0


def test_after_a_reset_nothing_stored_before_is_found(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))

    world.half.reset("new weights")
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)

    assert world.half.matched(again, 0) == (0, False)


def test_a_save_under_way_at_a_reset_is_dropped(world: World) -> None:
    lease = world.save(request("a", 2 * BLOCK)).saves[0].lease

    world.half.reset("new weights")
    world.half.saved(lease, True)
    world.half.reported(StepReport(done={lease: 1}))

    assert world.store.stats()["saved_pages"] == 0
    assert world.pool.num_held == 0


def test_only_prompts_are_saved_unless_told_otherwise(store: LocalStore) -> None:
    for save, expected in (("auto", 2), ("prompt", 2), ("all", 3)):
        world = World(store, extra={"save": save})
        asked = request(save, 3 * BLOCK, seed=len(save))
        asked.num_prompt_tokens = 2 * BLOCK + 5
        plan = world.save(asked)

        assert sum(len(part.slots) for job in plan.saves for part in job.copies) == expected


@pytest.mark.parametrize(
    ("answer", "saved_at"),
    [
        ([3] * 4 * BLOCK, {3: 1, 4: 1, 5: 1, 6: 1}),  # kept from its first token on
        ([4] * 4 * BLOCK, {}),  # the next turn has another token there
        ([5] * 4 * BLOCK, {}),  # a thought without a call
        ([5] * 2 * BLOCK + [7] + [6] * 2 * BLOCK, {4: 2, 5: 1, 6: 1}),  # with one: what was filled before it follows
    ],
)
def test_an_answer_is_saved_as_soon_as_it_is_known_that_the_next_turn_begins_with_it(
    store: LocalStore, answer: list[int], saved_at: dict[int, int]
) -> None:
    kept = (AnswerForm((3,), False), AnswerForm((5,), True, (7,)))
    rules = AnswerRules((TurnRule((1, 2), False, kept), TurnRule((9,), False, ())), ((5,),), "")
    world = World(store, extra={"save": "auto"}, answers=SavedAnswers("auto", rules, "prompt"))
    asked = request("a", 2 * BLOCK, seed=answer[0])
    asked.prompt_token_ids = [0] * (2 * BLOCK - 2) + [1, 2]
    world.half.new_request(asked)
    row = list(range(1, 9))
    plan = world.half.plan_step({"a": 2 * BLOCK}, lambda name: (row,))
    assert sum(len(part.slots) for job in plan.saves for part in job.copies) == 2

    found: dict[int, int] = {}
    for number in range(len(answer)):
        asked.num_computed_tokens = asked.num_tokens
        asked.num_tokens += 1
        asked.all_token_ids = [*asked.prompt_token_ids, *answer[: number + 1]]
        asked.block_hashes = [bytes([answer[0], n]) * 16 for n in range(asked.num_tokens // BLOCK)]
        for job in world.half.plan_step({"a": 1}, lambda name: (row,)).saves:
            found[asked.num_tokens // BLOCK] = sum(len(part.slots) for part in job.copies)
            assert [block for part in job.copies for block in part.blocks][-1] == asked.num_tokens // BLOCK
            world.half.reported(StepReport(done={job.lease: 1}))
    world.half.request_finished(asked)

    assert found == saved_at
    assert world.half.counters["unsaved_pages"] == (0 if saved_at else 4)


def test_hints_of_a_request_reach_the_store(world: World) -> None:
    asked = request("a", BLOCK)
    asked.kv_transfer_params = {"kvstore": {"session": "s", "priority": 2, "ttl_s": 60}}

    world.half.new_request(asked)

    options = world.half._requests._tracked["a"].store.options
    assert (options.session, options.priority, options.ttl_s) == ("s", 2, 60.0)


@pytest.mark.parametrize(
    "hints",
    [
        {"priority": "high"},
        {"ttl_s": [60]},
        {"retain_until": "soon"},
        {"last_turn": "yes"},
        {"session": "\ud800"},
        {"session": "s" * 2000},
        {"priority": 1 << 40},
        {"priority": 10**400},
        {"ttl_s": 10**400},
        {"ttl_s": 1e300},
        {"retain_until": 10**400},
        {"retain_until": float("inf")},
        {"retain_until": float("nan")},
        {"finish_reason": 7},
        {"finish_reason": "f" * 65},
        "session",
        7,
        None,
    ],
)
def test_hints_that_make_no_sense_are_ignored(world: World, hints: Any) -> None:
    asked = request("a", BLOCK)
    asked.kv_transfer_params = {"kvstore": hints}

    world.half.new_request(asked)

    options = world.half._requests._tracked["a"].store.options
    assert (options.session, options.priority, options.ttl_s, options.retain_until) == ("", 0, None, 0.0)


def test_a_reply_that_calls_a_tool_ends_so_where_the_request_says_it(world: World) -> None:
    for name, status in (("a", "FINISHED_STOPPED"), ("b", "FINISHED_LENGTH_CAPPED")):
        asked = request(name, BLOCK)
        asked.kv_transfer_params = {"kvstore": {"finish_reason": "tool_use"}}
        asked.status = SimpleNamespace(name=status)
        world.half.new_request(asked)
        world.half.request_finished(asked)

    assert world.store._planner.in_steps.finish_reasons == {"tool_use": 1, "length_capped": 1}


def struct(sent: dict[str, Any]) -> Any:
    """The same as vLLM's own structs."""
    actions = [SimpleNamespace(**action) for action in sent["actions"]]
    return SimpleNamespace(**{**sent, "actions": actions})


def test_both_carriers_of_a_message_are_read_and_answered(world: World) -> None:
    asked = request("a", 4 * BLOCK)
    asked.kv_hints = struct(envelope(("pin", {"ttl_s": -1})))
    asked.kv_transfer_params = {"kv_hint": envelope(("kv.pin", {"ttl_s": -1}), ("evaporate", {}))}
    world.half.new_request(asked)

    answer = world.half.request_finished(asked)

    assert answer is not None
    told = [(one["action"], one["status"]) for one in answer["kv_hint"]["outcomes"]]
    assert told == [("pin", "rejected"), ("pin", "rejected"), ("unknown", "ignored")]
    assert world.half.counters["hints.rejected"] == 2
    assert world.half.counters["hints.ignored"] == 1


def test_what_a_pinned_request_saves_is_kept_and_others_go(world: World) -> None:
    asked = request("a", 8 * BLOCK)
    asked.kv_hints = struct(envelope(("pin", {"ttl_s": 60})))
    world.stored(asked)
    for number in range(2, 20):
        world.stored(request(f"other {number}", 8 * BLOCK, seed=number))

    kept, gone = request("b", 8 * BLOCK + 1), request("c", 8 * BLOCK + 1, seed=2)
    for again in (kept, gone):
        world.half.new_request(again)

    assert world.half.matched(kept, 0)[0] == 8 * BLOCK
    assert world.half.matched(gone, 0)[0] == 0
    assert world.store.stats()["kept_pages"] == 8


def test_another_prompt_is_named_by_the_engines_hashes_and_not_by_tokens(world: World) -> None:
    stored = request("a", 4 * BLOCK)
    world.stored(stored)
    asked = request("b", BLOCK, seed=9)
    hashes = [one.hex() for one in stored.block_hashes]
    asked.kv_hints = struct(envelope(("pin", {"block_hashes": hashes}), ("pin", {"tokens": [1] * 4 * BLOCK})))
    world.half.new_request(asked)

    answer = world.half.request_finished(asked)

    assert answer is not None
    by_hash, by_token = answer["kv_hint"]["outcomes"]
    assert (by_hash["status"], by_hash["tokens"]) == ("accepted", 4 * BLOCK)
    assert (by_token["status"], by_token["reason"].split(":")[0]) == (
        "rejected",
        "the engine names blocks by hashes of its own",
    )


def test_a_request_without_hints_has_no_answer_about_them(world: World) -> None:
    asked = request("a", 4 * BLOCK)
    world.half.new_request(asked)

    assert world.half.request_finished(asked) is None


@pytest.mark.parametrize("params", [[], ["kv_hint"], "kv_hint", 7, {"kv_hint": None}])
def test_params_that_are_no_object_are_no_hints(world: World, params: Any) -> None:
    asked = request("a", 4 * BLOCK)
    asked.kv_transfer_params = params
    world.half.new_request(asked)

    assert world.half._requests.get("a") is not None
    assert world.half.request_finished(asked) is None


def test_a_save_that_cannot_be_planned_keeps_no_load_back(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)
    world.half.allocated(again, world.blocks(5), 4 * BLOCK)
    other = request("c", 4 * BLOCK, seed=9)
    world.half.new_request(other)

    plan = world.half.plan_step({"c": 4 * BLOCK}, lambda name: 1 // 0)

    assert [job.request for job in plan.loads] == ["b"]
    assert plan.saves == []
    assert world.half.counters["save_failures"] == 1


def test_a_refused_load_is_a_failed_one_for_vllm(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)

    world.half.refuse(again, world.blocks(5))
    plan = world.half.plan_step({}, lambda name: None)

    assert plan.loads[0].is_bad
    assert list(plan.loads[0].blocks) == [50, 51, 52, 53, 54]
    assert world.half.matched(again, 0) == (0, False)
    assert world.store.stats()["leases"] == 0


def test_where_tokens_came_from_adds_up(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    again = request("b", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)
    world.half.allocated(again, world.blocks(5), 4 * BLOCK)

    assert world.half.hit_sources(again, 4 * BLOCK) == {"host": 4 * BLOCK}


def test_a_step_with_nothing_to_do_waits_for_the_pages_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        host={"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False},
        disk={"path": str(tmp_path), "capacity_bytes": 64 * PAGE_BYTES},
    )
    with open_store(config, LAYOUT, namespace(), shared_name="kvstore-test") as first:
        World(first).stored(request("a", 4 * BLOCK))
    monkeypatch.setattr("connectors.vllm.scheduler.IDLE_WAIT_S", 30.0)
    with open_store(config, LAYOUT, namespace(), shared_name="kvstore-test") as store:
        world = World(store, extra={"store": {"load_deadline_s": 60, "load_or_recompute": False}})
        asked = request("b", 4 * BLOCK + 3)
        world.half.new_request(asked)

        assert world.half.matched(asked, 0) == (None, False)
        world.half.plan_step({}, lambda name: None)

        assert world.half.matched(asked, 0) == (4 * BLOCK, True)


def test_rests_of_steps_with_nothing_to_do_are_counted_apart(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = Pending(store)
    world = World(pending)
    monkeypatch.setattr(pending, "wait_lookup", lambda asked, timeout_s: world.clock.pass_s(timeout_s), raising=False)
    asked = request("a", 4 * BLOCK)
    world.half.new_request(asked)
    world.half.matched(asked, 0)

    world.half.plan_step({"other": BLOCK}, lambda name: None)
    busy = world.half.counters["rest_seconds"]
    world.half.matched(asked, 0)
    world.half.plan_step({}, lambda name: None)

    assert busy == 0.0
    assert world.half.counters["rest_seconds"] == pytest.approx(IDLE_WAIT_S)


class TestSingleFlight:
    @pytest.fixture
    def single(self, store: LocalStore) -> World:
        return World(store, extra={"store": {"single_flight": True}})

    def test_a_request_waits_aside_for_what_another_one_computes_and_loads_it(self, single: World) -> None:
        first, second = request("a", 4 * BLOCK + 1), request("b", 4 * BLOCK + 1)
        single.half.new_request(first)
        single.half.new_request(second)

        assert single.half.matched(first, 0) == (0, False)
        assert single.half.matched(second, 0) == (None, False)
        plan = single.half.plan_step({"a": first.num_tokens}, lambda name: ([1, 2, 3, 4, 5],))
        single.half.reported(StepReport(done={plan.saves[0].lease: 1}))
        single.clock.now += 1.0

        assert single.half.matched(second, 0) == (4 * BLOCK, True)
        assert single.half.counters["compute_waits"] == 1

    def test_a_request_that_ends_is_not_waited_for(self, single: World) -> None:
        first, second = request("a", 4 * BLOCK + 1), request("b", 4 * BLOCK + 1)
        single.half.new_request(first)
        single.half.new_request(second)
        single.half.matched(first, 0)
        single.half.matched(second, 0)

        single.half.request_finished(first)
        single.clock.now += 1.0

        assert single.half.matched(second, 0) == (0, False)

    def test_what_vllm_has_itself_is_not_waited_for(self, single: World) -> None:
        first, second = request("a", 4 * BLOCK + 1), request("b", 4 * BLOCK + 1)
        single.half.new_request(first)
        single.half.new_request(second)
        single.half.matched(first, 0)

        assert single.half.matched(second, 4 * BLOCK) == (0, False)

    def test_without_the_option_nobody_waits(self, world: World) -> None:
        for name in ("a", "b"):
            asked = request(name, 4 * BLOCK + 1)
            world.half.new_request(asked)
            assert world.half.matched(asked, 0) == (0, False)


def test_after_a_first_load_an_idle_engine_loads_beside_its_forward(store: LocalStore) -> None:
    world = World(store, is_beside=True)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)

    assert world.loaded("b", asked)  # nothing shows yet that copies work
    world.half.request_finished(request("b", 1))
    assert not world.loaded("c", asked)
    assert world.loaded("d", asked)  # while c runs
    world.half.request_finished(request("c", 1))
    world.half.request_finished(request("d", 1))
    assert not world.loaded("e", asked)


def test_only_one_load_of_a_step_goes_beside_the_forward(store: LocalStore) -> None:
    world = World(store, is_beside=True)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)
    world.loaded("b", asked)
    world.half.request_finished(request("b", 1))
    waiting = [request(name, 4 * BLOCK + 1) for name in ("c", "d")]

    aside = []
    for one in waiting:
        world.half.new_request(one)
        num_tokens, is_aside = world.half.matched(one, 0)
        world.half.allocated(one, world.blocks(4), num_tokens or 0)
        aside.append(is_aside)

    assert aside == [False, True]
    assert [job.is_async for job in world.half.plan_step({"c": 1}, lambda name: None).loads] == [False, True]


@pytest.mark.parametrize(("load", "is_beside"), [("async", True), ("auto", False)])
def test_loads_go_aside_where_that_is_wanted_or_nothing_else_works(
    store: LocalStore, load: str, is_beside: bool
) -> None:
    world = World(store, extra={"load": load}, is_beside=is_beside)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)

    for name in ("b", "c"):
        assert world.loaded(name, asked)
        world.half.request_finished(request(name, 1))


class TestAPromptThatEndsOnABorder:
    """Of four blocks, all stored."""

    def asked(self, world: World, name: str) -> tuple[int | None, bool]:
        again = request(name, 4 * BLOCK, request("a", 4 * BLOCK).block_hashes[0][0])
        world.half.new_request(again)
        return world.half.matched(again, 0)

    def test_it_is_loaded_whole_by_a_load_aside(self, store: LocalStore) -> None:
        world = World(store, is_whole=True)
        world.stored(request("a", 4 * BLOCK))

        assert self.asked(world, "b") == (4 * BLOCK, True)

    def test_where_vllm_cannot_take_a_token_back_its_last_block_is_computed(self, store: LocalStore) -> None:
        world = World(store)
        world.stored(request("a", 4 * BLOCK))

        assert self.asked(world, "b") == (3 * BLOCK, True)

    def test_beside_the_forward_its_last_block_is_computed(self, store: LocalStore) -> None:
        world = World(store, is_beside=True, is_whole=True)
        asked = request("a", 4 * BLOCK)
        world.stored(asked)
        assert world.loaded("b", asked)
        world.half.request_finished(request("b", 1))

        assert self.asked(world, "c") == (3 * BLOCK, False)
        assert world.half.counters["short_loads"] == 0

    def test_a_long_last_block_is_loaded_aside_rather_than_computed(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("connectors.vllm.loads.LONG_BLOCK", BLOCK)
        world = World(store, is_beside=True, is_whole=True)
        asked = request("a", 4 * BLOCK)
        world.stored(asked)
        world.loaded("b", asked)
        world.half.request_finished(request("b", 1))

        assert self.asked(world, "c") == (4 * BLOCK, True)

    def test_a_last_block_alone_is_computed(self, store: LocalStore) -> None:
        world = World(store, is_whole=True)
        world.stored(request("a", 4 * BLOCK))
        again = request("b", 4 * BLOCK)
        world.half.new_request(again)

        assert world.half.matched(again, 3 * BLOCK) == (0, False)  # vLLM's own cache has the others


def test_a_request_that_must_not_read_caches_asks_the_store_nothing_and_is_saved(store: LocalStore) -> None:
    world = World(store, extra={"store": {"single_flight": True}})
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)
    before = store.stats()
    again = request("b", 4 * BLOCK + 1)
    again.skip_reading_prefix_cache = True
    new = request("c", 3 * BLOCK, seed=9)
    new.skip_reading_prefix_cache = True
    for one in (again, new):
        world.half.new_request(one)

    assert [world.half.matched(one, 0) for one in (again, new)] == [(0, False)] * 2

    after = store.stats()
    same = ("lookups", "matched_tokens", "missed_tokens", "leases", "compute_claims")
    assert {name: after.get(name) for name in same} == {name: before.get(name) for name in same}
    plan = world.half.plan_step({"c": 3 * BLOCK}, lambda name: ([7, 8, 9],))
    assert [len(job.copies[0].slots) for job in plan.saves] == [3]


def test_a_request_that_wants_no_cache_neither_asks_the_store_nor_is_saved(world: World) -> None:
    world.stored(request("a", 4 * BLOCK + 1))
    before = world.store.stats()
    asked = request("b", 4 * BLOCK + 1)
    asked.kv_transfer_params = {"kvstore": {"cache": False, "session": "s"}}
    world.half.new_request(asked)

    matched = world.half.matched(asked, 0)
    plan = world.half.plan_step({"b": 4 * BLOCK + 1}, lambda name: ([1, 2, 3, 4, 5],))

    assert matched == (0, False)
    assert plan.saves == []
    assert world.store.stats()["lookups"] == before["lookups"]
    assert world.half.request_finished(asked) is None


def test_after_a_load_failed_inside_a_step_nothing_of_who_was_there_is_saved(store: LocalStore) -> None:
    world = World(store, is_beside=True)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)
    world.loaded("b", asked)
    world.half.request_finished(request("b", 1))
    bystander = request("c", 3 * BLOCK, seed=9)
    world.half.new_request(bystander)

    assert not world.loaded("d", asked, ok=False)

    plan = world.half.plan_step({"c": 3 * BLOCK}, lambda name: ([1, 2, 3],))
    assert plan.saves == []
    assert len(plan.heard) == 1
    assert world.save(request("e", 2 * BLOCK, seed=8)).saves == []  # came while they are there
    for name in ("c", "d"):
        world.half.request_finished(request(name, 1))
    assert world.save(request("f", 2 * BLOCK, seed=7)).saves != []


def test_after_a_failed_load_the_next_ones_go_aside_until_one_worked(store: LocalStore) -> None:
    world = World(store, is_beside=True)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)
    aside = []
    for name, ok in (("b", True), ("c", False), ("d", True), ("e", True)):
        aside.append(world.loaded(name, asked, ok=ok))
        world.half.request_finished(request(name, 1))
        world.clock.pass_s(60)

    assert aside == [True, False, True, False]


def test_after_a_failed_load_nobody_is_offered_anything_for_longer_each_time(world: World) -> None:
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)

    for number, pause_s in enumerate((1, 2, 4, 8, 16, 30, 30)):
        world.loaded(f"fails {number}", asked, ok=False)
        other = request(f"other {number}", 4 * BLOCK + 1)
        world.half.new_request(other)
        world.clock.pass_s(pause_s - 0.1)
        assert world.half.matched(other, 0) == (0, False)
        world.clock.pass_s(0.2)
        assert world.half.matched(other, 0) == (4 * BLOCK, True)
        world.half.request_finished(other)
    world.loaded("works", asked)
    world.loaded("fails", asked, ok=False)
    world.clock.pass_s(1.1)

    assert world.loaded("works again", asked)


class Broken:
    """A store of which, for a while, one attribute raises."""

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name, self.is_broken = store, name, False

    def __getattribute__(self, name: str) -> Any:
        if name in ("_store", "_name", "is_broken"):
            return object.__getattribute__(self, name)
        if self.is_broken and name == self._name:
            raise RuntimeError("not just now")
        return getattr(self._store, name)


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_plan_that_cannot_be_finished_goes_out_as_one_that_no_worker_copies(
    store: LocalStore, is_beside: bool
) -> None:
    broken = Broken(store, "slots")
    world = World(broken, is_beside=is_beside)
    asked = request("a", 4 * BLOCK + 1)
    world.stored(asked)
    world.loaded("b", asked)
    world.half.request_finished(request("b", 1))
    again = request("c", 4 * BLOCK + 1)
    world.half.new_request(again)
    world.half.matched(again, 0)
    world.half.allocated(again, world.blocks(4), 4 * BLOCK)
    broken.is_broken = True

    plan = world.half.plan_step({} if not is_beside else {"c": 1}, lambda name: None)

    assert [(job.request, job.is_async) for job in plan.loads] == [("c", not is_beside)]
    assert plan.layout != LAYOUT.fingerprint


def test_one_lease_that_cannot_be_booked_keeps_no_other_from_it(store: LocalStore) -> None:
    broken = Broken(store, "complete")
    world = World(broken)
    plans = [world.save(request("a", 2 * BLOCK)), world.save(request("b", 3 * BLOCK, seed=1), first_block=10)]
    leases = [plan.saves[0].lease for plan in plans]
    broken.is_broken = True

    world.half.reported(StepReport(done=dict.fromkeys(leases, 1)))

    assert world.pool.num_held == 0


class TestCommonHead:
    """Requests that come while another one's load of their head is being copied."""

    @pytest.fixture
    def loading(self, world: World) -> World:
        """Eight blocks are stored, and on their way to "b"."""
        world.stored(request("a", 8 * BLOCK + 1))
        self.begin(world, request("b", 8 * BLOCK + 1))
        return world

    def begin(self, world: World, asked: Any) -> int | None:
        world.half.new_request(asked)
        num_tokens, _ = world.half.matched(asked, 0)
        if num_tokens:
            world.half.allocated(asked, world.blocks(num_tokens // BLOCK), num_tokens)
        return num_tokens

    def fork(self, name: str, num_shared: int, num_blocks: int) -> Any:
        """The first `num_shared` blocks of "a", and others."""
        asked = request(name, num_blocks * BLOCK + 1, seed=5)
        asked.block_hashes[:num_shared] = request("a", 8 * BLOCK + 1).block_hashes[:num_shared]
        return asked

    def test_they_wait_for_it_and_take_it_from_the_engine(self, loading: World) -> None:
        asked = self.fork("c", 8, 12)
        assert self.begin(loading, asked) is None

        (job,) = loading.half.plan_step({}, lambda name: None).loads
        loading.half.reported(StepReport(done={job.lease: 1}))

        assert loading.half.matched(asked, 8 * BLOCK) == (0, False)
        assert loading.store.stats()["leases"] == 0

    def test_one_that_shares_less_than_half_does_not_wait(self, loading: World) -> None:
        assert self.begin(loading, self.fork("c", 4, 9)) == 4 * BLOCK

    def test_one_that_has_the_head_itself_does_not_wait(self, loading: World) -> None:
        loading.stored(self.fork("d", 8, 12))
        asked = self.fork("c", 8, 12)
        loading.half.new_request(asked)

        assert loading.half.matched(asked, 8 * BLOCK) == (4 * BLOCK, True)

    def test_if_the_load_fails_they_are_not_kept_waiting(self, loading: World) -> None:
        asked = self.fork("c", 8, 8)
        assert self.begin(loading, asked) is None
        (job,) = loading.half.plan_step({}, lambda name: None).loads

        loading.half.reported(StepReport(done={job.lease: 1}, failed={job.lease}))

        assert loading.half.matched(asked, 0) == (0, False)  # nothing is offered for a while
        loading.clock.pass_s(1.1)
        assert loading.half.matched(asked, 0) == (8 * BLOCK, True)

    def test_after_the_load_nobody_is_kept_waiting_even_if_its_request_took_back_its_tokens(
        self, loading: World
    ) -> None:
        tracked = loading.half._requests.get("b")
        assert tracked is not None
        (job,) = loading.half.plan_step({}, lambda name: None).loads
        tracked.engine.block_hashes = []
        loading.half._requests.extend(tracked)

        loading.half.reported(StepReport(done={job.lease: 1}))

        assert self.begin(loading, self.fork("c", 8, 8)) == 8 * BLOCK

    def test_they_wait_within_their_patience(self, loading: World) -> None:
        asked = self.fork("c", 8, 8)
        assert self.begin(loading, asked) is None
        loading.clock.pass_s(60)

        assert loading.half.matched(asked, 0) == (8 * BLOCK, True)

    def test_without_vllms_own_cache_everybody_loads(self, store: LocalStore) -> None:
        world = World(store, extra={"without_prefix_caching": True})
        world.stored(request("a", 8 * BLOCK + 1))

        assert [self.begin(world, request(name, 8 * BLOCK + 1)) for name in "bc"] == [8 * BLOCK] * 2


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[World]:
    layout = layout_with(plain_axes(1, 2, BLOCK, 64), tokens=BLOCK)
    disk = {"path": tmp_path / "disk", "capacity_bytes": 64 * layout.slot_bytes, "codec": "near", "shared": False}
    config = Config(
        host={"capacity_bytes": 64 * layout.slot_bytes, "huge_pages": False},
        disk=disk,
        store={"load_or_recompute": False},
    )
    engine = EngineLayout(layout, (0,), (("a",),), ((layout.groups[0].page_bytes,),))
    with open_store(config, layout, namespace(layout), shared_name="kvstore-lossy") as store:
        yield World(store, engine)


def refusing(name: str, num_tokens: int, salt: str | None = None) -> Any:
    """A request that refuses loss."""
    asked = request(name, num_tokens)
    asked.cache_salt, asked.kv_transfer_params = salt, {"kvstore": {"exact": True}}
    return asked


def test_what_vllm_computed_after_lossy_pages_is_not_saved_under_exact_names(lossy: World) -> None:
    lossy.stored(request("a", 4 * BLOCK + 1))
    lossy.loaded("b", request("a", 4 * BLOCK + 1))

    asked = refusing("c", 8 * BLOCK + 1)
    lossy.half.new_request(asked)
    assert lossy.half.matched(asked, 4 * BLOCK) == (0, False)  # four blocks of vLLM's own cache are those of b
    asked.num_computed_tokens = 4 * BLOCK
    plan = lossy.half.plan_step({"c": 4 * BLOCK + 1}, lambda name: (list(range(1, 9)),))
    assert plan.saves == []


def test_a_request_that_refuses_loss_uses_the_store_where_it_begins_anew_or_has_a_salt_of_its_own(lossy: World) -> None:
    lossy.stored(request("a", 4 * BLOCK + 1))
    lossy.loaded("b", request("a", 4 * BLOCK + 1))

    asked = refusing("c", 4 * BLOCK + 1)
    lossy.half.new_request(asked)
    assert lossy.half.matched(asked, 0) == (0, False)  # what is stored is lossy
    plan = lossy.half.plan_step({"c": asked.num_tokens}, lambda name: (list(range(1, 5)),))
    lossy.half.reported(StepReport(done={plan.saves[0].lease: 1}))
    lossy.half.request_finished(asked)
    again = refusing("d", 8 * BLOCK + 1, salt="exact")
    lossy.half.new_request(again)
    assert lossy.half.matched(again, 2 * BLOCK)[0] == 2 * BLOCK  # vLLM's blocks under this salt never were lossy


def test_a_request_that_refuses_loss_does_so_whatever_else_it_says(lossy: World) -> None:
    lossy.stored(request("a", 4 * BLOCK + 1))

    asked = refusing("b", 4 * BLOCK + 1)
    asked.kv_transfer_params["kvstore"]["priority"] = "first"
    lossy.half.new_request(asked)
    assert lossy.half.matched(asked, 0) == (0, False)


def test_many_salts_under_which_lossy_pages_came_count_as_all(lossy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.vllm.loads.MAX_SALTS", 0)
    lossy.stored(request("a", 4 * BLOCK + 1))
    lossy.loaded("b", request("a", 4 * BLOCK + 1))

    asked = refusing("c", 4 * BLOCK + 1, salt="exact")
    lossy.half.new_request(asked)
    assert lossy.half.matched(asked, 2 * BLOCK) == (0, False)
    assert lossy.half.plan_step({"c": asked.num_tokens}, lambda name: (list(range(1, 5)),)).saves == []

"""A run step by step: what a server does that answers several prompts on one thread."""

from typing import Any

import pytest

from connectors.transformers import GenerationRun, KVCacheModel, Piece
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from kvstore.config.sections import Config
from kvstore.plan.records import RequestOptions
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama_gqa")


@pytest.fixture
def store(model: Any) -> Any:
    layout = model_layout(model, BLOCK)
    return DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))


def drive(run: GenerationRun) -> list[list[Piece]]:
    steps = []
    while not run.is_done:
        steps.append(run.step())
    return steps


def test_every_step_is_one_chunk_or_one_token(model: Any) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    expected = cold.generate(random_ids(100), 5)

    run = cold.start(random_ids(100), 5)
    steps = drive(run)

    assert [len(pieces) for pieces in steps] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert run.result.tokens == expected.tokens
    assert run.result.finish_reason == "length"
    assert run.step() == []


def test_runs_that_take_turns_give_the_answers_they_give_alone(model: Any) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    prompts = [random_ids(length, seed=length) for length in (40, 100, 170)]

    runs = [cold.start(ids, 6) for ids in prompts]
    while not all(run.is_done for run in runs):
        for run in runs:
            run.step()

    assert [run.result.tokens for run in runs] == [cold.generate(ids, 6).tokens for ids in prompts]


def test_a_step_asks_a_store_that_cannot_answer_yet_and_comes_back(model: Any, store: Any) -> None:
    from dataclasses import replace

    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        opened.generate(random_ids(100), 1)
        assert opened.flush(WAIT_S)
        plain, asked = store.lookup, []

        def lookup(request: Any) -> Any:
            asked.append(request)
            return replace(plain(request), pending=len(asked) < 3)

        store.lookup = lookup
        run = opened.start(random_ids(100), 1)

        waiting = []
        while not run.is_done:
            run.step()
            waiting.append(run.is_waiting)

    assert waiting == [True, True, False]
    assert run.report.by_tier == {"host": 96}


def test_a_step_does_not_wait_for_pages_on_their_way(model: Any, store: Any) -> None:
    with KVCacheModel(model, store, prefill_chunk=CHUNK, load_deadline_s=60.0) as opened:
        opened.generate(random_ids(100), 1)
        assert opened.flush(WAIT_S)
        store.late = True
        run = opened.start(random_ids(100), 1)
        assert run.step() == []
        assert run.is_waiting
        assert len(store.open_leases) == 1

        store.late = False
        run.step()

        assert not run.is_waiting
        assert run.report.by_tier == {"host": 96}
    assert not store.open_leases


def test_a_run_closed_while_it_waits_gives_everything_back(model: Any, store: Any) -> None:
    with KVCacheModel(model, store, prefill_chunk=CHUNK, load_deadline_s=60.0) as opened:
        opened.generate(random_ids(100), 1)
        store.late = True
        run = opened.start(random_ids(100), 1)
        run.step()

        run.close()
        assert opened.flush(WAIT_S)

    assert run.is_done
    assert not store.open_leases
    assert store.finishes[-1] == ("cancelled", False)
    assert store.replies[-1] == 0


def test_a_run_that_failed_is_over(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    run = cold.start(random_ids(100), 5)
    run.step()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run._prompt, "_forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.step()

    assert run.is_done
    assert run.step() == []


def test_a_lookup_for_routers_says_what_a_run_would_load_and_loads_nothing(model: Any, store: Any) -> None:
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        opened.generate(random_ids(100), 1)
        assert opened.flush(WAIT_S)
        loads = store.calls["prepare_load"]

        found = opened.lookup(random_ids(100))

        assert (found.prompt_tokens, found.hit_tokens, found.by_tier) == (100, 96, {"host": 96})
        assert store.calls["prepare_load"] == loads
    assert KVCacheModel(model).lookup(random_ids(100)).by_tier == {}


@pytest.mark.parametrize(("reuse", "computed"), [("exact", [100, 4]), ("any", [100, 4])])
def test_of_two_runs_on_one_thread_one_computes_and_the_other_waits_for_it(
    model: Any, reuse: str, computed: list[int]
) -> None:
    config = Config(
        store={"block_size": BLOCK, "single_flight": True, "load_or_recompute": False, "compute_wait_s": 60.0},
        host={"capacity_bytes": 1 << 20, "huge_pages": False},
    )
    with KVCacheModel.open(model, config, prefill_chunk=CHUNK, reuse=reuse) as opened:
        expected = KVCacheModel(model, prefill_chunk=CHUNK).generate(random_ids(100), 3).tokens
        # A rate would tell how long the other may wait: milliseconds, with a model as small as this.
        opened.connector.observe_prefill = lambda *_: None  # type: ignore[union-attr,method-assign]
        one, other = opened.start(random_ids(100), 3), opened.start(random_ids(100), 3)
        one.step()
        other.step()
        has_waited = other.is_waiting

        while not one.is_done:
            one.step()
            other.step()
        while not other.is_done:
            other.step()

    assert has_waited
    assert [run.report.computed_tokens for run in (one, other)] == computed
    assert other.report.compute_wait_s > 0.0 == one.report.compute_wait_s
    assert one.result.tokens == other.result.tokens == expected


@pytest.mark.parametrize(("reuse", "step_blocks"), [("exact", 2), ("any", 1)])
def test_a_request_that_takes_its_turn_says_in_which_steps_it_is_computed(
    model: Any, reuse: str, step_blocks: int
) -> None:
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK, reuse=reuse))
    with KVCacheModel(model, store, prefill_chunk=CHUNK, reuse=reuse) as plain:
        assert plain.connector is not None
        asked = RequestOptions(session="s", single_flight=True)
        own: Any = plain.connector.begin(random_ids(100), asked)
        usual: Any = plain.connector.begin(random_ids(100))

    assert own.options == RequestOptions(session="s", single_flight=True, step_blocks=step_blocks)
    assert usual.options == RequestOptions()


def test_a_prompt_that_others_may_wait_for_is_saved_chunk_by_chunk(model: Any, store: Any) -> None:
    with KVCacheModel(model, store, prefill_chunk=CHUNK, single_flight=True) as opened:
        run = opened.start(random_ids(100), 1)
        saved = []
        while not run.is_done:
            run.step()
            assert opened.flush(WAIT_S)
            saved.append(len(store.pages))

    assert saved == [2, 4, 6, 6]

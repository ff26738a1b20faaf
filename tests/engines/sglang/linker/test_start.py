"""A linker that cannot work says so at the start, by SGLang's own factory; and what it says names the fix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker

from kvstore.errors import ConfigError
from tests.engines.sglang.linker.engine import LinkerEngine, linker_flags, make_pool, prompt
from tests.engines.sglang.linker.worlds import World, play
from tests.engines.sglang.updates import Weights

HOST = {"host": {"capacity_bytes": "4MiB"}}


def make(extra: dict[str, Any], **changes: Any) -> Any:
    """A linker over a small pool, with something changed of what SGLang hands over."""
    groups = dict.fromkeys(("tp_cache_group", "attn_tp_cache_group", "attn_cp_cache_group"))
    params = SimpleNamespace(
        page_size=changes.get("page_size", 16),
        pp_size=changes.get("pp_size", 1),
        attn_cp_size=1,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: make_pool("mha")),
        **groups,
    )
    return create_unified_cache_linker(
        SimpleNamespace(model_path="no/model", lora_paths=changes.get("lora_paths")),
        params,
        backend="dynamic",
        config=linker_flags(extra),
        components=changes.get("components", {ComponentType.FULL}),
    )


@pytest.mark.parametrize(
    ("extra", "changes", "message"),
    [
        ({"hots": {}}, {}, "linker_extra_config: unknown key 'hots'; did you mean 'host'"),
        (HOST, {"components": set()}, "components: SGLang's cache has none; the linker stores FULL alone"),
        (HOST, {"components": {ComponentType.FULL, ComponentType.SWA}}, "SGLang's cache has FULL + SWA"),
        (HOST, {"pp_size": 2}, "--pp-size is 2"),
        (HOST, {"lora_paths": ["a=/a"]}, "--lora-paths is given"),
        ({**HOST, "weights": "sampled"}, {}, "name them yourself: linker_extra_config"),
        ({"host": {"capacity_bytes": "1KiB"}}, {}, "host.capacity_bytes"),
    ],
)
def test_a_start_that_cannot_work_names_the_field_and_the_fix(
    extra: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(extra, **changes)

    assert message in str(caught.value)


def test_another_release_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "__version__", "0.5.24")

    with pytest.raises(ConfigError, match="is not supported"):
        make(HOST)


def test_whatever_sglang_hands_over_beside_is_taken() -> None:
    from connectors.sglang_linker import KVStoreLinker

    engine = LinkerEngine(HOST)
    try:
        linker = KVStoreLinker(
            engine.server_args,
            engine.params,
            components={ComponentType.FULL},
            extra_config={**HOST, "weights": "mine"},
            forward_stream=None,
            something_new=1,
        )
        linker.close()
    finally:
        engine.close()


def test_another_model_at_the_same_disk_is_a_miss(tmp_path: Path) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 100)
        disk = {**HOST, "disk": {"path": str(world.folder / "kv"), "capacity_bytes": "64MiB"}}
        first = world.engine(disk)
        first.run(tokens)
        first.settle()
        first.close()
        world.engines.remove(first)

        other = world.engine({**disk, "weights": "others"}, model=2)
        assert not other.match(tokens).promised
        assert other.run(tokens).loaded == 0  # and stored beside the first one's, with bytes of its own
        other.settle()
        other.flush()
        assert other.run(tokens).loaded == 96

    play(scenario, tmp_path)


def test_after_an_update_of_the_weights_nothing_is_loaded_or_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scenario(world: World) -> None:
        tokens, weights = prompt(1, 100), Weights(monkeypatch)
        engine = world.engine(HOST)
        engine.run(tokens)
        engine.settle()
        engine.flush()
        asked = engine.match(tokens)
        assert asked.promised == 96

        weights.update("v2")
        engine.model = 2  # whose bytes the harness expects from here on
        waiting = engine.admit(tokens, asked)  # it was looked up before
        assert waiting is not None
        engine.forward(waiting)
        engine.finish(waiting)
        engine.settle()
        engine.flush()

        assert waiting.loaded == 0
        assert not engine.match(tokens).promised

    play(scenario, tmp_path)


def test_updates_that_are_vouched_for_make_pages_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario(world: World) -> None:
        tokens, weights = prompt(1, 100), Weights(monkeypatch)
        engine = world.engine({**HOST, "updates_by_name": True})
        for version, model in ((None, 1), ("v2", 2), ("v3", 3)):
            if version:
                weights.update(version)
                engine.model = model
            assert engine.run(tokens).loaded == 0
            engine.settle()
            engine.flush()
            assert engine.run(tokens).loaded == 96
            engine.settle()
            engine.flush()

    play(scenario, tmp_path)

"""What KV depends on beside the tokens: adapters, images, embeddings, and everything about the engine itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectors.vllm.identity import engine_namespace
from kvstore.layout import GroupKind, LayerGroup, Layout
from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, DTYPE, Engine, make_prompt
from tests.engines.vllm.models import IMAGE_SIDE, make_adapter

pytestmark = pytest.mark.timeout(600)
LENGTH = 300
HIT = (LENGTH - 1) // BLOCK * BLOCK
PROMPT = make_prompt(LENGTH, 1)


def ask(engine: Engine, inputs: dict[str, Any], adapter: Any = None) -> tuple[tuple[int, ...], int]:
    """Greedy tokens, and how many prompt tokens came from the store: vLLM's own cache is emptied before."""
    from vllm import SamplingParams

    engine.forget_own_cache()
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = engine.llm.generate([inputs], sampling, use_tqdm=False, lora_request=adapter)
    return tuple(output.outputs[0].token_ids), output.num_cached_tokens or 0


def ask_all(engine: Engine, questions: list[tuple[dict[str, Any], Any]]) -> list[tuple[tuple[int, ...], int]]:
    return [ask(engine, inputs, adapter) for inputs, adapter in questions]


class TestAdapters:
    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine]) -> Engine:
        return open_engine({}, enable_lora=True, max_lora_rank=8, max_loras=2, enable_prompt_embeds=True)

    def test_the_model_and_two_adapters_of_one_name_share_nothing(
        self, engine: Engine, reference: Reference, tmp_path: Path
    ) -> None:
        from vllm.lora.request import LoRARequest

        adapters = [LoRARequest("same", n, str(make_adapter(tmp_path / str(n), seed=n))) for n in (1, 2)]
        questions = [({"prompt_token_ids": PROMPT}, adapter) for adapter in (None, *adapters)]

        computed = ask_all(engine, questions)
        loaded = ask_all(engine, questions)

        assert computed[0] == (tuple(reference.answer(PROMPT)["tokens"]), 0)
        assert [cached for _, cached in computed] == [0, 0, 0]
        assert len({tokens for tokens, _ in computed}) == 3
        assert loaded == [(tokens, HIT) for tokens, _ in computed]

    def test_other_files_at_the_path_of_an_adapter_find_nothing(self, engine: Engine, tmp_path: Path) -> None:
        from vllm.lora.request import LoRARequest

        prompt = {"prompt_token_ids": make_prompt(LENGTH, 2)}
        path = str(make_adapter(tmp_path / "adapter", seed=3))
        first = ask(engine, prompt, LoRARequest("trained", 3, path))
        make_adapter(Path(path), seed=4)

        second = ask(engine, prompt, LoRARequest("trained", 3, path, load_inplace=True))
        again = ask(engine, prompt, LoRARequest("trained", 3, path))

        assert [first[1], second[1], again[1]] == [0, 0, HIT]
        assert first[0] != second[0] == again[0]
        assert engine.scheduler.connector._hook_errors == 0

    def test_embeddings_are_told_apart_by_their_content(self, engine: Engine) -> None:
        import torch

        embeddings = [
            torch.randn(LENGTH, 256, generator=torch.Generator().manual_seed(n)).to(torch.float32) for n in (1, 2)
        ]
        questions: list[tuple[dict[str, Any], Any]] = [({"prompt_embeds": one}, None) for one in embeddings]

        computed = ask_all(engine, questions)
        loaded = ask_all(engine, questions)

        assert [cached for _, cached in computed] == [0, 0]
        assert computed[0] != computed[1]
        assert loaded == [(tokens, HIT) for tokens, _ in computed]


def test_images_are_told_apart_by_their_content(open_engine: Callable[..., Engine]) -> None:
    from PIL import Image

    engine = open_engine({}, kind="image", max_model_len=1024, limit_mm_per_prompt={"image": 1})
    pixels = [np.random.default_rng(n).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8) for n in (1, 2)]
    questions: list[tuple[dict[str, Any], Any]] = [
        ({"prompt_token_ids": PROMPT, "multi_modal_data": {"image": Image.fromarray(one)}}, None) for one in pixels
    ]

    computed = ask_all(engine, questions)
    loaded = ask_all(engine, questions)

    assert [cached for _, cached in computed] == [0, 0]
    assert computed[0] != computed[1]
    assert loaded == [(tokens, HIT) for tokens, _ in computed]
    assert engine.scheduler.connector._hook_errors == 0


class TestNamespace:
    """vLLM's own configuration, one thing changed at a time: each makes pages of another kind."""

    @pytest.fixture(scope="class")
    def vllm_config(self, model_of: Callable[[str], str]) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(model=model_of("gqa"), dtype=DTYPE, block_size=BLOCK).create_engine_config()
        config.cache_config.kv_cache_layout = "LBHNC"  # as the engine core resolves it
        return config

    @pytest.mark.parametrize(
        ("part", "field", "value"),
        [
            ("model_config", "dtype", "float16"),
            ("model_config", "quantization", "fp8"),
            ("model_config", "hf_overrides", {"rope_theta": 5.0}),
            ("model_config", "max_model_len", 99),  # some ropes scale by it
            ("model_config.hf_config", "rms_norm_eps", 0.5),
            ("cache_config", "cache_dtype", "fp8"),
            ("cache_config", "kv_cache_layout", "LBNHC"),
            ("cache_config", "prefix_caching_hash_algo", "sha256_cbor"),
            ("parallel_config", "tensor_parallel_size", 2),
        ],
    )
    def test_another_setting_is_another_namespace(self, vllm_config: Any, part: str, field: str, value: Any) -> None:
        changed = copy.copy(vllm_config)
        owner = changed
        for name in part.split("."):
            setattr(owner, name, copy.copy(getattr(owner, name)))
            owner = getattr(owner, name)
        assert getattr(owner, field) != value
        setattr(owner, field, value)

        assert root(changed) != root(vllm_config)
        assert root(copy.deepcopy(vllm_config)) == root(vllm_config)

    def test_another_machine_version_layout_or_name_of_the_weights_is_another_namespace(
        self, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = {
            root(vllm_config),
            root(vllm_config, vllm_version="0.33.0"),
            root(vllm_config, block_size=2 * BLOCK),
            root(vllm_config, weights="mine"),
        }
        import torch

        has_amx = torch.cpu._is_amx_tile_supported()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not has_amx)
        names.add(root(vllm_config))

        assert len(names) == 5

    def test_a_patch_release_and_another_place_of_the_model_change_nothing(
        self, vllm_config: Any, model_of: Callable[[str], str], tmp_path: Path
    ) -> None:
        moved = copy.copy(vllm_config)
        moved.model_config = copy.copy(vllm_config.model_config)
        (tmp_path / "elsewhere").symlink_to(model_of("gqa"))
        moved.model_config.model = str(tmp_path / "elsewhere")

        assert root(moved, vllm_version="0.32.9") == root(vllm_config, vllm_version="0.32.0")

    def test_the_engine_knows_its_layout_when_the_namespace_is_made(self, open_engine: Callable[..., Engine]) -> None:
        engine = open_engine({})

        assert dict(engine.half.store.namespace.extra)["kv_layout"] == "LBHNC"


def root(vllm_config: Any, *, block_size: int = BLOCK, vllm_version: str = "0.32.0", weights: str = "sampled") -> bytes:
    layout = Layout(block_size, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "bfloat16")
    return engine_namespace(vllm_config, layout, weights=weights, vllm_version=vllm_version).root()

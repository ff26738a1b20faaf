"""Whatever changes what a model computes keeps its pages apart, and nothing else does."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from connectors.transformers import KVCacheModel
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from connectors.transformers.watch import ModelWatch
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import SUPPORTED, random_ids, tiny_model

BLOCK = 16
CHUNK = 32


class Observing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while; what was inherited before is inherited again."""
    own = getattr(owner, name) if name.startswith("__c") else vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def held(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def item(space: Any, name: str, value: Any) -> Iterator[None]:
    before = space[name]
    space[name] = value
    try:
        yield
    finally:
        space[name] = before


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _attention(model: Any) -> Any:
    return model.model.layers[1].self_attn


def _modeling(model: Any) -> Any:
    import sys

    return sys.modules[type(model).__module__]


def _halved(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def _module_hook(*_: Any, **__: Any) -> None:
    return None


# Changes that can be taken back. kind -> makes one.
PASSING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "autocast": ("autocast", lambda m: torch.autocast("cpu", dtype=torch.bfloat16)),
    "forward hook": ("hooks", lambda m: held(m.model.layers[1].register_forward_hook(_module_hook))),
    "hook of the model": ("hooks", lambda m: held(m.register_forward_hook(_module_hook))),
    "hook with keywords": (
        "hooks",
        lambda m: held(_attention(m).register_forward_hook(_module_hook, with_kwargs=True)),
    ),
    "forward pre-hook": ("hooks", lambda m: held(m.model.norm.register_forward_pre_hook(_module_hook))),
    "pre-hook with keywords": (
        "hooks",
        lambda m: held(_attention(m).register_forward_pre_hook(_module_hook, with_kwargs=True)),
    ),
    "global hook": (
        "global hooks",
        lambda m: held(torch.nn.modules.module.register_module_forward_hook(_module_hook)),
    ),
    "global pre-hook": (
        "global hooks",
        lambda m: held(torch.nn.modules.module.register_module_forward_pre_hook(_module_hook)),
    ),
    "forward of a module": (
        "methods",
        lambda m: replaced(
            m.model.layers[1].mlp, "forward", types.MethodType(lambda self, x: 0 * x, m.model.layers[1].mlp)
        ),
    ),
    "forward of the rope": ("methods", lambda m: replaced(m.model.rotary_emb, "forward", lambda *_: None)),
    "forward of a class": (
        "code",
        lambda m: replaced(type(_attention(m)), "forward", _halved(type(_attention(m)).forward)),
    ),
    "forward of another class": (
        "code",
        lambda m: replaced(type(m.model.norm), "forward", type(m.model.layers[1].mlp).forward),
    ),
    "call of torch's modules": (
        "code",
        lambda m: replaced(torch.nn.Module, "_call_impl", lambda *args, **kwargs: None),
    ),
    "forward of a torch class": ("code", lambda m: replaced(torch.nn.Linear, "forward", lambda self, x: x)),
    "update of the cache": (
        "code",
        lambda m: replaced(
            __import__("transformers").cache_utils.DynamicLayer, "update", lambda self, k, v, *_, **__: (k, v)
        ),
    ),
    "function of the modeling file": (
        "code",
        lambda m: replaced(_modeling(m), "apply_rotary_pos_emb", lambda q, k, *_: (q, k)),
    ),
    "registered attention": (
        "code",
        lambda m: item(_modeling(m).ALL_ATTENTION_FUNCTIONS, m.config._attn_implementation, lambda *_, **__: None),
    ),
    "function of torch": ("code", lambda m: replaced(torch.nn.functional, "silu", torch.nn.functional.gelu)),
    "operation of torch": ("code", lambda m: replaced(torch, "matmul", lambda *_: None)),
    "code of a function": (
        "code",
        lambda m: replaced(
            type(m.model.norm).forward, "__code__", (lambda self, hidden_states: hidden_states).__code__
        ),
    ),
    "attribute of attention": ("attributes", lambda m: replaced(_attention(m), "scaling", 0.5)),
    "attribute of a norm": ("attributes", lambda m: replaced(m.model.norm, "variance_epsilon", 1.0)),
    "class of a module": (
        "modules",
        lambda m: replaced(m.model.norm, "__class__", torch.nn.Identity),
    ),
    "module": ("modules", lambda m: item(m.model.layers[1].mlp._modules, "act_fn", torch.nn.ReLU())),
    "parameter": (
        "weights",
        lambda m: item(_attention(m).k_proj._parameters, "weight", torch.nn.Parameter(torch.ones(32, 64))),
    ),
    "buffer": ("buffers", lambda m: item(m.model.rotary_emb._buffers, "inv_freq", torch.ones(8))),
    "config": ("config", lambda m: replaced(m.config, "sliding_window", 7)),
    "nested config": ("config", lambda m: item(m.config.rope_parameters, "rope_theta", 5.0)),
    "training of one module": ("training", lambda m: replaced(m.model.layers[0].mlp, "training", True)),
    "function mode": ("torch function mode", lambda m: Observing()),
    "dispatch mode": ("torch dispatch mode", lambda m: Dispatching()),
    "matmul precision": (
        "numerics",
        lambda m: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    ),
    "default dtype": ("numerics", lambda m: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64)),
    "threads": ("numerics", lambda m: setting(torch.get_num_threads, torch.set_num_threads, 2)),
    "kernel of attention": (
        "numerics",
        lambda m: setting(torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    ),
    "flushed denormals": ("numerics", lambda m: setting(lambda: False, torch.set_flush_denormal, True)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama_gqa")


@pytest.fixture
def opened(model: Any) -> Iterator[tuple[KVCacheModel, DictStore]]:
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as kv:
        yield kv, store


@pytest.mark.parametrize("name", sorted(PASSING))
def test_a_request_under_a_change_neither_saves_nor_loads_and_one_after_it_does(
    opened: tuple[KVCacheModel, DictStore], name: str
) -> None:
    kv, _ = opened
    kind, change = PASSING[name]
    ids = random_ids(100)
    assert kv.connector is not None

    with change(kv.model):
        reason = kv.connector.bypass_reason()
        under = kv.connector.begin(ids)
        assert kv.lookup(ids).hit_tokens == 0

    assert under is None
    assert kind in reason.removeprefix("model changed: ").split(", ")
    assert kv.connector.counters.bypassed == 1
    assert kv.connector.bypass_reason() == ""
    kv.prefill(ids)
    assert kv.flush(10.0)
    again = kv.prefill(ids).report
    assert again.reused_tokens == 96
    assert again.bypassed == ""


def test_the_answer_under_a_hook_is_computed_with_it_and_its_report_says_why(
    opened: tuple[KVCacheModel, DictStore],
) -> None:
    kv, store = opened
    ids = random_ids(100)
    kv.prefill(ids)
    assert kv.flush(10.0)
    pages = dict(store.pages)
    cold = KVCacheModel(kv.model, prefill_chunk=CHUNK)

    with held(kv.model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)):
        under, expected = kv.prefill(ids), cold.prefill(ids)

    assert torch.equal(under.logits, expected.logits)
    assert under.report.bypassed == "model changed: hooks"
    assert under.report.reused_tokens == 0
    assert store.pages == pages
    assert not torch.equal(under.logits, cold.prefill(ids).logits)


@pytest.mark.parametrize("reuse", ["exact", "any"])
def test_what_comes_and_goes_between_two_steps_ends_the_saving_of_that_request(model: Any, reuse: str) -> None:
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK, reuse=reuse))
    with KVCacheModel(model, store, prefill_chunk=CHUNK, reuse=reuse) as kv:
        for at in (2, 8):  # in the prompt, and in the answer, in the middle of a block
            run = kv.start(random_ids(100, seed=at), 30)
            for step in range(40):
                if step == at:
                    with held(model.model.norm.register_forward_hook(_module_hook)):
                        run.step()
                else:
                    run.step()
            run.close()
            assert kv.flush(10.0)
        saved = len(store.pages)

        assert run.report.bypassed == ("model changed: hooks" if reuse == "any" else "")
        assert saved == 6  # the second prompt's; what a prompt had before it was disturbed is not saved
        assert kv.connector is not None
        assert kv.connector.counters.reasons == {"model changed: hooks": 2 if reuse == "any" else 1}


@pytest.mark.parametrize("name", ["hook of the model", "forward of a class", "forward of a module", "autocast"])
def test_what_was_there_at_the_opening_keeps_the_model_from_its_store_too(model: Any, name: str) -> None:
    kind, change = PASSING[name]
    layout = model_layout(model, BLOCK)
    with change(model):
        store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))
        with KVCacheModel(model, store, prefill_chunk=CHUNK) as kv:
            assert kv.prefill(random_ids(100)).report.bypassed == f"model changed: {kind}"
            assert kv.flush(10.0)
            assert store.pages == {}


def test_a_model_that_was_opened_under_a_hook_uses_its_store_once_that_is_gone(model: Any) -> None:
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))
    with held(model.register_forward_hook(_module_hook)):
        kv = KVCacheModel(model, store, prefill_chunk=CHUNK)
    with kv:
        assert kv.connector is not None
        assert kv.connector.bypass_reason() == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda model: replaced(_attention(model), "scaling", 0.5),
        lambda model: item(model.model.layers[1].mlp._modules, "act_fn", torch.nn.ReLU()),
        lambda model: replaced(model.model.norm, "variance_epsilon", 1.0),
        lambda model: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    ],
)
@pytest.mark.parametrize("reuse", ["exact", "any"])
def test_what_was_changed_before_the_opening_is_part_of_the_name(model: Any, change: Any, reuse: str) -> None:
    layout = model_layout(model, BLOCK)
    plain = model_namespace(model, layout, reuse=reuse, revision="same").root()

    with change(model):
        changed = model_namespace(model, layout, reuse=reuse, revision="same").root()

    assert changed != plain
    assert model_namespace(model, layout, reuse=reuse, revision="same").root() == plain


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_running_a_model_is_no_change(name: str) -> None:
    own = tiny_model(name)
    watch = ModelWatch(own, bits=True)
    with torch.inference_mode():
        for length in (3, 100):
            own(torch.tensor([random_ids(length)]))
            own(torch.tensor([random_ids(length)]), output_hidden_states=True)
    own.generate(torch.tensor([random_ids(4)]), max_new_tokens=2, do_sample=False)

    assert watch.findings() == []


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ],
)
def test_a_rope_that_moves_by_itself_is_no_change_and_one_that_somebody_wrote_to_is(rope: dict[str, Any]) -> None:
    own = tiny_model("llama_gqa", rope_parameters=rope, max_position_embeddings=64)
    watch = ModelWatch(own, bits=True)
    for length in (20, 200, 20):
        with torch.inference_mode():
            own(torch.tensor([random_ids(length)]))
        assert watch.findings() == []

    if rope["rope_type"] == "dynamic":  # the other sets its frequencies anew in each forward
        own.model.rotary_emb.inv_freq.mul_(0.5)
    else:
        own.model.rotary_emb.original_inv_freq.mul_(0.5)

    assert {finding.kind for finding in watch.findings()} == {"buffers"}


def test_harmless_attributes_and_hooks_for_gradients_are_no_change(model: Any) -> None:
    own = tiny_model("llama_gqa")
    watch = ModelWatch(own, bits=True)

    own.note = "mine"
    own.model.layers[0].register_full_backward_hook(_module_hook)
    own.config.use_cache = False
    with torch.device("cpu"):
        assert watch.findings() == []


def test_accelerates_alignment_of_devices_is_no_change_and_its_offloading_is() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    own = tiny_model("llama_gqa")
    watch = ModelWatch(own, bits=True)

    add_hook_to_module(own.model.layers[0], AlignDevicesHook("cpu", io_same_device=True))
    assert watch.findings() == []
    assert ModelWatch(own, bits=True).findings() == []

    remove_hook_from_module(own.model.layers[0])
    own.model.layers[0].forward = functools.partial(own.model.layers[0].forward)
    assert [finding.kind for finding in watch.findings()] == ["methods"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda model: model.train(), "training"),
        (lambda model: model.bfloat16(), "dtype"),
        (lambda model: model.set_attn_implementation("eager"), "attention"),
        (lambda model: add_tuner(model, "poet"), "adapters"),
        (lambda model: model.lm_head.weight.detach().add_(1e-3), "weights"),
        (lambda model: model.lm_head.weight.data.mul_(1.5), "weights"),  # torch's own counter does not see it
        (lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.clone()), "weights"),
        (lambda model: model.load_state_dict(tiny_model("llama_gqa", seed=1).state_dict()), "weights"),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(0.5), "buffers"),
        (
            lambda model: torch.nn.utils.parametrize.register_parametrization(
                model.lm_head, "weight", torch.nn.Identity()
            ),
            "modules",
        ),
        (lambda model: model.model.layers[0].compile(backend="eager"), "compiled"),
        (lambda model: setattr(model.config, "rope_parameters", {"rope_type": "default", "rope_theta": 7.0}), "config"),
        (lambda model: model.model.layers.append(model.model.layers[0]), "modules"),
    ],
)
def test_a_model_that_changes_for_good_is_noticed(change: Any, kind: str) -> None:
    own = tiny_model("llama_gqa")
    watch = ModelWatch(own, bits=True)
    assert watch.findings() == []

    change(own)

    assert kind in {finding.kind for finding in watch.findings()}
    assert kind in {finding.kind for finding in watch.findings()}  # and it stays so


def test_an_adapter_whose_strength_is_changed_in_place_is_noticed() -> None:
    own = tiny_model("llama_gqa")
    tuner = add_tuner(own, "poet")
    watch = ModelWatch(own, bits=True)
    assert watch.findings() == []

    tuner.scaling["poet"] = 0.5

    assert "adapters" in {finding.kind for finding in watch.findings()}


def test_the_watch_of_a_model_holds_none_of_the_tensors_that_were_replaced() -> None:
    import gc
    import weakref

    own = tiny_model("llama_gqa")
    watch = ModelWatch(own, bits=True)
    old = weakref.ref(own.model.layers[0].mlp.up_proj.weight)

    own.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False).eval()
    assert watch.findings()
    gc.collect()

    assert old() is None


def test_prompts_under_a_change_can_be_forgotten(opened: tuple[KVCacheModel, DictStore]) -> None:
    kv, store = opened
    ids = random_ids(100)
    kv.prefill(ids)
    assert kv.flush(10.0)
    assert store.pages

    with held(kv.model.register_forward_hook(_module_hook)):
        assert kv.forget(ids) == 6

    assert not store.pages


def add_tuner(model: Any, name: str) -> Any:
    """Wrap one projection as PEFT does: same attributes, none of its code."""

    class Tuner(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.active_adapters = [name]
            self.disable_adapters = False
            self.merged_adapters: list[str] = []
            self.scaling = {name: 1.0}

        def forward(self, x: Any) -> Any:
            return self.base_layer(x)

    attention = model.model.layers[0].self_attn
    attention.q_proj = Tuner(attention.q_proj).eval()
    return attention.q_proj


def test_a_module_that_was_put_in_before_the_opening_may_be_in_training_mode_unless_it_draws() -> None:
    own = tiny_model("llama_gqa")
    own.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    assert ModelWatch(own, bits=True).findings() == []

    own.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    assert {finding.kind for finding in ModelWatch(own, bits=True).findings()} == {"training"}

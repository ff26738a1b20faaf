"""Every causal language model of the installed transformers: exact with the store, or refused with a sentence.

Exact: behind the windows and chunks of the model, logits of all tokens after a hit are bit-equal to a run without a
store, those are transformers' own in one piece up to rounding, and the tokens generated are the same.
"""

import pytest
import torch
import transformers

from connectors.transformers import KVCacheModel
from connectors.transformers.check import check_engine
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from kvstore.errors import RequestError, UnsupportedModel
from tests.helpers.all_models import VOCAB, causal_types, small_model
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids

BLOCK = 16
CHUNK = 32
LENGTH = 120  # beyond the windows (40) and chunks (48) of the models made here

EXACT = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "bamba",
    "bart",
    "beam",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "data2vec-text",
    "deepseek_v3",
    "diffllama",
    "doge",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "kolibri1",
    "laguna",
    "lfm2",
    "llama",
    "llama4_text",
    "marian",
    "mbart",
    "megatron-bert",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "mpt",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "plbart",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "youtu",
]
REFUSED = [
    "axk2",
    "bailing_hybrid",
    "cpmant",
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "lfm3",
    "minimax",
    "openai-gpt",
    "qwen3_5_moe_text",
    "recurrent_gemma",
    "rwkv",
    "xlnet",
]
# Resumes wrongly in transformers itself: found by the check at the opening, which says this.
FOUND_BY_THE_CHECK = {
    "falcon_mamba": "ignores the state in its cache",
    "jamba": "does not run with a DynamicCache",  # where it has no attention layer, as here
    "mamba": "ignores the state in its cache",
    "moshi": "does not resume from a cache as it should",
}
# Not made here: wrappers of a text model that is in the lists above, models that need more than sizes, or larger ones.
# They are checked when they are opened, like all types that are not proven.
NOT_MADE = [
    "blt",
    "cohere_compass_text",
    "dbrx",
    "deepseek_v2",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "emu3",
    "fuyu",
    "gemma3",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "gemma4_assistant",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_assistant",
    "git",
    "got_ocr2",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "llama4",
    "longcat_flash",
    "mamba2",
    "ministral",
    "mllama",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "phi4_multimodal",
    "prophetnet",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "xlm",
    "xlstm",
    "xmod",
    "zamba",
    "zamba2",
    "zaya",
]
QUICK = [
    "beam",
    "bloom",
    "falcon",
    "gemma3_text",
    "gpt_neo",
    "gpt_oss",
    "llama4_text",
    "minicpm3",
    "mpt",
    "olmo3",
    "phi3",
]
SLOW = pytest.mark.slow
ALL = [pytest.param(name, marks=() if name in QUICK else SLOW) for name in EXACT]


def test_every_type_that_transformers_has_is_in_one_of_the_lists() -> None:
    listed = [*EXACT, *REFUSED, *FOUND_BY_THE_CHECK, *NOT_MADE]

    assert len(set(listed)) == len(listed)
    if transformers.__version__.startswith("5.23."):
        assert sorted(listed) == causal_types()


@pytest.mark.parametrize("name", ALL)
def test_a_model_is_exact_behind_its_windows(name: str) -> None:
    model = small_model(name)
    ids = [3 + token % (VOCAB - 3) for token in random_ids(LENGTH)]
    layout = model_layout(model, BLOCK)
    store: DictStore = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))
    with torch.inference_mode():
        whole = model(torch.tensor([ids]), position_ids=torch.arange(LENGTH)[None], use_cache=False).logits
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    expected = cold.prefill(ids, all_logits=True).logits

    with KVCacheModel(model, store, prefill_chunk=CHUNK) as kv:  # type: ignore[arg-type]
        kv.prefill(ids[:104])
        assert kv.flush(10.0)
        warm = kv.prefill(ids, all_logits=True)
        tokens = kv.generate(ids, 3, eos=()).tokens
        assert kv.connector is not None
        assert kv.connector.bypass_reason() == ""  # nothing in a model as it is keeps it from its store

    assert warm.report.reused_tokens == 96
    assert torch.equal(warm.logits, expected[:, 96:])
    assert float((expected - whole).abs().mean() / whole.std()) < 1e-3
    assert tokens == cold.generate(ids, 3, eos=()).tokens


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("mamba", "rwkv") else SLOW) for n in REFUSED])
def test_a_model_without_pages_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="model type"):
        model_layout(small_model(name), BLOCK)


@pytest.mark.parametrize("name", FOUND_BY_THE_CHECK)
def test_a_model_that_resumes_wrongly_is_found(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=FOUND_BY_THE_CHECK[name]):
        check_engine(small_model(name)).require()


@pytest.mark.parametrize("prompt", [{"input_ids": [[3, 4]], "attention_mask": [[0, 1]]}, [[3, 4], [0, 3]]])
def test_masks_and_padded_batches_cannot_be_passed(prompt: object) -> None:
    with pytest.raises(RequestError, match="prompt"):
        KVCacheModel(small_model("llama")).generate(prompt, 1)

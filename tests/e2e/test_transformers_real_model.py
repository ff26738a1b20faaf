"""Once with a real model: SmolLM2, bfloat16, over disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from connectors.transformers import KVCacheModel, check_engine
from kvstore.config.sections import Config
from kvstore.demo.models import find_smollm2

TEXT = (
    "The cache keeps what the model has already read. When the next question begins with the same words, their keys "
    "and values are taken from memory, from disk or from another machine, and only what is new is computed. "
)
PROMPT_TOKENS = 600
CHUNK = 128

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_smollm2() is None, reason="needs the converted SmolLM2: .ci/setup model"),
]


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = str(find_smollm2())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def test_a_new_process_answers_from_disk_with_the_bits_and_words_of_a_cold_run(
    real: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = real
    text = tokenizer.decode(tokenizer(TEXT * 30).input_ids[:PROMPT_TOKENS]) + "\nIn short:"
    config = Config(store={"load_or_recompute": False}, disk={"path": tmp_path, "capacity_bytes": 64 << 20})
    cold = KVCacheModel(model, tokenizer=tokenizer, prefill_chunk=CHUNK)
    expected = cold.prefill(text)
    answer = cold.generate(text, 12)
    with KVCacheModel.open(model, config, tokenizer=tokenizer, prefill_chunk=CHUNK) as writer:
        first = writer.generate(text, 12)

    with KVCacheModel.open(model, config, tokenizer=tokenizer, prefill_chunk=CHUNK) as reader:
        loaded = reader.prefill(text)
        again = reader.generate(text, 12)

    assert loaded.report.by_tier == {"disk": PROMPT_TOKENS // CHUNK * CHUNK}
    assert torch.equal(loaded.logits, expected.logits)
    assert answer.text
    assert first.text == again.text == answer.text
    assert first.tokens == again.tokens == answer.tokens


def test_the_self_check_passes(real: tuple[Any, Any]) -> None:
    check_engine(real[0]).require()

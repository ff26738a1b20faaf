"""A small Llama with random weights and a tokenizer of single bytes, as a Hugging Face directory.

    python -m kvstore.demo.random_model DIRECTORY

For a demo without any download, and for tests. The text it writes means nothing; sizes, times and the equality of
tokens are as real as any model's. The same seed makes the same weights every time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20250101
END = "<|end|>"
START = "<|start|>"
# One line per message, then the invitation to answer: the least that makes a conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of the model; the default has 13M parameters, three query heads to a KV head."""

    hidden: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 1024
    positions: int = 16384


def make_random_model(target: Path, shape: Shape | None = None) -> None:
    """Write a model of `shape` into the existing directory `target`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape or Shape()
    tokenizer = byte_tokenizer()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        # Wide enough that the greedy choice is never a tie decided by rounding, as it is near a flat distribution.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def byte_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with one token per byte, and two special ones for the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[START], clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


if __name__ == "__main__":
    make_random_model(Path(sys.argv[1]))

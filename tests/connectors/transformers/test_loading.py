from __future__ import annotations

from connectors.transformers.loading import chat_ids
from kvstore.demo.random_model import byte_tokenizer

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_a_chat_template_makes_the_prompt() -> None:
    tokenizer = byte_tokenizer()

    ids = chat_ids(tokenizer, MESSAGES)

    assert tokenizer.decode(ids) == "<|start|>system\ns<|end|>\n<|start|>user\nu<|end|>\n<|start|>assistant\n"


def test_a_model_without_chat_template_gets_plain_lines() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None

    ids = chat_ids(tokenizer, MESSAGES)

    assert tokenizer.decode(ids) == "System: s\n\nUser: u\n\nAssistant:"

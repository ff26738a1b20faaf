"""A model of transformers in this process, its tokenizer, and the prompt that a conversation becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def load_model(source: str, dtype: str, threads: int) -> tuple[Any, Any]:
    """The causal language model in `source`, in eval mode, and its tokenizer.

    source:  a directory or a hub id.
    dtype:   "float32", "bfloat16" or "float16".
    threads: of torch, for the whole process. Replicas that share pages need the same number.

    Raises OSError or ValueError, as transformers does, if there is no such model.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    return model, tokenizer


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt that a chat server makes of `messages`; plain lines where the model has no chat template."""
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    else:
        lines = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
        ids = tokenizer.encode("".join(lines) + "Assistant:")
    return [int(token) for token in ids]

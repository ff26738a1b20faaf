"""The end of a request, as far as an engine tells it: the reason why the reply ended.

Engines and gateways have many words for few reasons. What is decided by them (`store.ttl_after`, policies) goes by one
word each, those of TURN_ENDS; a word that is none of theirs stands for itself. What is no word may be a text of
somebody: it is "other", since words are kept, written and shown.
"""

from __future__ import annotations

import re

# One word per reason -> the others that mean it: Anthropic's, OpenAI's, vLLM's (its states in small letters), ours.
TURN_ENDS = {
    "tool_use": ("tool_calls", "function_call", "tool_call"),
    "end_turn": ("stop", "stopped", "stop_sequence", "eos"),
    "length": ("max_tokens", "length_capped", "max_output_tokens"),
    "cancelled": ("abort", "aborted", "canceled"),
}
_WORD = re.compile(r"[a-z0-9_.-]{0,32}")
_ONE_WORD = {other: word for word, others in TURN_ENDS.items() for other in others}


def one_word(finish_reason: str) -> str:
    """Return the one word that stands for a reason, whoever's word it is."""
    word = finish_reason.strip().lower()
    return _ONE_WORD.get(word, word) if _WORD.fullmatch(word) else "other"

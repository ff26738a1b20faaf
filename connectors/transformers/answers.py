"""Which blocks of answers a transformers model saves, by its mode and its tokenizer's chat template."""

from __future__ import annotations

import logging
from typing import Any

from connectors.answers import ALL, AUTO, NOT_KNOWN, PROMPT, SavedAnswers, decide
from connectors.transformers.identity import Reuse
from kvstore.errors import ConfigError
from kvstore.prefix.template import ModelTemplate, of_loaded

log = logging.getLogger(__name__)

SAVES = (AUTO, ALL, PROMPT)


def saved_answers(save: str, reuse: Reuse, tokenizer: Any = None) -> SavedAnswers:
    """Settle `save` for a model. Raises ConfigError for what cannot be.

    With "exact" no answer is saved: a decode step gives other bits than a prefill. With "any" all are by default.
    """
    if save not in SAVES:
        raise ConfigError(f"save is {save!r}; it must be one of {', '.join(SAVES)}")
    if reuse is Reuse.EXACT:
        if save == ALL:
            raise ConfigError("save is 'all' with reuse 'exact'; a decode step gives other bits than a prefill")
        return SavedAnswers(PROMPT, NOT_KNOWN, PROMPT)

    def find() -> ModelTemplate:
        if tokenizer is None:
            raise ConfigError(NOT_KNOWN.why)
        return of_loaded(str(getattr(tokenizer, "name_or_path", "")) or "the tokenizer", tokenizer)

    return decide(save, ALL, find, log)

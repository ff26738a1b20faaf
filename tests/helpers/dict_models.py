"""Tiny models over stores that are dicts."""

from __future__ import annotations

from typing import Any

from connectors.transformers import KVCacheModel
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32
NEW_TOKENS = 6


def ask(model: KVCacheModel, ids: list[int], **options: Any) -> Any:
    """Generate, and wait until the saves are done."""
    answer = model.generate(ids, NEW_TOKENS, **options)
    assert model.flush(WAIT_S)
    return answer


def reused(answer: Any) -> int:
    """Tokens of a prompt that were not computed."""
    return int(answer.report.reused_tokens)

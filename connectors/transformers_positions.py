"""How many tokens a model has positions for, and up to where it encodes them in one way.

Most models encode a position the same way whatever the length of the prompt. Two kinds of rotary embedding do not:
"dynamic" and "longrope" change their frequencies once the prompt grows beyond the length they were trained with. The
first pages of such a prompt are then other than those of a shorter one with the same tokens, and a block hash cannot
tell them apart.
"""

from __future__ import annotations

from typing import Any

_MOVING = ("dynamic", "longrope")


def max_tokens(config: Any) -> int | None:
    """Positions the model has, stretched by its rope's factor where it has one; None if its config does not say."""
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    return int(limit * max([1.0, *(float(rope.get("factor") or 1.0) for rope in _ropes(config))]))


def steady_tokens(config: Any) -> int | None:
    """Tokens up to which positions are encoded in one way; None where that is always so.

    A longer prompt is to be computed in one piece, as transformers does, and never stored.
    """
    config = config.get_text_config(decoder=True)
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in _ropes(config)
        if any(kind in str(rope.get("rope_type", "")) for kind in _MOVING)
    ]
    return min(limits, default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of each rope: one for the model, or one per type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]

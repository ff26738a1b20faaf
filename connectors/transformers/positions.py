"""How many tokens a model has positions for, and up to where it encodes them in one way.

Most models encode a position the same way whatever the length of the prompt. Two kinds of rotary embedding do not:
"dynamic" and "longrope" change their frequencies once the prompt grows beyond the length they were trained with. The
first pages of such a prompt are then other than those of a shorter one with the same tokens, and a block hash cannot
tell them apart.
"""

from __future__ import annotations

from typing import Any


def max_tokens(config: Any) -> int | None:
    """Positions the model has; None if its config does not say.

    `max_position_embeddings` is the answer where a rope has been stretched already (llama3, longrope, and yarn as most
    models ship it) or each type of layer has its own. Where it is the length before the stretching, it is stretched
    here: always with "dynamic", which computes with it; with "linear", which says nothing else; and with "yarn" or
    "longrope" up to their factor times the original length they name.
    """
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(entry, dict) for entry in rope.values()):
        return int(limit)
    factor = float(rope.get("factor") or 1.0)
    original = int(rope.get("original_max_position_embeddings") or limit)
    kind = _kind(rope)
    if kind in ("yarn", "longrope", "linear"):
        return max(int(limit), int(factor * original))
    return int(factor * limit) if kind == "dynamic" else int(limit)


def steady_tokens(config: Any) -> int | None:
    """Tokens up to which positions are encoded in one way; None where that is always so.

    A longer prompt is to be computed as transformers does, and never stored.
    """
    config = config.get_text_config(decoder=True)
    limits = []
    for rope in _ropes(config):
        if "dynamic" in _kind(rope):
            limits.append(int(config.max_position_embeddings))
        elif "longrope" in _kind(rope):
            limits.append(int(rope.get("original_max_position_embeddings") or config.max_position_embeddings))
    return min(limits, default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of each rope: one for the model, or one per type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")

"""JSON bodies that a front passes on: read as far as it has to, changed as little as can be."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from kvstore.cluster.openai import ApiError, KVOptions


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object of a request. Raises ApiError 400."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def take_extension(body: dict[str, Any]) -> KVOptions:
    """Take what is for the store out of a request. Raises ApiError 400."""
    try:
        return KVOptions.model_validate(body.pop("kvstore", None) or {})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, ("kvstore", *first["loc"])))
        raise ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value") from None


def as_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

"""The bodies of the HTTP API, checked by pydantic; the OpenAPI document is made from these models and `answers`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvstore.service.protocol.namespaces import (
    MAX_BLOCK_SIZE,
    MAX_EXTRA,
    MAX_GROUPS,
    MAX_LAYERS,
    MAX_PAGE_BYTES,
    MAX_SHARDS,
    MAX_TEXT,
)

Text = Annotated[str, Field(max_length=MAX_TEXT)]

MAX_TOKENS = 1 << 20
MAX_KEYS = 1 << 16
MAX_ACTIONS = 1 << 12

Token = Annotated[int, Field(ge=0, lt=1 << 32)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NamespaceId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="Id of a namespace, from /v1/namespaces.")]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


def parse_json(raw: bytes) -> Any:
    """JSON as the models take it. Raises ValueError for anything else, NaN and Infinity included.

    JSON knows one kind of number: 5.0 is as good a 5.
    """
    try:
        return json.loads(raw, parse_float=_number, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


class Body(BaseModel):
    """Unknown fields are refused; numbers are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InNamespace(Body):
    """Something about one namespace."""

    namespace: NamespaceId | None = Field(default=None, description="Not needed where there is only one.")


def _either(schema: dict[str, Any]) -> None:
    """Say in the schema what `_one_of_both` checks."""
    schema["oneOf"] = [{"required": ["tokens"]}, {"required": ["keys"]}]
    for name in ("tokens", "keys"):
        field = schema["properties"][name]
        schema["properties"][name] = next(kind for kind in field["anyOf"] if kind.get("type") == "array") | {
            "description": field.get("description", "Token ids.")
        }


class Prompt(InNamespace):
    """A prompt: its token ids, or the hashes of its full blocks."""

    model_config = ConfigDict(json_schema_extra=_either)

    tokens: Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS)] | None = None
    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_KEYS)] | None = Field(
        default=None, description="Block hashes as the client library chains them, hexadecimal, root first."
    )
    exact: bool = Field(
        default=False,
        description="tokens mean pages that lost nothing, where tiers store with loss; the names in keys tell it.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Prompt:
        given = self.model_fields_set & {"tokens", "keys"}
        if len(given) != 1 or getattr(self, next(iter(given))) is None:
            raise ValueError("give either tokens or keys")
        return self


class Lookup(Prompt):
    """A question: how much of a prompt is stored?"""

    timeout_s: Seconds = Field(default=0.05, ge=0, le=10, description="Longest wait for a shared tier's answer.")


class Explain(Prompt):
    """Why did this prompt miss?"""

    timeout_s: Seconds = Field(default=0.5, ge=0, le=10, description="Longest wait for shared tiers; 0 asks none.")


class TtlBody(Prompt):
    """A new time to live for a prefix."""

    ttl_s: Seconds = Field(gt=0, le=10 * 365 * 86400)


class Flush(InNamespace):
    """Is everything that was saved and deleted so far on its tiers?"""

    timeout_s: Seconds = Field(default=10.0, ge=0, le=60, description="Longest wait for tiers that take it.")


class Delete(Prompt):
    """Delete a prefix from a block on, and all that continues it."""

    first: int = Field(default=0, ge=0, le=MAX_TOKENS)


class Read(Prompt):
    """Pages to read."""

    num_blocks: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="At most this many; else all.")
    timeout_s: Seconds = Field(default=2.0, ge=0, le=60, description="Longest wait for the pages.")


class HintsBody(InNamespace):
    """A message with KV hints (docs/hints.md). What is wrong with an action is told in its outcome."""

    protocol_version: Text
    message_id: Text = ""
    actions: list[Any] = Field(
        max_length=MAX_ACTIONS, description="Objects with action_id, action_type, action_version and payload."
    )


class Cancel(InNamespace):
    """A prefetch to be stopped."""

    ticket: int = Field(ge=0, lt=1 << 63)


class GroupBody(Body):
    """Layers that share a rule and travel in one page."""

    kind: Literal["full", "mla", "sliding", "recurrent"]
    layers: Annotated[list[Annotated[int, Field(ge=0, le=MAX_LAYERS)]], Field(max_length=MAX_LAYERS)]
    page_bytes: int = Field(ge=1, le=MAX_PAGE_BYTES)
    window: int | None = Field(ge=1, le=1 << 31, description="Tokens a sliding layer looks back on.")
    axes: list[Annotated[list[Annotated[int, Field(ge=0, le=MAX_PAGE_BYTES)]], Field(min_length=7, max_length=7)]] = (
        Field(
            default_factory=list,
            max_length=2 * MAX_LAYERS,
            description="What lies where in a page, for tiers that store with loss: of each layer's keys and values "
            "is_key, offset, heads, head_stride, tokens, token_stride, dims (kvstore/layout.py).",
        )
    )


class LayoutBody(Body):
    """The geometry of pages (kvstore/layout.py)."""

    block_size: int = Field(ge=1, le=MAX_BLOCK_SIZE)
    groups: Annotated[list[GroupBody], Field(min_length=1, max_length=MAX_GROUPS)]
    format: Text
    dtype: Text
    shards: int = Field(ge=1, le=MAX_SHARDS)


class NamespaceBody(Body):
    """The values that must be equal for two engines to share pages (radix/namespace.py)."""

    model: Text
    revision: Text
    dtype: Text
    layout: Text = Field(description="Fingerprint of the layout.")
    block_size: int = Field(ge=1, le=MAX_BLOCK_SIZE)
    adapter: Text
    salt: Text
    hash: Literal["sha256"]
    extra: Annotated[
        list[Annotated[list[Text], Field(min_length=2, max_length=2)]],
        Field(max_length=MAX_EXTRA, description="Further [name, value] pairs."),
    ]


class NewNamespace(Body):
    """A layout and a namespace that belongs to it."""

    layout: LayoutBody
    namespace: NamespaceBody


class Attach(InNamespace):
    """A tier to attach, as configured unless said otherwise."""

    path: str | None = Field(default=None, max_length=4096, description="Directory, for a tier that has one (disk).")
    url: str | None = Field(default=None, max_length=4096, description="URL, for a tier on a server (redis).")
    capacity_bytes: int | None = Field(default=None, ge=4096, lt=1 << 60, description="Size, for a tier that has one.")


class Resize(InNamespace):
    """A tier's new capacity."""

    capacity_bytes: int = Field(ge=4096, lt=1 << 60)


# ---- answers

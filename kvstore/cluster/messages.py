"""Messages of a chat as the replica takes them: texts, in parts if need be, which may have Anthropic's breakpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator


class Strict(BaseModel):
    """A part of a request: a field that nobody knows is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CacheControl(Strict):
    """A breakpoint as Anthropic's API has it: what comes before is worth keeping so long after each use."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class TextPart(Strict):
    """A piece of a message. cache_control: at its end."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ChatMessage(Strict):
    """One message; "developer" is what newer clients call "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _parts(cls, content: Any) -> list[TextPart]:
        if isinstance(content, str):
            return [TextPart(type="text", text=content)]
        if isinstance(content, list):
            if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                return [TextPart.model_validate(part) for part in content]
            raise ValueError("only parts of type 'text' are supported here")
        raise ValueError("it must be text")

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}

    @property
    def breakpoints(self) -> Iterator[tuple[int, int, CacheControl]]:
        """The parts with a breakpoint: number of the part, characters of the message up to there, and what it says."""
        characters = 0
        for number, part in enumerate(self.content):
            characters += len(part.text)
            if part.cache_control is not None:
                yield number, characters, part.cache_control

"""The base of everything that can be configured: one part's own settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part's own settings. Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

"""Configurations that are refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.config.sections import Config
from kvstore.errors import ConfigError


def refusal(path: Path | None = None, **overrides: Any) -> str:
    """What a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        Config.load(path, **overrides)
    return str(caught.value)

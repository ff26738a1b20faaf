"""The formats of traces by name, in the order in which a file's first line is shown to them."""

from __future__ import annotations

import json
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.lab.traces.event_log import EVENT_LOG
from kvstore.lab.traces.hash_ids import BAILIAN, MOONCAKE
from kvstore.lab.traces.kvt1 import KVT1
from kvstore.lab.traces.prompts import PROMPT_LOG
from kvstore.lab.traces.recording import RECORDING
from kvstore.lab.traces.source import Format
from kvstore.load.lines import broken_line

FORMATS = {one.name: one for one in (KVT1, MOONCAKE, BAILIAN, RECORDING, EVENT_LOG, PROMPT_LOG)}


def find_format(name: str) -> Format:
    """Return a format by its name. Raises ConfigError, with the list of all, if there is none."""
    if name not in FORMATS:
        raise ConfigError(f"there is no trace format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(path: Path, line: str) -> Format:
    """Return the format of a file by its first line. Raises ConfigError, with the list of all, if it is in none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        for one in FORMATS.values():
            if one.claims(fields):
                return one
    raise broken_line(
        path,
        1,
        f"the first line of a trace ({'; '.join(f'{one.name}: {one.about}' for one in FORMATS.values())})",
        line,
    )

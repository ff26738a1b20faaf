"""Traces as the laboratory replays them: who asked when, and of which blocks a prompt is made.

Each format has a file of its own that registry.py names; `read_trace` finds out which of them a file is.
"""

from kvstore.lab.traces.read import read_trace
from kvstore.lab.traces.trace import ReplayTrace

__all__ = ["ReplayTrace", "read_trace"]

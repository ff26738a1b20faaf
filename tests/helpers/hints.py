"""Messages of KV hints."""

from __future__ import annotations

from typing import Any


def envelope(*actions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A message of actions, each given by its type and payload."""
    return {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [
            {"action_id": str(index), "action_type": kind, "action_version": "1.0", "payload": payload}
            for index, (kind, payload) in enumerate(actions)
        ],
    }

"""The message that carries hints, and its reading.

    {"protocol_version": "1.0", "message_id": "m-1", "actions": [
        {"action_id": "a-1", "action_type": "pin", "action_version": "1.0", "payload": {"ttl_s": 60}}]}

It comes as JSON, as a dict, or as an engine's own struct of the same fields (vLLM's `KvHintsEnvelope`). `parse` never
raises: whatever is sent becomes actions that can be tried, and outcomes for the rest.

A major version of 1 is read, of the message and of each action; others are ignored, as are types that are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvstore.hints.actions import HintAction, HintKind, Unfit, read_payload
from kvstore.hints.limits import MAX_NAME, HintLimits, is_text
from kvstore.hints.outcome import HintOutcome, HintStatus

UNKNOWN = "unknown"  # the action of an outcome whose type is none of ours
ENVELOPE = "envelope"  # of an outcome about the message as a whole
MAX_REPORTED = 256  # actions beyond the most that are answered one by one

_KINDS = {kind.value: kind for kind in HintKind}


@dataclass(frozen=True, slots=True)
class HintEnvelope:
    """A message that was read: in the order in which they were sent, actions to be done and outcomes of the others."""

    message_id: str
    items: Sequence[HintAction | HintOutcome]


def parse(message: object, limits: HintLimits) -> HintEnvelope:
    """Read a message. Any thread. Never raises.

    message: JSON as bytes or text, a mapping, or an object with the fields of a message as attributes.
    """
    try:
        return _parse(message, limits)
    except _Broken as error:
        reason = str(error)
    except Exception as error:  # an object of a stranger's class may do anything when it is looked at
        reason = f"it cannot be read: {type(error).__name__}"
    return HintEnvelope("", [HintOutcome("", ENVELOPE, HintStatus.REJECTED, reason=reason)])


def refusal(size: int, limits: HintLimits) -> HintOutcome:
    """Return the answer to a message of too many bytes, for a door that reads JSON itself."""
    return HintOutcome("", ENVELOPE, HintStatus.REJECTED, reason=_too_large(size, limits))


def _too_large(size: int, limits: HintLimits) -> str:
    return f"{size} bytes; an envelope may have {limits.max_bytes}"


class _Broken(Exception):
    """The message as a whole is none; its text is the reason."""


def _parse(message: object, limits: HintLimits) -> HintEnvelope:
    if isinstance(message, (bytes, bytearray, memoryview, str)):
        message = _from_json(message, limits)
    message_id = _text(message, "message_id", "")
    version = _text(message, "protocol_version", None)
    actions = _field(message, "actions")
    if not isinstance(actions, (list, tuple)):
        raise _Broken("actions must be a list")
    is_known = _is_known(version)
    items = [_item(action, is_known, limits) for action in actions[: limits.max_actions]]
    if len(actions) > limits.max_actions:
        reason = f"{len(actions)} actions; an envelope may have {limits.max_actions}"
        for action in actions[limits.max_actions : limits.max_actions + MAX_REPORTED]:
            name = _name(action, "action_id") or ""
            items.append(HintOutcome(name, _word(action), HintStatus.REJECTED, reason=reason))
    return HintEnvelope(message_id, items)


def _from_json(raw: bytes | bytearray | memoryview | str, limits: HintLimits) -> object:
    size = len(raw) if isinstance(raw, str) else memoryview(raw).nbytes
    if size > limits.max_bytes:
        raise _Broken(_too_large(size, limits))
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError):
        raise _Broken("it is not JSON") from None
    except RecursionError:
        raise _Broken("it is nested too deep") from None


def _item(action: object, is_known: bool, limits: HintLimits) -> HintAction | HintOutcome:
    """Read one action."""
    action_id, word = _name(action, "action_id"), _word(action)
    if action_id is None:
        return HintOutcome(
            "", word, HintStatus.REJECTED, reason=f"action_id must be text of at most {MAX_NAME} characters"
        )
    if not is_known:
        return HintOutcome(action_id, word, HintStatus.IGNORED, reason="this protocol_version is not known here")
    if word == UNKNOWN:
        return HintOutcome(action_id, word, HintStatus.IGNORED, reason="this action_type is not known here")
    if not _is_known(_name(action, "action_version")):
        return HintOutcome(action_id, word, HintStatus.IGNORED, reason="this action_version is not known here")
    if not limits.enabled:
        return HintOutcome(action_id, word, HintStatus.REJECTED, reason="hints are off here (hints.enabled)")
    payload = _field(action, "payload")
    if payload is None:
        payload = {}
    if not isinstance(payload, Mapping):
        return HintOutcome(action_id, word, HintStatus.REJECTED, reason="payload must be an object")
    try:
        return read_payload(action_id, _KINDS[word], payload, limits)
    except Unfit as error:
        return HintOutcome(action_id, word, HintStatus.REJECTED, reason=str(error))


def _word(action: object) -> str:
    """The kind of an action in one of our words."""
    sent = (_name(action, "action_type") or "").lower().removeprefix("kv.")
    return sent if sent in _KINDS else UNKNOWN


def _name(action: object, name: str) -> str | None:
    """A short text of an action; None for anything else."""
    value = _field(action, name)
    return value if is_text(value, MAX_NAME) else None


def _text(message: object, name: str, default: str | None) -> str:
    value = _field(message, name)
    value = default if value is None else value
    if not is_text(value, MAX_NAME):
        raise _Broken(f"{name} must be text of at most {MAX_NAME} characters")
    return value


def _field(holder: object, name: str) -> object:
    """A field of a mapping, or of a struct."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _is_known(version: str | None) -> bool:
    return version is not None and version.removeprefix("v").split(".", 1)[0] == "1"

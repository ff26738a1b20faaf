"""Weights that are updated while a server runs, by `/update_weights_from_disk` and its siblings.

Page hashes stay the same then, and nothing tells a cache of SGLang's: its own is flushed, if the caller asks for it. So
our names of the weights, made of the model's files at the start, hold until the first update. After it a page has
another mark, the name that the update gave the weights (`weight_version`), where the operator vouches for such names
and SGLang's caches were flushed with the update: what they held before would be stored under the new name. Otherwise
there is no mark, and nothing is loaded or stored.

Updates are heard of from the first seat of a process on: the methods of SGLang's classes that every update goes through
are wrapped, since it has no other way to tell. They are of the process, and so is what is known of them: a seat that is
attached again after an update finds it here.

Scheduler's thread for what happens, any thread for the mark.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple

from kvstore.errors import ConfigError

log = logging.getLogger("sglang.kvstore")

RUNNER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"
CHANGES = (
    "begin_weight_update",
    "load_weights_from_distributed",
    "update_weights_from_disk",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
)
SCHEDULER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
FLUSH = "flush_cache_after_weight_update"


class _State(NamedTuple):
    """before: the version of the weights before the update that is the last one, or under way; None before any."""

    before: str | None = None
    is_flushed: bool = False


class Updates:
    """What happened to the weights of this process. weight_version: SGLang's name of them as they are now."""

    def __init__(self, weight_version: Callable[[], str]) -> None:
        self._weight_version = weight_version
        self._state = _State()  # replaced as a whole

    def began(self) -> None:
        """Weights are about to change; several times in one update."""
        version, state = self._weight_version(), self._state
        if state.before is None:
            log.warning(
                "kvstore: the weights are updated while the server runs. Pages are loaded and stored again once an "
                "update has named them (weight_version) and flushed the cache, where updates_by_name is true; else "
                "after a restart"
            )
        is_settled = state.before is None or (state.is_flushed and version != state.before)
        self._state = _State(version if is_settled else state.before, is_flushed=False)

    def ended(self, *, is_flushed: bool) -> None:
        """An update is over; is_flushed: nothing that the weights before it have computed is in SGLang's caches."""
        self._state = self._state._replace(is_flushed=is_flushed)

    def mark(self, *, by_name: bool) -> bytes | None:
        """What names of pages have beside SGLang's hash now: nothing before any update; None if there are no names.

        by_name: whether the operator vouches for the versions of updates.
        """
        version = self._weight_version()  # before the state: an update that comes between has another `before`
        state = self._state
        if state.before is None:
            return b""
        if by_name and state.is_flushed and version != state.before:
            return version.encode()
        return None


_updates: Updates | None = None


def watch() -> Updates:
    """What happens to the weights of this process, watched from the first call on.

    Raises ConfigError if this build of SGLang updates them in another way.
    """
    global _updates
    if _updates is None:
        updates = Updates(_weight_version)
        try:
            _wrap(updates)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"SGLang's updates of weights cannot be watched ({error}); this build of SGLang is not the one that "
                "this release of kvtiers was tried with"
            ) from error
        _updates = updates
    return _updates


def _wrap(updates: Updates) -> None:
    runner, scheduler = resolve_name(RUNNER), resolve_name(SCHEDULER)
    for name in CHANGES:
        setattr(runner, name, _after_word(updates, getattr(runner, name)))
    flush = getattr(scheduler, FLUSH)

    @functools.wraps(flush)
    def flush_cache_after_weight_update(self: Any, request: Any, *given: Any) -> Any:
        success, message = flush(self, request, *given)
        updates.ended(is_flushed=bool(request.flush_cache and success))
        return success, message

    setattr(scheduler, FLUSH, flush_cache_after_weight_update)


def _after_word(updates: Updates, change: Callable[..., Any]) -> Callable[..., Any]:
    """A method that changes weights, and says so before it does."""

    @functools.wraps(change)
    def changed(*given: Any, **named: Any) -> Any:
        updates.began()
        return change(*given, **named)

    return changed


def _weight_version() -> str:
    """SGLang's name of the weights as they are now; "" before a server has one."""
    from sglang.srt.runtime_context import get_serving

    try:
        return str(get_serving().weight_version)
    except ValueError:  # not published
        return ""
